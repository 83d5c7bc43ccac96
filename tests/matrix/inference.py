"""What was trained, used on each base: the logits must be those of transformers and PEFT on the same base."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import llmtune
from llmtune.inference.reopen import open_model
from tests.by_hand import base_by_hand
from tests.matrix.axes import Combo
from tests.matrix.reference import PROBE_IDS
from tests.matrix.runner import TOLERANCE, Result
from tests.matrix.scene import BASES, Scene


def check_inference(scene: Scene, combos: Iterable[Combo]) -> Iterator[Result]:
    """Train each method once in full precision, and open the result on the combination's base."""
    for combo in combos:
        run = trained(scene, combo.method)
        block = BASES[combo.base]
        kernels = None if combo.kernels == "none" else combo.kernels
        options: dict[str, Any] = {"quant_config": block, "kernel_config": kernels}
        ours, _ = open_model(run, dtype=torch.float32, device="cpu", **options)
        expected = by_transformers(scene, run, block)
        with torch.no_grad():
            found = ours.eval()(input_ids=PROBE_IDS).logits
        apart = float((found - expected).abs().max() / expected.abs().max())
        yield Result(combo=combo, outcome="equal" if apart < TOLERANCE else "wrong", logits=apart)


def trained(scene: Scene, method: str) -> Path:
    """A run of `method`, made on first use."""
    folder = scene.root / f"trained-{method}"
    if not folder.exists():
        with contextlib.redirect_stdout(io.StringIO()):
            llmtune.train(scene.recipe(Combo(method=method), folder))
    return folder


def by_transformers(scene: Scene, run: Path, block: dict[str, Any] | None) -> torch.Tensor:
    """Logits of what the run saved, without llmtune."""
    from peft import PeftModel

    adapter = (run / "model" / "adapter_config.json").exists()
    folder = scene.model("llama") if adapter else str(run / "model")
    model: Any = base_by_hand({"model": folder, "quant_config": block})
    if adapter:
        model = PeftModel.from_pretrained(model, str(run / "model"))
    # On some CPUs bitsandbytes repacks 4-bit weights in eval mode and rounds differently; there is no dropout here.
    model.train(bool(block) and block.get("quantization_bit") != 8)
    with torch.no_grad():
        return model(input_ids=PROBE_IDS).logits
