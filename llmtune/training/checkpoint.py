"""Checkpoints that can be trusted: written aside, hashed, published by a rename, never written to again.

    checkpoints/step-00000100/
        manifest.json   step, ranks, versions, recipe; size and SHA-256 of every other file
        state/          trainable weights and optimiser state, safetensors through torch.distributed.checkpoint
        adapter/        for adapters: the same weights as others read them

No pickle is written or read. Frozen weights are never stored.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from llmtune.contract.errors import CheckpointError, DivergedError, listed
from llmtune.contract.optimizers import Repacks, SpreadsState
from llmtune.distributed.placement import local
from llmtune.distributed.ranks import Ranks, from_first, total, wait_for_all
from llmtune.folders import publish, size_and_hash
from llmtune.training.manifest import Manifest, write_manifest
from llmtune.training.optimizer_state import (
    Box,
    belongs_to_a_shard,
    box_of,
    box_text,
    is_empty,
    parse_box,
    repacked,
    stored_tensors,
)
from llmtune.training.step_folders import step_folder

if TYPE_CHECKING:
    from torch import Tensor, nn


def save(
    root: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    manifest: Manifest,
    ranks: Ranks,
    write_extra: Callable[[Path], None] | None = None,
) -> Path:
    """Write and publish one checkpoint; collective. Returns its folder.

    A kill at any moment leaves either the published folder or an invisible `.partial` one. Raises DivergedError if what
    would be saved is not finite, CheckpointError if the step is already published, or if any rank could not write.
    """
    final = step_folder(root, manifest.step)
    partial = root / f".{final.name}.partial"
    state, numbers = training_state(model, optimizer)
    require_finite(state, manifest.step)
    if from_first(final.exists()):
        raise CheckpointError(f"{final}: already published; checkpoints are never overwritten")
    if ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait_for_all()
    _write_state(state, partial / "state", ranks)
    if write_extra is not None:
        write_extra(partial)
    wait_for_all()
    if ranks.first:
        for scratch in partial.rglob("*.tmp"):
            scratch.unlink()
        files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
        content = replace(
            manifest,
            numbers={**manifest.numbers, "optimizer": numbers},
            files={str(path.relative_to(partial)): size_and_hash(path) for path in files},
        )
        write_manifest(partial, content)
        publish(partial, final)
    wait_for_all()
    return final


def require_finite(state: Mapping[str, Tensor], step: int) -> None:
    """Raise DivergedError, on all ranks alike, where a tensor of any rank is not finite: it is no good to go on from.

    A loss is finite as long as the weights that it was computed with were; the last update may have spoilt them.
    """
    held = {name: local(tensor) for name, tensor in state.items() if tensor.is_floating_point()}
    if not held:
        return
    sound = torch.stack([tensor.isfinite().all() for tensor in held.values()])
    if not total((~sound).sum().double()).item():
        return
    bad = [name.partition("/")[2] for name, fine in zip(held, sound.tolist(), strict=True) if not fine]
    raise DivergedError(
        f"step {step}: the update has left weights or optimiser state that are not finite "
        f"({listed(bad, 3) or 'on another rank'}); nothing of this step is saved, what was saved before it is good. "
        "Lower learning_rate, or set max_grad_norm"
    )


def training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trainable weights and optimiser state as named tensors, and the optimiser's plain numbers."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tensors[f"model/{name}"] = parameter.detach()
        state = optimizer.state.get(parameter, {}) if optimizer else {}
        cut = not isinstance(optimizer, SpreadsState) and belongs_to_a_shard(state, parameter)
        suffix = f"/{box_text(box_of(parameter))}" if cut else ""
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() == 0:
                # A counter: exact as a number, and safetensors storage cannot address a tensor without dimensions.
                numbers[f"{name}/{key}"] = {"value": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
            elif isinstance(value, torch.Tensor):
                tensors[f"optim/{name}/{key}{suffix}"] = value
            else:
                numbers[f"{name}/{key}"] = value
    return tensors, numbers


def _write_state(state: dict[str, Tensor], folder: Path, ranks: Ranks) -> None:
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _alone_is_fine():
        dcp.save(state, storage_writer=writer, no_dist=ranks.size == 1)


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """torch.distributed.checkpoint warns about each save and load of a single process, which is what we mean."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def restore(
    folder: Path, manifest: Manifest, model: nn.Module, optimizer: torch.optim.Optimizer | None, ranks: Ranks
) -> None:
    """Read a verified checkpoint into `model` and `optimizer`; collective.

    Raises CheckpointError if the checkpoint holds other tensors than this recipe trains.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder / "state"))
    stored = reader.read_metadata().state_dict_metadata
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    have = {key.removeprefix("model/") for key in stored if key.startswith("model/")}
    if have != set(trainable):
        odd = listed(sorted(have ^ set(trainable)))
        raise CheckpointError(
            f"{folder}: holds other trained tensors than this recipe trains ({odd}); use the recipe it was made with"
        )
    state: dict[str, Tensor] = {f"model/{name}": parameter.detach() for name, parameter in trainable.items()}
    shards: dict[str, dict[Box, dict[str, str]]] = {}
    for key, facts in stored.items():
        if key.startswith("optim/") and optimizer is not None:
            name, leaf, *box = _parse(key, trainable)
            if box:
                shards.setdefault(name, {}).setdefault(parse_box(box[0]), {})[leaf] = key
            if not box or parse_box(box[0]) == box_of(trainable[name]):
                state[key] = _empty_like_stored(facts, trainable[name], leaf, optimizer, whole=not box)
    cut_anew = {name: found for name, found in shards.items() if box_of(trainable[name]) not in found}
    _require_repacking(folder, manifest, optimizer, cut_anew, trainable, ranks)
    with _alone_is_fine():
        dcp.load(state, storage_reader=reader, no_dist=ranks.size == 1)
    if optimizer is None:
        return
    for key, value in state.items():
        if key.startswith("optim/"):
            name, leaf, *_ = _parse(key, trainable)
            optimizer.state[trainable[name]][leaf] = value
    read = stored_tensors(folder / "state") if cut_anew else None
    for name, found in cut_anew.items():
        if read is not None and not is_empty(box_of(trainable[name])):
            optimizer.state[trainable[name]].update(repacked(cast("Repacks", optimizer), trainable[name], found, read))
    for key, number in manifest.numbers.get("optimizer", {}).items():
        name, _, leaf = key.rpartition("/")
        if name not in trainable:
            raise CheckpointError(f"{folder}: holds optimiser state for {name}, which this recipe does not train")
        counter = isinstance(number, dict)
        optimizer.state[trainable[name]][leaf] = (
            torch.tensor(number["value"], dtype=getattr(torch, number["dtype"])) if counter else number
        )
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.grad = None


def _require_repacking(
    folder: Path, manifest: Manifest, optimizer: Any, cut_anew: Mapping[str, Any], trainable: Mapping[str, Tensor],
    ranks: Ranks,
) -> None:  # fmt: skip
    """On all ranks alike: raise CheckpointError where some rank's state must be cut anew and the optimiser cannot."""
    wanted = any(not is_empty(box_of(trainable[name])) for name in cut_anew)
    device = next(iter(trainable.values())).device
    if total(torch.tensor(float(wanted), device=device)).item() and not isinstance(optimizer, Repacks):
        raise CheckpointError(
            f"{folder}: this optimiser's state is cut for {manifest.ranks} ranks and cannot be used on {ranks.size}; "
            f"resume on {manifest.ranks} ranks, or start a new run from its weights"
        )


def _parse(key: str, trainable: Mapping[str, Any]) -> list[str]:
    name, *rest = key.removeprefix("optim/").split("/")
    if name not in trainable:
        raise CheckpointError(f"optimiser state for {name}, which this recipe does not train")
    return [name, *rest]


def _empty_like_stored(facts: Any, parameter: Any, leaf: str, optimizer: Any, whole: bool) -> Tensor:
    shape, dtype = tuple(facts.size), facts.properties.dtype
    if whole and isinstance(optimizer, SpreadsState):
        return optimizer.empty_state(parameter, leaf, shape, dtype)
    if whole:
        return torch.zeros_like(parameter.detach(), dtype=dtype)
    return torch.zeros(shape, dtype=dtype, device=parameter.device)


def read_trained(folder: Path) -> dict[str, Tensor]:
    """The trained weights of a checkpoint, whole, by model name, whatever the number of ranks that wrote it."""
    reader = dcp.HuggingFaceStorageReader(str(folder / "state"))
    stored = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(tuple(facts.size), dtype=facts.properties.dtype)
        for key, facts in stored.items()
        if key.startswith("model/") and isinstance(facts, TensorStorageMetadata)
    }
    with _alone_is_fine():
        dcp.load(state, storage_reader=reader, no_dist=True)
    return {key.removeprefix("model/"): tensor for key, tensor in state.items()}
