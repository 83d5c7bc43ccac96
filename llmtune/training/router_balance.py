"""The auxiliary loss that keeps experts equally busy (https://arxiv.org/abs/2101.03961, equations 4 to 6), as
transformers' `load_balancing_loss_func` computes it, over all tokens of a step.

With E experts, R rows of router logits (tokens times layers), C[e] times that an expert is among a row's chosen ones,
and S[e] the sum of its probabilities, the loss is E * sum_e C[e] / R * S[e] / R. Gradients flow through S alone, which
is a sum over micro-batches and ranks; so each micro-batch can give its share once C and R of the whole step are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from llmtune.distributed.ranks import total
from llmtune.model.routers import routers

if TYPE_CHECKING:
    from torch import Tensor

    from llmtune.contract.stages import Batch


class RouterBalance:
    """The balance of a model's routers, times `coefficient`."""

    def __init__(self, model: Any, coefficient: float, tensor_ranks: int) -> None:
        self.coefficient = coefficient
        self._top_k = int(model.config.get_text_config().num_experts_per_tok)
        self._tensor_ranks = tensor_ranks
        self._logits: list[Tensor] | None = None
        self._chosen: Tensor | None = None
        for module, index in routers(model):
            module.register_forward_hook(partial(self._record, index))

    def _record(self, index: int, module: Any, inputs: Any, output: Any) -> None:
        """Keep logits of the model as it trains: not of a reference without adapters, nor of what is computed again."""
        if self._logits is not None and module.training:
            self._logits.append(output[index])

    def begin_step(self, forward: Callable[[int], object], micros: Sequence[Batch]) -> None:
        """Learn how often the whole step chooses each expert. With several micro-batches that takes a forward pass of
        each, before the first backward. Collective."""
        self._chosen = None
        if len(micros) == 1:
            return
        counts = []
        with torch.no_grad():
            for number, micro in enumerate(micros):
                with self._recording() as logits:
                    forward(number)
                counts.append(self._counted(logits, micro)[0])
        self._chosen = self._everywhere(torch.stack(counts).sum(0))

    @contextmanager
    def share(self, micro: Batch) -> Iterator[list[Tensor]]:
        """Around the forward pass of a micro-batch: the list gets its share of the step's loss, a float32 scalar."""
        made: list[Tensor] = []
        with self._recording() as logits:
            yield made
        chosen_E1, sums_E = self._counted(logits, micro)
        chosen_E1 = self._everywhere(chosen_E1) if self._chosen is None else self._chosen
        rows = chosen_E1[-1].clamp(min=1.0)
        made.append(len(sums_E) * (chosen_E1[:-1] * sums_E).sum() / rows**2)

    @contextmanager
    def _recording(self) -> Iterator[list[Tensor]]:
        self._logits = []
        try:
            yield self._logits
        finally:
            self._logits = None

    def _counted(self, logits: list[Tensor], micro: Batch) -> tuple[Tensor, Tensor]:
        """((E + 1,) how often each expert is chosen, and the rows; (E,) sums of probabilities) of sequences alone."""
        counts_LT = _in_sequences(micro).float().reshape(-1).repeat(len(logits))
        probabilities = torch.cat(logits).float().softmax(-1)
        chosen = probabilities.topk(self._top_k, dim=-1).indices.reshape(-1)
        chosen_E = torch.zeros_like(probabilities[0]).index_add(0, chosen, counts_LT.repeat_interleave(self._top_k))
        return torch.cat([chosen_E.detach(), counts_LT.sum()[None]]), counts_LT @ probabilities

    def _everywhere(self, numbers: Tensor) -> Tensor:
        """Over all ranks; a tensor group, whose ranks compute the same, counts once."""
        return total(numbers) / self._tensor_ranks


def _in_sequences(micro: Batch) -> Tensor:
    """(B, T) which tokens are of a sequence: neither padding, nor of blanks that stand beside the rows."""
    counts_BT = torch.ones_like(micro.input_ids) if micro.attention_mask is None else micro.attention_mask.clone()
    if micro.document_starts is None:
        counts_BT[micro.sequences :] = 0
        return counts_BT
    place_T = micro.piece_start + torch.arange(counts_BT.shape[1], device=counts_BT.device)
    return counts_BT * (place_T < micro.document_starts[micro.sequences])
