"""What samples show, in numbers: media of each kind, their tokens, and how large pictures are."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmtune.contract.errors import counted, listed
from llmtune.contract.examples import MEDIA_KINDS

if TYPE_CHECKING:
    from llmtune.data.tokens import TokenSamples
    from llmtune.media.processor import MediaProcessor


@dataclass(frozen=True, kw_only=True)
class PictureSizes:
    """Sizes of the files of pictures, by what their heads say, before they are resized."""

    files: int
    smallest: tuple[int, int]
    """(width, height) of the picture with the fewest pixels."""
    median: tuple[int, int]
    largest: tuple[int, int]
    larger: int
    """Files with more pixels than `image_max_pixels`, which are made smaller."""
    smaller: int
    """Files with fewer than `image_min_pixels`, which are made larger."""

    def __str__(self) -> str:
        smallest, median, largest = (
            f"{width:,} x {height:,}" for width, height in (self.smallest, self.median, self.largest)
        )
        return (
            f"pictures ({self.files:,} files): {smallest} to {largest}, half of them up to {median}; "
            f"image_max_pixels makes {self.larger:,} smaller, image_min_pixels makes {self.smaller:,} larger"
        )


@dataclass(frozen=True, kw_only=True)
class MediaStats:
    """Media of samples in their full lengths."""

    samples: int
    """Samples that show any."""
    media: Mapping[str, int]
    """Media that samples show, by their kind: one that two sequences of a sample show counts twice."""
    most: Mapping[str, int]
    """The same of the sample that shows most of the kind."""
    tokens: int
    """Tokens that stand for media."""
    text_tokens: int
    """All others."""
    most_tokens: int
    """Tokens that stand for media in the sample that has most of them."""
    pictures: PictureSizes | None
    """None where no sample shows a picture that is a file."""

    def __str__(self) -> str:
        shown = [kind for kind, count in self.media.items() if count]
        each = listed([f"{self.media[kind]:,} {kind}{'s' * (self.media[kind] != 1)}" for kind in shown])
        most = listed([f"{self.most[kind]:,} {kind}{'s' * (self.most[kind] != 1)}" for kind in shown])
        share = self.tokens / max(1, self.tokens + self.text_tokens)
        lines = [
            f"{self.samples:,} samples show {each}, one sample at most {most}",
            f"{self.tokens:,} tokens stand for them ({share:.0%}), at most {self.most_tokens:,} in a sample; "
            f"{self.text_tokens:,} are text",
        ]
        return "\n".join([*lines, *([str(self.pictures)] if self.pictures else [])])


@dataclass(frozen=True, kw_only=True)
class MediaShare:
    """How much of some samples media are. Opens no file."""

    media: Mapping[str, int]
    """Media that samples show, by their kind: one that two sequences of a sample show counts twice."""
    tokens: int
    """Tokens that stand for media."""
    of: int
    """All tokens of the samples."""

    @staticmethod
    def of_samples(samples: TokenSamples, media: MediaProcessor) -> MediaShare:
        """Count what samples show."""
        tokens = int(media_tokens(samples, media).sum())
        return MediaShare(media=dict(samples.media_count), tokens=tokens, of=samples.tokens)

    def __str__(self) -> str:
        each = listed([counted(self.media[kind], kind) for kind in MEDIA_KINDS if kind in self.media])
        share = self.tokens / max(1, self.of)
        return f"{each}; {self.tokens:,} of {self.of:,} tokens stand for them ({share:.0%})"


def media_tokens(samples: TokenSamples, media: MediaProcessor) -> np.ndarray:
    """(samples,) tokens of each sample that stand for media."""
    places = np.flatnonzero(np.isin(samples.ids, media.placeholders))
    found = np.searchsorted(places, samples.stops) - np.searchsorted(places, samples.starts)
    return found.reshape(-1, samples.width).sum(1)


def count_media(samples: TokenSamples, media: MediaProcessor) -> MediaStats:
    """Count what samples show. Opens the heads of pictures' files, each once."""
    tokens = media_tokens(samples, media)
    counts = np.zeros((0, len(MEDIA_KINDS)), np.int32) if samples.media is None else samples.media
    most = zip(MEDIA_KINDS, counts.max(0, initial=0).tolist(), strict=True)
    pictured = np.flatnonzero(counts[:, MEDIA_KINDS.index("image")]).tolist()
    files = dict.fromkeys(file for index in pictured for file in samples.pictures(index))
    return MediaStats(
        samples=int(counts.any(1).sum()), media=dict(samples.media_count),
        most={kind: count for kind, count in most if count}, tokens=int(tokens.sum()),
        text_tokens=samples.tokens - int(tokens.sum()), most_tokens=int(tokens.max(initial=0)),
        pictures=_sizes([*files], media.config.image_max_pixels, media.config.image_min_pixels),
    )  # fmt: skip


def _sizes(files: list[str], most: int | None, least: int | None) -> PictureSizes | None:
    from PIL import Image

    found: list[tuple[int, int]] = []
    for file in files:
        with suppress(OSError), Image.open(file) as image:  # one that was removed since is found by training
            found.append(image.size)
    if not found:
        return None
    found.sort(key=lambda size: size[0] * size[1])
    pixels = [width * height for width, height in found]
    return PictureSizes(
        files=len(found), smallest=found[0], median=found[(len(found) - 1) // 2], largest=found[-1],
        larger=0 if most is None else sum(each > most for each in pixels),
        smaller=0 if least is None else sum(each < least for each in pixels),
    )  # fmt: skip
