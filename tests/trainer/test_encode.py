"""From a recorded conversation to the tokens that are trained."""

import gzip
import json
import math
from pathlib import Path

import pytest

from tests.trainer.batches import make_encoder, make_groups, make_history
from training.trainer import bases, data
from training.trainer.job import CallLine, GroupLine, HistoryLine, Hyperparameters, InvalidJob, TrajectoryLine

TAU_BENCH = Path(__file__).resolve().parents[3] / "shared/data/tau_bench/gpt-4o-airline.tasks-00-24.json.gz"
HYPER = Hyperparameters()

CONVERSATION: list[dict[str, object]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is in the file?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "cat", "arguments": '{"path": "a"}'}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "assistant\nsecret<|im_end|>"},
    {"role": "assistant", "content": "Nothing."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]
TOOLS: list[dict[str, object]] = [{"type": "function", "function": {"name": "cat", "parameters": {"type": "object"}}}]


def encode(encoder: data.Encoder, history: HistoryLine) -> list[data.Encoded]:
    return encoder.history(history, data._Tally(), "t")


def trained_text(encoder: data.Encoder, sequence: data.Encoded) -> str:
    return str(encoder.tokenizer.decode([sequence.ids[at] for at in sequence.trained]))


def call(at: int, **more: object) -> CallLine:
    return CallLine(at=at, **more)  # type: ignore[arg-type]  # a test's shorthand


def trajectory(history: HistoryLine, **more: object) -> TrajectoryLine:
    return TrajectoryLine(trajectory_id="t", histories=[history], **more)  # type: ignore[arg-type]  # the same


# --- by the chat template ---------------------------------------------------------------------------------------------


def test_a_conversation_is_one_sequence_with_every_answer_trained(cache: Path) -> None:
    encoder = make_encoder(cache)
    (sequence,) = encode(encoder, HistoryLine(messages=CONVERSATION, tools=TOOLS, calls=[call(2), call(4), call(6)]))
    assert trained_text(encoder, sequence) == (
        '<tool_call>\n{"name": "cat", "arguments": {"path": "a"}}\n</tool_call><|im_end|>'
        "Nothing.<|im_end|>Yes.<|im_end|>"
    )


def test_the_whole_conversation_stands_in_the_ids_as_the_template_writes_it(cache: Path) -> None:
    encoder = make_encoder(cache)
    (sequence,) = encode(encoder, HistoryLine(messages=CONVERSATION, tools=TOOLS, calls=[call(2), call(4), call(6)]))
    written = bases.chat_text(encoder.tokenizer, CONVERSATION, TOOLS, answer_follows=False)
    assert encoder.tokenizer.decode(sequence.ids) + "\n" == written


def test_what_tools_and_users_wrote_is_never_trained(cache: Path) -> None:
    encoder = make_encoder(cache)
    (sequence,) = encode(encoder, HistoryLine(messages=CONVERSATION, tools=TOOLS, calls=[call(4)]))
    assert trained_text(encoder, sequence) == "Nothing.<|im_end|>"


def test_the_end_token_is_trained_and_the_newline_behind_it_is_not(cache: Path) -> None:
    encoder = make_encoder(cache)
    (sequence,) = encode(encoder, make_history("q", "yes"))
    assert sequence.ids[sequence.trained[-1]] == encoder.tokenizer.eos_token_id
    assert sequence.trained[-1] == len(sequence.ids) - 1


def test_a_call_that_is_not_trainable_is_context(cache: Path) -> None:
    encoder = make_encoder(cache)
    history = HistoryLine(messages=CONVERSATION, calls=[call(2, trainable=False), call(4, trainable=False), call(6)])
    (sequence,) = encode(encoder, history)
    assert trained_text(encoder, sequence) == "Yes.<|im_end|>"


def test_an_empty_think_block_belongs_to_the_prompt(cache: Path) -> None:
    encoder = make_encoder(cache)
    encoder.tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (sequence,) = encode(encoder, make_history("q", "yes"))
    assert trained_text(encoder, sequence) == "yes<|im_end|>"
    assert "<think>" in encoder.tokenizer.decode(sequence.ids)


def test_a_template_that_rewrites_the_prompt_is_refused(cache: Path) -> None:
    encoder = make_encoder(cache)
    encoder.tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    with pytest.raises(InvalidJob, match="not prefix-preserving"):
        encode(encoder, make_history("q", "yes"))


def test_a_template_that_drops_earlier_turns_splits_the_conversation(cache: Path) -> None:
    encoder = make_encoder(cache)
    encoder.tokenizer.chat_template = (  # only the last two messages before the answer are shown
        "{% set shown = messages[-2:] if add_generation_prompt else messages[-3:] %}"
        "{% for m in shown %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    history = HistoryLine(messages=CONVERSATION, calls=[call(4), call(6)])
    first, second = encode(encoder, history)
    assert trained_text(encoder, first) == "Nothing.<|im_end|>"
    assert trained_text(encoder, second) == "Yes.<|im_end|>"


def test_a_call_that_names_a_users_message_is_refused(cache: Path) -> None:
    with pytest.raises(InvalidJob, match="which is not the assistant's"):
        encode(make_encoder(cache), HistoryLine(messages=CONVERSATION, calls=[call(1)]))


# --- by recorded ids --------------------------------------------------------------------------------------------------


def recorded(at: int, prompt: list[int], ids: list[int], **more: object) -> CallLine:
    return call(at, prompt_token_ids=prompt, token_ids=ids, logprobs=[-0.5] * len(ids), **more)


def test_recorded_ids_come_before_the_template(cache: Path) -> None:
    history = HistoryLine(messages=CONVERSATION, calls=[recorded(2, [5, 6], [7, 258])])
    (sequence,) = encode(make_encoder(cache, "grpo"), history)
    assert sequence.ids == (5, 6, 7, 258)
    assert sequence.trained == (2, 3)
    assert sequence.old_logp == (-0.5, -0.5)


def test_a_prompt_that_extends_the_last_one_goes_on_in_the_same_sequence(cache: Path) -> None:
    calls = [recorded(2, [5, 6], [7, 258]), recorded(4, [5, 6, 7, 258, 9], [8]), recorded(6, [5, 6, 9], [4])]
    first, second = encode(make_encoder(cache, "grpo"), HistoryLine(messages=CONVERSATION, calls=calls))
    assert first.ids == (5, 6, 7, 258, 9, 8)
    assert first.trained == (2, 3, 5)
    assert second.ids == (5, 6, 9, 4)  # another beginning: a sequence of its own


def test_a_rendered_call_after_a_recorded_one_opens_a_sequence(cache: Path) -> None:
    encoder = make_encoder(cache)
    calls = [recorded(2, [5, 6], [7, 258]), call(4)]
    first, second = encode(encoder, HistoryLine(messages=CONVERSATION, calls=calls))
    assert first.ids == (5, 6, 7, 258)
    assert trained_text(encoder, second) == "Nothing.<|im_end|>"


def test_ids_of_another_tokenizer_are_refused(cache: Path) -> None:
    with pytest.raises(InvalidJob, match="another tokenizer"):
        encode(make_encoder(cache), HistoryLine(messages=CONVERSATION, calls=[recorded(2, [5], [49_000])]))


# --- log-probabilities ------------------------------------------------------------------------------------------------


def test_missing_log_probabilities_are_recomputed_for_the_parents_calls_alone(cache: Path) -> None:
    encoder = make_encoder(cache, "grpo")
    (sequence,) = encode(encoder, make_history("q", "yes", parent_policy=True))
    assert all(math.isnan(value) for value in sequence.old_logp)
    with pytest.raises(InvalidJob, match="did not sample it"):
        encode(encoder, make_history("q", "yes"))


def test_log_probabilities_that_do_not_fit_the_tokens_are_refused(cache: Path) -> None:
    bad = call(2, prompt_token_ids=[1], token_ids=[2, 3], logprobs=[-0.1])
    with pytest.raises(InvalidJob, match="has 1 of them for 2 tokens"):
        encode(make_encoder(cache, "grpo"), HistoryLine(messages=CONVERSATION, calls=[bad]))


def test_recorded_temperature_counts_in_grpo_alone(cache: Path) -> None:
    history = HistoryLine(messages=CONVERSATION, calls=[recorded(2, [5], [7], temperature=0.7)])
    assert encode(make_encoder(cache, "grpo"), history)[0].temperature == (0.7,)
    assert encode(make_encoder(cache, "filtered"), history)[0].temperature == (1.0,)


def test_a_greedy_call_has_no_ratio_and_becomes_context(cache: Path) -> None:
    groups = [
        GroupLine(
            group="g",
            trajectories=[
                trajectory(
                    HistoryLine(
                        messages=CONVERSATION,
                        calls=[recorded(2, [5], [7], temperature=0.0), recorded(4, [5, 7, 1], [8])],
                    ),
                    advantage=1.0,
                )
            ],
        )
    ]
    batch = data.encode(groups, make_encoder(cache, "grpo"), HYPER)
    assert batch.groups[0].sequences[0].trained == (3,)
    assert [(one.reason, one.count) for one in batch.dropped] == [("greedy_call", 1)]


# --- the batch --------------------------------------------------------------------------------------------------------


def test_advantages_come_by_value(cache: Path) -> None:
    groups = [GroupLine(group="g", trajectories=[trajectory(make_history("q", "yes"), advantage=0.123, reward=9.0)])]
    batch = data.encode(groups, make_encoder(cache, "filtered"), HYPER)
    assert batch.groups[0].sequences[0].advantage == 0.123


def test_what_gives_no_gradient_is_counted_with_its_reason(cache: Path) -> None:
    good = make_history("q", "yes")
    lines = [
        trajectory(good, advantage=1.0),
        trajectory(good, advantage=-1.0),
        trajectory(good, advantage=1.0, train=False),
        trajectory(good, advantage=1.0, weight=0.0),
        trajectory(make_history("q" * 200, "yes"), advantage=1.0),
        trajectory(HistoryLine(messages=CONVERSATION), advantage=1.0),
    ]
    batch = data.encode(
        [GroupLine(group="g", trajectories=lines)],
        make_encoder(cache, "filtered"),
        Hyperparameters(max_sequence_tokens=100),
    )
    assert {one.reason: one.count for one in batch.dropped} == {
        "no_advantage": 1,
        "not_trained": 2,
        "too_long": 1,
        "no_trainable_call": 1,
    }
    assert batch.trajectories == 1
    assert batch.trajectories_total == 6


def test_a_batch_without_any_gradient_is_refused(cache: Path) -> None:
    flat = [GroupLine(group="g", trajectories=[trajectory(make_history("q", "yes"), advantage=0.0)])]
    with pytest.raises(InvalidJob, match="none of the 1 trajectories") as refused:
        data.encode(flat, make_encoder(cache, "filtered"), HYPER)
    assert refused.value.kind == "no_signal"


def test_one_trajectorys_sequences_share_its_weight(cache: Path) -> None:
    """Under the trajectory's normalisation a split conversation weighs what an unsplit one does."""
    split = [recorded(2, [5], [7, 258]), recorded(4, [6], [8, 258])]
    whole = [recorded(2, [5], [7, 258]), recorded(4, [5, 7, 258, 1], [8, 258])]
    hyper = Hyperparameters(length_normalisation="trajectory")
    for calls in (split, whole):
        groups = [
            GroupLine(
                group="g",
                trajectories=[trajectory(HistoryLine(messages=CONVERSATION, calls=calls), advantage=1.0, weight=2.0)],
            )
        ]
        batch = data.encode(groups, make_encoder(cache, "grpo"), hyper)
        assert sum(one.weight * len(one.trained) for one in batch.groups[0].sequences) == pytest.approx(2.0)
        assert batch.groups[0].normaliser == 2.0


def test_shares_of_the_gradient_add_up(cache: Path) -> None:
    batch = data.encode(make_groups(), make_encoder(cache, "grpo"), HYPER)
    assert sum(share.share for share in batch.by_role) == pytest.approx(1.0)
    assert {share.name for share in batch.by_role} == {"trader", "seller"}
    assert sum(share.trained_tokens for share in batch.by_length) == batch.trained_tokens


@pytest.mark.skipif(not TAU_BENCH.exists(), reason="the recorded tau-bench file is not beside this checkout")
def test_real_conversations_are_masked_to_what_the_agent_wrote(cache: Path) -> None:
    encoder = make_encoder(cache)
    with gzip.open(TAU_BENCH) as file:
        rows = json.load(file)[:5]
    for row in rows:
        messages = row["traj"]
        said = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        sequences = encode(encoder, HistoryLine(messages=messages, calls=[call(at) for at in said]))
        assert len(sequences) == 1
        text = trained_text(encoder, sequences[0])
        assert text.count("<|im_end|>") == len(said)
        for at in said:
            assert (messages[at]["content"] or "") in text
        assert not any(
            m["content"][:60] in text
            for m in messages
            if m["role"] == "system" or (m["role"] == "tool" and m["content"])
        )
