"""What people and programs ask a model becomes prompts, read and written as the rows of its recipe are: messages in
OpenAI's shape, whose contents may show pictures, video and sound."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import DataError
from llmtune.contract.examples import MEDIA_KINDS, BadRow, Conversation, Message
from llmtune.contract.generation import Asked, ShownPrompt
from llmtune.data.config import DataConfig
from llmtune.data.formats.chats import OpenAi
from llmtune.data.render import Renderer
from llmtune.data.tool_format import read_tool_format
from llmtune.media.files import MediaFiles
from llmtune.media.marks import given_text, kinds_in
from llmtune.media.rows import shown, with_files
from llmtune.model.generation import encode

if TYPE_CHECKING:
    from llmtune.media.processor import MediaProcessor

_IN_LINE = re.compile(f"<({'|'.join(MEDIA_KINDS)})>(.+?)</\\1>", re.DOTALL)


def files_of_user(config: DataConfig) -> MediaFiles:
    """Media that a person names, who may read every file: paths count from where the person is."""
    return MediaFiles(folder=Path.cwd(), reach="anywhere", fetches=config.media_from_network)


def in_line(text: str) -> str | list[dict[str, Any]]:
    """The content of a question that names files where it shows them: `<image>FILE</image>What is this?`."""
    pieces = _IN_LINE.split(text)  # text, kind, file, text, kind, file, ..., text
    if len(pieces) == 1:
        return text
    parts: list[dict[str, Any]] = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
    for kind, file, after in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        parts += [{"type": kind, kind: file.strip()}, *([{"type": "text", "text": after}] if after else [])]
    return parts


def with_shown(text: str, **files: Sequence[Any]) -> str | list[dict[str, Any]]:
    """The content of a question that shows files, by their kind (`image=[...]`), where marks `<image>` stand for them,
    else at its beginning. Raises DataError where marks and files do not match."""
    try:
        return with_files(text, {kind: own for kind, own in files.items() if own})
    except BadRow as bad:
        raise DataError(bad.detail) from bad


@dataclass(frozen=True, kw_only=True)
class PromptWriter:
    """Writes conversations with one model up to the answer."""

    name: str
    """What errors call the model."""
    config: DataConfig
    """The recipe's keys of data."""
    base_dir: Path
    """What its paths count from."""
    tokenizer: Any
    media: MediaProcessor | None
    """What reads media, for an engine's `asking` too; None where the model reads text only."""
    files: MediaFiles
    """Which files messages may show."""
    default_system: str | None = None
    """The system message of conversations that have none."""

    @cached_property
    def renderer(self) -> Renderer:
        """What writes a conversation. DataError where the tokenizer cannot tell where tokens stand in a text."""
        data = self.config
        return Renderer(
            self.tokenizer, template_kwargs=data.template_variables, default_system=self.default_system,
            tool_format=read_tool_format(data.tool_format, self.base_dir),
            split_special_tokens=data.split_special_tokens, media=self.media,
        )  # fmt: skip

    def read(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), template_kwargs: Mapping[str, Any] | None = None,
        files: Mapping[str, Sequence[Any]] | None = None,
    ) -> Conversation:  # fmt: skip
        """Messages in OpenAI's shape as a conversation whose media are found.

        A content is text, or a list of parts, some of which show a file: `{type: image, image: FILE}`, `{type:
        image_url, image_url: {url: ...}}`, `{type: input_audio, input_audio: {data: ..., format: wav}}`. `files` are
        others, by their kind (`{"image": [...]}`), for marks `<image>` in the texts, or for the beginning of the first
        question. Raises BadRow where messages cannot be read or files not found, or the model sees no such media.
        """
        row = {"messages": list(messages), "tools": list(tools), "chat_template_kwargs": template_kwargs or {}}
        asked = OpenAi().convert(row)
        kinds = [kind for message in asked.messages for kind in kinds_in(message["content"])]
        kinds += [kind for kind in MEDIA_KINDS for _ in (files or {}).get(kind, ())]
        sees = () if self.media is None else self.media.reads if kinds else MEDIA_KINDS
        if unseen := [kind for kind in kinds if kind not in sees]:
            what = f"{self.name} reads {' and '.join(['text', *sees]) if sees else 'text only'}"
            fix = "; that part needs torchvision, where the model has one" if "video" in unseen and sees else ""
            raise BadRow("media the model cannot read", f"{what}, and {given_text(unseen)}{fix}")
        named = {kind: some for kind, some in (files or {}).items() if some}
        found = shown(asked, named, None if self.media is None else self.files)
        assert isinstance(found, Conversation)
        return found

    def prompt(self, conversation: Conversation) -> Asked:
        """The prompt of a conversation: its tokens, with what it shows where it shows anything. Raises BadRow where it
        cannot be written, or a file is broken."""
        made = self.renderer.prompt(conversation)
        ids = tuple(made.ids.tolist())
        return ids if made.shown is None else ShownPrompt(ids=ids, shown=made.shown)

    def asked(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> Asked:
        """The prompt of messages. Raises DataError, in a sentence, where `read` or `prompt` raise BadRow.

        Texts before a model that reads text only are written by the tokenizer itself, whatever kind that is.
        """
        texts = all(isinstance(message["content"], str) for message in messages)
        if texts and self.media is None and not tools and self.default_system is None:
            return encode(self.tokenizer, list(messages), self.config.template_variables)[0].tolist()
        try:
            return self.prompt(self.read(messages, tools))
        except BadRow as bad:
            raise DataError(bad.detail) from bad
