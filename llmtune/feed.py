"""Which rows make up an optimiser step, and their batches on this rank. A pure function of the step number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmtune.context_parallel import split_row
from llmtune.data.batches import collate
from llmtune.data.order import Order, pack, split

if TYPE_CHECKING:
    import torch

    from llmtune.data.tokens import TokenSamples
    from llmtune.ranks import Ranks
    from llmtune.stages import Batch


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Batches of a training run. `units` are what the order shuffles: samples, or packs of samples."""

    samples: TokenSamples
    units: Sequence[tuple[int, ...]]
    order: Order
    ranks: Ranks
    micro_steps: int
    flat: bool
    pad_id: int

    @classmethod
    def make(
        cls, samples: TokenSamples, *, packing: bool, cutoff_len: int, per_device: int, micro_steps: int, ranks: Ranks,
        seed: int, shuffle: bool, flat: bool, pad_id: int,
    ) -> Feed:  # fmt: skip
        units = pack(samples.lengths, cutoff_len) if packing else [(index,) for index in range(len(samples))]
        order = Order(len(units), per_device * micro_steps * ranks.batch_ranks, seed, shuffle)
        return cls(
            samples=samples,
            units=units,
            order=order,
            ranks=ranks,
            micro_steps=micro_steps,
            flat=flat or packing,
            pad_id=pad_id,
        )

    def step(self, step: int, device: torch.device) -> list[Batch]:
        """This rank's micro-batches of the 0-based optimiser step; always `micro_steps` of them."""
        mine = split(self.order.step_units(step), self.ranks.batch_rank, self.ranks.batch_ranks, self.micro_steps)
        return [to_device(self._batch([i for unit in units for i in self.units[unit]]), device) for units in mine]

    def _batch(self, samples: Sequence[int]) -> Batch:
        rows = [self.samples.sample(index) for index in samples]
        batch = collate(rows, flat=self.flat, pad_id=self.pad_id, sample_ids=tuple(samples))
        return split_row(batch, self.ranks)

    def tokens(self, step: int) -> int:
        """Tokens (without padding) in the whole optimiser step, all ranks."""
        lengths = self.samples.lengths
        return sum(int(lengths[i]) for unit in self.order.step_units(step) for i in self.units[unit])


def evaluation_batches(
    samples: TokenSamples, *, per_device: int, ranks: Ranks, flat: bool, pad_id: int, device: torch.device
) -> Iterator[Batch]:
    """Every sample once, over all ranks; each rank gets the same number of batches, the last ones maybe empty."""
    count = -(-len(samples) // (per_device * ranks.batch_ranks))
    for index in range(count):
        start = (index * ranks.batch_ranks + ranks.batch_rank) * per_device
        chosen = tuple(range(start, min(start + per_device, len(samples))))
        batch = collate([samples.sample(i) for i in chosen], flat=flat, pad_id=pad_id, sample_ids=chosen)
        yield to_device(split_row(batch, ranks), device)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    import torch

    if device.type == "cpu":
        return batch
    moved: dict[str, Any] = {
        name: value.pin_memory().to(device, non_blocking=True)
        for name, value in vars(batch).items()
        if isinstance(value, torch.Tensor)
    }
    return replace(batch, **moved)
