"""Models whose processors are not there without torchvision, tested with a copy of it where it is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

OPERATORS = """import torch as _torch

_own = _torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):  # what the wheel compiled for GPUs, which a torch for CPUs cannot load
    _own.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
"""What `import torchvision` needs besides its Python files; nothing that processes pictures calls them."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a process that can import torchvision: the one that is installed, or a copy from the index of
    packages (8 MB) that only such a process sees. What transformers does elsewhere must not depend on it."""
    if find_spec("torchvision"):
        return dict(os.environ)
    import torch

    folder = tmp_path_factory.mktemp("torchvision")
    minor = int(torch.__version__.split(".")[1])
    install = [
        "install",
        "--quiet",
        "--no-deps",
        "--retries",
        "0",
        "--target",
        str(folder),
        f"torchvision==0.{minor + 15}.*",
    ]
    done = subprocess.run([sys.executable, "-m", "pip", *install], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs torchvision, and pip finds none: {done.stderr[-200:]}")
    start = folder / "torchvision" / "__init__.py"
    start.write_text(OPERATORS + start.read_text())
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def test_what_needs_torchvision_learns_as_in_transformers_and_pictures_are_taken_as_without_it(
    environment: dict[str, str],
) -> None:
    chosen = ["tests/test_media_inputs.py", "tests/test_media_training.py", "tests/test_video_training.py"]
    chosen += [f"tests/test_media_{name}.py" for name in ("families", "preferences", "spread")]
    wanted = ["pixtral", "mistral3", "sees_video", "videos_that", "less_their_part_for_video", "inputs_are_those"]
    wanted += ["mllama and all_that_trains", "preferences_about and qwen2_5_vl"]
    wanted += ["cannot_run", "lfm2_vl", "cohere2_vision", "kimi", "minicpmv", "video_llava", "mistral_large4"]
    wanted += ["gemma4_unified"]
    chosen += ["-k", " or ".join(f"({one})" for one in wanted)]
    command = [sys.executable, "-m", "pytest", *chosen, "-n", "0", "-p", "no:cacheprovider", "-q"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "SKIPPED" not in done.stdout
