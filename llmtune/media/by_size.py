"""A processor that is asked how many tokens stand for pictures, which hangs on their sizes alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

_NO_WORK = {"do_rescale": False, "do_normalize": False, "resample": 0}
"""What leaves the work on pixels out; 0 takes the nearest one."""
_PIXELS = 2**12
"""From so many numbers on an array holds pixels, and nothing that tokens hang on."""
_MOST_KEPT = 2**13
"""Answers that are kept, some kilobytes each: one for each combination of sizes in a row."""


def by_size(processor: Any) -> Any:
    """A copy of a processor of transformers that gives the same tokens, of tensors the shapes, and processes pictures
    of the same sizes once."""
    kept: dict[Any, tuple[Any, list[str]]] = {}

    def process(images: Any, **options: Any) -> tuple[Any, list[str]]:
        asked = _sizes(images), options.get("return_tensors")  # lists and tensors of the same sizes are two answers
        if asked not in kept:
            if len(kept) == _MOST_KEPT:
                kept.clear()
            made, texts = processor._process_images(images, **{**options, **_NO_WORK})
            made.update({name: _without_pixels(value) for name, value in made.items()})
            kept[asked] = made, texts
        made, texts = kept[asked]
        return copy.copy(made), [*texts]

    found = copy.copy(processor)
    found._process_images = process
    return found


def _sizes(images: Any) -> Any:
    return tuple(map(_sizes, images)) if isinstance(images, list | tuple) else images.size


def _without_pixels(value: Any) -> Any:
    """The value; an array of pixels as one of its shape that holds one number."""
    import torch

    if isinstance(value, list | tuple):
        return [_without_pixels(each) for each in value]
    if isinstance(value, np.ndarray) and value.size > _PIXELS:
        return np.broadcast_to(np.zeros((), value.dtype), value.shape)
    if isinstance(value, torch.Tensor) and value.numel() > _PIXELS:
        return value.new_zeros(()).expand(value.shape)
    return value
