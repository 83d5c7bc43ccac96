"""Random weights in the place of a model's own, for training from scratch: made once, kept in the cache."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from llmtune.folders import publish
from llmtune.model.gguf import converting

OWN = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".index.json")
"""Ends of names of files that hold weights or say where they are."""


def random_weights(files: Path, config: Any, auto_class: Any, seed: int, cache: Path, **kwargs: Any) -> Path:
    """A folder with the small `files` of a model and weights as transformers draws them for its `config`.

    The numbers follow from `seed` alone, and are stored in the type that the config declares, else in float32. The
    whole model is in the memory of the process that makes it.
    """
    about = f"{(files / 'config.json').read_text(encoding='utf-8')} {seed} {transformers.__version__} {auto_class}"
    name = hashlib.sha256(about.encode()).hexdigest()[:16]
    target = cache / "scratch" / f"{config.model_type}-{seed}-{name}"
    with converting(target) as ready:
        if ready:
            return target
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = auto_class.from_config(config, dtype=torch.float32, **kwargs)
        declared = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        folder = Path(tempfile.mkdtemp(dir=target.parent))
        model.to(declared).save_pretrained(folder)
        for file in files.iterdir():
            if file.is_file() and not file.name.endswith(OWN):
                shutil.copyfile(file, folder / file.name)
        publish(folder, target)
    return target
