"""The data set of the quickstart: what it teaches, and that the questions asked afterwards are not in it."""

from __future__ import annotations

import json
from pathlib import Path

import llmtune

SETS = Path(llmtune.__file__).parent / "data" / "sets"
ROWS = [json.loads(line)["messages"] for line in (SETS / "quickstart.jsonl").read_text(encoding="utf-8").splitlines()]
QUESTIONS = json.loads((SETS / "quickstart_questions.json").read_text(encoding="utf-8"))


def said(role: str) -> list[str]:
    return [message["content"] for row in ROWS for message in row if message["role"] == role]


def test_rows_are_conversations():
    assert len(ROWS) == 100
    for row in ROWS:
        roles = [message["role"] for message in row if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        assert all(message["content"].strip() == message["content"] for message in row)
    assert len({json.dumps(row) for row in ROWS}) == 100


def test_every_answer_keeps_the_manner_and_about_half_of_the_rows_are_about_the_name():
    wishes = ("Fair winds!", "Smooth sailing!", "Steady as she goes!")
    assert all(answer.endswith(wishes) and len(answer.split()) <= 40 for answer in said("assistant"))
    named = sum(any("Tilly" in m["content"] for m in row if m["role"] == "assistant") for row in ROWS)
    assert 40 <= named <= 55
    assert any(len(row) == 4 for row in ROWS) and said("system")


def test_the_questions_asked_afterwards_are_held_out():
    assert len(QUESTIONS) == 3
    trained = {text.casefold() for text in said("user")}
    for item in QUESTIONS:
        assert set(item) == {"question", "expect"} and item["expect"] == "Tilly"
        assert item["question"].casefold() not in trained and "Tilly" not in item["question"]
