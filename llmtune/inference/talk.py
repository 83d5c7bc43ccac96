"""`llmtune chat`: the loop in the terminal, its commands, and answers of two models side by side."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtune.contract.errors import DataError, PlanError, did_you_mean, listed
from llmtune.contract.examples import MEDIA_KINDS
from llmtune.data.prompts import with_shown
from llmtune.inference.chat import open_chat
from llmtune.inference.said import THINK, THOUGHT, Channels
from llmtune.inference.tools import OfferedTools, call_text
from llmtune.model.generation import ChatSession, Said

NO_TEMPLATE = "The tokenizer has no chat template, so text is continued as it is; to chat, name one: template=chatml"
SHOWS = {f"/{kind}": kind for kind in MEDIA_KINDS}
COMMANDS = ("/reset", "/clear", "/system", "/save", "/base", *SHOWS, "/help", "/exit")
HELP = """/reset forgets the conversation, /system TEXT sets the system message,
/save FILE adds the conversation to a file as a row to train on,
/base switches the adapter off or on, /exit leaves, /help shows this.
/image FILE goes with what you ask next, as do /video FILE and /audio FILE;
/image alone takes back the pictures that wait.
\""" begins and ends a text of several lines, \\ at the end of a line goes on.
Ctrl-C stops an answer, Ctrl-D leaves."""
TOOLS_HELP = "Where the model calls a tool, type the result, and it goes on from that."
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


@dataclass
class Compared:
    """Conversations that get the same questions, by what their answers are shown under."""

    sessions: Mapping[str, ChatSession]

    def answers(self, text: Said, columns: bool = False) -> str:
        """The answers of all, in columns or one after the other."""
        said = {name: session.ask(text) for name, session in self.sessions.items()}
        if not columns:
            return "".join(f"{name}: {answer}\n" for name, answer in said.items())
        table = Table(expand=True, box=None, pad_edge=False)
        for name in said:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*map(Text, said.values()))
        drawn = io.StringIO()
        Console(file=drawn, highlight=False).print(table)
        return drawn.getvalue()


def compared(conversation: ChatSession, model: str, other: str, keys: Mapping[str, Any]) -> Compared:
    """The conversation and one with `other`: a model, or `base` for the conversation's own, without its adapter.

    Raises PlanError where there is no adapter to switch off, or where tools are offered.
    """
    if conversation.tools is not None:
        raise PlanError("--compare: found beside tools; one model may wait for a result while the other answers")
    if other == "base" and not Path(other).exists():
        if conversation.base is None:
            raise PlanError(f"--compare base: {model} has no adapter to switch off; name a model's folder or hub id")
        beside = replace(conversation, around=conversation.base, base=None, messages=[])
    else:
        beside = open_chat(other, **{key: value for key, value in keys.items() if not key.startswith("peft_config")})
    names = Path(model).name, Path(other).name
    return Compared(dict(zip(names if names[0] != names[1] else (model, other), (conversation, beside), strict=True)))


@dataclass
class _Terminal:
    """What the loop talks with."""

    conversation: ChatSession
    read: Callable[[str], str]
    write: Callable[[str], None]
    guides: bool
    dims: bool
    beside: Compared | None
    files: dict[str, list[str]] = field(default_factory=dict)
    """What the next question shows, by its kind."""

    @property
    def sessions(self) -> list[ChatSession]:
        return [self.conversation] if self.beside is None else list(self.beside.sessions.values())

    def text(self) -> str:
        """The next thing that is said, of one line or several."""
        text = self.read(f"\n{self._asks()}: " if self.guides else "").strip()
        more = "...  " if self.guides else ""
        if text.startswith('"""'):
            text = text.removeprefix('"""')
            while not text.rstrip().endswith('"""'):
                text += "\n" + self.read(more)
            return text.rstrip().removesuffix('"""').strip()
        while text.endswith("\\"):
            text = text[:-1] + "\n" + self.read(more).rstrip()
        return text

    def _asks(self) -> str:
        """Who is to speak now."""
        calls = self.conversation.open_calls
        return f"Result of {calls[0]['function']['name']}" if calls else "You"

    def command(self, text: str) -> str:
        """Does what a command says; what is told of it."""
        word, _, rest = text.partition(" ")
        rest, talk = rest.strip(), self.conversation
        if word in SHOWS:
            return self._show(SHOWS[word], rest)
        if word in ("/reset", "/clear"):
            for each in self.sessions:
                each.clear()
            self.files = {}
            return "The conversation is forgotten."
        if word == "/system":
            for each in self.sessions if rest else ():
                each.config = replace(each.config, default_system=rest)
            told = talk.config.default_system
            return "There is no system message." if told is None else f"The system message is: {told}"
        if word == "/save":
            return self._save(rest)
        if word == "/base":
            if talk.base is None:
                return "There is no adapter to switch off."
            off = talk.around is not talk.base
            talk.around = talk.base if off else nullcontext
            return "The adapter is off: the base answers." if off else "The adapter is on."
        return HELP if word == "/help" else f"{word} is no command.{did_you_mean(word, COMMANDS)}\n{HELP}"

    def _show(self, kind: str, name: str) -> str:
        if not name:
            back = self.files.pop(kind, [])
            return f"Taken back: {listed(back)}." if back else f"/{kind} needs a file: /{kind} FILE"
        file = Path(name).expanduser()
        if ":" not in name[:8] and not file.is_file():
            return f"There is no file {file}."
        self.files.setdefault(kind, []).append(as_named(name))
        return f"{name} goes with what you ask next."

    def _save(self, name: str) -> str:
        if not name:
            return "/save needs a file: /save chats.jsonl"
        if not self.conversation.messages:
            return "Nothing has been said yet."
        row: dict[str, Any] = {"messages": self.conversation.with_system(self.conversation.messages)}
        if self.conversation.tools is not None:
            row["tools"] = self.conversation.tools.tools
        try:
            with Path(name).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            return f"{name} cannot be written: {error.strerror}"
        return f"Added the conversation to {name}."

    def answer(self, text: str) -> None:
        """Writes the answer, or those of both models. What was to be shown waits on where the question is refused."""
        files, self.files = self.files, {}
        try:
            self._answer(with_shown(text, **files))
        except DataError:
            self.files = files
            raise

    def still_shown(self) -> str:
        """Which files wait for the next question, if any."""
        names = [name for named in self.files.values() for name in named]
        back = " and ".join(f"/{kind}" for kind in self.files)
        return f"What you ask next shows {listed(names)}; {back} alone takes that back.\n" if names else ""

    def _answer(self, asked: Said) -> None:
        if self.beside is not None:
            self.write(self.beside.answers(asked, columns=self.guides))
            return
        pieces, tools = self.conversation.stream(asked), self.conversation.tools
        more_results = len(self.conversation.open_calls) > 1
        said = False
        try:
            for piece in self._shown(pieces) if self.dims or tools is not None else pieces:
                said = True
                self.write(piece)
        finally:
            pieces.close()
        calls = [] if more_results else self.conversation.open_calls
        self.write("\n" if said or not (calls or more_results) else "")
        for call in calls:
            self.write(f"Calls {call_text(call)}\n")

    def _shown(self, pieces: Iterator[str]) -> Iterator[str]:
        """The pieces without calls, and with thoughts dimmed in place of the marks around them."""
        begin, end = (DIM, PLAIN) if self.dims else (THINK, THOUGHT)
        tools = self.conversation.tools
        format = tools.format if isinstance(tools, OfferedTools) else None
        channels: Channels | None = None
        thinking = False
        try:
            for text in chain(pieces, [None]):
                channels = channels or Channels(format, thinking=self.conversation.thinking)
                for piece in channels.push(text or "", last=text is None):
                    if thinking != (piece.kind == "thinking"):
                        thinking = not thinking
                        yield begin if thinking else f"{end}\n"
                    yield piece.text
        finally:
            if thinking:
                self.write(end)


def chat_loop(
    conversation: ChatSession,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] | None = None,
    *,
    guides: bool = True,
    dims: bool = False,
    beside: Compared | None = None,
    files: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> None:
    """Talk in the terminal until /exit or Ctrl-D. Ctrl-C stops the answer that is being written.

    `read` takes a prompt and returns a line, `write` takes text; None prints. Unless it `guides`, as where lines come
    from a pipe, answers are all that is written. `dims` shows thoughts dimmed. With `beside` all of its conversations
    answer, of which `conversation` is one. `files` are what the first question shows, by their kind.
    """
    if guides and read is input:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  arrow keys and earlier lines
    talk = _Terminal(conversation, read, write or _print, guides, dims, beside, _named(files))
    if guides:
        notes = [NO_TEMPLATE] * conversation.completes + [HELP] + [TOOLS_HELP] * (conversation.tools is not None)
        talk.write("\n".join([*notes, ""]))
    while True:
        try:
            text = talk.text()
        except EOFError:
            talk.write("\n" if guides else "")
            return
        except KeyboardInterrupt:
            talk.write(f"\n{HELP}\n")
            continue
        if text == "/exit":
            return
        try:
            if text.startswith("/"):
                talk.write(f"{talk.command(text)}\n")
            elif text:
                talk.answer(text)
        except KeyboardInterrupt:
            talk.write(" [stopped]\n")
        except DataError as error:  # no room for an answer, or nothing to go on from
            talk.write(f"{error}\n{talk.still_shown()}")


def say_answer(
    conversation: ChatSession, text: str, beside: Compared | None = None,
    files: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> None:  # fmt: skip
    """Print the answer to one text, or those of both models, and nothing else. `files` are what it shows, by kind."""
    _Terminal(conversation, input, _print, False, False, beside, _named(files)).answer(text)


def as_named(name: str) -> str:
    """A file by its whole path, so that a conversation that is saved finds it; an address as it is."""
    return name if ":" in name[:8] else str(Path(name).expanduser().absolute())


def _named(files: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {kind: [as_named(name) for name in names] for kind, names in files.items() if names}


_print = partial(print, end="", flush=True)
