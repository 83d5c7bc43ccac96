"""Checkpoints that can be trusted: written aside, hashed, published by a rename, never written to again.

    checkpoints/step-00000100/
        manifest.json   step, ranks, versions, recipe; size and SHA-256 of every other file
        state/          trainable weights and optimiser state, safetensors through torch.distributed.checkpoint
        adapter/        for adapters: the same weights as others read them

No pickle is written or read. Frozen weights are never stored.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmtune.contract.errors import CheckpointError, listed
from llmtune.contract.records import Repacks
from llmtune.distributed.ranks import Ranks, from_first, total, wait_for_all
from llmtune.training.optimizer_state import (
    Box,
    belongs_to_a_piece,
    box_of,
    box_text,
    is_empty,
    parse_box,
    repacked,
    stored_tensors,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    ranks: int
    recipe: Mapping[str, Any]
    """The resolved recipe, to compare on resume."""
    plugins: Mapping[str, Any]
    llmtune: str
    rows: int = 0
    """Rows (packs, with packing) of an optimiser step over all ranks; the run keeps it on any number of ranks."""
    data: str = ""
    """Hash of the tokenised training data."""
    revision: str | None = None
    """The base model's commit on the hub."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Plain values the run continues with: counters, loss scale, optimiser scalars."""
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """Path to (bytes, SHA-256)."""
    schema: int = SCHEMA


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is published; the name sorts as the number does."""
    return root / f"step-{step:08d}"


def save(
    root: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    manifest: Manifest,
    ranks: Ranks,
    write_extra: Callable[[Path], None] | None = None,
) -> Path:
    """Write and publish one checkpoint; collective. Returns its folder.

    A kill at any moment leaves either the published folder or an invisible `.partial` one. Raises CheckpointError if
    the step is already published, or if any rank could not write.
    """
    final = step_folder(root, manifest.step)
    partial = root / f".{final.name}.partial"
    if from_first(final.exists()):
        raise CheckpointError(f"{final}: already published; checkpoints are never overwritten")
    if ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait_for_all()
    state, numbers = training_state(model, optimizer)
    _write_state(state, partial / "state", ranks)
    if write_extra is not None:
        write_extra(partial)
    wait_for_all()
    if ranks.first:
        for scratch in partial.rglob("*.tmp"):
            scratch.unlink()
        content = asdict(manifest) | {
            "numbers": {**manifest.numbers, "optimizer": numbers},
            "files": {
                str(path.relative_to(partial)): _fingerprint(path)
                for path in sorted(partial.rglob("*"))
                if path.is_file()
            },
        }
        _write_synced(partial / "manifest.json", json.dumps(content, indent=1))
        for inner in [*(path for path in partial.rglob("*") if path.is_dir()), partial]:
            _sync_folder(inner)
        os.rename(partial, final)
        _sync_folder(root)
    wait_for_all()
    return final


def training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trainable weights and optimiser state as named tensors, and the optimiser's plain numbers."""
    import torch

    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tensors[f"model/{name}"] = parameter.detach()
        state = optimizer.state.get(parameter, {}) if optimizer else {}
        suffix = f"/{box_text(box_of(parameter))}" if belongs_to_a_piece(state, parameter) else ""
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
    import torch.distributed.checkpoint as dcp

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
    import torch
    import torch.distributed.checkpoint as dcp

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
    pieces: dict[str, dict[Box, dict[str, str]]] = {}
    for key, facts in stored.items():
        if key.startswith("optim/") and optimizer is not None:
            name, leaf, *box = _parse(key, trainable)
            if box:
                pieces.setdefault(name, {}).setdefault(parse_box(box[0]), {})[leaf] = key
            if not box or parse_box(box[0]) == box_of(trainable[name]):
                state[key] = _empty_like_stored(facts, trainable[name], whole=not box)
    cut_anew = {name: found for name, found in pieces.items() if box_of(trainable[name]) not in found}
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
    import torch

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


def _empty_like_stored(facts: Any, parameter: Tensor, whole: bool) -> Tensor:
    import torch

    dtype = facts.properties.dtype
    if whole:
        return torch.zeros_like(parameter.detach(), dtype=dtype)
    return torch.zeros(tuple(facts.size), dtype=dtype, device=parameter.device)


def read_manifest(folder: Path) -> Manifest:
    """Parse `manifest.json`. Raises CheckpointError for a missing or unreadable one."""
    try:
        content = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: not a checkpoint of llmtune, manifest.json cannot be read ({error})"
        ) from error
    if content.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{folder}: made by another llmtune (format {content.get('schema')}, this one reads {SCHEMA})"
        )
    return Manifest(**content)


def verify(folder: Path) -> Manifest:
    """Check every file against the manifest's size and hash. Raises CheckpointError naming the file."""
    manifest = read_manifest(folder)
    for name, (size, digest) in manifest.files.items():
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{path}: missing; the manifest lists it")
        found = path.stat().st_size
        if found != size:
            raise CheckpointError(f"{path}: {found} bytes, the manifest says {size}; the file is damaged")
        if _fingerprint(path)[1] != digest:
            raise CheckpointError(f"{path}: its content does not match the manifest's SHA-256; the file is damaged")
    return manifest


def newest(root: Path) -> tuple[Path, Manifest, list[str]] | None:
    """The newest checkpoint that verifies, and why newer ones were passed over; None where there is none at all.

    Raises CheckpointError if there are checkpoints and none is sound: starting over silently would lose a run.
    """
    passed = []
    folders = sorted(root.glob("step-*"), reverse=True)
    for folder in folders:
        try:
            return folder, verify(folder), passed
        except CheckpointError as error:
            passed.append(str(error))
    if folders:
        raise CheckpointError(
            "no checkpoint is sound: " + "; ".join(passed) + ". Start a new output_dir, or restore the files"
        )
    return None


def sweep(root: Path) -> None:
    """Delete what killed runs left half-written or half-deleted."""
    for pattern in (".step-*.partial", ".step-*.deleted"):
        for folder in root.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def retain(root: Path, most: int | None, keep: set[Path]) -> list[Path]:
    """Delete the oldest published checkpoints beyond `most`, never one of `keep`. Returns what was deleted."""
    if most is None:
        return []
    folders = sorted(root.glob("step-*"))
    spare = [folder for folder in folders if folder not in keep]
    surplus = spare[: max(0, len(folders) - max(most, 1))]
    for folder in surplus:
        # Renamed first, so that a kill leaves no half-deleted checkpoint under a published name.
        doomed = folder.with_name(f".{folder.name}.deleted")
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return surplus


def _fingerprint(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return path.stat().st_size, digest


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_trained(folder: Path) -> dict[str, Tensor]:
    """The trained weights of a checkpoint, whole, by model name, whatever the number of ranks that wrote it."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

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
