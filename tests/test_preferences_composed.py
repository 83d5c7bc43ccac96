"""dpo, kto and rm with every method, base, init, kernel, layout, checkpointing and number of ranks: the same numbers.

`test_further_models.py` has more of the references of dpo.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtune.testing import running
from tests.spawn import in_ranks

STAGES = {"dpo": "preference", "kto": "labelled", "rm": "preference"}
LORA = {"name": "lora", "lora_dropout": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"peft_config": LORA},
    "freeze": {"peft_config": "freeze"},
    "qlora": {"peft_config": LORA, "quant_config": {"name": "bnb", "quantization_bit": 4}},
}
PACKED = {"packing": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "rank0": {"init_config": "init_on_rank0", "kernel_config": "auto", "activation_checkpointing": "full"},
    "rows": {
        "init_config": "init_on_default", "activation_checkpointing": "selective", "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
    },
    "packs": {"init_config": "init_on_meta", "activation_checkpointing": "full", **PACKED},
    "packs with kernels": {"kernel_config": "auto", "activation_checkpointing": "none", **PACKED},
}  # fmt: skip
"""Every step learns from all eight rows, so that packs make up the same steps."""


def keys(folder: Path, stage: str, name: str, **more: Any) -> dict[str, Any]:
    return running.tiny_recipe(
        folder, kind=STAGES[stage], output_dir=str(folder / name),
        **{
            "stage_config": stage, "max_samples": 8, "disable_shuffling": True, "learning_rate": 0.01, "max_steps": 3,
            "activation_checkpointing": "none", **more,
        },
    )  # fmt: skip


def found(several: list[dict[str, Any]]) -> list[np.ndarray]:
    """(steps, 4) of what each run reports."""
    names = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected")
    return [np.array([[row[name] for name in names] for row in running.train(each).metrics]) for each in several]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", STAGES)
def test_numbers_do_not_depend_on_how_a_run_is_put_together(stage: str, method: str, tmp_path: Path) -> None:
    # Which answers kto crosses follows the order of a step's rows, which packs change.
    variants = {name: more for name, more in VARIANTS.items() if stage != "kto" or "packing" not in more}
    made = [keys(tmp_path, stage, name, **METHODS[method], **more) for name, more in variants.items()]
    expected, *others = found([keys(tmp_path, stage, "plain", **METHODS[method]), *made])
    assert np.isfinite(expected).all() and abs(expected[-1, 0] - expected[0, 0]) > 1e-3  # it learns
    for name, other in zip(variants, others, strict=True):
        assert other == pytest.approx(expected, rel=2e-4, abs=2e-5), name
    two = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    spread = [
        {**each, **two, "output_dir": f"{each['output_dir']} on two"}
        for name, each in zip(variants, made, strict=True)
        if name != "rows"
    ]
    for each, other in zip(spread, in_ranks(2, tmp_path / "ranks", found, spread)[0], strict=True):
        assert other == pytest.approx(expected, rel=2e-4, abs=2e-5), each["output_dir"]
