"""A stream's batches are those of a run that tokenises first, for everything that can be learnt from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.contract.stages import Batch
from llmtune.data import DataConfig, prepare
from llmtune.data.batch_loader import BatchLoader
from llmtune.distributed.ranks import Ranks
from llmtune.testing import tiny_tokenizer
from tests.streams import CPU, feed, rows, write

KINDS = ("conversation", "preference", "labelled", "prompt", "text", "tokens")


def chat(question: str, *answers: str, **more: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for number, answer in enumerate(answers):
        messages += [{"role": "user", "content": f"{question} {number}"}, {"role": "assistant", "content": answer}]
    messages[-1] |= more
    return messages


def data(kind: str, count: int = 22) -> list[dict[str, Any]]:
    words = ["word " * (1 + number * 5 % 9) for number in range(count)]
    made: dict[str, Any] = {
        "alpaca": lambda number: rows(1, number)[0],
        "weights": lambda number: {"messages": chat("Say", words[number], "Yes.", weight=[0.5, 1, 2][number % 3])},
        "preference": lambda number: {
            "prompt": f"Say {number}", "chosen": words[number], "rejected": f"No {number}.",
        },
        "labelled": lambda number: {"prompt": f"Say {number}", "completion": words[number], "label": number % 3 == 0},
        "text": lambda number: {"text": f"{number} {words[number]}"},
        "tokens": lambda number: {"input_ids": [5 + number, *range(9, 12 + number)]},
    }  # fmt: skip
    return [made[kind](number) for number in range(count)]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, Batch):
        return all(equal(value, getattr(other, name)) for name, value in vars(one).items())
    return one == other


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packs"])
@pytest.mark.parametrize("kind", ["alpaca", "weights", "preference", "labelled", "text", "tokens"])
def test_the_same_batches(tmp_path: Path, kind: str, packing: bool) -> None:
    config = DataConfig(
        dataset=str(write(tmp_path / "a.jsonl", data(kind))), cutoff_len=96, disable_shuffling=True, packing=packing,
        preprocessing_num_workers=1, group_by_length=False,
    )  # fmt: skip
    first = prepare(config, tiny_tokenizer(), seed=0, learns=KINDS)
    stream = prepare(replace(config, streaming=True), tiny_tokenizer(), seed=0, learns=KINDS)
    assert first.train.kind == stream.train.kind and first.train.width == stream.train.width
    batch = 1 if packing else 4
    usual = BatchLoader.make(
        first.train, config, per_device=batch // 2 or 1, micro_steps=min(2, batch), ranks=Ranks(), seed=0, flat=False,
        pad_id=0,
    )  # fmt: skip
    with feed(stream, batch=batch, micro_steps=min(2, batch)) as streamed:
        for step in range(22 // batch if not packing else len(usual.units)):
            wanted, found = usual.step(step, CPU), streamed.step(step, CPU)
            assert len(wanted) == len(found)
            assert usual.tokens(step) == streamed.share_of_tokens(step)
            for one, other in zip(wanted, found, strict=True):
                differing = [
                    name for name, value in vars(one).items()
                    if name != "sample_ids" and not equal(value, getattr(other, name))
                ]  # fmt: skip
                assert not differing


def test_a_step_weighs_what_the_stage_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(24))
    made = prepare(
        DataConfig(dataset=str(path), streaming=True, cutoff_len=96, preprocessing_num_workers=1),
        tiny_tokenizer(),
        seed=0,
    )
    for unit in ("tokens", "samples"):
        with feed(made.counting(unit)) as streamed:
            (batch,) = streamed.step(0, CPU)
            assert batch.weight == (4 if unit == "samples" else len(batch.targets)) and len(batch.targets) > 4
