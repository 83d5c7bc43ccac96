"""The recipe's keys of media."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from llmtune.contract.schema import Ge, Gt


@dataclass(frozen=True, kw_only=True)
class MediaConfig:
    """How pictures, video and sound in rows are found and how large they may be."""

    media_dir: str | None = None
    """Folder that the paths of pictures, videos and sounds count from, and that none may lead out of. Absent takes the
    folder of each data set's file."""
    media_from_network: bool = False
    """Fetch media that rows name by an `https` or `http` address. Each is kept in the cache."""
    image_max_pixels: Annotated[int, Ge(1)] | None = 768 * 768
    """Pictures with more pixels are made smaller before the model's processor sees them; null leaves that to it."""
    image_min_pixels: Annotated[int, Ge(1)] | None = 32 * 32
    """Pictures with fewer pixels are made larger; null leaves them."""
    video_max_pixels: Annotated[int, Ge(1)] | None = 256 * 256
    """The same for each picture of a video."""
    video_min_pixels: Annotated[int, Ge(1)] | None = 16 * 16
    """The same for each picture of a video."""
    video_fps: Annotated[float, Gt(0)] = 2.0
    """Pictures taken from each second of a video."""
    video_maxlen: Annotated[int, Ge(1)] = 128
    """Most pictures taken from a video, evenly spaced."""

    def __post_init__(self) -> None:
        for kind in ("image", "video"):
            least, most = (vars(self)[f"{kind}_{end}_pixels"] for end in ("min", "max"))
            if least is not None and most is not None and least > most:
                raise ValueError(f"{kind}_min_pixels: found {least}, allowed is at most {kind}_max_pixels {most}")
