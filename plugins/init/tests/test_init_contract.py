"""The contract, and what each way of loading reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from llmtune_init import InitConfig, init_config
from torch import Tensor

from llmtune.testing import Law, in_ranks, laws

NAMES = ("init_on_meta", "init_on_rank0", "init_on_default")


@pytest.mark.parametrize("law", [law for name in NAMES for law in laws("init_config", name)], ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)


class Listening:
    """A reader of one tensor (6, 4) that notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.tensor = torch.arange(24.0).reshape(6, 4)

    def shape(self, key: str) -> tuple[int, ...]:
        return (6, 4)

    def dtype(self, key: str) -> torch.dtype:
        return torch.float32

    def read(self, key: str) -> Tensor:
        self.asked.append(key)
        return self.tensor

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        self.asked.append((key, start, stop))
        return self.tensor[start:stop]


def way(name: str):
    (plugin,) = (plugin for plugin in init_config() if plugin.name == name)
    return plugin.build(InitConfig())


def test_on_meta_reads_its_rows_and_no_others() -> None:
    reader = Listening()
    assert torch.equal(way("init_on_meta").fetch(reader, "w", (2, 5)), reader.tensor[2:5])
    assert reader.asked == [("w", 2, 5)]


def fetch_on_this_rank() -> tuple[list[object], list[list[float]]]:
    torch.distributed.init_process_group("gloo")
    reader = Listening()
    found = way("init_on_rank0").fetch(reader, "w", None)
    return reader.asked, found.tolist()


def test_on_rank0_the_others_read_nothing_and_have_the_same(tmp_path: Path) -> None:
    (asked, first), (asked_too, second) = in_ranks(2, tmp_path, fetch_on_this_rank)
    assert asked == ["w"] and asked_too == []
    assert first == second == torch.arange(24.0).reshape(6, 4).tolist()
