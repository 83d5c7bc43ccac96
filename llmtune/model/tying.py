"""Tied weights of which the files hold two: as in transformers, they are tied only where the two are equal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmtune.contract.errors import LoadError, listed
from llmtune.model.edits import persistent_names
from llmtune.model.loading import match_keys
from llmtune.model.tensor_reader import FolderReader
from llmtune.model.weight_files import missing_weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from llmtune.model.edits import Ledger
    from llmtune.model.weight_files import StoredTensor

_STEP_ROWS = 8192


def untie(model: Any, folder: Path) -> list[str]:
    """Part what `model`, on the meta device, ties and the files in `folder` hold two of; returns the names.

    Nothing is parted where the weights are not here yet; the loader then looks again.
    """
    if not model.all_tied_weights_keys or missing_weights(folder):
        return []
    with FolderReader(folder) as reader:
        names = tied_in_conflict(model, persistent_names(model), reader)
    part(model, names)
    return names


def require_tied(model: Any, ledger: Ledger, folder: Path, index: Mapping[str, StoredTensor]) -> None:
    """LoadError if the files in `folder` hold two of a tensor, and came after `untie` looked for them."""
    with FolderReader(folder, index) as reader:
        if names := tied_in_conflict(model, {*ledger.direct, *ledger.rules}, reader):
            raise LoadError(
                f"{folder}: the files, which have been fetched since the plan was made, hold {listed(names)} apart "
                "from the tensor that the config ties it to; run the same command again, which then reads them as two"
            )


def tied_in_conflict(model: Any, names: set[str], reader: FolderReader) -> list[str]:
    """Which of the original tensors `names` are tied to another one while the files have two values for them."""
    tied: dict[str, str] = model.all_tied_weights_keys
    if not tied:
        return []
    originals, _ = match_keys(model, reader.keys(), names)
    keys = {original.names[0]: original.keys[0] for original in originals if original.converter is None}
    pairs = {target: (keys[target], keys[source]) for target, source in tied.items() if {target, source} <= keys.keys()}
    return [target for target, pair in pairs.items() if not _equal(reader, *pair)]


def part(model: Any, names: list[str]) -> None:
    """Give each of the tied tensors `names` of a meta model a tensor of its own, in the model and in its config."""
    for name in names:
        module, _, leaf = name.rpartition(".")
        owner = model.get_submodule(module)
        setattr(owner, leaf, nn.Parameter(torch.empty_like(getattr(owner, leaf))))
        del model.all_tied_weights_keys[name]
    if names and not model.all_tied_weights_keys:  # or a reader of what is saved would tie them again
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _equal(reader: FolderReader, one: str, other: str) -> bool:
    shape = reader.shape(one)
    if shape != reader.shape(other):
        return False
    return all(
        torch.equal(reader.rows(one, start, stop).float(), reader.rows(other, start, stop).float())
        for start in range(0, shape[0], _STEP_ROWS)
        for stop in [min(start + _STEP_ROWS, shape[0])]
    )
