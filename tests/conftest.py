"""Fixtures shared by all tests, and the marks they understand."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

# Two cores and many small tensors: more threads than one only cost.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    wanting = [item for item in items if "gpu" in item.keywords]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny random Llama with untied heads and a ChatML tokenizer."""
    from tests.tiny import tiny_model_folder

    return str(tiny_model_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def tiny_tied_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with tied embeddings, as most small models have."""
    from tests.tiny import tiny_model_folder

    return str(tiny_model_folder(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True))


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 short conversations of different lengths, some with two turns, as OpenAI messages."""
    import json

    rows = []
    for number in range(24):
        messages = [
            {"role": "user", "content": f"How much is {number} and {number}?" + " Please." * (number % 4)},
            {"role": "assistant", "content": f"It is {2 * number}." + " Anything else?" * (number % 3)},
        ]
        if number % 5 == 0:
            messages += [{"role": "user", "content": "No."}, {"role": "assistant", "content": "Good day then."}]
        rows.append({"messages": messages})
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def folder(tiny_llama: str, tmp_path: Path) -> Path:
    """A copy of the tiny model for a test that spoils it."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))
