"""Checkpoints of GPTQ and AWQ: integers packed into int32, with scales and zero points for groups of inputs.

transformers reads them with kernels only, so their weights are unpacked here, one at a time, as
their authors do. So are those in FP8 some of whose blocks are cut at the end, which transformers does not dequantise.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import LoadError
from llmtune.model.weight_files import INDEX, StoredTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmtune.model.tensor_reader import FolderReader

PARTS = {
    "gptq": (".qweight", ".qzeros", ".scales", ".g_idx"),
    "awq": (".qweight", ".qzeros", ".scales"),
    "fp8": (".weight_scale_inv", ".weight"),
}
"""Ends of names of the tensors that stand for one `.weight`; only weights that are packed have the first."""
ALLOWED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gptq": {"bits": (2, 4, 8), "checkpoint_format": ("gptq", "gptq_v2")},
    "awq": {"bits": (4,), "version": ("gemm",)},
}
"""What can be unpacked, by the keys of `quantization_config`."""
_LEFT_OUT = {"checkpoint_format": "gptq", "version": "gemm"}
"""What a config means that leaves a key out."""
_SHARD_BYTES = 4_000_000_000


def unreadable(about: Mapping[str, Any]) -> str | None:
    """What stands in a `quantization_config` of these kinds that cannot be unpacked, and what can; None if nothing."""
    for key, allowed in ALLOWED[about["quant_method"]].items():
        found = about.get(key) or _LEFT_OUT.get(key)
        if (found.lower() if isinstance(found, str) else found) not in allowed:
            return f"{key} {found}, allowed is {' or '.join(str(value) for value in allowed)}"
    return None


def cut_blocks(index: Mapping[str, StoredTensor]) -> bool:
    """Whether blocks of FP8 do not fill a weight evenly, as of DeepSeek's `kv_a_proj_with_mqa`."""
    pairs = [(index.get(key.removesuffix("_scale_inv")), index[key]) for key in index if key.endswith(PARTS["fp8"][0])]
    return any(
        weight is not None
        and len(scale.shape) == 2
        and any(size % count for size, count in zip(weight.shape, scale.shape, strict=True))
        for weight, scale in pairs
    )


def write_unpacked(files: Path, about: Mapping[str, Any], dtype: torch.dtype, target: Path) -> None:
    """The weights of the folder `files` as safetensors in `target`, the unpacked ones in `dtype`.

    Memory holds one weight and what of a file is not written yet (4 GB). Raises LoadError where tensors are missing or
    do not fit.
    """
    from safetensors.torch import save_file

    from llmtune.model.tensor_reader import FolderReader

    places: dict[str, str] = {}
    held: dict[str, Tensor] = {}

    def write() -> None:
        name = f"model-{len(set(places.values())) + 1:05}.safetensors"
        save_file(held, target / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(held, name))
        held.clear()

    with FolderReader(files) as reader:
        for name, tensor in _weights(reader, about, dtype):
            held[name] = tensor
            if sum(tensor.nbytes for tensor in held.values()) >= _SHARD_BYTES:
                write()
    write()
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")


def _weights(reader: FolderReader, about: Mapping[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    kind = about["quant_method"]
    mark = PARTS[kind][0]
    layers = {key.removesuffix(mark) for key in reader.index if key.endswith(mark)}
    keys: dict[str, dict[str, str]] = defaultdict(dict)
    for key in reader.index:
        layer, _, end = key.rpartition(".")
        if layer in layers and f".{end}" in PARTS[kind]:
            keys[layer][f".{end}"] = key
        elif end not in ("activation_scale", "input_scale"):
            yield key, reader.read(key)
    unpack: Callable[..., Tensor] = {"gptq": _gptq, "awq": _awq, "fp8": _fp8}[kind]
    for layer, ends in keys.items():
        parts = {end: reader.read(key) for end, key in ends.items()}
        try:
            yield f"{layer}.weight", unpack(parts, about).to(dtype)
        except (KeyError, RuntimeError, IndexError) as error:
            found = ", ".join(f"{key} {reader.shape(key)}" for key in ends.values())
            raise LoadError(f"{reader.folder}: {found} make no weight ({error!r}); fetch the model again") from error
        except ValueError as error:
            raise LoadError(f"{reader.folder}: {layer} {error}") from error


def _gptq(parts: Mapping[str, Tensor], about: Mapping[str, Any]) -> Tensor:
    """(out, in), float32. Numbers lie along the inputs, zero points along the outputs; the first format stores zero
    points less one. arXiv 2210.17323."""
    import torch

    bits, less = about["bits"], str(about.get("checkpoint_format") or "gptq").lower() == "gptq"
    codes, zeros = unpacked(parts[".qweight"].t(), bits).t(), unpacked(parts[".qzeros"], bits)
    if less and (zeros == 2**bits - 1).any():
        raise ValueError(
            f"has the zero point {2**bits - 1}, which readers of GPTQ's first format understand in two ways; convert "
            "the checkpoint to checkpoint_format gptq_v2"
        )
    size = about.get("group_size") or -1
    group = parts.get(".g_idx", torch.arange(len(codes)) // (size if size > 0 else len(codes))).long()
    return ((codes - zeros[group] - int(less)) * parts[".scales"].float()[group]).t().contiguous()


def _awq(parts: Mapping[str, Tensor], about: Mapping[str, Any]) -> Tensor:
    """(out, in), float32. Numbers lie along the outputs, each eight out of order. arXiv 2306.00978."""
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # where each of eight outputs lies
    codes, zeros = (
        unpacked(parts[name], 4).unflatten(1, (-1, 8))[:, :, order].flatten(1) for name in (".qweight", ".qzeros")
    )
    size = len(codes) // len(zeros)
    scales = parts[".scales"].float().repeat_interleave(size, 0)
    return ((codes - zeros.repeat_interleave(size, 0)) * scales).t().contiguous()


def _fp8(parts: Mapping[str, Tensor], about: Mapping[str, Any]) -> Tensor:
    """(out, in), float32. Each block has a scale; the last of a row or column may be smaller."""
    weight, scale = parts[".weight"].float(), parts[".weight_scale_inv"].float()
    for dim, size in enumerate(about["weight_block_size"]):
        scale = scale.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
    return weight * scale


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """The numbers of int32 (rows, n) as int32 (rows, n * 32 / bits), the lowest bits first."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)
