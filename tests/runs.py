"""Small recipes that really train, for tests of what surrounds training."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FLOAT32 = {"torch.float32"}
"""What `stored_types` says of a model that is stored in float32."""
LORA: dict[str, Any] = {"name": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1}


def recipe(model: str, data: str, output: Path, **changes: Any) -> dict[str, Any]:
    """Twelve steps of LoRA with dropout on a tiny model, three an epoch."""
    return {
        "model": model,
        "dataset": data,
        "output_dir": str(output),
        "device": "cpu",
        "peft_config": LORA,
        "learning_rate": 1e-2,
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_steps": None,
        "cutoff_len": 128,
        **changes,
    }


def stored_types(folder: Path) -> set[str]:
    """The types of the weights in a model folder, as torch names them."""
    import torch
    from safetensors.torch import load_file

    found = [load_file(file) for file in folder.glob("*.safetensors")]
    found += [torch.load(file, weights_only=True) for file in folder.glob("*.bin")]
    return {str(tensor.dtype) for tensors in found for tensor in tensors.values()}


def killed_at(step: int, run: Path, train: Callable[[], object]) -> None:
    """Train in a process that SIGKILL ends as soon as `run` has as many checkpoints as `step`."""

    def dies() -> None:
        while len([*(run / "checkpoints").glob("step-*")]) < step:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            threading.Thread(target=dies, daemon=True).start()
            train()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
