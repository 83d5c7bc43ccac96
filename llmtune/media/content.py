"""What files of media hold, as a hash: by it a medium is known wherever it lies, and as it was when rows were read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from llmtune.contract.errors import DataError
from llmtune.contract.examples import BadRow, Media, ShownText
from llmtune.media.files import blamed, is_kept


def with_contents(shown: ShownText) -> ShownText:
    """The text, whose media know what their files hold. BadRow where one cannot be read."""
    try:
        media = tuple(replace(each, content=content_of(each)) for each in shown.media)
    except OSError as error:
        said = f"{error.filename} cannot be read ({error.strerror})"
        raise BadRow("missing media", said, [str(error.filename)]) from None
    return ShownText(shown.text, media)


def content_of(medium: Media) -> str:
    """A hash of the bytes of a medium's files. Raises OSError."""
    digest = hashlib.sha256()
    for path in medium.paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def opened_each(media: Sequence[Media], opened: Callable[[Media], Any]) -> list[Any]:
    """What a row shows, each medium as it is `opened`. DataError where one does not hold what it did when the data were
    tokenised; a BadRow says which of them is meant."""
    kinds, found = [medium.kind for medium in media], []
    for at, medium in enumerate(media):
        _require_content(medium)
        with blamed(kinds, at, medium.paths):
            found.append(opened(medium))
    return found


def _require_content(medium: Media) -> None:
    # Hashing a file takes a hundredth of the time in which a processor makes tensors of it.
    if not medium.content:
        return
    try:
        if content_of(medium) == medium.content:
            return
        what = f"{medium.paths[0]} has changed since the data were tokenised"
    except OSError as error:
        what = f"{error.filename} is no longer there or cannot be read ({error.strerror})"
        if is_kept(str(error.filename)):
            what += ", where the content of a row was kept"
            raise DataError(f"media: {what}; set overwrite_cache: true, to keep it anew") from None
    raise DataError(f"media: {what}; put back what it was, or set overwrite_cache: true")
