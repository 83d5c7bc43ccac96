"""`llmtune data check` reads rows that show media as training does, and says what is wrong with each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtune.inference.inspect import check_data
from tests.tiny_media import MODELS, rows

pytest.importorskip("PIL")


def asks(*images: str, marks: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": "<image>" * marks + "what"}, {"role": "assistant", "content": "red"}]
    return {"messages": turns, "images": [*images]}


def test_each_row_is_told_what_is_wrong_with_its_pictures(tmp_path: Path, tiny_llama: str) -> None:
    rows(tmp_path)
    model, data = MODELS["llava"](tmp_path / "llava"), tmp_path / "all.json"
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    good = json.loads((tmp_path / "rows.json").read_text())
    bad = [asks("nothing.png", marks=1), asks("0.png", marks=2), asks("/etc/hostname", marks=1)]
    data.write_text(json.dumps([*good, *bad, asks("broken.png", marks=1)]))
    found = check_data(data, model=str(model))
    reasons = ["missing media", "marks and files differ", "media outside of media_dir", "broken media"]
    assert [each.reason for each in found.bad] == reasons
    assert [each.origin.rpartition("row ")[2] for each in found.bad] == ["9", "10", "11", "12"]
    # Nothing is opened where no model is named, and one that reads text takes no row with pictures.
    assert [each.reason for each in check_data(data).bad] == reasons[:3]
    assert {each.reason for each in check_data(data, model=tiny_llama, keep=None).bad} == {"not only text"}
    elsewhere = tmp_path / "elsewhere" / "all.json"
    elsewhere.parent.mkdir()
    elsewhere.write_text(json.dumps(good))
    assert not check_data(elsewhere, model=str(model), media_dir=str(tmp_path)).bad
