"""The safetensors files of a model folder: which ones count, whether each is whole, and what their headers say.

A safetensors file starts with 8 bytes (little-endian length of the header), the header (JSON) and the tensors,
whose last offset in the header gives the size the file must have.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import LoadError, listed, raise_all

if TYPE_CHECKING:
    import torch

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_LARGEST_HEADER_BYTES = 100_000_000  # the safetensors library refuses longer ones, too
_AGAIN = "Fetch it again (hub models: hf cache verify)"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies on disk. Plain values, so that one rank can tell the others."""

    file: str
    dtype: str
    """The type as safetensors names it, such as `BF16`."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    stop: int


def holds_no_weights(folder: Path) -> bool:
    """Whether a folder has weights in no format at all, just the description of a model."""
    return not any(file.name == INDEX or file.suffix in (".safetensors", *_PICKLES) for file in folder.iterdir())


def missing_weights(folder: Path) -> list[str]:
    """Weight files that are not there (yet), as of a hub model that was fetched in part."""
    sharded = (folder / INDEX).is_file() and not (folder / WHOLE).exists()
    if not sharded and any(folder.glob("*.safetensors")):
        return []
    return [name for name in (index_names(folder / INDEX) if sharded else [WHOLE]) if not (folder / name).is_file()]


def weight_names(folder: Path) -> list[str]:
    """The files that hold the weights of `folder`, sorted; of those that could, transformers' choice.

    Raises LoadError where there are none.
    """
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if WHOLE in names:
        return [WHOLE]
    if (folder / INDEX).is_file():
        return index_names(folder / INDEX)
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
    names = set(_weight_map(index).values())
    for name in names:
        plain = isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\:\0")
        if not plain:
            raise LoadError(
                f"{index} names the weight file {name!r}; only plain names of .safetensors files in the same folder "
                "are allowed, anything else could read files elsewhere. Do not use this model, or mend its index"
            )
    return sorted(names)


def _weight_map(index: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        cause = _not_safetensors(index.read_bytes()[:512]) or f"it is no index of weight files ({error!r})"
        raise LoadError(f"{index} cannot be read: {cause}. Fetch the file again") from error


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder, from the headers of its files, each of which is whole as far as they tell.

    Raises LoadError naming the file, the cause (a Git LFS pointer, an HTML page, truncated with both byte counts,
    a name that leads out of the folder, pickles only, a tensor twice or not at all) and the fix; all damaged files are
    reported at once.
    """
    tensors: dict[str, StoredTensor] = {}
    problems = []
    names = weight_names(folder)
    for name in names:
        try:
            header = _header_inside(folder / name, folder)
        except LoadError as error:
            problems.append(error)
            continue
        if twice := sorted(tensors.keys() & header.keys()):
            problems.append(
                LoadError(
                    f"{folder}: {tensors[twice[0]].file} and {name} both hold the tensor {listed(twice, 3)}, so it "
                    "is not clear which counts; leave only the files of one model in the folder"
                )
            )
        tensors |= header
    raise_all(problems)
    index = folder / INDEX
    if names != [WHOLE] and index.is_file() and (lacking := sorted(set(_weight_map(index)) - set(tensors))):
        raise LoadError(f"{index}: names {lacking[0]}, which its file does not hold; {_AGAIN}")
    return tensors


def stored_dtype(index: Mapping[str, StoredTensor], declared: torch.dtype | None) -> torch.dtype:
    """The type of a model's weights on disk: of all that are numbers with a point, if they agree; else the one that
    its config declares, else the one of most of the numbers."""
    import torch

    counts: Counter[torch.dtype] = Counter()
    for tensor in index.values():
        kind = torch_type(tensor.dtype)
        if kind.is_floating_point and kind.itemsize > 1:  # what has 8 bits is packed
            counts[kind] += (tensor.stop - tensor.start) // kind.itemsize
    if len(counts) > 1 and declared is not None:
        return declared
    return counts.most_common(1)[0][0] if counts else declared or torch.bfloat16


def torch_type(name: str) -> torch.dtype:
    """torch's type for safetensors' name of it. ValueError for one that llmtune does not read."""
    import torch

    types: dict[str, Any] = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
        "U8": torch.uint8, "BOOL": torch.bool,
    }  # fmt: skip
    if name not in types:
        raise ValueError(f"it has tensors of type {name}, which llmtune does not read")
    return types[name]


def _header_inside(file: Path, folder: Path) -> dict[str, StoredTensor]:
    if not file.exists():
        missing = "is a link to a file that is gone" if file.is_symlink() else f"is named in {INDEX}, but missing"
        raise LoadError(f"{file} {missing}. Fetch the model again (hub models: hf cache verify)")
    if not any(file.resolve().is_relative_to(root) for root in _roots(folder)):
        raise LoadError(
            f"{file} is a link out of its folder, to {file.resolve()}; only files inside the folder are read. "
            "Put the file itself there"
        )
    return read_header(file)


def _roots(folder: Path) -> list[Path]:
    # The hub's cache keeps the files of <cache>/models--x--y/snapshots/<commit> in <cache>/models--x--y/blobs,
    # and since huggingface_hub 2 in <cache>/blobs.
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        repo = folder.resolve().parent.parent
        roots += [repo / "blobs", repo.parent / "blobs"]
    return roots


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by key. Raises LoadError with the cause and the fix if the file is not whole."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(512)
        length = int.from_bytes(start[:8], "little")
        if cause := _not_safetensors(start) or _wrong_length(length, size):
            raise LoadError(f"{file} cannot be read: {cause}")
        stream.seek(8)
        header = stream.read(length)
    try:
        tensors = {
            key: StoredTensor(file.name, facts["dtype"], tuple(facts["shape"]), *_place(facts, 8 + length))
            for key, facts in json.loads(header).items()
            if key != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        known = "llmtune does not read" in str(error)
        cause = str(error) if known else f"it is no safetensors file: its header is damaged. {_AGAIN}"
        raise LoadError(f"{file} cannot be read: {cause}") from error
    end = max((tensor.stop for tensor in tensors.values()), default=8 + length)
    if end != size:
        kind = "truncated" if end > size else "longer than its header says"
        raise LoadError(f"{file} cannot be read: it is {kind}: {end:,} bytes expected, {size:,} found. {_AGAIN}")
    return tensors


def _place(facts: Mapping[str, Any], first: int) -> tuple[int, int]:
    """A tensor's first byte in the file and the one after its last. ValueError where its shape has another size."""
    start, stop = facts["data_offsets"]
    count = torch_type(facts["dtype"]).itemsize
    for extent in facts["shape"]:
        count *= extent
    if start < 0 or stop - start != count:
        raise ValueError(f"{count} bytes lie at {start} to {stop}")
    return first + start, first + stop


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


def _wrong_length(header_bytes: int, size_bytes: int) -> str | None:
    if size_bytes < 8:
        return f"it is truncated: {size_bytes} bytes, a safetensors header alone takes more. {_AGAIN}"
    if header_bytes > _LARGEST_HEADER_BYTES:
        return f"it is no safetensors file: its header claims {header_bytes:,} bytes. {_AGAIN}"
    if header_bytes + 8 > size_bytes:
        return f"it is truncated: at least {header_bytes + 8:,} bytes expected, {size_bytes:,} found. {_AGAIN}"
    return None
