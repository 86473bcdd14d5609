from tests.trainer.batches import cache, one_thread

__all__ = ["cache", "one_thread"]
