"""Rows that a run leaves out are kept for whoever mends them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune.contract.errors import DataError
from tests.runs import recipe


@pytest.fixture
def keys(tiny_llama: str, chats: str, tmp_path: Path) -> dict[str, Any]:
    """24 good rows, one that is no conversation and one that is no JSON."""
    bad = json.dumps({"messages": "hi \u00e9"}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_text(f"{Path(chats).read_text()}{bad}\n{{'a'\n", encoding="utf-8")
    keys = recipe(tiny_llama, str(tmp_path / "rows.jsonl"), tmp_path / "run", on_bad_record="skip", max_steps=1)
    return keys | {"gradient_accumulation_steps": 1}


def test_a_run_writes_what_it_leaves_out_and_says_so(keys: dict[str, Any], tmp_path: Path) -> None:
    run = llmtune.train(keys)
    lines = [json.loads(line) for line in (run.output_dir / "quarantine.jsonl").read_text("utf-8").splitlines()]
    assert [line["origin"] for line in lines] == [f"{tmp_path}/rows.jsonl:25", f"{tmp_path}/rows.jsonl:26"]
    assert lines[0]["row"] == {"messages": "hi \u00e9"} and lines[0]["reason"] == "messages is not a list"
    assert lines[1]["row"] is None and "not JSON" in lines[1]["detail"] and ">>>" in lines[1]["detail"]
    said = str(llmtune.plan(keys, output_dir=str(tmp_path / "other")))
    assert "2 of 26 rows (messages is not a list 1, unreadable 1)" in said
    assert not (tmp_path / "other").exists()


def test_the_file_is_that_of_the_run_in_the_folder(keys: dict[str, Any], chats: str) -> None:
    llmtune.train(keys)
    run = llmtune.train(keys, dataset=chats, overwrite_output_dir=True)
    assert not (run.output_dir / "quarantine.jsonl").exists()
    assert llmtune.plan(keys, dataset=chats, output_dir="elsewhere").data.prepared.report.bad_rows == ()


def test_rows_are_left_out_only_where_it_is_asked_for_and_few(keys: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"2 of 26 rows .*\n.*:25: .*\n.*:26:.*\n.*on_bad_record: skip"):
        llmtune.plan(keys, on_bad_record="error")
    with pytest.raises(DataError, match="more than max_bad_records=1 lets"):
        llmtune.plan(keys, max_bad_records=1)
    assert llmtune.plan(keys, max_bad_records=0.5).data.prepared.report.sources[0].bad.total() == 2
