"""Base models: the one made in code is the same everywhere, and templates keep what they wrote."""

from pathlib import Path

import pytest
import torch

from tests.trainer.batches import BASE
from tests.trainer.test_encode import CONVERSATION, TOOLS
from training.trainer import bases


def test_the_tiny_base_comes_out_the_same_each_time(cache: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)  # whoever draws before
    again = bases.materialise(BASE, tmp_path)
    made = bases.materialise(BASE, cache)
    assert bases.fingerprint(again) == bases.fingerprint(made)


def test_making_it_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    bases.materialise(BASE, tmp_path)
    assert torch.equal(torch.rand(1), expected)


def test_a_base_that_was_half_made_is_made_again(tmp_path: Path) -> None:
    half = tmp_path / f"{BASE}-r{bases.RECIPE}.part"
    half.mkdir()
    (half / "config.json").write_text("{")
    bases.load_model(bases.materialise(BASE, tmp_path))
    assert not half.exists()


@pytest.mark.parametrize("text", ["plain", "Ümläute, 漢字, 🙂", "tab\tnew\n\nline", "<|im_start|>user\nx<|im_end|>"])
def test_the_tiny_tokenizer_loses_nothing(cache: Path, text: str) -> None:
    tokenizer = bases.load_tokenizer(bases.materialise(BASE, cache))
    assert tokenizer.decode(bases.token_ids(tokenizer, text)) == text


@pytest.mark.parametrize("template", [bases.TINY_TEMPLATE, bases.CHATML_WITH_TOOLS])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_the_templates_keep_what_they_wrote(cache: Path, template: str, tools: list[dict[str, object]] | None) -> None:
    tokenizer = bases.load_tokenizer(bases.materialise(BASE, cache))
    tokenizer.chat_template = template
    written = ""
    for at, message in enumerate(CONVERSATION):
        if message["role"] == "assistant":
            before = bases.chat_text(tokenizer, CONVERSATION[:at], tools, answer_follows=True)
            after = bases.chat_text(tokenizer, CONVERSATION[: at + 1], tools, answer_follows=False)
            assert before.startswith(written)
            assert after.startswith(before)
            written = after
    assert '{"name": "cat", "arguments": {"path": "a"}}' in written


def test_a_message_in_parts_is_its_texts(cache: Path) -> None:
    tokenizer = bases.load_tokenizer(bases.materialise(BASE, cache))
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    text = bases.chat_text(tokenizer, [{"role": "user", "content": parts}], None, answer_follows=False)
    assert text == "<|im_start|>user\none two<|im_end|>\n"


def test_a_hub_id_is_not_fetched_when_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(bases.UnknownBase, match="HF_HUB_OFFLINE"):
        bases.materialise("nobody/nothing-at-all", tmp_path)


@pytest.mark.slow
def test_smollm2_is_converted_and_answers(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    folder = bases.materialise("smollm2", tmp_path)
    tokenizer, model = bases.load_tokenizer(folder), bases.load_model(folder)
    asked = bases.chat_text(
        tokenizer, [{"role": "user", "content": "What is the capital of France?"}], None, answer_follows=True
    )
    ids = torch.tensor([bases.token_ids(tokenizer, asked)])
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids.shape[1] :])
