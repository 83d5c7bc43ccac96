"""`llmtune data check` reads rows that show media as training does, and says what is wrong with each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune.inference.inspect import check_data
from llmtune.model.generation import encode
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


def test_a_mark_without_a_picture_is_told_where_a_model_would_be_blind(tmp_path: Path, tiny_llama: str) -> None:
    data, model = tmp_path / "rows.json", MODELS["qwen2_vl"](tmp_path / "qwen2_vl")
    row = asks(marks=1)
    data.write_text(json.dumps([{**row, "images": None}, {"messages": row["messages"], "imgs": ["0.png"]}]))
    found = check_data(data, model=str(model))
    assert [each.reason for each in found.bad] == ["marks and files differ"] * 2
    assert "found 1 mark <image> and no image beside the text" in str(found.bad[0])
    assert not check_data(data, model=tiny_llama).bad  # a word as any other


def test_other_pictures_of_the_same_rows_are_other_data(tmp_path: Path) -> None:
    model = MODELS["llava"](tmp_path / "llava")
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        rows(tmp_path / name)
    keys = {"model": str(model), "dataset": str(tmp_path / "here" / "rows.json"), "output_dir": str(tmp_path / "run")}
    for name in ("here", "there"):
        prepared = llmtune.plan({**keys, "media_dir": str(tmp_path / name)}).data.prepared
        shown = [medium for index in range(8) for each in prepared.train.shown(index) for medium in each.media]
        assert shown and {Path(str(medium.path)).parent.name for medium in shown} == {name}
    with pytest.raises(llmtune.LlmtuneError, match="missing media|no file"):
        llmtune.plan({**keys, "media_dir": str(tmp_path / "nowhere")})


def test_a_question_is_asked_of_a_template_that_reads_parts_alone(tmp_path: Path) -> None:
    from transformers import AutoProcessor

    folder = MODELS["llava"](tmp_path / "llava")
    processor = AutoProcessor.from_pretrained(folder)
    parts = [{"role": "user", "content": [{"type": "text", "text": "what is red"}]}]
    expected = processor.apply_chat_template(parts, add_generation_prompt=True, tokenize=True, return_dict=True)
    asked = encode(processor.tokenizer, [{"role": "user", "content": "what is red"}], {})
    assert asked.tolist() == expected["input_ids"]
