"""The contract of data formats: what a row of a data set becomes. Plain values; nothing here knows of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

Message: TypeAlias = dict[str, Any]
"""OpenAI's shape: `role` (system, user, assistant, tool) and `content` (text, or a list of parts of type text, image,
image_url, video, video_url, audio, input_audio). Optional: `reasoning_content` (text),
`tool_calls` (list of `{type: function, function: {name, arguments}}`, arguments an object), `name`, `tool_call_id`,
and on assistant messages `weight` (a number >= 0: what each of its tokens counts in the loss; 1 where absent)."""


MEDIA_KINDS = ("image", "video", "audio")


class BadRow(Exception):
    """A row that cannot be used: a short reason to count by, what was found in this one, and the files for which it
    cannot, as long as they stay what they are."""

    def __init__(self, reason: str, detail: str, paths: Sequence[str] = ()) -> None:
        self.reason, self.detail, self.paths = reason, detail, tuple(paths)
        super().__init__(f"{reason}: {detail}")


@dataclass(frozen=True)
class Media:
    """A picture, a video or a sound that a message shows."""

    kind: Literal["image", "video", "audio"]
    path: str | tuple[str, ...]
    """The file; of a video that comes in pictures, their files."""
    content: str = ""
    """A hash of what its files held when the data were tokenised; empty where nobody took it."""

    @property
    def paths(self) -> tuple[str, ...]:
        """All its files."""
        return (self.path,) if isinstance(self.path, str) else self.path


@dataclass(frozen=True)
class ShownText:
    """A rendered text with a place for each medium, and the media."""

    text: str
    media: tuple[Media, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {"text": self.text, "media": [[each.kind, each.path, each.content] for each in self.media]}

    @staticmethod
    def read(held: Mapping[str, Any] | None) -> ShownText:
        """What `as_json` gave; None is a text without media."""
        if held is None:
            return ShownText("")
        return ShownText(
            held["text"],
            tuple(
                Media(kind, path if isinstance(path, str) else tuple(path), content)
                for kind, path, content in held["media"]
            ),
        )


PER_TOKEN = (
    "input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids",
    "cross_attention_mask",
)  # fmt: skip
"""What of a processor's tensors has a number (or several) for each token of a text. Others may have the same shape by
chance, as features of sounds."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages whose assistant turns are learnt."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """OpenAI's shape: `{type: function, function: {name, description, parameters}}`."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables for the chat template, of this row alone (`enable_thinking`); they win over the recipe's."""
    media: Sequence[Media] = ()
    """What the messages show, in the order in which they do. llmtune fills it in; a format leaves it empty."""
    kind: ClassVar[str] = "conversation"


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Two answers to one prompt, the first of which is better."""

    prompt: list[Message]
    """What both have in common; ends with a user or tool message."""
    chosen: list[Message]
    """What follows the prompt: messages that begin and end with the assistant's."""
    rejected: list[Message]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What else a stage may want of the row: `margin`, by how much the first answer is better."""
    media: Sequence[Media] = ()
    """What the messages show, in the order in which they do. llmtune fills it in; a format leaves it empty."""
    kind: ClassVar[str] = "preference"


@dataclass(frozen=True, kw_only=True)
class UnpairedPreference:
    """A conversation whose last answer is wanted, or not (KTO)."""

    messages: list[Message]
    """The last one is the assistant's, and the only one learnt."""
    label: bool
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    media: Sequence[Media] = ()
    """What the messages show, in the order in which they do. llmtune fills it in; a format leaves it empty."""
    kind: ClassVar[str] = "labelled"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A question without an answer, for stages that let the model answer."""

    messages: list[Message]
    """Ends with a user or tool message."""
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, such as a reference answer that a reward is computed from: what JSON can hold."""
    media: Sequence[Media] = ()
    """What the messages show, in the order in which they do. llmtune fills it in; a format leaves it empty."""
    kind: ClassVar[str] = "prompt"


@dataclass(frozen=True, kw_only=True)
class Text:
    """Plain text, of which every token is learnt and the end too."""

    text: str
    media: Sequence[Media] = ()
    """What the text shows, in the order in which it does. llmtune fills it in; a format leaves it empty."""
    kind: ClassVar[str] = "text"


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A row that comes tokenised."""

    input_ids: Sequence[int]
    labels: Sequence[int] | None = None
    """As long as `input_ids`; -100 where a token is not learnt, else the token itself. None learns all."""
    kind: ClassVar[str] = "tokens"


Example: TypeAlias = Conversation | Preference | UnpairedPreference | Prompt | Text | Tokens
"""What a row becomes."""

KINDS = ("conversation", "preference", "labelled", "prompt", "text", "tokens")


class DataFormat(Protocol):
    """One shape of rows: what `build` of a `data_config` plugin returns. Used in several processes at once."""

    kind: str
    """Which of `KINDS` its rows become."""
    columns: Sequence[str]
    """Every column it reads, for `did you mean`."""
    required: Sequence[str]
    """The columns no row can lack."""

    def recognise(self, row: Mapping[str, Any]) -> str | None:
        """What makes a row look like this format, in words (`instruction and output`); None if it does not."""
        ...

    def convert(self, row: Mapping[str, Any]) -> Example:
        """The row, its columns already renamed as the recipe says, as an example. Raises BadRow if it does not fit."""
        ...


@runtime_checkable
class SaysWhatItNeeds(Protocol):
    """Optional on a format that more than one set of columns fits."""

    needs: str
    """What its rows need in words, for messages (`messages of role and content`)."""
