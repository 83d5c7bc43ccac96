"""Prompts of one batch, padded on the left, with what they show; and a model reads them.

B rows · T tokens
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from llmtune.contract.errors import DataError
from llmtune.contract.examples import PER_TOKEN, ShownText
from llmtune.contract.generation import Asked, MediaReader, ShownPrompt

if TYPE_CHECKING:
    from torch import Tensor

NOTHING = ShownText("")
"""What a prompt of text alone shows."""


def tokens_of(prompt: Asked) -> tuple[int, ...]:
    """A prompt's tokens."""
    return prompt.ids if isinstance(prompt, ShownPrompt) else tuple(prompt)


def shown_by(prompt: Asked) -> ShownText:
    """What a prompt shows."""
    return prompt.shown if isinstance(prompt, ShownPrompt) else NOTHING


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Prompts that are read together."""

    ids: Sequence[tuple[int, ...]]
    shown: Sequence[ShownText]
    width: int
    """Tokens of a row, padding included."""
    pad: int
    """The token of padding."""
    device: torch.device
    media: MediaReader | None = None
    given: Sequence[int] | None = None
    """How many of each row's tokens are its prompt's, where some said tokens follow; None: all are."""

    @cached_property
    def ids_BT(self) -> Tensor:
        """The tokens."""
        rows = [[self.pad] * (self.width - len(ids)) + list(ids) for ids in self.ids]
        return torch.tensor(rows, device=self.device)

    @cached_property
    def real_BT(self) -> Tensor:
        """1 where a token is none of padding."""
        rows = [[0] * (self.width - len(ids)) + [1] * len(ids) for ids in self.ids]
        return torch.tensor(rows, device=self.device)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """What the model is given besides tokens; nothing where no row shows anything. Raises DataError where it cannot
        be read."""
        if self.media is None or not any(shown.media for shown in self.shown):
            return {}
        made = self.media.prompt_tensors(self.shown, self.ids, self.width, self.given)
        return {name: value.to(self.device) for name, value in made.items()}

    def open(self) -> None:
        """Read what is shown. Raises DataError where it cannot be read."""
        _ = self.tensors

    def distinct(self) -> tuple[PromptBatch, Tensor]:
        """The prompts without repeats, and (B,) the number of each row's among them."""
        places: dict[tuple[Any, ...], int] = {}
        rows = zip(self.ids, self.shown, self.given or map(len, self.ids), strict=True)
        numbers = [places.setdefault(each, len(places)) for each in rows]
        ids, shown, given = zip(*places, strict=True)
        once = PromptBatch(
            ids=ids, shown=shown, width=self.width, pad=self.pad, device=self.device, media=self.media, given=given
        )  # fmt: skip
        return once, torch.tensor(numbers, device=self.device)


def ends_in_media(ids: Sequence[int], media: MediaReader | None) -> bool:
    """Whether a prompt ends within what it shows, so that it can only be read whole."""
    return media is not None and ids[-1] in media.placeholders


@torch.no_grad()
def read_but_last(model: Any, prompts: PromptBatch, **options: Any) -> tuple[Any, Tensor]:
    """The output of the model's base for all but the last token of each row (of 2 or more), and (B,) by how much less
    than its number among the row's tokens the position of a later token is: a picture's tokens may share positions.

    Raises DataError where what is shown is not kept in the cache.
    """
    ids_BT, real_BT, tensors = prompts.ids_BT, prompts.real_BT, prompts.tensors
    if reads_anew(tensors):
        what = "looks at pictures anew for each token, and can only read prompts whole"
        raise DataError(f"{type(model).__name__} {what}; ask it with `llmtune chat` or `llmtune predict`")
    # The only way to positions in three dimensions that all kinds of models share.
    places = model._prepare_position_ids_for_generation(ids_BT, {"attention_mask": real_BT, **tensors})
    given = {name: value[:, :-1] if name in PER_TOKEN else value for name, value in tensors.items()}
    found = model.base_model(
        input_ids=ids_BT[:, :-1], attention_mask=real_BT[:, :-1], position_ids=places[..., :-1], use_cache=True,
        **given, **options,
    )  # fmt: skip
    moved = getattr(model.base_model, "rope_deltas", None)
    return found, ids_BT.new_zeros(len(ids_BT)) if moved is None else moved.to(ids_BT).reshape(-1)


def positions(real_BT: Tensor, moved_B: Tensor) -> Tensor:
    """(B, T) the positions of tokens that follow a prompt, as `read_but_last` says they are moved; (those of a
    prompt's own tokens may be others)."""
    return (real_BT.cumsum(1) - 1).clamp(min=0) + moved_B[:, None]


def reads_anew(tensors: dict[str, Tensor]) -> bool:
    """Whether each token of an answer looks at what is shown by a mask of its own (Mllama)."""
    return "cross_attention_mask" in tensors


def sees_empty_places(model: Any) -> bool:
    """Whether tokens before the first picture of a row see the empty places that rows with more pictures make in its
    batch, as cross attention of transformers masks none (Mllama)."""
    return "cross_attention_mask" in inspect.signature(model.base_model.forward).parameters
