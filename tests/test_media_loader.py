"""Batches whose media other processes read ahead are those that this one reads, in their order; and so are errors."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.contract.errors import DataError, LlmtuneError
from llmtune.data.media_loader import MediaLoader
from llmtune.data.stream_loader import StreamLoader
from llmtune.data.workers import WorkerPool
from llmtune.testing import running
from llmtune.training.isolation import check_media_isolation
from tests.spawn import in_ranks
from tests.tiny_media import MODELS, rows

pytest.importorskip("PIL")
CPU = torch.device("cpu")


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    """Of eight rows, one in each step."""
    return {
        "model": str(MODELS["llava"](tmp_path / "model")), "dataset": str(rows(tmp_path)), "bf16": False,
        "output_dir": str(tmp_path / "run"), "preprocessing_num_workers": 2, "per_device_train_batch_size": 1,
        "disable_shuffling": True,
    }  # fmt: skip


@pytest.fixture
def loader(keys: dict[str, Any]) -> MediaLoader:
    found = llmtune.plan(keys).data.batches
    assert isinstance(found, MediaLoader)
    return found


def same(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(dict(one.media), dict(other.media), rtol=0, atol=0)
        assert one.sample_ids == other.sample_ids


def test_batches_come_in_the_order_of_steps_from_wherever_one_begins(loader: MediaLoader) -> None:
    expected = [loader.step(step, CPU) for step in range(8)]
    loader.start(3)
    for step in (3, 4, 5, 0, 1, 2, 3, 7):
        same(loader.step(step, CPU), expected[step])
    loader.close()
    assert not [each.name for each in threading.enumerate() if each.name.startswith("llmtune-ahead")]
    same(loader.step(1, CPU), expected[1])


def test_a_file_that_broke_since_stops_the_step_that_shows_it(loader: MediaLoader, tmp_path: Path) -> None:
    expected = [loader.step(step, CPU) for step in range(4)]
    broken = tmp_path / "4.png"
    broken.write_bytes(broken.read_bytes()[:60])
    loader.start()
    for step in range(4):
        same(loader.step(step, CPU), expected[step])
    for _ in range(2):
        with pytest.raises(DataError, match=r"4.png has changed since the data were tokenised"):
            loader.step(4, CPU)
    same(loader.step(1, CPU), expected[1])
    loader.close()


def _met(keys: dict[str, Any]) -> str:
    torch.distributed.init_process_group("gloo")
    with pytest.raises(LlmtuneError) as met:
        llmtune.train(keys)
    return str(met.value)


@pytest.mark.parametrize("evaluated", [False, True])
def test_all_ranks_stop_for_a_file_that_one_of_them_cannot_read(evaluated: bool, tmp_path: Path) -> None:
    """What was learnt before is saved."""
    keys = {
        "model": str(MODELS["llava"](tmp_path / "model")), "dataset": str(rows(tmp_path)), "bf16": False,
        "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
        "disable_shuffling": True, "save_steps": None, "max_steps": 4, "ddp_timeout": 60,
    }  # fmt: skip
    if evaluated:
        (tmp_path / "eval").mkdir()
        keys |= {"eval_dataset": str(rows(tmp_path / "eval")), "eval_strategy": "steps", "eval_steps": 1}
    llmtune.plan(keys)  # tokenises the rows
    broken = tmp_path / ("eval/4.png" if evaluated else "5.png")  # the plan opens those of the first rows
    whole = broken.read_bytes()
    broken.write_bytes(whole[:60])
    for said in in_ranks(2, tmp_path / "ranks", _met, keys):
        assert f"{broken.name} has changed since the data were tokenised" in said
        assert f"; step {1 if evaluated else 2} is saved, and the same command goes on after it" in said
    broken.write_bytes(whole)
    assert llmtune.train(keys).metrics[-1]["step"] == 4


def streamed(keys: dict[str, Any]) -> StreamLoader:
    """The same rows, of which two processes read the media ahead."""
    found = llmtune.plan({**keys, "streaming": True, "max_steps": 8}).data.batches
    assert isinstance(found, StreamLoader)
    return found


def alike(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        torch.testing.assert_close(dict(one.media), dict(other.media), rtol=0, atol=0)


def test_a_stream_reads_as_far_ahead_as_its_processes_go_and_goes_on_where_it_was(
    keys: dict[str, Any], loader: MediaLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, begun, begin = [loader.step(step, CPU) for step in range(8)], [], WorkerPool.begin
    monkeypatch.setattr(WorkerPool, "begin", lambda pool, item: begun.append(item) or begin(pool, item))
    stream, ahead, cursors = streamed(keys), [], []
    for step in range(8):
        alike(stream.step(step, CPU), expected[step])
        ahead.append(len(begun) - step - 1)
        cursors.append(json.loads(json.dumps(stream.cursor())))
    stream.close()
    assert max(ahead) == ahead[4] == 2  # as many as processes, once those of the first steps are begun
    stream = streamed(keys)
    stream.start(3, cursors[2])  # which was read beyond
    for step in (3, 4, 5):
        alike(stream.step(step, CPU), expected[step])
    stream.close()


def test_a_stream_stops_at_the_step_that_shows_a_file_that_broke_since(
    keys: dict[str, Any], loader: MediaLoader, tmp_path: Path
) -> None:
    expected, stream = [loader.step(step, CPU) for step in range(6)], streamed(keys)
    alike(stream.step(0, CPU), expected[0])  # all rows are tokenised, and what the next two steps show is read
    (tmp_path / "6.png").write_bytes((tmp_path / "6.png").read_bytes()[:60])
    for step in range(1, 6):
        alike(stream.step(step, CPU), expected[step])
    for _ in range(2):
        with pytest.raises(DataError, match=r"6.png has changed since the data were tokenised"):
            stream.step(6, CPU)
    stream.close()


def test_packed_rows_are_compared_by_the_shortest(keys: dict[str, Any]) -> None:
    """Rows of the length of a context would take as much memory as training, and more."""
    data = Path(keys["dataset"])
    written = json.loads(data.read_text())
    longer = [{**row, "messages": [{**each, "content": each["content"] + " what" * 99} for each in row["messages"]]}
              for row in written]  # fmt: skip
    data.write_text(json.dumps([*longer, *written]))
    plan, objective = running.start({**keys, "packing": True, "cutoff_len": 512})
    seen: list[int] = []
    objective.model.base_model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    check_media_isolation(objective, plan.device, plan.data.batches)
    packs = plan.data.batches.units.tokens
    assert len(seen) > 4 and max(seen) <= packs.max() < plan.data.batches.samples.lengths[:6].sum()
