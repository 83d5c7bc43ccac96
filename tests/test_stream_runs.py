"""Runs of streamed recipes: stopped and continued, on one rank and on two, and stopped by what one rank finds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.contract.errors import DataError, LlmtuneError
from llmtune.training.manifest import verify
from tests.runs import recipe
from tests.spawn import in_ranks
from tests.streams import rows, write
from tests.test_resume import forget_after, trained

KINDS: dict[str, dict[str, Any]] = {"rows": {}, "packs": {"packing": True, "cutoff_len": 96}}


def keys_for(model: str, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return recipe(
        model, str(data), output, streaming=True, buffer_size=20, preprocessing_num_workers=1, save_steps=1,
        save_total_limit=None, **changes,
    )  # fmt: skip


def same(one: Path, other: Path) -> None:
    """Bit-identical weights, and the same metrics but for the time taken."""
    expected, found = trained(one), trained(other)
    assert expected and expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    straight, again = (llmtune.load(folder).metrics for folder in (one, other))
    timed = {"tokens_per_second", "mfu", "peak_memory_bytes"}
    assert [{k: v for k, v in row.items() if k not in timed} for row in straight] == [
        {k: v for k, v in row.items() if k not in timed} for row in again
    ]


@pytest.mark.parametrize("keys", KINDS.values(), ids=KINDS)
def test_a_stopped_run_ends_with_the_same_weights(tiny_llama: str, tmp_path: Path, keys: dict[str, Any]) -> None:
    """Twelve steps of eight rows of 41: two epochs end on the way."""
    data = write(tmp_path / "a.jsonl", rows(41))
    llmtune.train(keys_for(tiny_llama, data, tmp_path / "straight", **keys))
    wanted = keys_for(tiny_llama, data, tmp_path / "stopped", **keys)
    llmtune.train(wanted)
    for stop in (1, 5, 11):
        forget_after(tmp_path / "stopped", stop)
        llmtune.train(wanted)
        same(tmp_path / "straight", tmp_path / "stopped")


def go_on(keys: dict[str, Any], stop: int | None) -> None:
    """On this rank: finish the run, then forget what came after step `stop`."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    llmtune.train(keys)
    torch.distributed.barrier()
    if stop is not None and torch.distributed.get_rank() == 0:
        forget_after(Path(keys["output_dir"]), stop)
    torch.distributed.barrier()


def test_a_run_moves_between_one_rank_and_two(tiny_llama: str, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", rows(41))
    keys = keys_for(tiny_llama, data, tmp_path / "moved", packing=True, cutoff_len=96, peft_config=None,
                    learning_rate=1e-3)  # fmt: skip
    llmtune.train({**keys, "output_dir": str(tmp_path / "straight")})
    llmtune.train(keys)
    forget_after(tmp_path / "moved", 3)
    in_ranks(2, tmp_path / "two", go_on, keys, 8)
    llmtune.train(keys)
    straight, moved = (llmtune.load(tmp_path / name).metrics for name in ("straight", "moved"))
    for one, other in zip(straight, moved, strict=True):
        assert (one["step"], one["tokens"], one.get("epoch")) == (other["step"], other["tokens"], other.get("epoch"))
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
    expected, found = trained(tmp_path / "straight"), trained(tmp_path / "moved")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-5)


def fail(keys: dict[str, Any]) -> str:
    """On this rank: how the run ends."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    with pytest.raises(LlmtuneError) as met:
        llmtune.train(keys)
    return str(met.value)


def test_a_bad_row_of_one_rank_stops_all(tiny_llama: str, tmp_path: Path) -> None:
    """Row 1101 is tokenised by one of the ranks, in the chunk of 336 rows that begins in step 64: there both stop."""
    data = write(tmp_path / "a.jsonl", [*rows(1100), {"instruction": "Say nothing."}, *rows(300)])
    keys = keys_for(tiny_llama, data, tmp_path / "run", disable_shuffling=True, max_steps=80) | {"save_steps": 63}
    messages = in_ranks(2, tmp_path / "two", fail, keys)
    assert all("a.jsonl:1101: no output" in message for message in messages)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "failed" and "a.jsonl:1101" in record["error"]
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert verify(folder).step == 63


def test_rows_held_out_are_evaluated_on(tiny_llama: str, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", rows(60))
    run = llmtune.train(
        keys_for(tiny_llama, data, tmp_path / "run", val_size=6, eval_strategy="steps", eval_steps=6, max_steps=6)
    )
    assert [row["step"] for row in run.metrics if "eval_loss" in row] == [6]


def test_a_changed_file_is_not_continued(tiny_llama: str, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", rows(60))
    keys = keys_for(tiny_llama, data, tmp_path / "run", max_steps=3)
    llmtune.train(keys)
    forget_after(tmp_path / "run", 2)
    write(data, [*rows(59), *rows(1, 100)])
    with pytest.raises(LlmtuneError, match="the tokens to train on are not those the run was started with"):
        llmtune.train(keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": None}, "max_steps: not given, but streaming does not know how many rows an epoch has"),
        ({"eval_strategy": "epoch", "val_size": 4}, "eval_strategy: found epoch, whose end streaming does not know"),
        ({"save_strategy": "epoch"}, "know; set save_strategy: steps and save_steps"),
        ({"per_device_train_batch_size": 64}, "the data have 60 rows, fewer than the 128 of a step"),
    ],
)
def test_what_a_plan_refuses(tiny_llama: str, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    data = write(tmp_path / "a.jsonl", rows(60))
    with pytest.raises((LlmtuneError, DataError), match=re.escape(message)):
        llmtune.plan(keys_for(tiny_llama, data, tmp_path / "run") | changes)


def test_the_plan_says_what_it_looked_at(tiny_llama: str, tmp_path: Path) -> None:
    few = str(llmtune.plan(keys_for(tiny_llama, write(tmp_path / "a.jsonl", rows(80)), tmp_path / "run")))
    assert "rows are read and tokenised while the model trains, shuffled 20 at a time; 80 in all" in few
    assert "12 (10.0 an epoch" in few
    many = llmtune.plan(keys_for(tiny_llama, write(tmp_path / "b.jsonl", rows(5000)), tmp_path / "run", packing=True))
    text = str(many)
    assert "the numbers above are those of the first rows" in text and "train: 256 samples" in text
    assert "rows of up to 128 tokens, kept apart" in text and "an epoch" not in text
    assert many.cost.shape.length > 128 and many.cost.quick.at_peak.total > 0


@pytest.mark.parametrize(("streaming", "rows_looked_at"), [(True, "the first 38"), (False, "38")])
def test_the_plan_counts_packed_rows_that_train_nothing(
    tiny_llama: str, tmp_path: Path, streaming: bool, rows_looked_at: str
) -> None:
    ids = list(range(5, 24))
    ends = [[*ids[:3], *[-100] * 16], [*[-100] * 16, *ids[16:]]]
    data = write(tmp_path / "a.jsonl", [{"input_ids": ids, "labels": ends[number % 2]} for number in range(40)])
    keys = keys_for(tiny_llama, data, tmp_path / "run", packing=True, neat_packing=False, cutoff_len=20)
    plan = llmtune.plan(keys | {"streaming": streaming, "disable_shuffling": True})
    bare = plan.data.batches.units.bare
    assert bare > 4 and f"neat_packing: {bare} of {rows_looked_at} rows are left out" in str(plan)
