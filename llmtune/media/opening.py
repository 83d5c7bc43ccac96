"""Files of pictures, video and sound become arrays: decoded, of a sane size, sampled in time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llmtune.contract.errors import DataError
from llmtune.contract.examples import BadRow
from llmtune.media.config import MediaConfig

if TYPE_CHECKING:
    from PIL.Image import Image

_ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)
"""EXIF's tag of how a camera was held, and its values of one that lay on a side."""
MOST_PIXELS = 2**27
"""Pixels of a picture that is still opened: 134 million, 400 MB once it is decoded. A file of some kilobytes may claim
more."""
_GUARDS = {"protocol_whitelist": "none", "max_pixels": str(MOST_PIXELS)}
"""What a file may not make its reader do while it looks at the beginning: open others, or fill the memory."""
MOST_VIDEO_PIXELS = 2**30
"""Pixels that are kept of a video, all its pictures together: 3 GB."""
_HEAD_ERRS = 0.05
"""By how much of it a time that a head says may differ from that of the packets, which have rounded ones."""
MOST_SAMPLES = 2**28
"""Samples of a sound that is still opened: 1 GB, four and a half hours at 16,000 a second."""


class Video(NamedTuple):
    """Pictures of a video."""

    frames: np.ndarray
    """(pictures, height, width, 3) uint8."""
    fps: float
    """Pictures a second of the whole video."""
    indices: list[int]
    """The numbers of these pictures among those of the whole video."""
    total: int
    """Pictures of the whole video."""

    @property
    def taken_fps(self) -> float:
        """Pictures a second of these pictures."""
        return len(self.indices) / self.total * self.fps

    def metadata(self) -> dict[str, Any]:
        """What a processor of transformers is told of it."""
        height, width = self.frames.shape[1:3]
        return {
            "total_num_frames": self.total, "fps": self.fps, "duration": self.total / self.fps,
            "frames_indices": self.indices, "height": height, "width": width,
        }  # fmt: skip


def open_image(path: str, most: int | None, least: int | None) -> Image:
    """A picture as RGB, turned as its EXIF data say, with `least` to `most` pixels. BadRow if it cannot be read."""
    from PIL import ImageOps

    with _picture(path) as image:
        found = ImageOps.exif_transpose(image).convert("RGB")
        size = fitted(found.size, most, least)
        return found if found.size == size else found.resize(size)


def open_blank(path: str, most: int | None, least: int | None) -> Image:
    """A picture that shows nothing, of the size that `open_image` gives. BadRow if the file cannot be read.

    All of the file is decoded, or a broken one would be found in the middle of a run; but of JPEG every eighth pixel,
    and what takes longer than that, resizing, is left out.
    """
    from PIL import Image, ImageOps

    with _picture(path) as image:
        lies = image.getexif().get(_ORIENTATION) in _QUARTER_TURNS
        whole = image.size[::-1] if lies else image.size
        coarse = image.draft(image.mode, (1, 1))
        upright = ImageOps.exif_transpose(image)
        upright.crop((0, 0, 1, 1)).convert("RGB")  # raises where the whole picture would
    return Image.new("RGB", fitted(whole if coarse else upright.size, most, least))


@contextmanager
def _picture(path: str) -> Iterator[Any]:
    """The opened file of a picture, of which the head was read."""
    from PIL import Image

    with _reading(path), Image.open(path) as image:
        if image.format == "EPS":
            raise BadRow("broken media", f"{path} is a program that draws a picture, allowed are pictures")
        if image.mode[0] in "IF":  # Pillow cuts what is above 255, which leaves a white picture
            what = f"{path} has more than 8 bits for each colour of a pixel"
            raise BadRow("broken media", f"{what}, which would be cut; save it with 8 bits")
        if image.width * image.height > MOST_PIXELS:
            what = f"{path} has {image.width:,} x {image.height:,} pixels"
            raise BadRow("huge media", f"{what}, allowed are {MOST_PIXELS:,} in all; make it smaller")
        yield image


def fitted(size: tuple[int, int], most: int | None, least: int | None) -> tuple[int, int]:
    """The size, or one of the same shape with about `most` or `least` pixels."""
    width, height = size
    pixels = width * height
    wanted = most if most is not None and pixels > most else least if least is not None and pixels < least else None
    if wanted is None:
        return size
    factor = math.sqrt(wanted / pixels)
    rounded = math.floor if wanted < pixels else math.ceil
    return max(1, rounded(width * factor)), max(1, rounded(height * factor))


def open_video(path: str | tuple[str, ...], config: MediaConfig, most_decoded: int | None = None) -> Video:
    """Pictures of a video, `video_fps` a second and at most `video_maxlen`. BadRow if it cannot be read, or if it has
    more than `most_decoded` pixels, those of pictures that are not taken among them."""
    most, least = config.video_max_pixels, config.video_min_pixels
    if not isinstance(path, str):  # pictures that somebody has taken already
        taken = _spread(len(path), config.video_maxlen)
        images = (open_image(path[at], most, least) for at in taken)
        return Video(_stacked(images, len(taken), path[0]), config.video_fps, taken, len(path))
    with open_film(path) as (container, stream):
        times = film_times(container, stream)
    total = times.count
    for _ in range(2):  # Some packets hold no picture that is shown: how many there are, decoding tells.
        fps = times.fps(total)
        # At least two, where there are: Qwen3-VL's processor takes no single one.
        taken = _spread(total, min(config.video_maxlen, max(2, math.floor(total / fps * config.video_fps))))
        numbers, wanted = count(), {*taken}
        with open_film(path) as (container, stream):
            container.seek(0)
            frames = _no_more(container.decode(stream), path, most_decoded)
            found = _stacked(
                (_small(each, most, least) for each in frames if next(numbers) in wanted), len(taken), path
            )
        if (decoded := next(numbers)) == total:
            return Video(found, fps, taken, total)
        total = decoded
    raise BadRow("broken media", f"{path} has another number of pictures each time that it is decoded")


def _no_more(frames: Iterable[Any], path: str, most: int | None) -> Iterator[Any]:
    """The pictures of a video. BadRow where all of them together have more pixels than `most`."""
    pixels = 0
    for frame in frames:
        pixels += frame.width * frame.height
        if most is not None and pixels > most:
            what = f"{path} has more than {most:,} pixels, all its pictures together"
            raise BadRow("huge media", f"{what}; make it smaller, or cut it")
        yield frame


class FilmTimes(NamedTuple):
    """How many pictures a video has and how long it takes, by its packets: its head may say anything."""

    count: int
    """Packets, of which most hold a picture that is shown."""
    seconds: float | None
    """None where packets have no times."""
    told: float | None
    """Pictures a second, as the head says."""

    def fps(self, count: int) -> float:
        """How many of `count` pictures there are a second: as the head says, unless that is far from the truth."""
        found = count / self.seconds if self.seconds else None
        if self.told and (found is None or abs(self.told / found - 1) < _HEAD_ERRS):
            return self.told
        return found or 24.0


def film_times(container: Any, stream: Any) -> FilmTimes:
    """What the packets of a video say, none of which is decoded."""
    said = ((packet.dts if packet.pts is None else packet.pts, packet.duration) for packet in container.demux(stream)
            if packet.size and not packet.is_discard)  # fmt: skip
    rows = np.array([[math.nan if time is None else time, duration or 0] for time, duration in said]).reshape(-1, 2)
    timed = rows[~np.isnan(rows[:, 0])]
    told, ticks, seconds = stream.average_rate or stream.guessed_rate, np.ptp(timed[:, 0]) if len(timed) else 0, None
    if ticks:
        # The last one takes as long as it says, if the others do; else as long as they do.
        last = timed[timed[:, 0].argmax(), 1]
        honest = abs(timed[:, 1].sum() - ticks - last) <= _HEAD_ERRS * ticks
        seconds = float(ticks + (last if honest else ticks / (len(timed) - 1))) * float(stream.time_base)
    return FilmTimes(len(rows), seconds, float(told) if told else None)


def open_audio(path: str, sampling_rate: int) -> np.ndarray:
    """(samples,) float32 of a sound: the mean of its channels, as librosa and transformers take it. BadRow if it cannot
    be read."""
    with _container(path) as container:
        if container.format.name == "wav":  # of others the decoder says it
            _require_whole_wav(path)
        if not container.streams.audio:
            raise BadRow("broken media", f"{path} holds no sound")
        # FFmpeg's own mix is louder, 1.4 times for stereo. Packed: PyAV cannot read eight planes or more.
        resampler = _library().AudioResampler(format="dbl", rate=sampling_rate)
        parts, samples = [], 0
        for frame in chain(container.decode(container.streams.audio[0]), [None]):  # None: what it still holds
            new = [_mean(part) for part in resampler.resample(frame) if part is not None]
            parts += new
            samples += sum(map(len, new))
            if samples > MOST_SAMPLES:
                what = f"{path} is longer than {MOST_SAMPLES // sampling_rate:,} seconds"
                raise BadRow("huge media", f"{what}, allowed are {MOST_SAMPLES:,} samples; cut it into parts")
    if not samples:
        raise BadRow("broken media", f"{path} holds no sound that can be decoded")
    return np.concatenate(parts)


def _mean(part: Any) -> np.ndarray:
    """(samples,) float32, the mean of the channels of a packed piece of sound."""
    return part.to_ndarray().reshape(-1, part.layout.nb_channels).mean(1).astype(np.float32)


def _require_whole_wav(path: str) -> None:
    """BadRow for a file that ends before its head says, but for those of programs that did not know their end."""
    with open(path, "rb") as file:
        head, found = file.read(12), file.seek(0, 2)
    named = int.from_bytes(head[4:8], "little") + 8
    if head[:4] == b"RIFF" and found < named < 2**31 - 2**16:
        raise BadRow("broken media", f"{path} ends after {found:,} of the {named:,} bytes that its head names")


def _small(frame: Any, most: int | None, least: int | None) -> Image:
    """A picture of a video, turned and mirrored as its file says (phones that are held upright record on a side)."""
    image = frame.to_image()
    for matrix in (each for each in frame.side_data if each.type.name == "DISPLAYMATRIX"):
        image = _displayed(image, np.frombuffer(bytes(matrix), np.int32).reshape(3, 3))
    size = fitted(image.size, most, least)
    return image if size == image.size else image.resize(size)


def _stacked(images: Iterable[Image], count: int, path: str) -> np.ndarray:
    """At most `count` pictures, in the size of the first one. BadRow for more pixels than are kept of a video."""
    found: list[np.ndarray] = []
    size = (0, 0)
    for image in images:
        size = size if found else image.size
        if count * size[0] * size[1] > MOST_VIDEO_PIXELS:
            what = f"{path} has pictures of {size[0]:,} x {size[1]:,} pixels, of which {count:,} are taken"
            allowed = f"allowed are {MOST_VIDEO_PIXELS:,} pixels in all; lower video_maxlen or video_max_pixels"
            raise BadRow("huge media", f"{what}, {allowed}")
        found.append(np.asarray(image if image.size == size else image.resize(size)))
    if not found:
        raise BadRow("broken media", f"{path} holds no picture that can be decoded")
    return np.stack(found)


def _spread(total: int, wanted: int) -> list[int]:
    """Numbers of at most `wanted` of `total` pictures, evenly spaced, the first and the last among them."""
    return sorted({int(at) for at in np.linspace(0, total - 1, min(total, wanted))})


def _displayed(image: Image, matrix: np.ndarray) -> Image:
    """The picture as a display matrix has it, to a quarter of a turn: a point (x, y) is shown at (x, y) times it."""
    from PIL import Image as Pillow

    (x_x, y_x), (x_y, y_y) = matrix[:2, :2]
    if abs(x_x) < abs(y_x):
        image, x_x, y_y = image.transpose(Pillow.Transpose.TRANSPOSE), x_y, y_x
    if x_x < 0:
        image = image.transpose(Pillow.Transpose.FLIP_LEFT_RIGHT)
    return image.transpose(Pillow.Transpose.FLIP_TOP_BOTTOM) if y_y < 0 else image


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except BadRow:
        raise
    except Exception as error:  # decoders raise whatever they like, from OSError to SyntaxError
        if type(error).__name__ == "DecompressionBombError":  # Pillow's own bound, before the size is known here
            what = f"allowed are {MOST_PIXELS:,} in all; make it smaller"
            raise BadRow("huge media", f"{path} has more pixels than Pillow opens, {what}") from None
        said = str(error) or type(error).__name__
        raise BadRow("broken media", f"{path} cannot be read ({said})") from None


@contextmanager
def open_film(path: str, format: str | None = None) -> Iterator[tuple[Any, Any]]:
    """The opened file of a video, and its pictures, none of which is decoded if it is huge, whatever the head says.
    `format` is FFmpeg's name of the only kind that it may be. BadRow if it cannot be read."""
    with _container(path, format) as container:
        if not container.streams.video:
            raise BadRow("broken media", f"{path} holds no video")
        stream = container.streams.video[0]
        if stream.width * stream.height > MOST_PIXELS:
            size = f"{path} has pictures of {stream.width:,} x {stream.height:,} pixels"
            raise BadRow("huge media", f"{size}, allowed are {MOST_PIXELS:,}; make it smaller")
        stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
        yield container, stream


@contextmanager
def _container(path: str, format: str | None = None) -> Iterator[Any]:
    """The opened file of a video or sound. Other files that it lists are not read: they might be anywhere."""
    av = _library()
    with _reading(path), open(path, "rb") as file, av.open(file, format=format, options=_GUARDS) as container:
        yield container


def _library() -> Any:
    try:
        import av
    except ImportError:
        raise DataError("video and sound are decoded by PyAV; run pip install 'llmtune[media]'") from None
    return av
