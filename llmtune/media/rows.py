"""What the messages of a row show: marks in their texts, parts of their contents, and the row's columns of files become
marks and files that fit each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmtune.contract.examples import (
    MEDIA_KINDS,
    BadRow,
    Conversation,
    Example,
    Media,
    Message,
    Preference,
    Prompt,
    Text,
    UnpairedPreference,
)
from llmtune.media.files import MediaFiles, blamed
from llmtune.media.marks import MARKS, as_parts, check_unmarked, kinds_in, kinds_text

COLUMNS = {"image": ("images", "image"), "video": ("videos", "video"), "audio": ("audios", "audio")}
"""Columns of files, by what they hold."""
NAMES = tuple(name for names in COLUMNS.values() for name in names)
_SIDES = ("chosen", "rejected")
_TEXT_ONLY = "and the model reads text only, or the command asks in text only"


def columns_in(row: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The files that a row's columns name, by their kind. BadRow where two columns name files of one kind."""
    found: dict[str, list[Any]] = {}
    for name in (f"{side}_{name}" for side in _SIDES for name in NAMES):
        if row.get(name) and row[name] != row.get(name.partition("_")[2]):
            what = f"{name} shows what the other answer does not see"
            raise BadRow("media of one answer", f"{what}; both answer the same question, so name its files in images")
    for kind, names in COLUMNS.items():
        filled = [name for name in names if row.get(name)]
        if len(filled) > 1:
            raise BadRow("two columns of media", f"the row has {' and '.join(filled)}, allowed is one of them")
        for name in filled:
            value = row[name]
            found[kind] = list(value) if isinstance(value, list | tuple) else [value]
            if None in found[kind]:
                raise BadRow("bad media", f"{name} holds null, allowed are files; an empty list or null shows nothing")
    return found


def shown(example: Example, columns: Mapping[str, Sequence[Any]], files: MediaFiles | None) -> Example:
    """The example with marks in its messages and the files they stand for.

    A mark is a part of a content (`{type: image, ...}`), which may name its file, or the text `<image>` in a row that
    has a column of such files. Where messages hold neither, the columns' files stand at the beginning of the first
    question, or of a plain text. BadRow where marks and files do not match, or the model reads text only (`files` is
    None).
    """
    if isinstance(example, Text):
        _without_files([example.text], columns, files)
        return _shown_text(example, columns, files) if columns else example
    if not isinstance(example, Conversation | Preference | UnpairedPreference | Prompt):
        if columns:
            raise BadRow(
                "media beside tokens", f"the row holds {_all(columns)} beside tokens, which have places for none"
            )
        return example
    asked = example.prompt if isinstance(example, Preference) else example.messages
    answers = [*example.chosen, *example.rejected] if isinstance(example, Preference) else []
    for number, message in enumerate([*asked, *answers], start=1):
        if not message.get("media"):
            check_unmarked(message["content"], f"message {number} ({message['role']})")
    _without_files([message["content"] for message in [*asked, *answers]], columns, files)
    if not columns and not any(kinds_in(message["content"]) for message in [*asked, *answers]):
        return example
    if files is None:
        kinds = [kind for message in [*asked, *answers] for kind in kinds_in(message["content"])]
        raise BadRow("not only text", f"the row holds {_all(columns) or kinds_text(kinds)}, {_TEXT_ONLY}")
    asked = [_spelt(message, columns) for message in asked]
    for number, message in enumerate([*asked, *(_spelt(each, columns) for each in answers)], start=1):
        if (kinds := kinds_in(message["content"])) and (message["role"] == "assistant" or number > len(asked)):
            why = "models answer in text" if message["role"] == "assistant" else "what a pair shows is in its prompt"
            what = f"message {number} ({message['role']}) shows {kinds_text(kinds)}"
            raise BadRow("media in an answer", f"{what}, allowed is text; {why}")
    asked = _led(asked, columns)
    messages, media = _matched(asked, columns, files)
    if isinstance(example, Preference):
        return replace(example, media=tuple(media), prompt=messages)
    return replace(example, media=tuple(media), messages=messages)


def _shown_text(example: Text, columns: Mapping[str, Sequence[Any]], files: MediaFiles | None) -> Text:
    if files is None:
        raise BadRow("not only text", f"the row holds {_all(columns)}, {_TEXT_ONLY}")
    check_unmarked(example.text, "the text")
    asked = [_spelt({"role": "user", "content": example.text}, columns)]
    ((message,), media) = _matched(_led(asked, columns), columns, files)
    return replace(example, text=message["content"], media=tuple(media))


def with_files(text: str, columns: Mapping[str, Sequence[Any]]) -> str | list[dict[str, Any]]:
    """The content of a message that shows files, by their kind, where marks (`<image>`) stand in a text for them, else
    at its beginning. BadRow where marks and files do not match."""
    if not columns:
        return text
    (message,) = _led([_spelt({"role": "user", "content": text}, columns)], columns)
    marks = kinds_in(message["content"])
    for kind, sources in columns.items():
        _check_counts(kind, marks.count(kind), len(sources))
    waiting = {kind: iter(sources) for kind, sources in columns.items()}
    return [
        part if part["type"] == "text" else {**part, part["type"]: next(waiting[part["type"]])}
        for part in as_parts(message)["content"]
    ]


def _without_files(texts: Sequence[str], columns: Mapping[str, Sequence[Any]], files: MediaFiles | None) -> None:
    """BadRow for marks of pictures in a row that names none, before a model that reads some: it would be blind, or find
    more places than pictures. In a row without any files `<video>` and `<audio>` are what texts on web pages say."""
    for kind in MEDIA_KINDS if columns else ("image",):
        marks = sum(text.count(f"<{kind}>") for text in texts)
        if files is not None and marks and kind not in columns:
            what = f"found {_counted(marks, 'mark')} <{kind}> and no {kind} beside the text"
            fix = f"name its file: in a row with `{COLUMNS[kind][0]}`, in `llmtune chat` with --{kind} or /{kind}"
            raise BadRow("marks and files differ", f"{what}; {fix}")


def _spelt(message: Message, columns: Mapping[str, Any]) -> Message:
    content = message["content"]
    for kind in columns:
        content = content.replace(f"<{kind}>", MARKS[kind])
    if content != message["content"] and any(source is not None for source in message.get("media", ())):
        what = "a message shows files that its parts name, and others by marks in its text"
        raise BadRow("marks beside parts", f"{what}; let parts name all of them, or a column of the row")
    return message if content == message["content"] else {**message, "content": content}


def _led(messages: list[Message], columns: Mapping[str, Sequence[Any]]) -> list[Message]:
    """The messages, the first question led by marks for files of a kind that no mark stands for."""
    there = {kind for message in messages for kind in kinds_in(message["content"])}
    marks = "".join(MARKS[kind] * len(columns[kind]) for kind in MEDIA_KINDS if kind in columns and kind not in there)
    first = next((at for at, message in enumerate(messages) if message["role"] == "user"), None)
    if not marks or first is None:
        return messages
    led = {**messages[first], "content": marks + messages[first]["content"]}
    return [*messages[:first], led, *messages[first + 1 :]]


def _matched(
    messages: Sequence[Message], columns: Mapping[str, Sequence[Any]], files: MediaFiles
) -> tuple[list[Message], list[Media]]:
    """The messages without their own lists of files, and the file of each mark."""
    waiting = {kind: list(sources) for kind, sources in columns.items()}
    bare, media, marks = [], [], dict.fromkeys(columns, 0)
    kinds = [kind for message in messages for kind in kinds_in(message["content"])]
    for message in messages:
        own = iter(message.get("media", ()))
        for kind in kinds_in(message["content"]):
            source = next(own, None)
            if source is None:
                marks[kind] = marks.get(kind, 0) + 1
                source = waiting[kind].pop(0) if waiting.get(kind) else None
            if source is not None:
                with blamed(kinds, len(media)):
                    media.append(files.find(kind, source))
        bare.append({key: value for key, value in message.items() if key != "media"})
    for kind, count in marks.items():
        _check_counts(kind, count, len(columns.get(kind, ())))
    return bare, media


def _check_counts(kind: str, marks: int, files: int) -> None:
    if marks != files:
        what = f"found {_counted(marks, 'mark')} <{kind}> for {_counted(files, kind)}"
        raise BadRow("marks and files differ", f"{what}; each mark needs a file, and each file a mark")


def _counted(count: int, kind: str) -> str:
    name = {"audio": "sound"}.get(kind, kind)
    return f"{count} {name}{'' if count == 1 else 's'}"


def _all(columns: Mapping[str, Sequence[Any]]) -> str:
    return kinds_text([kind for kind, sources in columns.items() for _ in sources])
