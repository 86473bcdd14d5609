"""How the demo learns, for each base. The numbers were measured; docs/demo.md has the tables."""

from training.demo import Recipe

# Small passes stay in a core's cache: a quarter faster than one of 16,384 tokens.
SMALL: dict[str, object] = {"max_tokens_per_batch": 2048, "share_prefix_tokens": 400}
SMALLER: dict[str, object] = {"max_tokens_per_batch": 1024, "share_prefix_tokens": 500}

RECIPES: dict[str, Recipe] = {
    "tiny": Recipe(
        base_model="tiny",
        warm={
            "epochs": 3,
            "learning_rate": 3e-3,
            "lora_rank": 16,
            "lora_alpha": 32,
            "trajectories_per_step": 64,
            **SMALL,
        },
        # PPO's clip, not CISPO's: with 2,000 frozen runs of a model this small CISPO drifts and does not learn.
        grpo={
            "loss": "ppo",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "epochs": 4,
            "learning_rate": 1e-3,
            "trajectories_per_step": 256,
            "max_drift": 0.2,
            **SMALL,
        },
        ceiling={"epochs": 6, "learning_rate": 3e-3, "trajectories_per_step": 64, **SMALL},
    ),
    "smollm2": Recipe(
        base_model="smollm2",
        groups=48,
        warm_groups=24,
        versions=3,
        evaluation_scenarios=16,
        evaluation_attempts=2,
        warm={"epochs": 1, "learning_rate": 2e-4, "trajectories_per_step": 16, **SMALLER},
        grpo={
            "loss": "ppo",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "epochs": 2,
            "learning_rate": 1e-4,
            "trajectories_per_step": 128,
            "max_drift": 0.2,
            **SMALLER,
        },
        ceiling={"epochs": 1, "learning_rate": 1e-4, "trajectories_per_step": 32, **SMALLER},
    ),
}
