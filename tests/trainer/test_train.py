"""One job from its folder to its adapter."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.batches import BASE, make_encoder, make_groups, make_history, make_job, make_policy, put_job
from training.trainer import bases, checkpoints, data, loop
from training.trainer.__main__ import main
from training.trainer.job import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INVALID,
    CallLine,
    GroupLine,
    HistoryLine,
    InvalidJob,
    Progress,
    Result,
    TrajectoryLine,
    read_progress,
    read_result,
)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "adapter" / "adapter_model.safetensors"))


def same(left: Path, right: Path) -> bool:
    """Bit for bit."""
    one, other = weights_of(left), weights_of(right)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def stop_after(asked: int) -> Callable[[], bool]:
    """A `stop` that says yes from the given question on."""
    questions = iter(range(10_000))
    return lambda: next(questions) >= asked


def steps_of(folder: Path) -> list[Progress]:
    return [line for line in read_progress(folder) if line.loss is not None]


def finish(folder: Path) -> Result:
    assert main(["--job", str(folder)]) == EXIT_DONE
    result = read_result(folder)
    assert result is not None
    return result


def test_a_batch_becomes_an_adapter_that_others_can_load(cache: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = put_job(tmp_path / "job", make_job(cache, epochs=2))
    result = finish(folder)
    assert (result.state, result.job_id, result.fence) == ("succeeded", "job", 3)
    assert (result.steps_planned, result.steps_done) == (6, 6)
    assert result.weight_change > 0
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE
    PeftModel.from_pretrained(bases.load_model(bases.materialise(BASE, cache)), folder / "adapter")


def test_the_answers_with_a_high_advantage_become_likelier(cache: Path, tmp_path: Path) -> None:
    def line(name: str, answer: str, advantage: float) -> TrajectoryLine:
        history = make_history("now?", answer, parent_policy=True)
        return TrajectoryLine(trajectory_id=name, advantage=advantage, histories=[history])

    groups = [GroupLine(group="g", trajectories=[line("a", "yes", 1.0), line("b", "no", -1.0)])]
    folder = put_job(tmp_path / "job", make_job(cache, epochs=4), groups)
    before = steps_of_odds(cache, None)
    finish(folder)
    after = steps_of_odds(cache, folder / "adapter")
    assert after["yes"] > before["yes"]
    assert after["no"] < before["no"]


def steps_of_odds(cache: Path, adapter: Path | None) -> dict[str, float]:
    """Log-probability of each answer to "now?" under an adapter."""
    job = msgspec.structs.replace(make_job(cache), parent_adapter=str(adapter) if adapter else None)
    policy, _ = loop.load_policy(job)
    odds = {}
    for answer in ("yes", "no"):
        (sequence,) = make_encoder(cache).history(make_history("now?", answer), data._Tally(), "t")
        (micro,) = data.micro_batches([sequence], job.hyperparameters)
        with torch.no_grad():
            odds[answer] = float(policy.logp(micro)[0].sum())
    return odds


def test_every_step_logs_what_a_reader_needs(cache: Path, tmp_path: Path) -> None:
    folder = put_job(tmp_path / "job", make_job(cache, epochs=2, kl_beta=0.1))
    finish(folder)
    lines = steps_of(folder)
    assert [line.step for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {line.total_steps for line in lines} == {6}
    for line in lines:
        for name in (
            *("loss", "drift", "ratio_p95", "clipped_share", "kl_behaviour", "kl_base", "entropy", "grad_norm"),
            *("trained_tokens", "tokens_per_second", "reward_mean", "share_without_spread", "eta_seconds"),
        ):
            value = getattr(line, name)
            assert value is not None and math.isfinite(value), name
    assert lines[0].drift == pytest.approx(0.0, abs=1e-5)
    assert lines[-1].drift is not None and lines[-1].drift > 0.0
    assert lines[0].reward_mean == 0.5
    assert [line.phase for line in read_progress(folder)][-2:] == ["saving", "done"]


def test_equal_answers_are_counted_and_computed_once(cache: Path, tmp_path: Path) -> None:
    result = finish(put_job(tmp_path / "job", make_job(cache)))
    assert result.sequences == 24
    assert result.sequences_merged < 24
    assert sum(line.trained_tokens or 0 for line in steps_of(tmp_path / "job")) == result.trained_tokens


def test_an_adapter_goes_on_from_its_parent(cache: Path, tmp_path: Path) -> None:
    parent = put_job(tmp_path / "parent", make_job(cache))
    finish(parent)
    job = msgspec.structs.replace(make_job(cache, learning_rate=1e-12), parent_adapter=str(parent / "adapter"))
    child = put_job(tmp_path / "child", job)
    result = finish(child)
    assert result.weight_change < 1e-6
    for name, weight in weights_of(child).items():
        assert torch.allclose(weight, weights_of(parent)[name], atol=1e-9)


def test_weight_change_is_the_norm_of_the_built_matrices(cache: Path) -> None:
    policy = make_policy(cache)
    parent = policy.copy()
    with torch.no_grad():
        for weight in policy.weights.values():
            weight.add_(0.01 * torch.ones_like(weight))
    total = 0.0
    for name in parent:
        if ".lora_A." in name:
            b = name.replace(".lora_A.", ".lora_B.")
            change = policy.weights[b] @ policy.weights[name] - parent[b] @ parent[name]
            total += float((32 / 4 * change.detach()).pow(2).sum())
    assert loop.weight_change(policy, parent) == pytest.approx(math.sqrt(total), rel=1e-4)


# --- the drift stop ---------------------------------------------------------------------------------------------------


def test_a_drifting_run_ends_with_the_weights_from_before_the_breach(cache: Path, tmp_path: Path) -> None:
    drifting = put_job(tmp_path / "drifting", make_job(cache, epochs=20, learning_rate=3e-3, max_drift=0.2))
    result = finish(drifting)
    assert result.drift_stopped
    assert 0 < result.steps_done < result.steps_planned
    assert f"the weights after step {result.steps_done} are the result" in result.drift_detail
    assert result.final_drift is not None and result.final_drift <= 0.2
    # The same run without the stop has passed through exactly these weights.
    free = put_job(tmp_path / "free", make_job(cache, epochs=20, learning_rate=3e-3))
    assert not (free / "checkpoint").exists()
    with pytest.raises(loop.Stopped):
        loop.run(free, make_job(cache, epochs=20, learning_rate=3e-3), stop=stop_after(result.steps_done))
    kept = checkpoints.load(free)
    assert kept is not None and kept.step == result.steps_done
    for name, weight in weights_of(drifting).items():
        assert torch.equal(weight, kept.adapter[name.replace(".weight", ".default.weight")])


def test_a_first_step_that_breaks_the_limit_is_no_version(cache: Path, tmp_path: Path) -> None:
    folder = put_job(tmp_path / "job", make_job(cache, learning_rate=0.5, warmup_steps=0, max_drift=0.01))
    result = failure(folder, EXIT_INVALID)
    assert "nothing was learned. Lower learning_rate (0.5)" in result.error


def test_data_that_is_far_from_the_parent_at_once_is_refused(cache: Path, tmp_path: Path) -> None:
    groups = []
    for group in make_groups():
        for trajectory in group.trajectories:
            (history,) = trajectory.histories
            call = CallLine(at=1, prompt_token_ids=[1, 2], token_ids=[3, 4], logprobs=[-0.01, -0.01])
            groups.append(
                GroupLine(
                    group=trajectory.trajectory_id,
                    trajectories=[
                        msgspec.structs.replace(
                            trajectory, histories=[HistoryLine(messages=history.messages, calls=[call])]
                        )
                    ],
                )
            )
    folder = put_job(tmp_path / "job", make_job(cache, max_drift=0.2), groups)
    assert main(["--job", str(folder)]) == EXIT_INVALID
    result = read_result(folder)
    assert result is not None and "before the first step" in result.error


# --- other modes ------------------------------------------------------------------------------------------------------


def test_imitation_needs_no_log_probabilities_and_says_it_is_uncorrected(cache: Path, tmp_path: Path) -> None:
    groups = make_groups(parent_policy=False)
    result = finish(put_job(tmp_path / "job", make_job(cache, "sft", epochs=3), groups))
    assert result.uncorrected
    assert result.trajectories_trained == 24
    lines = steps_of(tmp_path / "job")
    assert lines[0].drift is None
    assert lines[0].loss is not None and lines[-1].loss is not None and lines[-1].loss < lines[0].loss


def test_filtered_trains_on_what_is_above_the_mean_alone(cache: Path, tmp_path: Path) -> None:
    result = finish(put_job(tmp_path / "job", make_job(cache, "filtered"), make_groups(parent_policy=False)))
    assert result.uncorrected
    assert result.trajectories_trained == 12
    assert [(one.reason, one.count) for one in result.dropped] == [("no_advantage", 12)]


# --- refusals ---------------------------------------------------------------------------------------------------------


def failure(folder: Path, code: int) -> Result:
    assert main(["--job", str(folder)]) == code
    result = read_result(folder)
    assert result is not None and result.state == "failed"
    assert not (folder / "adapter").exists()
    return result


def test_a_batch_without_spread_is_refused(cache: Path, tmp_path: Path) -> None:
    flat = [
        msgspec.structs.replace(
            group, trajectories=[msgspec.structs.replace(t, advantage=0.0) for t in group.trajectories]
        )
        for group in make_groups()
    ]
    result = failure(put_job(tmp_path / "job", make_job(cache), flat), EXIT_INVALID)
    assert result.error_kind == "no_signal"


def test_grpo_refuses_what_the_parent_did_not_sample(cache: Path, tmp_path: Path) -> None:
    result = failure(put_job(tmp_path / "job", make_job(cache), make_groups(parent_policy=False)), EXIT_INVALID)
    assert result.error_kind == "invalid_data"
    assert "mode filtered or sft" in result.error


def test_a_job_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"job_id": "x", "mode": "dance"}')
    assert failure(tmp_path, EXIT_INVALID).error_kind == "invalid_job"


def test_an_unknown_base_is_refused_with_the_way_out(cache: Path, tmp_path: Path) -> None:
    job = msgspec.structs.replace(make_job(cache), base_model="nosuchbase")
    assert "Use one of tiny" in failure(put_job(tmp_path / "job", job), EXIT_INVALID).error


def test_a_parent_of_another_base_is_refused(cache: Path, tmp_path: Path) -> None:
    parent = put_job(tmp_path / "parent", make_job(cache))
    finish(parent)
    config = parent / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 8'))
    job = msgspec.structs.replace(make_job(cache), parent_adapter=str(parent / "adapter"))
    assert "does not fit base" in failure(put_job(tmp_path / "job", job), EXIT_INVALID).error


def test_a_fault_is_told_apart_from_a_refusal(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError("No space left on device")

    monkeypatch.setattr(loop, "_save_adapter", full)
    result = failure(put_job(tmp_path / "job", make_job(cache)), EXIT_FAILED)
    assert result.error_kind == "fault"
    assert "No space left" in result.error


def test_a_failed_try_leaves_nothing_behind_that_a_new_one_could_be_taken_for(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put_job(tmp_path / "job", make_job(cache))
    (folder / "result.json").write_text('{"job_id": "job", "fence": 3, "state": "failed", "mode": "grpo"}')

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            main(["--job", str(folder)])
    assert read_result(folder) is None
    finish(folder)


def test_a_finished_job_is_not_done_again(cache: Path, tmp_path: Path) -> None:
    folder = put_job(tmp_path / "job", make_job(cache))
    finish(folder)
    written = (folder / "metrics.jsonl").read_bytes()
    finish(folder)
    assert (folder / "metrics.jsonl").read_bytes() == written


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [0, 1, 4])
def test_a_run_that_goes_on_ends_as_one_that_was_never_stopped(cache: Path, tmp_path: Path, asked: int) -> None:
    job = make_job(cache, epochs=2, kl_beta=0.05)
    whole, cut = put_job(tmp_path / "whole", job), put_job(tmp_path / "cut", job)
    finish(whole)
    with pytest.raises(loop.Stopped):
        loop.run(cut, job, stop=stop_after(asked))
    result = finish(cut)
    assert result.resumed_from_step == asked
    assert all(line.loss is not None for line in read_progress(cut) if line.phase == "training" and line.step)
    assert same(whole, cut)
    assert [line.step for line in steps_of(cut)] == [1, 2, 3, 4, 5, 6]
    assert [line.loss for line in steps_of(cut)] == [line.loss for line in steps_of(whole)]


def test_another_attempt_goes_on_from_the_folder_it_is_shown(cache: Path, tmp_path: Path) -> None:
    job = make_job(cache, epochs=2)
    whole, first = put_job(tmp_path / "whole", job), put_job(tmp_path / "first", job)
    finish(whole)
    with pytest.raises(loop.Stopped):
        loop.run(first, job, stop=stop_after(3))
    second = put_job(tmp_path / "second", msgspec.structs.replace(job, fence=4, resume_from=str(first)))
    result = finish(second)
    assert (result.fence, result.resumed_from_step) == (4, 3)
    assert same(whole, second)


def test_a_checkpoint_of_other_data_is_refused(cache: Path, tmp_path: Path) -> None:
    job = make_job(cache, epochs=2)
    first = put_job(tmp_path / "first", job)
    with pytest.raises(loop.Stopped):
        loop.run(first, job, stop=stop_after(3))
    other = msgspec.structs.replace(job, resume_from=str(first))
    with pytest.raises(InvalidJob, match="other data, settings or base"):
        loop.run(put_job(tmp_path / "second", other, make_groups(seed=9)), other)


def test_a_kill_between_the_two_renames_leaves_the_older_checkpoint(cache: Path, tmp_path: Path) -> None:
    job = make_job(cache, epochs=2, checkpoint_every=1)
    folder = put_job(tmp_path / "job", job)
    with pytest.raises(loop.Stopped):
        loop.run(folder, job, stop=stop_after(2))
    (folder / "checkpoint").rename(folder / "checkpoint.old")
    kept = checkpoints.load(folder)
    assert kept is not None and kept.step == 2
    assert finish(folder).resumed_from_step == 2


def test_the_checkpoint_is_gone_once_the_result_stands(cache: Path, tmp_path: Path) -> None:
    folder = put_job(tmp_path / "job", make_job(cache, checkpoint_every=1))
    finish(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter",
        "groups.jsonl",
        "job.json",
        "metrics.jsonl",
        "result.json",
    ]
