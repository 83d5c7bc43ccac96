"""The largest micro-batch a rank can meet: what memory must suffice for, whatever the order of rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from llmtune.contract.stages import RollsOut
from llmtune.data.batch_loader import row_lengths
from llmtune.planning.media_memory import MediaSizes, pieces_per_token, sizes_of_media

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Sizes that memory depends on."""

    rows: int
    """Rows of the micro-batch; 1 where documents are laid end to end."""
    length: int
    """Tokens of a row on this rank."""
    targets: int
    """Positions that a loss is computed for."""
    sequences: int = 1
    """Documents that see themselves only, several in a row where rows are packed."""
    micro_steps: int
    """Micro-batches of an optimiser step."""
    masked: bool = False
    """Whether rows differ in length, so that there is a mask."""
    flat: bool = False
    """Whether documents are laid end to end."""
    mean_tokens: float = 0.0
    """Tokens of a micro-batch on average, without padding."""
    attended: float = 0.0
    """Earlier tokens, itself included, that a token attends to on average."""
    media: MediaSizes = field(default_factory=MediaSizes)
    """What its rows show, each as much as the longest."""
    media_share: float = 0.0
    """The share of the data's tokens that stand for media."""
    pieces_share: float = 0.0
    """What the towers' layers see, for each token of the data."""

    @property
    def tokens(self) -> int:
        """Token positions, padding included."""
        return self.rows * self.length


def largest(plan: Plan) -> MicroBatch:
    """The micro-batch of the longest rows together, as many as `per_device_train_batch_size` says."""
    batches, train = plan.data.batches, plan.recipe.train
    samples, units, flat = batches.samples, batches.units, batches.flat
    rows = row_lengths(samples, units)
    stage = plan.parts.one("stage_config").built
    answer = stage.answer_tokens if isinstance(stage, RollsOut) else 0
    size = min(train.per_device_train_batch_size, len(units))
    # A piece of a sample counts at most its own tokens.
    targets = np.minimum(units.sums(samples.supervised), units.tokens)
    longest = np.sort(units.tokens if flat else rows)[-size:]
    documents = (units.tokens if units.kind == "row" else samples.stops - samples.starts).astype(float)
    pieces, stands = pieces_per_token(batches, plan.model)
    share, total = plan.ranks.dims.context, float(units.tokens.sum())
    width = samples.width if units.kind == "sample" else 1
    return MicroBatch(
        rows=1 if flat else size * width,
        length=-(-int(longest.sum() + answer * size if flat else longest[-1] + answer) // share),
        targets=-(-int(np.sort(targets)[-size:].sum() + answer * size) // share),
        sequences=int(np.sort(np.diff(units.bounds))[-size:].sum()) * samples.width,
        micro_steps=train.gradient_accumulation_steps * (stage.splits if isinstance(stage, RollsOut) else 1),
        masked=not flat and size * width > 1 and bool(rows.min() < rows.max() or width > 1),
        flat=flat,
        mean_tokens=(total / len(units) + answer) * size,
        attended=float((documents * (documents + 1)).sum()) / 2 / max(total, 1.0),
        media=sizes_of_media(batches, int(np.argmax(rows)), plan.model).times(size),
        media_share=stands,
        pieces_share=pieces,
    )
