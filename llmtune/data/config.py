"""The data keys of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from llmtune.errors import DataError
from llmtune.schema import Ge, decode, split_names

_TEMPLATE_ARGUMENTS = frozenset({
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize",
    "continue_final_message", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set, as an entry of `dataset` may spell it out."""

    path: str
    """File, folder, glob, `hub:` id, or `llmtune:` name of a set that ships with llmtune."""
    format: str | None = None
    """Format of this data set; absent follows `data_format`."""
    split: str = "train"
    """Split of a hub data set."""
    subset: str | None = None
    """Subset (configuration) of a hub data set."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learnt from: data sets, how they become tokens, and how long a sample may be."""

    dataset: str | dict[str, Any] | tuple[str | dict[str, Any], ...] | None = None
    """Data sets to train on: files, globs, `hub:` ids or `llmtune:` names, as a list or separated by commas. An entry
    may be a mapping with `path`, `format`, `split` and `subset`."""
    eval_dataset: str | dict[str, Any] | tuple[str | dict[str, Any], ...] | None = None
    """Data sets to evaluate on, spelt like `dataset`."""
    data_format: Literal["auto", "alpaca", "sharegpt", "openai"] = "auto"
    """Format of the rows. `auto` looks at the first rows of each data set and reports what it found."""
    template: str | None = None
    """Chat template: a `.jinja` file or a name (`chatml`, `alpaca`). Absent takes the tokenizer's own."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables passed to the chat template, such as `enable_thinking: false`."""
    default_system: str | None = None
    """System message for conversations that have none."""
    cutoff_len: Annotated[int, Ge(1)] = 2048
    """Longest sample in tokens. What goes beyond is cut off at the end, and reported."""
    max_samples: int | None = None
    """At most this many rows of each data set, the first ones. null or -1 takes all."""
    val_size: Annotated[int | float, Ge(0)] = 0.0
    """Rows kept from training for evaluation: a share below 1, or a number of rows."""
    packing: bool = False
    """Lay several samples end to end in one row of `cutoff_len` tokens. Samples do not see each other."""
    train_on_prompt: bool = False
    """Train on all tokens, not only on the assistant's."""
    mask_history: bool = False
    """Train on the last assistant turn of a conversation only."""
    disable_shuffling: bool = False
    """Take the samples in the order of the files, the same in every epoch."""
    on_bad_record: Literal["error", "skip"] = "error"
    """Whether rows that cannot be used stop the run or are left out and counted."""

    def __post_init__(self) -> None:
        limit = self.max_samples
        _require(limit is None or limit == -1 or limit >= 1, "max_samples", limit, "1 or more, or -1 or null for all")
        whole = self.val_size < 1 or float(self.val_size).is_integer()
        _require(whole, "val_size", self.val_size, "a share below 1 or a whole number of rows")
        taken = sorted(_TEMPLATE_ARGUMENTS & set(self.template_kwargs))
        _require(not taken, "template_kwargs", ", ".join(taken), "variables of the template; llmtune sets these itself")
        both = self.eval_dataset is not None and self.val_size > 0
        _require(not both, "val_size", self.val_size, "0 where eval_dataset is given; choose one of the two")
        both = self.train_on_prompt and self.mask_history
        _require(not both, "mask_history", True, "false where train_on_prompt is true; choose one of the two")
        for key in ("dataset", "eval_dataset"):
            sources(getattr(self, key), key, ValueError)

    @property
    def row_limit(self) -> int | None:
        """`max_samples` with -1 read as no limit."""
        return None if self.max_samples in (None, -1) else self.max_samples


def sources(
    entries: str | Mapping[str, Any] | tuple[str | Mapping[str, Any], ...] | None,
    key: str = "dataset",
    error: type[Exception] = DataError,
) -> tuple[Source, ...]:
    """The data sets that `dataset` or `eval_dataset` names; `error` if an entry cannot be understood."""
    if entries is None:
        return ()
    if isinstance(entries, str):
        entries = split_names(entries)
    elif isinstance(entries, Mapping):
        entries = (entries,)
    found = []
    for number, entry in enumerate(entries):
        source, problems = decode(Source, {"path": entry} if isinstance(entry, str) else entry, f"{key}[{number}]")
        if problems:
            raise error("; ".join(f"{problem.key}: {problem.message}" for problem in problems))
        found.append(source)
    return tuple(found)


def _require(holds: bool, key: str, got: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{key}: found {got}, allowed is {allowed}")
