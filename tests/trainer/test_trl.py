"""An independent trainer as a witness; runs where TRL is installed (`pip install trl`), it is no dependency."""

from pathlib import Path

import pytest
import torch

from tests.trainer.batches import make_encoder, make_history, make_job
from training.trainer import bases, data, loop, loss


def test_imitation_has_the_loss_of_trl(cache: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    policy, folder = loop.load_policy(make_job(cache, "sft"))
    encoder = make_encoder(cache)
    histories = [make_history(f"question {n}", "yes" * (n + 1)) for n in range(4)]
    sequences = [one for history in histories for one in encoder.history(history, data._Tally(), "t")]
    (micro,) = data.micro_batches(sequences, make_job(cache).hyperparameters)
    with torch.no_grad():
        logp, _ = policy.logp(micro)
    mine = float(loss.likelihood_loss(logp, micro.advantage + 1.0, micro.weight, normaliser=float(len(logp))))

    rows = [
        {"input_ids": list(s.ids), "labels": [i if at in s.trained else -100 for at, i in enumerate(s.ids)]}
        for s in sequences
    ]
    trainer = trl.SFTTrainer(
        model=bases.load_model(folder),
        args=trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], per_device_eval_batch_size=4),
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows),
        processing_class=encoder.tokenizer,
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(mine, rel=1e-4)
