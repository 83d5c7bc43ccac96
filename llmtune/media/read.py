"""What a processor has made of the media of a batch's rows, and how it goes with their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from llmtune.contract.errors import DataError
from llmtune.contract.examples import PER_TOKEN, ShownText

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = ("input_ids", "attention_mask", "offset_mapping", "text_replacement_offsets")
"""What of its answer is no tensor that only media need."""
_GOES_ON = ("cross_attention_mask",)
"""What of `PER_TOKEN` an answer has as the token that it follows has it. The others are kinds of tokens, of which 0 is
text."""
TokenLayout = Literal["padded", "left", "flat"]
"""How a batch lays rows of tokens out: padded to the longest on the right or on the left, or end to end."""


class ShownTokens(NamedTuple):
    """The tokens of a row of a batch, and what it shows."""

    ids: np.ndarray
    """(tokens,) integers."""
    shown: ShownText = ShownText("")
    given: int | None = None
    """How many of the tokens are the first ones of the text; those after them are an answer of another origin, which
    stands for no media. None: all are the text's, and all of its."""


class ReadMedia(NamedTuple):
    """What a processor made of the texts and media of a batch's rows. Travels between processes."""

    made: Mapping[str, Any]
    """Its tensors by their names; none where no row shows any media."""

    def tensors(self, rows: Sequence[ShownTokens], layout: TokenLayout, width: int = 0) -> Mapping[str, Tensor]:
        """What the model is given of a batch besides its tokens, of rows that show what was read, in the same order;
        padded to `width`, or to the longest if that is longer.

        Raises:
            DataError: the processor gives other tokens than when the data were tokenised, as where a file has changed.
        """
        import torch

        if not self.made:
            return {}
        made, mask = self.made["input_ids"], self.made["attention_mask"].bool()
        for row, own, real in zip(rows, made, mask, strict=True):
            found = own[real].tolist()[: row.given]
            if row.shown.media and found != row.ids[: row.given].tolist():
                raise DataError(
                    f"media: {row.shown.media[0].path} has changed since the data were tokenised, or its processor "
                    "has; set overwrite_cache: true"
                )
        given = {name: each for name, each in self.made.items() if name not in _ROWS and isinstance(each, torch.Tensor)}
        return {
            name: _laid_out(value, rows, layout, width, name in _GOES_ON) if name in PER_TOKEN else value
            for name, value in given.items()
        }


def _laid_out(value_BT: Tensor, rows: Sequence[ShownTokens], layout: TokenLayout, width: int, goes_on: bool) -> Tensor:
    """A number (or several) for each token as the batch lays tokens out. An answer of another origin has 0, or where it
    `goes_on` the numbers of the token that it follows; rows that show nothing have 0."""
    import torch

    values = []
    for row, own in zip(rows, value_BT, strict=True):
        value = own.new_zeros(len(row.ids), *own.shape[1:])
        if row.shown.media:
            given = len(row.ids) if row.given is None else row.given
            value[:given] = own[:given]
            if goes_on:
                value[given:] = own[given - 1]
        values.append(value)
    if layout == "flat":
        return torch.cat(values)[None]
    side = "left" if layout == "left" else "right"
    values.append(value_BT.new_zeros(width, *value_BT.shape[2:]))
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_side=side)[:-1]
