"""Small streams: files, feeds, and what they give."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmtune.data import DataConfig, prepare
from llmtune.data.stream_loader import StreamLoader
from llmtune.distributed.ranks import Ranks
from llmtune.testing import tiny_tokenizer

CPU = torch.device("cpu")


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Alpaca rows that tell themselves apart, of different lengths."""
    return [
        {"instruction": f"Say {number}.", "output": f"{number}" + " word" * (number * 7 % 13)}
        for number in range(first, first + count)
    ]


def write(path: Path, found: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in found), "utf-8")
    return path


def prepared(data: Any, **keys: Any) -> Any:
    keys = {"buffer_size": 16, "preprocessing_num_workers": 1, "cutoff_len": 128, "group_by_length": False, **keys}
    if isinstance(data, list):
        data = tuple(str(each) if isinstance(each, Path) else each for each in data)
    config = DataConfig(dataset=str(data) if isinstance(data, Path) else data, streaming=True, **keys)
    return prepare(config, tiny_tokenizer(), seed=3)


class Meeting:
    """Ranks that are threads of this process."""

    def __init__(self, ranks: int) -> None:
        self._barrier, self._values = threading.Barrier(ranks, timeout=60), [None] * ranks

    def exchange(self, rank: int) -> Callable[[Any], list[Any]]:
        """What `from_all` is to a process."""

        def from_all(value: Any) -> list[Any]:
            self._values[rank] = value
            self._barrier.wait()
            everyone = list(self._values)
            self._barrier.wait()
            return everyone

        return from_all


@contextmanager
def feed(
    made: Any, batch: int = 4, rank: int = 0, ranks: int = 1, micro_steps: int = 1, meeting: Meeting | None = None
) -> Iterator[StreamLoader]:
    """A feed of `batch` rows a step over `ranks` ranks."""
    one = StreamLoader.over(
        made.stream, made.train, per_device=1, micro_steps=1, ranks=Ranks(rank, ranks), flat=False, pad_id=0
    )
    one = replace(one.with_rows(batch, micro_steps), exchange=(meeting or Meeting(1)).exchange(rank))
    try:
        yield one
    finally:
        one.close()


def origins(one: StreamLoader, step: int) -> list[str]:
    """`file:number` of each sample of a step, in the order of its batches."""
    batches = one.step(step, CPU)
    return [Path(one.origin(sample)).name for batch in batches for sample in batch.sample_ids]


def tokens(one: StreamLoader, step: int) -> list[list[int]]:
    """The trained tokens of a step's micro-batches, with what they stand in."""
    batches = one.step(step, CPU)
    return [[*batch.input_ids.reshape(-1).tolist(), -1, *batch.targets.tolist()] for batch in batches]


def targets(one: StreamLoader, step: int) -> list[int]:
    """The trained tokens of a step."""
    return [token for batch in one.step(step, CPU) for token in batch.targets.tolist()]


def run(made: Any, steps: Sequence[int], cursor: Mapping[str, Any] | None = None, look: Any = origins, **more: Any):
    """What `look` finds at each step, and the cursor after the last."""
    with feed(made, **more) as one:
        one.start(steps[0], None if cursor is None else dict(cursor))
        found = [look(one, step) for step in steps]
        return found, json.loads(json.dumps(one.cursor()))


def on_ranks(made: Any, ranks: int, steps: Sequence[int], cursor: Any = None, **more: Any):
    """The same over several ranks: for each step what all of them have, and the cursor of all."""
    meeting = Meeting(ranks)
    with ThreadPoolExecutor(ranks) as threads:
        runs = [
            threads.submit(run, made, steps, cursor, rank=rank, ranks=ranks, meeting=meeting, **more)
            for rank in range(ranks)
        ]
        each = [one.result() for one in runs]
    joined = [sorted(row for found, _ in each for row in found[at]) for at in range(len(steps))]
    assert all(own == each[0][1] for _, own in each)
    return joined, each[0][1]
