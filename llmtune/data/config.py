"""The data keys of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from llmtune.contract.errors import DataError
from llmtune.contract.schema import Commas, Ge, Gt, NullIs, decode, split_names
from llmtune.media.config import MediaConfig

TEMPLATE_ARGUMENTS = frozenset({
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize",
    "continue_final_message", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip
"""What `apply_chat_template` takes; no variables of a template."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set, as an entry of `dataset` may spell it out."""

    path: str
    """File, folder, glob, `hub:` id, `llmtune:` name of a set that ships with llmtune, or a name that
    `dataset_info.json` in `dataset_dir` describes."""
    name: str | None = None
    """What reports and metrics call this data set; absent takes the last part of `path`."""
    format: str | dict[str, Any] | None = None
    """Format of this data set, spelt like `data_config`; absent follows `data_config`."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of the format and the names they have in this data set: `{instruction: question, output: answer}`."""
    tags: dict[str, str] = field(default_factory=dict)
    """Keys and roles of the messages where they differ from the format's, by the names that `dataset_info.json` uses:
    `role_tag`, `content_tag`, `user_tag`, `assistant_tag`, `observation_tag`, `function_tag`, `system_tag`."""
    split: str = "train"
    """Split of a hub data set."""
    subset: str | None = None
    """Subset (configuration) of a hub data set."""
    num_samples: Annotated[int, Ge(1)] | None = None
    """Take this many rows: drawn by the seed without repeats where there are more, in whole passes where there are
    fewer. With `streaming` the first ones are taken."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(MediaConfig):
    """What is learnt from: data sets, how they become tokens, and how long a sample may be."""

    dataset: str | dict[str, Any] | tuple[str | dict[str, Any], ...] | None = None
    """Data sets to train on: files, globs, `hub:` ids, `llmtune:` names or names in `dataset_info.json`, as a list or
    separated by commas. An entry may be a mapping with `path`, `name`, `format`, `columns`, `tags`, `split`, `subset`
    and `num_samples`."""
    eval_dataset: str | dict[str, Any] | tuple[str | dict[str, Any], ...] | None = None
    """Data sets to evaluate on, spelt like `dataset`."""
    eval_on_each_dataset: Annotated[bool, NullIs(False)] = False
    """Report the loss of each data set that is evaluated on, besides the loss of all."""
    dataset_dir: str | None = None
    """Folder whose `dataset_info.json` gives names to data sets. Absent looks for that file in the folder that llmtune
    is started in, then in its folder `data`."""
    mix_strategy: Literal["concat", "interleave_under", "interleave_over"] = "concat"
    """How several data sets become an epoch: all of each; drawn in turn until the first is used up; or drawn in turn
    until all are, those used up starting again."""
    interleave_probs: Annotated[tuple[Annotated[float, Gt(0)], ...], Commas()] | None = None
    """How often each data set is drawn from when interleaving, in the order of `dataset`, as a list or separated by
    commas; absent draws from each alike."""
    template: str | None = None
    """Chat template: a `.jinja` file or a name (`chatml`, `llama3`; docs/data.md lists them). Absent takes the
    tokenizer's own."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables passed to the chat template, such as `enable_thinking: false`."""
    enable_thinking: bool | None = None
    """Short for the template variable of this name. A row's own `enable_thinking` wins."""
    tool_format: str | None = None
    """How tools, calls and results are written where the chat template cannot: a name (docs/data.md lists them) or a
    `.jinja` file. Absent leaves them to the template."""
    default_system: str | None = None
    """System message for conversations that have none."""
    split_special_tokens: bool = False
    """Read special tokens that a message's text spells as plain text, so that data cannot end a turn. false reads them
    as the tokens, as `apply_chat_template` does."""
    cutoff_len: Annotated[int, Ge(1)] = 2048
    """Longest sample in tokens."""
    cutoff_policy: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to samples beyond `cutoff_len`. `truncate` keeps as many whole turns as fit, else the beginning of
    the first answer; plain text goes on in the next sample. `drop` leaves them out, `error` stops. Preference pairs are
    never cut: `truncate` drops them. Whatever is lost is reported."""
    max_samples: int | None = None
    """At most this many rows of each data set, the first ones. null or -1 takes all."""
    val_size: Annotated[int | float, Ge(0)] = 0.0
    """Rows kept from training for evaluation: a share below 1, or a number of rows."""
    packing: Annotated[bool, NullIs(False)] = False
    """Lay several samples end to end in one row of `cutoff_len` tokens. null is false, whatever the stage."""
    neat_packing: bool = True
    """Packed samples do not see each other, and none is split. false concatenates all samples and cuts the result into
    rows of exactly `cutoff_len` tokens that see what stands before them, as is usual for pretraining."""
    group_by_length: bool = True
    """Without packing, let rows of similar length meet in a step, so that little is padded. false draws them regardless
    of length."""
    train_on_prompt: bool = False
    """Train on all tokens, not only on the assistant's."""
    mask_history: bool = False
    """Train on the last assistant turn of a conversation only."""
    disable_shuffling: bool = False
    """Take the samples in the order of the files, the same in every epoch."""
    on_bad_record: Literal["error", "skip"] = "error"
    """Whether rows that cannot be used stop the run or are left out, counted, and written to `quarantine.jsonl` in the
    run's folder."""
    max_bad_records: Annotated[int | float, Ge(0)] = 0.001
    """Most rows of a data set that `skip` leaves out before it is an error: a share below 1 (ten rows always pass), or
    a number of rows."""
    streaming: bool = False
    """Read, tokenise and shuffle while training, for data larger than disk or memory. Needs `max_steps`; `val_size` is
    a number of rows, the first ones."""
    buffer_size: Annotated[int, Ge(1)] = 16384
    """Rows that streaming shuffles at a time, as they are read: each rank holds all of them."""
    preprocessing_num_workers: Annotated[int, Ge(1)] | None = None
    """Processes that tokenise; absent takes the processors there are, one for small data. With `streaming` each rank
    has as many; absent shares the processors, at most 8 a rank."""
    preprocessing_batch_size: Annotated[int, Ge(1)] = 1000
    """Rows that a process tokenises at a time."""
    overwrite_cache: bool = False
    """Tokenise again, though the cache holds the result."""
    tokenized_path: str | None = None
    """Folder to keep the tokenised data in, or to take it from if it is there. Absent uses the cache, which is
    `LLMTUNE_CACHE` or `~/.cache/llmtune`."""
    data_shared_file_system: Annotated[bool, NullIs(False)] = False
    """Whether all machines of a run see the same cache, so that one of them tokenises for all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        limit = self.max_samples
        _require(limit is None or limit == -1 or limit >= 1, "max_samples", limit, "1 or more, or -1 or null for all")
        whole = self.val_size < 1 or float(self.val_size).is_integer()
        _require(whole, "val_size", self.val_size, "a share below 1 or a whole number of rows")
        taken = sorted(TEMPLATE_ARGUMENTS & set(self.template_kwargs))
        _require(not taken, "template_kwargs", ", ".join(taken), "variables of the template; llmtune sets these itself")
        both = self.eval_dataset is not None and self.val_size > 0
        _require(not both, "val_size", self.val_size, "0 where eval_dataset is given; choose one of the two")
        both = self.train_on_prompt and self.mask_history
        _require(not both, "mask_history", True, "false where train_on_prompt is true; choose one of the two")
        whole = self.max_bad_records < 1 or float(self.max_bad_records).is_integer()
        _require(whole, "max_bad_records", self.max_bad_records, "a share below 1 or a whole number of rows")
        self._check_mixing()
        for key in ("dataset", "eval_dataset"):
            sources(vars(self)[key], key, ValueError)

    def _check_mixing(self) -> None:
        probabilities, count = self.interleave_probs, len(sources(self.dataset, "dataset", ValueError))
        if probabilities is None:
            return
        _require(
            self.mix_strategy != "concat", "interleave_probs", list(probabilities), "absent with mix_strategy: concat"
        )
        fits = len(probabilities) == count and abs(sum(probabilities) - 1) < 1e-6
        _require(fits, "interleave_probs", list(probabilities), f"{count} numbers that sum to 1, one a data set")

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the chat template is given besides messages, in training and in use."""
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return {**thinking, **self.template_kwargs}

    @property
    def isolates(self) -> bool:
        """Whether several samples share a row without seeing each other."""
        return self.packing and self.neat_packing

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
