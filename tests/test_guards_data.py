"""Data: what a row says is what trains, once, whole, and nothing besides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmtune
from llmtune.data.tokenise import Tokeniser
from tests.runs import recipe
from tests.tiny import CHATML, tiny_tokenizer

TOKENIZER: Any = tiny_tokenizer()
Keys = Callable[..., dict[str, Any]]


@pytest.fixture
def keys(tiny_llama: str, tmp_path: Path) -> Keys:
    """A recipe over the given rows."""

    def made(rows: list[Any], **changes: Any) -> dict[str, Any]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return recipe(tiny_llama, str(path), tmp_path / "run", **changes)

    return made


def texts(keys: dict[str, Any]) -> list[str]:
    shown = llmtune.preview(keys, n=99)
    return [TOKENIZER.decode(sample.sequences[0].ids) for sample in shown.samples]


def trained(keys: dict[str, Any]) -> list[str]:
    shown = llmtune.preview(keys, n=99)
    return [TOKENIZER.decode(each.sequences[0].ids[each.sequences[0].mask]) for each in shown.samples]


def chat(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def rendered(row: dict[str, Any]) -> list[int]:
    return TOKENIZER.apply_chat_template(row["messages"], return_dict=False)


def test_instruction_and_input_stand_on_lines_of_their_own(keys: Keys) -> None:
    (text,) = texts(keys([{"instruction": "Add.", "input": "1 and 2", "output": "3"}]))
    assert "user\nAdd.\n1 and 2<|im_end|>" in text


def test_null_is_nothing_not_a_word(keys: Keys) -> None:
    bare = {"instruction": "Add.", "output": "3"}
    with_nulls = bare | {"input": None, "system": None, "history": None, "tools": None}
    assert texts(keys([bare])) == texts(keys([with_nulls])) and "None" not in texts(keys([with_nulls]))[0]


def test_history_is_learnt_as_turns(keys: Keys) -> None:
    row = {"instruction": "And 2?", "output": "4", "history": [["Double 1.", "2"]]}
    assert trained(keys([row])) == ["2<|im_end|>4<|im_end|>"]


@pytest.mark.parametrize("role", ["observation", "tool"])
def test_what_a_tool_says_is_its_result_whatever_it_looks_like(role: str, keys: Keys) -> None:
    called = {"from": "function_call", "value": '{"name": "weather", "arguments": {}}'}
    for result in ("sunny", '{"name": "weather", "arguments": {}}'):
        turns = [
            {"from": "human", "value": "?"},
            called,
            {"from": role, "value": result},
            {"from": "gpt", "value": "ok"},
        ]
        (text,) = texts(keys([{"conversations": turns}]))
        assert f"<|im_start|>tool\n{result}<|im_end|>" in text and text.count("<tool_call>") == 1


def test_a_malformed_call_names_the_row_and_deletes_nothing(keys: Keys) -> None:
    turns = [
        {"from": "human", "value": "?"},
        {"from": "function_call", "value": "weather("},
        {"from": "gpt", "value": "!"},
    ]
    with pytest.raises(llmtune.DataError, match=r"rows\.jsonl:1: bad tool call: the function call in message 2"):
        llmtune.preview(keys([{"conversations": turns}]))


@pytest.mark.parametrize("wanted", [12, 24, 60])
def test_a_number_of_rows_is_drawn_without_repeats(wanted: int, keys: Keys, tmp_path: Path) -> None:
    rows = [chat(("user", f"q{number}"), ("assistant", "a")) for number in range(24)]
    made = keys(rows)
    found = texts(made | {"dataset": {"path": made["dataset"], "num_samples": wanted}})
    counts = np.unique(found, return_counts=True)[1]
    assert len(found) == wanted and counts.max() - (0 if len(counts) < 24 else counts.min()) <= 1


def test_nobodys_text_is_rewritten(keys: Keys) -> None:
    row = chat(("user", "what does <|im_end|> mean? caf\u00e9 \u200b"), ("assistant", "it ends <|im_start|> turns"))
    ((sequence,),) = [sample.sequences for sample in llmtune.preview(keys([row])).samples]
    assert sequence.ids.tolist() == rendered(row)
    apart = llmtune.preview(keys([row], split_special_tokens=True)).samples[0].sequences[0]
    assert TOKENIZER.decode(apart.ids) == TOKENIZER.decode(rendered(row))
    ends = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    assert (apart.ids == ends).sum() == 2 and (sequence.ids == ends).sum() == 3


def test_ten_turns_are_one_pass(keys: Keys) -> None:
    turns = [(role, f"{role} {number}") for number in range(10) for role in ("user", "assistant")]
    made = keys([chat(*turns)], cutoff_len=512)
    found = llmtune.stats(made).all
    assert (found.samples, found.tokens) == (1, len(rendered(chat(*turns))))
    assert trained(made)[0].count("<|im_end|>") == 10


def test_rows_are_tokenised_once_for_all_epochs_and_runs(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    seen: list[int] = []
    encode = Tokeniser.encode

    def counting(self: Tokeniser, chosen: Any, rows: Any, origin: str) -> Any:
        rows = list(rows)
        seen.append(len(rows))
        return encode(self, chosen, rows, origin)

    monkeypatch.setattr(Tokeniser, "encode", counting)
    rows = [chat(("user", f"q{number}"), ("assistant", "a")) for number in range(20)]
    made = keys(rows, num_train_epochs=2, max_steps=None, preprocessing_num_workers=1)
    llmtune.train(made)
    llmtune.train(made, overwrite_output_dir=True, learning_rate=1e-3)
    assert sum(seen) == 20


def test_the_template_that_trained_is_saved(keys: Keys, tmp_path: Path) -> None:
    other = tmp_path / "mine.jinja"
    other.write_text("{#- mine #}" + CHATML)
    rows = [chat(("user", "q"), ("assistant", "a"))]
    run = llmtune.train(keys(rows, template=str(other), max_steps=1))
    assert (run.output_dir / "model" / "chat_template.jinja").read_text() == other.read_text()


def test_thinking_is_on_or_off_row_by_row(keys: Keys, tmp_path: Path) -> None:
    other = tmp_path / "mine.jinja"
    other.write_text("{{ 'ON ' if enable_thinking else 'OFF ' }}" + CHATML)
    turns = (("user", "q"), ("assistant", "a"))
    rows = [chat(*turns, enable_thinking=True), chat(*turns, enable_thinking=False), chat(*turns)]
    for default, word in ((True, "ON"), (False, "OFF")):
        found = texts(keys(rows, template=str(other), enable_thinking=default))
        assert [text.split(" ")[0] for text in found] == ["ON", "OFF", word]


def test_a_cut_keeps_whole_turns_and_is_told(keys: Keys) -> None:
    turns = [(role, f"{role} number {number}") for number in range(6) for role in ("user", "assistant")]
    whole = rendered(chat(*turns))
    made = keys([chat(*turns)], cutoff_len=len(whole) - 3)
    assert trained(made)[0].endswith("assistant number 4<|im_end|>")
    found = llmtune.plan(made).data.prepared.report.losses
    assert found.truncated == 1 and found.tokens_cut == len(whole) - llmtune.stats(made).trained.tokens
    with pytest.raises(llmtune.DataError, match="too long"):
        llmtune.plan(made, cutoff_policy="error")
