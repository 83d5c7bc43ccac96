"""Pictures, videos and sounds that requests show become files of the request's own, checked before anything decodes
them. Who asks is a stranger: no path is read, and no address asked, but where a key allows it."""

from __future__ import annotations

import base64
import binascii
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from llmtune.contract.errors import DataError, listed
from llmtune.contract.examples import BadRow
from llmtune.data.messages import url_of_source
from llmtune.media.marks import given_text
from llmtune.media.opening import film_times, open_film
from llmtune.serving.config import ServeConfig
from llmtune.serving.errors import Refused

PICTURES = ("PNG", "JPEG", "WEBP", "GIF")
"""Kinds of pictures that are opened. Pillow knows others, one of which starts a program."""
FILMS = ("mp4", "mov", "webm", "mkv", "avi")
"""Kinds of videos that are opened. FFmpeg knows others, some of which name files that would be read."""
_SHOWS = {"image_url": "image", "video_url": "video", "audio_url": "audio", "input_audio": "audio"}
_JPEGS = "data:video/jpeg;base64,"
"""What a video in pictures begins with, as vLLM has it: JPEGs in base64, with commas between them."""
_FETCH_S = 20.0


@dataclass
class RequestMedia:
    """The pictures, videos and sounds of one request."""

    config: ServeConfig
    folder: Path
    """Where their files are, which are gone when the request is answered."""
    kinds: list[str] = field(default_factory=list)
    """Of its files so far."""
    decoded: int = 0
    """Pixels of all videos so far."""

    def taken(self, messages: Sequence[Mapping[str, Any]], reader: str, reads: Sequence[str]) -> list[dict[str, Any]]:
        """The messages with files in place of what they show to `reader`, a model that `reads` such kinds. Raises
        Refused."""
        rows = [_in_urls(message, number) for number, message in enumerate(messages, start=1)]
        shown = [_SHOWS[kind] for each in rows for part in _parts(each) if (kind := _kind(part)) in _SHOWS]
        if unseen := [kind for kind in shown if kind not in reads]:
            what = f"{reader} reads {' and '.join(['text', *reads]) if reads else 'text only'}"
            fix = "; of a model that sees video, that part needs torchvision beside the server"
            raise _refused(f"{what}, and {given_text(unseen)}{fix if 'video' in unseen and reads else ''}")
        if len(shown) > self.config.max_media:
            raise _refused(f"{given_text(shown)}, this server takes {self.config.max_media} at a time")
        return [
            {**row, "content": [self._taken(part, number) for part in _parts(row)]}
            if isinstance(row.get("content"), list)
            else row
            for number, row in enumerate(rows, start=1)
        ]

    def _taken(self, part: Any, number: int) -> Any:
        where, kind = f"message {number}", _kind(part)
        if kind not in _SHOWS:
            if kind not in ("text", "reasoning", "tool_call"):
                raise _refused(f"{where} has a part of type {kind}, allowed are {listed(('text', *_SHOWS))}")
            return part
        shows, given = _SHOWS[kind], part.get(kind)
        if kind == "input_audio":
            content = _decoded(given.get("data") if isinstance(given, Mapping) else None, where)
            return {"type": shows, shows: self._kept(shows, content, where)}
        source = given.get("url") if isinstance(given, Mapping) else given
        if not isinstance(source, str) or not source:
            raise _refused(f"{where} has {kind} without url, allowed is {_allowed(shows)}")
        if kind == "video_url" and source.startswith(_JPEGS):
            pictures = [_decoded(one, where) for one in source.removeprefix(_JPEGS).split(",")]
            return {"type": shows, shows: [self._kept("frame", content, where) for content in pictures]}
        return {"type": shows, shows: self._kept(shows, self._bytes(source, shows, where), where)}

    def _kept(self, kind: str, content: bytes, where: str) -> str:
        self.kinds.append(kind)
        place = self.folder / f"{kind}-{len(self.kinds)}"
        place.write_bytes(content)
        check = {"image": self._check_picture, "frame": self._check_frame, "video": self._check_video,
                 "audio": self._check_sound}[kind]  # fmt: skip
        try:
            check(place, where)
        except DataError as error:  # what decodes is not installed
            raise _refused(f"{where}: {error}") from None
        return str(place)

    def _bytes(self, source: str, kind: str, where: str) -> bytes:
        """What a data URL holds, or what is at an address or in a file where the server's keys allow that."""
        scheme = source.partition(":")[0].lower() if ":" in source[:8] else ""
        if scheme == "data":
            head, _, content = source.partition(",")
            if not head.endswith(";base64"):
                raise _refused(f"{where} has the URL {head[:40]!r}, allowed is {_allowed(kind)}")
            return _decoded(content, where)
        if scheme == "https":
            return self._fetched(source, where)
        return self._read(source, where)

    def _read(self, source: str, where: str) -> bytes:
        folder = self.config.allowed_local_media_path
        address = _split(source, where)
        if folder is None or address.scheme != "file" or address.netloc not in ("", "localhost"):
            allowed = "a data URL" + ("" if folder is None else f", or file:// and a path in {folder}")
            fix = "; the server reads files where its key allowed_local_media_path names their folder"
            raise _refused(f"{where} has the URL {source[:60]!r}, allowed is {allowed}{fix if folder is None else ''}")
        root = Path(folder).expanduser().resolve()
        place = Path(urllib.parse.unquote(address.path)).resolve()
        if not place.is_relative_to(root) or not place.is_file():
            raise _refused(f"{where} has the URL {source[:60]!r}, and there is no such file in {folder}")
        with place.open("rb") as file:
            return self._no_more(file.read(self._most_bytes + 1), where)

    def _fetched(self, address: str, where: str) -> bytes:
        allowed = self.config.allowed_media_domains
        _check_domain(address, allowed, where)
        opener = urllib.request.build_opener(_Redirects(allowed, where))
        try:
            with opener.open(address, timeout=_FETCH_S) as answer:
                return self._no_more(answer.read(self._most_bytes + 1), where)
        except (OSError, ValueError, HTTPException) as error:
            raise _refused(f"{where}: {address[:80]} cannot be fetched ({error})") from None

    @property
    def _most_bytes(self) -> int:
        return int(self.config.max_body_mb * 1e6)

    def _no_more(self, content: bytes, where: str) -> bytes:
        if len(content) > self._most_bytes:
            raise _refused(f"{where} shows a file of more than {self._most_bytes} bytes; the server's key max_body_mb")
        return content

    def _check_picture(self, place: Path, where: str) -> int:
        """How many pixels a picture has. Refused for what is none, or one that is huge once it is decoded. Its head is
        all that is read."""
        from PIL import Image

        try:
            with Image.open(place, formats=PICTURES) as image:
                pixels = image.width * image.height
        except Image.DecompressionBombError:
            pixels = 2**63
        except Exception:  # of what is broken, Pillow raises whatever it likes, with the file's path
            raise _refused(f"{where} shows no picture that can be read, allowed are {listed(PICTURES)}") from None
        if pixels > self.config.max_media_pixels:
            most = self.config.max_media_pixels
            raise _refused(f"{where} shows a picture of more than {most:,} pixels; make it smaller")
        return pixels

    def _check_frame(self, place: Path, where: str) -> None:
        """The same for one of a video that comes in pictures."""
        self._count(self._check_picture(place, where), where)

    def _check_video(self, place: Path, where: str) -> None:
        """Refused for what no video is, or one that is too long or huge, by all of its packets."""
        try:
            pixels, count, seconds = _film_size(place)
        except BadRow as bad:
            if bad.reason != "huge media":
                raise _refused(f"{where} shows no video that can be read, allowed are {listed(FILMS)}") from None
            pixels, count, seconds = 2**63, 1, 0.0
        if pixels > (most := self.config.max_media_pixels):
            raise _refused(f"{where} shows a video with pictures of more than {most:,} pixels; make it smaller")
        self._check_length(seconds, "video", where)
        self._count(count * pixels, where)

    def _count(self, pixels: int, where: str) -> None:
        """Add those of a video. Refused where there are too many of them."""
        self.decoded += pixels
        if self.decoded > (most := self.config.max_decoded_pixels):
            what = f"{where} shows video of more than {most:,} pixels, all its pictures together"
            raise _refused(f"{what}; make it smaller, or cut it")

    def _check_sound(self, place: Path, where: str) -> None:
        """Refused for what is neither wav nor mp3, or too long. Other kinds may name files that would be read."""
        with place.open("rb") as file:
            head = file.read(12)
        wav = head[:4] == b"RIFF" and head[8:] == b"WAVE"
        mp3 = head[:3] == b"ID3" or (head[:1] == b"\xff" and len(head) > 1 and head[1] >= 0xE0)
        seconds = _seconds(place, "wav" if wav else "mp3") if wav or mp3 else None
        if seconds is None:
            raise _refused(f"{where} has no sound that can be read, allowed are wav and mp3")
        self._check_length(seconds, "sound", where)

    def _check_length(self, seconds: float, what: str, where: str) -> None:
        most = self.config.max_media_seconds
        if seconds > most:
            raise _refused(f"{where} has a {what} of {seconds:,.0f} s, allowed are {most:g}; cut it")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Goes on to other addresses only where these may be asked, too."""

    def __init__(self, allowed: Sequence[str], where: str) -> None:
        self.allowed, self.where = allowed, where

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_domain(newurl, self.allowed, self.where)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_domain(address: str, allowed: Sequence[str], where: str) -> None:
    found = _split(address, where)
    if found.scheme.lower() != "https" or (found.hostname or "") not in allowed:
        domains = f"allowed is https:// of {listed(allowed)}" if allowed else "allowed is a data URL"
        fix = "" if allowed else "; the server fetches from domains that its key allowed_media_domains names"
        raise _refused(f"{where} has the URL {address[:80]!r}, {domains}{fix}")


def _split(address: str, where: str) -> urllib.parse.SplitResult:
    try:
        return urllib.parse.urlsplit(address)
    except ValueError as error:
        raise _refused(f"{where} has the URL {address[:60]!r}, which is none ({error})") from None


def _kind(part: Any) -> str:
    """The type of a part of a content."""
    return str(part.get("type")) if isinstance(part, Mapping) else type(part).__name__


def _in_urls(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The message, with OpenAI's parts in place of pictures in Anthropic's."""

    def plain(part: Any) -> Any:
        if _kind(part) != "image" or not part.get("source"):
            return part
        return {"type": "image_url", "image_url": {"url": url_of_source(part, f"message {number}")}}

    try:
        return {**message, "content": [plain(part) for part in _parts(message)]} if _parts(message) else {**message}
    except BadRow as bad:
        raise _refused(bad.detail) from None


def _allowed(kind: str) -> str:
    return f"data:{kind}/TYPE;base64,CONTENT"


def _film_size(place: Path) -> tuple[int, int, float]:
    """Pixels of a picture of a video, how many pictures there are, and the seconds that they take. BadRow where it
    cannot be read."""
    with place.open("rb") as file:
        format = _film_format(file.read(12))
    if format is None:
        raise BadRow("broken media", "is of another kind")
    with open_film(str(place), format) as (container, stream):
        times, pixels = film_times(container, stream), stream.width * stream.height
    if not times.count:
        raise BadRow("broken media", "has no pictures")
    return pixels, times.count, times.seconds or times.count / times.fps(times.count)


def _film_format(head: bytes) -> str | None:
    """FFmpeg's name of a kind of video, by the beginning of its file; None for others than those that are opened."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    return "avi" if head[:4] == b"RIFF" and head[8:] == b"AVI " else None


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _decoded(content: Any, where: str) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise _refused(f"{where} shows what is no base64; allowed are the file's bytes in base64") from None


def _seconds(place: Path, format: str) -> float | None:
    """How long a sound is by all of its packets, as its head may say anything; None where it cannot be read."""
    import av

    try:
        with av.open(str(place), format=format) as container:
            (sound,) = container.streams.audio
            ticks = sum(packet.duration or 0 for packet in container.demux(sound))
            return float(ticks * (sound.time_base or 0)) or None
    except (OSError, ValueError):  # av's errors are of these, and so is a file without any sound
        return None


def _refused(said: str) -> Refused:
    return Refused(400, said, param="messages")
