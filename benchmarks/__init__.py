"""What it costs: each benchmark prints ratios against a floor measured in the same run on the same machine."""
