"""The numbers: those of the authors' packages, and no byte more than the format needs.

What hqq makes of a weight lies beside this file. The packages are kept out of the tests' environment: PEFT imports hqq
and torchao wherever they are installed, which makes every process of every test start seconds later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llmtune_quant.bits import pack, packed_size, unpack
from llmtune_quant.hqq import HalfQuadratic
from llmtune_quant.packed import PackedRule
from llmtune_quant.torchao import WeightOnly
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = Path(__file__).with_name("published.safetensors")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HQQ = [(8, 64), (5, 32), (4, 64), (3, 32), (2, 16), (1, 64)]
"""(bits, group size)."""
SHAPE = (12, 128)


def weight(dtype: torch.dtype) -> Tensor:
    """Like a trained layer: mostly small, a few outliers, and a row in which all numbers are the same."""
    made = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * 0.05
    made[3, 7], made[5] = 1.5, 0.25
    return made.to(dtype)


def write_published() -> None:
    """Needs the package hqq: `python plugins/quant/tests/test_formats.py`."""
    from hqq.core.quantize import Quantizer

    found = {}
    for name, dtype in DTYPES.items():
        for bits, group in HQQ:
            codes, meta = Quantizer.quantize(weight(dtype), nbits=bits, group_size=group, axis=1, device="cpu")
            meta["compute_dtype"] = dtype
            found[f"hqq {bits} {group} {name}"] = Quantizer.dequantize(*Quantizer.cpu(codes, meta)).contiguous()
    save_file(found, FILE, metadata={"made_by": "hqq 0.2.8.post1"})


def there_and_back(form: Any, source: Tensor, storage: torch.dtype = torch.bfloat16) -> Tensor:
    rule = PackedRule("layer", tuple(source.shape), form, storage)
    made = rule.convert(source)
    assert made["layer.weight"].nbytes - form.size(tuple(source.shape)) in range(storage.itemsize)
    return rule.restore(made)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_numbers_come_back_and_take_their_bits(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (1003,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    stored = pack(codes, bits)
    assert stored.numel() == packed_size(1003, bits) <= 1003 * bits / 8 + 3
    assert torch.equal(unpack(torch.cat([stored, stored]), 1003, bits), codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), HQQ)
def test_hqq_weights_are_those_of_the_package(bits: int, group: int, dtype: str) -> None:
    expected = load_file(FILE)[f"hqq {bits} {group} {dtype}"]
    found = there_and_back(HalfQuadratic(bits=bits, group=group, dtype=DTYPES[dtype]), weight(DTYPES[dtype]))
    assert found.dtype == expected.dtype
    # Means may be summed in another order on another CPU: no code may be another one.
    torch.testing.assert_close(found, expected, rtol=0.01 if dtype == "bfloat16" else 1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4", "float8"])
def test_torchao_weights_are_those_of_the_package(kind: Any, dtype: torch.dtype) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    source, layer = weight(dtype), torch.nn.Linear(128, 12, bias=False)
    layer.weight = torch.nn.Parameter(source.clone(), requires_grad=False)
    quantize_(
        layer,
        {
            "int8": Int8WeightOnlyConfig(),
            "float8": Float8WeightOnlyConfig(),
            "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        }[kind],
    )
    found = there_and_back(WeightOnly(kind=kind, group=32, dtype=dtype), source)
    assert found.dtype == dtype and torch.equal(found, layer.weight.dequantize())


def test_fewer_bits_and_larger_groups_are_further_from_the_weight() -> None:
    source = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))

    def error(bits: int, group: int) -> float:
        found = there_and_back(HalfQuadratic(bits=bits, group=group, dtype=torch.float32), source)
        return ((found - source).norm() / source.norm()).item()

    far = [error(bits, 64) for bits in (8, 6, 4, 3, 2, 1)]
    assert far == sorted(far) and far[0] < 0.01 and far[2] < 0.12
    assert error(4, 16) < error(4, 128)


if __name__ == "__main__":
    write_published()
