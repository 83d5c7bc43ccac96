"""Rows for new tokens in the embedding and the output head: made with the skeleton, filled with the weights.

The skeleton is built with its new number of rows, so that every edit, every way of sharding and every file that is
saved sees one ordinary model. Only the loader knows that the checkpoint has fewer rows (`Ledger.shapes` holds the
checkpoint's shapes), and gives the others their first value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from llmtune.contract.errors import PlanError, listed
from llmtune.distributed.placement import local, local_box
from llmtune.model.skeleton import config_value

if TYPE_CHECKING:
    from torch import Tensor

    from llmtune.model.edits import Ledger
    from llmtune.model.vocabulary import Vocabulary

CHUNK = 4096
"""Rows that are summed at once: 128 MB in float64 at a width of 4096."""


def grow(config: Any, vocabulary: Vocabulary) -> None:
    """Write the number of rows into transformers' config, from where it reaches the model and what is saved."""
    for part in (config, config.get_text_config()):
        if config_value(part, "vocab_size") == vocabulary.held:
            part.vocab_size = vocabulary.rows


def token_tensors(model: Any, rows: int) -> dict[str, str]:
    """Tensors with one row for each of `rows` tokens, by name, each with the name of its module: the input embedding,
    the output head and its bias."""
    modules = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    names = {id(module): name for name, module in model.named_modules()}
    return {
        f"{names[id(module)]}.{leaf}": names[id(module)]
        for module in modules
        for leaf, tensor in module.named_parameters(recurse=False)
        if tensor.shape[0] == rows
    }


def enter(vocabulary: Vocabulary, ledger: Ledger, former: Mapping[str, tuple[int, ...]]) -> Vocabulary:
    """Find the rows in the ledger's model, and tell the ledger how many of them the checkpoint holds.

    `former`: shapes of the model before it grew. Raises PlanError where other tensors than those of embedding and head
    depend on the number of tokens.
    """
    places = token_tensors(ledger.model, vocabulary.rows)
    grown = {name for name, shape in ledger.shapes.items() if former.get(name) != shape}
    wrong = grown ^ set(places) if vocabulary.rows > vocabulary.held else set()
    if wrong or not places:
        raise PlanError(
            f"resize_vocab: {type(ledger.model).__name__} does not grow by rows of its embedding and output head alone "
            f"({listed(sorted(wrong)) or 'it has neither'}); use tokens for which it has rows, or another model"
        )
    ledger.shapes |= {name: (vocabulary.held, *ledger.shapes[name][1:]) for name in places}
    return replace(vocabulary, places=places)


def fill_rows(vocabulary: Vocabulary, ledger: Ledger, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Give the fresh rows the mean of the trained ones. Collective where the tensors are sharded.

    transformers draws them from a normal distribution around that mean whose covariance is 1e-9 that of the rows, a
    noise of 3e-5 of their spread; here they are the mean itself, which no number of ranks changes. What tells two new
    tokens apart, they learn from the first step on, as each is met in other places.
    """
    fresh = torch.tensor(vocabulary.fresh)
    places = [tensors[ledger.direct[name]] for name in vocabulary.places]
    for tensor in {id(tensor): tensor for tensor in places}.values():  # a tied one once
        mean = mean_of_rows(tensor, vocabulary.trained, device)
        piece, box = local(tensor), local_box(tensor)
        first = box[0].start if box else 0
        mine = fresh[(fresh >= first) & (fresh < first + piece.shape[0])] - first
        with torch.no_grad():
            piece[mine.to(piece.device)] = mean.to(piece)


def mean_of_rows(tensor: Tensor, stop: int, device: torch.device) -> Tensor:
    """Mean over the rows [0, stop) of a tensor of which this rank may hold a piece, in float64; (D,), or this rank's
    part of it. Collective where rows are sharded. Summed in float64, so that the order of ranks does not show."""
    piece, box = local(tensor).detach(), local_box(tensor)
    first = box[0].start if box else 0
    total = torch.zeros(piece.shape[1:], dtype=torch.float64, device=device)
    for rows in piece[: max(0, stop - first)].split(CHUNK):
        total += rows.to(device, torch.float64).sum(0)
    if isinstance(tensor, DTensor):
        for dim, placement in enumerate(tensor.placements):
            if placement.is_shard(0):
                dist.all_reduce(total, group=tensor.device_mesh.get_group(dim))
    return total / stop
