"""What an answer is worth (`reward_config`): by a Python function, a rule, a reward model, or a server."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from llmtune import Ge, Gt, Plugin, hookimpl


@dataclass(frozen=True, kw_only=True)
class RewardKeys:
    """What every reward can be told."""

    label: str | None = None
    """What metrics call the reward, `rewards/LABEL`; null is the name of its plugin."""


@dataclass(frozen=True, kw_only=True)
class FunctionConfig(RewardKeys):
    """Keys of `reward_config: {name: function}`."""

    function: str
    """`module:function` of a package that is installed. It gets the lists that its parameters name (`completions`,
    `prompts`, `completion_ids`, `prompt_ids`, `cut`, and columns of the rows), and returns a number for each answer."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments, the same in every call."""


@dataclass(frozen=True, kw_only=True)
class RuleConfig(RewardKeys):
    """Keys of `reward_config: {name: rule}`."""

    match: Literal["exact", "number", "choice", "regex", "length"] = "exact"
    """What is right. `exact`: the answer is the column's text. `number`: the last number of the answer is that of the
    column. `choice`: the last of `choices` that the answer names is that of the column. `regex`: `answer_pattern` is
    found in the answer, whatever the columns. `length`: the answer has `min_tokens` to `max_tokens`."""
    column: str = "answer"
    """The column of the row with the right answer; where it holds a list, each entry is right."""
    answer_pattern: str | None = None
    """A regular expression, `.` matching line ends too: only what its first group, or all of it, matches in the answer
    is compared; the last place where it does. An answer without a match is wrong. null compares all of the answer."""
    column_pattern: str | None = None
    """The same for the column; of GSM8K, whose solutions end in `#### 42`, it is `'####(.*)'`."""
    tolerance: Annotated[float, Ge(0)] = 0.0
    """How far a `number` may be from the right one, as a share of that one."""
    choices: tuple[str, ...] = ("A", "B", "C", "D")
    """The words or letters that `choice` looks for."""
    ignore_case: bool = False
    """Whether `exact`, `choice` and the patterns take capital letters for small ones."""
    ignore_space: bool = True
    """Whether `exact` takes any white space for one space, and none for that at the ends."""
    min_tokens: Annotated[int, Ge(0)] = 0
    """Fewest tokens of an answer that is right by its `length`, the one that ends it included."""
    max_tokens: Annotated[int, Ge(1)] | None = None
    """Most of them; null sets no limit."""
    right_score: float = 1.0
    """What a right answer is worth."""
    wrong_score: float = 0.0
    """What any other answer is worth."""

    def __post_init__(self) -> None:
        for key in ("answer_pattern", "column_pattern"):
            try:
                re.compile(getattr(self, key) or "")
            except re.error as error:
                raise ValueError(f"{key}: found {getattr(self, key)!r}, no regular expression: {error}") from None
        if self.match == "regex" and self.answer_pattern is None:
            raise ValueError("answer_pattern: match regex looks for it in the answer; set it")
        if self.match == "length" and self.max_tokens is None and not self.min_tokens:
            raise ValueError("max_tokens: match length calls every answer right without one; set it, or min_tokens")
        if self.match == "length" and self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(
                f"max_tokens: found {self.max_tokens}, allowed is min_tokens ({self.min_tokens}) or more, or null"
            )


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(RewardKeys):
    """Keys of `reward_config: {name: model}`."""

    reward_model: str
    """A run of stage `rm`, a folder or hub id of a sequence classifier with one output, or an adapter of one. With
    `reward_model_adapters` their base."""
    reward_model_type: Literal["lora", "full"] | None = None
    """Whether `reward_model` is an adapter (`lora`), on the base that it names or else the trained model's, or whole
    (`full`). null looks into the folder; a hub id is then whole."""
    reward_model_adapters: str | tuple[str, ...] | None = None
    """Adapters on `reward_model`, in PEFT's format, of which the last has the head."""
    reward_model_quantization_bit: Literal[4, 8] | None = None
    """Bits per weight of the reward model; null does not quantise it, unless its run did."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Answers that a rank reads at a time."""


@dataclass(frozen=True, kw_only=True)
class EndpointConfig(RewardKeys):
    """Keys of `reward_config: {name: endpoint}`."""

    url: str
    """Where answers are posted, such as `http://localhost:8000/v1/score/evaluation`."""
    model: str = "model"
    """The name of the model that the server is asked for."""
    columns: tuple[str, ...] = ()
    """Columns of the rows to send along."""
    api_key: str | None = None
    """Sent as `Authorization: Bearer ...`, and written down nowhere; take it from the environment with
    `${oc.env:NAME}`."""
    headers: dict[str, str] = field(default_factory=dict)
    """Further HTTP headers."""
    batch_size: Annotated[int, Ge(1)] = 32
    """Most answers of a request."""
    timeout: Annotated[float, Gt(0)] = 60.0
    """Seconds to wait for the server to say something."""
    retries: Annotated[int, Ge(0)] = 4
    """How often a request is sent again where the server cannot be reached, or fails (HTTP 5xx, 408, 429)."""
    backoff: Annotated[float, Ge(0)] = 1.0
    """Seconds before the first retry; each further one waits twice as long."""

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/]", self.url):
            raise ValueError(f"url: found {self.url!r}, allowed is an address that begins with http:// or https://")


def build_function(config: FunctionConfig) -> Any:
    """The reward that a Python function gives."""
    from .function import FunctionReward

    return FunctionReward(config)


def build_rule(config: RuleConfig) -> Any:
    """The reward of answers that a rule calls right."""
    from .rule import RuleReward

    return RuleReward(config)


def build_model(config: RewardModelConfig) -> Any:
    """The reward that a sequence classifier gives."""
    from .model import ModelReward

    return ModelReward(config)


def build_endpoint(config: EndpointConfig) -> Any:
    """The reward that a server gives."""
    from .endpoint import EndpointReward

    return EndpointReward(config)


@hookimpl
def reward_config() -> list[Plugin]:
    """`function`, `rule`, `model` and `endpoint`."""
    return [
        Plugin(name="function", config=FunctionConfig, build=build_function, summary="A Python function"),
        Plugin(name="rule", config=RuleConfig, build=build_rule, summary="Right or wrong by a rule"),
        Plugin(name="model", config=RewardModelConfig, build=build_model, summary="A reward model"),
        Plugin(name="endpoint", config=EndpointConfig, build=build_endpoint, summary="A server asked over HTTP"),
    ]
