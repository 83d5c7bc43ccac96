"""A tokenizer as a GGUF file holds it: words, merges, what splits texts, special tokens and the chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import TokenType
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from llmtune.contract.errors import PlanError
from llmtune.model.gguf import read_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

SPLITS = {split: name for name, split in reversed(GGUF_PRE_TOKENIZER_SPLITS.items())} | {
    GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]: "llama-bpe"
}
"""The name in a GGUF file of each expression that splits texts into words."""
PROBES = (
    "Hello, world! It's 12345.67 o'clock;  two  spaces,\n\nlines\tand tabs. don't WE'LL",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 caf\u00e9 na\u00efve \U0001f642 \u0434\u0430 def f(x):\n    return x**2",
)
"""Texts that a tokenizer read from the file has to split as the model's own does."""


def write_vocabulary(writer: GGUFWriter, tokenizer: Any, rows: int, turn_ends: Sequence[int]) -> None:
    """Write the tokenizer with as many words as the model has rows. Raises PlanError where a file cannot hold it."""
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    model = told["model"]
    if model["type"] != "BPE":
        raise PlanError(
            f"export_format: gguf is written for tokenizers of the kind BPE, and this one is {model['type']}; export "
            "safetensors and use the converter of llama.cpp"
        )
    pieces = bool(model.get("byte_fallback"))
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(_adds_space(told))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(told))
    words = {index: word for word, index in tokenizer.get_vocab().items()}
    tokens = [words.get(index, f"[PAD{index}]") for index in range(rows)]
    writer.add_token_list(tokens)
    writer.add_token_types([_type(tokenizer, index, word, index in words, pieces) for index, word in enumerate(tokens)])
    if pieces:
        writer.add_token_scores(_scores(tokens, merges))
    writer.add_token_merges(merges)
    _write_special(writer, tokenizer, turn_ends)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)


def check_vocabulary(file: Path, tokenizer: Any) -> None:
    """PlanError where the tokenizer that is read from the file splits texts in another way."""
    read = read_tokenizer(file)
    special = "".join(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    for text in (*PROBES, f"a{special}b"):
        if (ours := tokenizer(text).input_ids) != read(text).input_ids:
            raise PlanError(
                f"export_format: the tokenizer comes out of a gguf file as another one (of {text!r:.40} it makes "
                f"{read(text).input_ids[:8]}... and not {ours[:8]}...); export safetensors"
            )


def _split_name(told: dict[str, Any]) -> str:
    """What the file calls the way in which texts are split before merges. Raises PlanError for one without a name."""
    before = told.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and (name := SPLITS.get(steps[0]["pattern"].get("Regex"))):
        return name
    raise PlanError(
        f"export_format: gguf has no name for the way in which this tokenizer splits texts ({kinds}); export "
        "safetensors and use the converter of llama.cpp"
    )


def _adds_space(told: dict[str, Any]) -> bool:
    """Whether a text is taken as one that begins with a space."""
    before, normal = told.get("pre_tokenizer") or {}, json.dumps(told.get("normalizer"))
    return '"Prepend"' in normal or before.get("prepend_scheme", "never") != "never"


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Of two words that could be made next, the one with the higher score is: that of the earlier merge."""
    first: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        first.setdefault(merge.replace(" ", ""), -float(rank))
    return [first.get(token, -1e6) for token in tokens]


def _type(tokenizer: Any, index: int, word: str, used: bool, pieces: bool) -> int:
    added = tokenizer.added_tokens_decoder.get(index)
    if not used:
        return TokenType.UNUSED
    if added is not None:
        unknown = pieces and word == tokenizer.unk_token
        return TokenType.UNKNOWN if unknown else TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    return TokenType.BYTE if pieces and re.fullmatch(r"<0x[0-9A-F]{2}>", word) else TokenType.NORMAL


def _write_special(writer: GGUFWriter, tokenizer: Any, turn_ends: Sequence[int]) -> None:
    """The tokens with a meaning, and whether texts begin with one. What ends a turn of the chat ends an answer."""
    for name in ("bos", "eos", "pad", "unk"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    for index in turn_ends[:1]:
        writer.add_eot_token_id(index)
    writer.add_add_bos_token(tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id])
