"""Checks of a model folder that read headers only: is every weight file there, whole, and what it claims to be?

A safetensors file starts with 8 bytes (little-endian length of the header), the header (JSON) and the tensors,
whose last offset in the header gives the size the file must have.
"""

from __future__ import annotations

import json
from pathlib import Path

from llmtune.contract.errors import LoadError, listed, raise_all

INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_LARGEST_HEADER_BYTES = 100_000_000  # the safetensors library refuses longer ones, too


def check_weight_files(folder: Path) -> tuple[Path, ...]:
    """Paths of the safetensors files that hold the weights of `folder`, each proven whole as far as headers tell.

    Raises LoadError naming the file, the cause (a Git LFS pointer, an HTML page, truncated with both byte counts,
    a name that leads out of the folder, pickles only) and the fix; all damaged files are reported at once.
    """
    files = [folder / name for name in weight_names(folder)]
    problems = [problem for file in files if (problem := _damage(file, folder))]
    raise_all([LoadError(problem) for problem in problems])
    return tuple(files)


def holds_no_weights(folder: Path) -> bool:
    """Whether a folder has weights in no format at all, just the description of a model."""
    return not any(file.name == INDEX or file.suffix in (".safetensors", *_PICKLES) for file in folder.iterdir())


def weight_names(folder: Path) -> list[str]:
    """The files that hold the weights of `folder`, sorted. LoadError where there are none."""
    if (folder / INDEX).is_file():
        return index_names(folder / INDEX)
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if "model.safetensors" in names:
        return ["model.safetensors"]
    if names:
        return [name for name in names if not name.startswith(("adapter", "consolidated"))] or names
    raise LoadError(no_weights(str(folder), [file.name for file in folder.iterdir()]))


def no_weights(where: str, names: list[str]) -> str:
    """Why a model with these file names cannot be loaded: pickles only, or no weights at all."""
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if not pickles:
        return f"{where} holds no weights: a model.safetensors, or {INDEX} with its files, is needed"
    return (
        f"{where} holds its weights only as Python pickles ({listed(pickles, 3)}), and opening a pickle can run any "
        f'code, so llmtune reads safetensors only. If you trust the file, convert it once: python -c "from '
        f"transformers import AutoModelForCausalLM as M; M.from_pretrained('{where}').save_pretrained('converted')\" "
        "and copy the tokenizer's files along"
    )


def index_names(index: Path) -> list[str]:
    """File names listed in a safetensors index. LoadError where one is not a plain name."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        cause = _not_safetensors(index.read_bytes()[:512]) or f"it is no index of weight files ({error!r})"
        raise LoadError(f"{index} cannot be read: {cause}. Fetch the file again") from error
    for name in names:
        plain = isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\:\0")
        if not plain:
            raise LoadError(
                f"{index} names the weight file {name!r}; only plain names of .safetensors files in the same folder "
                "are allowed, anything else could read files elsewhere. Do not use this model, or mend its index"
            )
    return sorted(names)


def _damage(file: Path, folder: Path) -> str | None:
    """What is wrong with one weight file, in a sentence; None if it looks whole."""
    if not file.exists():
        missing = "is a link to a file that is gone" if file.is_symlink() else f"is named in {INDEX}, but missing"
        return f"{file} {missing}. Fetch the model again (hub models: hf cache verify)"
    if not any(file.resolve().is_relative_to(root) for root in _roots(folder)):
        return (
            f"{file} is a link out of its folder, to {file.resolve()}; only files inside the folder are read. "
            "Put the file itself there"
        )
    size_bytes = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(512)
        cause = _not_safetensors(start)
        if cause is None and size_bytes < 8:
            cause = f"it is truncated: {size_bytes} bytes, a safetensors header alone takes more"
        if cause is None:
            header_bytes = int.from_bytes(start[:8], "little")
            stream.seek(8)
            cause = _wrong_size(stream.read(min(header_bytes, _LARGEST_HEADER_BYTES)), header_bytes, size_bytes)
    return f"{file} cannot be read: {cause}" if cause else None


def _roots(folder: Path) -> list[Path]:
    # The hub's cache keeps the files of <cache>/models--x--y/snapshots/<commit> in <cache>/models--x--y/blobs,
    # and since huggingface_hub 2 in <cache>/blobs.
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        repo = folder.resolve().parent.parent
        roots += [repo / "blobs", repo.parent / "blobs"]
    return roots


def _not_safetensors(start: bytes) -> str | None:
    if not start:
        return "it is empty (0 bytes). Fetch it again (hub models: hf cache verify)"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself. Run `git lfs pull` in the folder"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "it is an HTML page, not weights; a download was answered by a web page (a login or an error). "
            "Download the file again"
        )
    return None


def _wrong_size(header: bytes, header_bytes: int, size_bytes: int) -> str | None:
    again = "Fetch it again (hub models: hf cache verify)"
    if header_bytes > _LARGEST_HEADER_BYTES:
        return f"it is no safetensors file: its header claims {header_bytes:,} bytes. {again}"
    if header_bytes + 8 > size_bytes:
        return f"it is truncated: at least {header_bytes + 8:,} bytes expected, {size_bytes:,} found. {again}"
    try:
        tensors = {key: value for key, value in json.loads(header).items() if key != "__metadata__"}
        expected = 8 + header_bytes + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return f"it is no safetensors file: its header is damaged. {again}"
    if expected > size_bytes:
        return f"it is truncated: {expected:,} bytes expected, {size_bytes:,} found. {again}"
    if expected < size_bytes:
        return f"it is longer than its header says: {expected:,} bytes expected, {size_bytes:,} found. {again}"
    return None
