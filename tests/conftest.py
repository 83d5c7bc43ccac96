"""Fixtures shared by all tests, and the marks they understand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


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
    from llmtune.testing import tiny_model_folder

    return str(tiny_model_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def tiny_tied_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with tied embeddings, as most small models have."""
    from llmtune.testing import tiny_model_folder

    return str(tiny_model_folder(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True))


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 short conversations of different lengths, some with two turns, as OpenAI messages."""
    from llmtune.testing import tiny_chats

    return str(tiny_chats(tmp_path_factory.mktemp("data")))


@pytest.fixture
def folder(tiny_llama: str, tmp_path: Path) -> Path:
    """A copy of the tiny model for a test that spoils it."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of pictures, and of rows that show them (rows.json)."""
    from tests.tiny_media import rows

    folder = tmp_path_factory.mktemp("media")
    rows(folder)
    return folder
