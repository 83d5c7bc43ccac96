"""Which file a row means. Nothing is opened here, and nothing outside of the data's own folder is looked at."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from llmtune.contract.errors import DataError
from llmtune.contract.examples import BadRow, Media
from llmtune.folders import cache_root, flush
from llmtune.media.fetching import content_at


@dataclass(frozen=True, kw_only=True)
class MediaFiles:
    """Where media are that rows or messages name."""

    folder: Path
    """What relative paths count from, of a data set its `media_dir`."""
    reach: Literal["folder", "anywhere", "nowhere"] = "folder"
    """Where paths may lead: not out of the folder, through links neither; `anywhere`, as where a person names them; or
    `nowhere`, as where a stranger asks."""
    fetches: bool = False
    """Whether `https` and `http` addresses are fetched."""

    def find(self, kind: str, source: Any) -> Media:
        """The file that `source` means: a path, an address, a data URL, bytes, or the mapping that data sets of the hub
        hold; of a video also a list of pictures. BadRow where there is none."""
        if kind == "video" and isinstance(source, list | tuple):
            if not source:
                raise BadRow("missing media", "a video is an empty list, allowed are the files of its pictures")
            return Media("video", tuple(self._file("image", each) for each in source))
        return Media(cast(Literal["image", "video", "audio"], kind), self._file(kind, source))

    def _file(self, kind: str, source: Any) -> str:
        if isinstance(source, Mapping):
            source = next((source[key] for key in ("bytes", "path", "url", "data") if source.get(key)), None)
        source = str(source) if isinstance(source, Path) else _saved(source)
        if isinstance(source, bytes):
            return _kept(source)
        if not isinstance(source, str) or not source:
            what = "a path, an address, a data URL, or bytes"
            found = "empty" if source == "" else type(source).__name__
            raise BadRow("bad media", f"{_with_article(kind)} is {found}, allowed is {what}")
        scheme = source.partition(":")[0].lower() if ":" in source[:8] else ""
        if scheme == "data":
            return _kept(_decoded(source, kind))
        if scheme in ("http", "https"):
            return self._fetched(source)
        return self._inside(urllib.parse.unquote(source.partition("://")[2]) if scheme == "file" else source)

    def _inside(self, path: str) -> str:
        if self.reach == "nowhere":
            allowed = f"a data URL{' or an address' if self.fetches else ''}"
            raise BadRow("media by path", f"{path[:80]!r} is a path, allowed is {allowed}")
        folder = self.folder.resolve()
        try:
            found = (folder / Path(path).expanduser()).resolve()
            there = found.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long, as base64 is; a zero byte; the home of nobody
            said = error.strerror if isinstance(error, OSError) else error
            what = f"{path[:40]!r} cannot be the begin of a path ({said})"
            raise BadRow("bad media", f"{what}; content in base64 is written as data:TYPE;base64,CONTENT") from None
        if self.reach == "folder" and not found.is_relative_to(folder):
            what = f"{path} is {found}, outside of {folder}"
            raise BadRow("media outside of media_dir", f"{what}; name a folder that holds all files with media_dir")
        if not there:
            counts = f"paths count from {'media_dir, which is ' if self.reach == 'folder' else ''}{folder}"
            raise BadRow("missing media", f"there is no file {found}; {counts}", [str(found)])
        return str(found)

    def _fetched(self, address: str) -> str:
        if not self.fetches:
            raise BadRow(
                "media on the network", f"{address[:80]} is an address; set media_from_network: true to fetch it"
            )
        place = _place(hashlib.sha256(address.encode()).hexdigest())
        if not place.exists():
            fetched = _beside(place, content_at(address))
            flush(fetched)
            fetched.replace(place)
        return str(place)


def _saved(source: Any) -> Any:
    """The bytes of a picture of Pillow, turned as its EXIF data say; anything else as it is."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        return source
    if not isinstance(source, Image.Image):
        return source
    if source.mode[0] in "IF":
        raise BadRow("bad media", f"an image has more than 8 bits for each colour ({source.mode}); convert it first")
    content = io.BytesIO()
    ImageOps.exif_transpose(source).convert("RGB").save(content, "PNG")
    return content.getvalue()


def _with_article(kind: str) -> str:
    return f"a{'n' if kind[0] in 'aeiou' else ''} {kind}"


def _decoded(url: str, kind: str) -> bytes:
    head, comma, content = url.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError
        return base64.b64decode(content, validate=True)
    except (ValueError, binascii.Error):
        what = f"{_with_article(kind)} is {url[:40]!r}..., allowed is data:TYPE;base64,CONTENT"
        raise BadRow("bad data URL", what) from None


def _place(name: str) -> Path:
    return _kept_in() / name[:2] / name


def _kept_in() -> Path:
    return cache_root() / "media"


def is_kept(path: str) -> bool:
    """Whether a file is one that the cache keeps of what a row held itself, or was fetched for it."""
    return Path(path).is_relative_to(_kept_in())


@contextmanager
def blamed(kinds: Sequence[str], at: int, paths: Sequence[str] = ()) -> Iterator[None]:
    """Say in a BadRow which of the media of these kinds is meant, where there are several of its kind: `at` that place.
    Of the `paths` of its files those in the cache, which nobody has written, are left out."""
    try:
        yield
    except BadRow as bad:
        kind, detail = kinds[at], bad.detail
        name = f"{kind} {kinds[: at + 1].count(kind)}" if kinds.count(kind) > 1 else f"the {kind}"
        for path in filter(is_kept, paths):
            detail = detail.replace(path, f"what {name} holds")
        if detail == bad.detail and kinds.count(kind) > 1:
            detail = f"{name}: {detail}"
        raise BadRow(bad.reason, detail, bad.paths or paths) from None


def _kept(content: bytes) -> str:
    """The file in the cache that holds this content, so that samples can name it."""
    place = _place(hashlib.sha256(content).hexdigest())
    # Flushing each of a hundred thousand to disk takes minutes; one that lost power while it was written is shorter.
    if not place.exists() or place.stat().st_size != len(content):
        _beside(place, content).replace(place)
    return str(place)


def _beside(place: Path, content: bytes) -> Path:
    """A new file next to `place`, of this process alone, of several machines that share a cache. DataError where the
    cache cannot be written."""
    beside = place.with_name(f"{place.name}.{uuid.uuid4().hex}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        what = f"pictures and sound that rows hold are kept in {cache_root()}, which cannot be written"
        raise DataError(f"{what} ({error.strerror}); set the variable LLMTUNE_CACHE to a folder that can") from None
    return beside
