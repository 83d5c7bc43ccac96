"""The contract: all kernels together, and each by itself, on the models it suits."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from llmtune.testing import Law, laws

ALL = laws("kernel_config", "auto")
ON_CPU = [
    law
    for name, families in {
        "packed_attention": ("llama", "qwen3", "mistral"),
        "linear_cross_entropy": ("gemma2", "granite", "qwen2"),
    }.items()
    for family in families
    for law in laws("kernel_config", "auto", {"include_kernels": name}, family=family, ranks=False)
]
WIDTHS = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "initializer_range": 0.05}
LIGER = [
    law
    for name, families in {
        "liger_rms_norm": ("llama", "qwen3", "gemma2"),
        "liger_swiglu": ("llama", "qwen3"),
        "liger_rope": ("llama", "qwen3"),
        "liger_linear_cross_entropy": ("llama", "qwen3"),
    }.items()
    for family in families
    for law in laws(
        "kernel_config", "auto", {"include_kernels": name}, family=family, sizes=WIDTHS, device="cuda", tolerance=2e-3
    )
]


@pytest.mark.parametrize("law", [*ALL, *ON_CPU], ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel")
@pytest.mark.parametrize("law", LIGER, ids=str)
def test_contract_on_a_gpu(law: Law, tmp_path: Path) -> None:
    law(tmp_path)
