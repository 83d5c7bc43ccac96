"""Laws of how weights arrive: the tensors of the files, whole or in rows, on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmtune.model.tensor_reader import FolderReader
from llmtune.testing import running
from llmtune.testing.contract import Broken, Check, Subject, names
from llmtune.testing.points.edits import same_bytes
from llmtune.testing.ranks import in_ranks


def laws(subject: Subject) -> list[Check]:
    """All; those on several ranks where they can be started."""
    found = [fetches_what_the_files_hold, loads_the_checkpoint]
    return found + ([loads_the_same_on_ranks] if subject.spreads else [])


def fetches_what_the_files_hold(subject: Subject, folder: Path) -> None:
    """`fetch` returns a tensor, or where rows are asked for exactly those, in the file's shape and type."""
    init = subject.built()
    with FolderReader(Path(subject.keys(folder)["model"])) as reader:
        for key in sorted(reader.keys()):
            expected = reader.read(key)
            rows = [None] if init.whole else [None, (0, 1), (0, expected.shape[0]), (expected.shape[0],) * 2]
            for wanted in rows:
                found = init.fetch(reader, key, wanted)
                if not same_bytes(found, expected if wanted is None else expected[slice(*wanted)]):
                    raise Broken(
                        f"fetch({key}, rows={wanted}) is not what the file holds",
                        "Return the tensor, or its rows [start, stop), untouched",
                    )


def loads_the_checkpoint(subject: Subject, folder: Path) -> None:
    """A loaded model holds the checkpoint's bytes, tied weights included."""
    for changes in ({}, {"tie_word_embeddings": True}):
        place = folder / ("tied" if changes else "untied")
        place.mkdir()

        keys = replace(subject, sizes={**subject.sizes, **changes}).keys(place)
        _compare(running.whole_state(keys), Path(keys["model"]), "1 rank")


def loads_the_same_on_ranks(subject: Subject, folder: Path) -> None:
    """Three ranks, on which rows do not fall evenly, hold the checkpoint's bytes together."""
    keys = subject.keys(folder, per_device_train_batch_size=1)
    state = in_ranks(3, folder / "ranks", running.whole_state, keys)[0]
    _compare(state, Path(keys["model"]), "3 ranks")


def _compare(state: Mapping[str, Tensor], model: Path, where: str) -> None:
    theirs: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = theirs.state_dict()
    if odd := [name for name, tensor in expected.items() if not same_bytes(state[name], tensor)]:
        raise Broken(f"on {where} {names(odd)} are not what the files hold", "Answer for the key and rows asked for")
