"""The shapes in which the same thing is written: messages, calls, reasoning, weights, preferences, labels, prompts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmtune.contract.examples import BadRow
from llmtune.data import Dataset, read_row
from llmtune.data.formats.builtin import builtin_formats

ASK, ANSWER, OTHER = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
)
CALLED = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALL = json.dumps(CALLED["function"])


def read(row: Any, name: str | dict[str, Any] | None = None) -> Any:
    formats = builtin_formats()
    return read_row(formats.of(Dataset(spelling="x", name="x", format=name), [row]), row)


def from_value(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": value} for role, value in pairs]}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, ANSWER]},
        {"conversations": [ASK, ANSWER], "conversation_id": "7"},
        {"conversation": [ASK, ANSWER], "conversation_id": "7", "model": "m"},
        {"conversation": [{"human": "q", "assistant": "a"}]},
        {"messages": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
        {"messages": [{**ASK, "content": [{"type": "text", "text": "q"}]}, ANSWER], "label": "small talk"},
        {"messages": [ASK, {**ANSWER, "weight": 1, "train": True}], "text": "rendered by somebody"},
        {"conversations": [ASK, ANSWER], "messages": None, "chosen": None, "rejected": None, "kto_tag": None},
        from_value(("human", "q"), ("gpt", "a")),
        from_value(("user", "q"), ("assistant", "a")),
        {"instruction": "q", "input": None, "output": "a", "system": None, "history": [], "text": "Below is"},
    ],
)
def test_a_question_and_its_answer(row: dict) -> None:
    found = read(row)
    assert (found.kind, found.messages) == ("conversation", [ASK, ANSWER])


@pytest.mark.parametrize("system", [{}, {"system": "s"}])
def test_a_system_message_said_twice_counts_once(system: dict) -> None:
    first = {"role": "system", "content": "s"}
    assert read({"messages": [first, ASK, ANSWER], **system}).messages == [first, ASK, ANSWER]
    with pytest.raises(BadRow, match="are system messages that differ"):
        read({"messages": [first, ASK, ANSWER], "system": "z"})


@pytest.mark.parametrize(
    "row",
    [
        from_value(("human", "q"), ("function_call", CALL), ("observation", CALL), ("gpt", "a")),
        {"messages": [ASK, {"role": "tool_call", "content": CALL}, {"role": "tool_response", "content": CALL}, ANSWER]},
        {"messages": [ASK, {"role": "assistant", "tool_calls": [CALLED]}, {"role": "tool", "content": CALL}, ANSWER]},
        {
            "messages": [
                ASK,
                {"role": "assistant", "content": "", "tool_calls": json.dumps([CALLED["function"]])},
                {"role": "tool", "content": CALL},
                ANSWER,
            ]
        },
    ],
)
def test_calls_are_calls_and_results_stay_text(row: dict) -> None:
    said = {"role": "assistant", "content": "", "tool_calls": [CALLED]}
    assert read(row).messages == [ASK, said, {"role": "tool", "content": CALL}, ANSWER]


def test_what_openai_called_functions_first() -> None:
    tool = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    result = {"role": "function", "name": "f", "content": "3"}
    found = read({"messages": [ASK, call, result, ANSWER], "functions": [tool]})
    said = {"role": "assistant", "content": "", "tool_calls": [CALLED]}
    assert found.messages == [ASK, said, {"role": "tool", "name": "f", "content": "3"}, ANSWER]
    assert found.tools == [{"type": "function", "function": tool}]
    with pytest.raises(BadRow, match="tool_calls and function_call"):
        read({"messages": [ASK, {**call, "tool_calls": [CALLED]}]})


def test_calls_in_a_row_are_one_turn() -> None:
    found = read(from_value(("human", "q"), ("gpt", "I look."), ("function_call", CALL), ("function_call", CALL)))
    assert found.messages == [ASK, {"role": "assistant", "content": "I look.", "tool_calls": [CALLED, CALLED]}]


def test_calls_that_count_otherwise_are_turns_of_their_own() -> None:
    calls = [{"role": "tool_call", "content": CALL, "loss": value} for value in (True, False)]
    assert [each.get("weight", 1) for each in read({"messages": [ASK, *calls]}).messages[1:]] == [1, 0]


def test_thinking_before_a_call_is_kept() -> None:
    found = read(from_value(("human", "q"), ("function_call", f"<think>\nhm\n</think>\n\n{CALL}")))
    assert found.messages[1] == {"role": "assistant", "content": "<think>\nhm\n</think>", "tool_calls": [CALLED]}


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_one_name(key: str) -> None:
    found = read({"messages": [ASK, {**ANSWER, key: "hm"}], "enable_thinking": True, "chat_template_kwargs": {"b": 2}})
    assert found.messages[1]["reasoning_content"] == "hm"
    assert found.template_kwargs == {"enable_thinking": True, "b": 2}


def test_inline_thinking_is_text() -> None:
    inline = {**ANSWER, "content": "<think>hm</think>a"}
    assert read({"messages": [ASK, inline]}).messages[1] == inline


@pytest.mark.parametrize(
    ("given", "weight"),
    [
        ({"weight": 0}, 0),
        ({"weight": 0.25}, 0.25),
        ({"train": False}, 0),
        ({"loss": True}, None),
        ({"loss_scale": 2}, 2),
    ],
)
def test_weights_by_all_their_names(given: dict, weight: float | None) -> None:
    assert read({"messages": [ASK, OTHER, ASK, {**ANSWER, **given}]}).messages[3].get("weight") == weight


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [ASK], "chosen": [ANSWER], "rejected": [OTHER]},
        {"chosen": [ASK, ANSWER], "rejected": [ASK, OTHER], "score_chosen": 8.0, "score_rejected": 2.0},
        {"prompt": "q", "prompt_id": "7", "messages": [ASK, ANSWER], "chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
         "rejected": {"from": "gpt", "value": "b"}},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b", "rejected_reason": "wrong"},
        {"messages": [ASK, ANSWER], "rejected_response": "b"},
        {"messages": [ASK, ANSWER], "rejected_response": [OTHER]},
        {"messages": [ASK, ANSWER], "rejected_messages": [ASK, OTHER]},
        {"chosen_messages": [ASK, ANSWER], "rejected_messages": [ASK, OTHER]},
        {"messages": [ASK, ANSWER], "rejected_response": "b", "chosen": None, "rejected": None, "label": None},
    ],
)  # fmt: skip
def test_a_preference(row: dict) -> None:
    found = read(row)
    assert (found.prompt, found.chosen, found.rejected) == ([ASK], [ANSWER], [OTHER])


def test_the_prompt_is_all_that_both_begin_with() -> None:
    found = read({"chosen": [ASK, OTHER, ASK, ANSWER], "rejected": [ASK, OTHER, ASK, OTHER], "system": "s"})
    assert found.prompt == [{"role": "system", "content": "s"}, ASK, OTHER, ASK]
    assert (found.chosen, found.rejected) == ([ANSWER], [OTHER])


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a"},
        {"prompt": [ASK], "completion": [ANSWER], "prompt_id": "7"},
        {"messages": [ASK, ANSWER]},
        from_value(("human", "q"), ("gpt", "a")),
        {"instruction": "q", "output": "a"},
    ],
)
def test_a_label(row: dict, label: bool) -> None:
    for column in ("label", "kto_tag"):
        found = read({**row, column: label})
        assert (found.kind, found.messages, found.label) == ("labelled", [ASK, ANSWER], label)


def test_a_prompt_keeps_what_stands_beside_it() -> None:
    found = read({"prompt": "q", "label": "1", "answer_key": [4]})
    assert (found.kind, found.messages, found.extra) == ("prompt", [ASK], {"label": "1", "answer_key": [4]})
    assert read({"messages": [ASK], "reference": 3}, "prompt").extra == {"reference": 3}


def test_tokens_without_their_padding() -> None:
    found = read({"input_ids": [0, 5, 6], "labels": [-100, -100, 6], "attention_mask": [0, 1, 1]})
    assert (found.input_ids, found.labels) == ([5, 6], [-100, 6])


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        # A label that is no truth value makes no plain conversation of an answer that nobody wants.
        ({"prompt": "q", "completion": "a", "label": "false"}, "label is not true or false", r"text \('false'\)"),
        ({"messages": [ASK, ANSWER], "label": 0}, "label is not true or false", "name the rows' `format`"),
        ({"instruction": "q", "output": "a", "kto_tag": "no"}, "label is not true or false", "kto_tag"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "equal answers", "nothing can be preferred"),
        ({"chosen": [ASK, ANSWER], "rejected": [{**ASK, "content": "z"}, OTHER]}, "no common prompt", "same question"),
        ({"question": "q", "chosen": "a", "rejected": "b"}, "no prompt", "found question, chosen, rejected"),
        ({"messages": [ASK], "rejected_response": "b"}, "no chosen answer", "to be the chosen one"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "empty answer", "say nothing"),
        ({"messages": [ASK, {**ANSWER, "weigth": 0}]}, "misspelt key of a message", 'Did you mean "weight"'),
        ({"messages": [ASK, {**ANSWER, "tool_call": []}]}, "misspelt key of a message", 'Did you mean "tool_calls"'),
        ({"messages": [ASK, {**ANSWER, "train_detail": []}]}, "train_detail", "cannot be weighted"),
        ({"messages": [ASK, {**ANSWER, "weight": -1}]}, "bad weight", "a number >= 0"),
        ({"messages": [ASK, {**ANSWER, "weight": 1, "train": False}]}, "bad weight", "weight, train that differ"),
        ({"messages": [{**ASK, "weight": 1}, ANSWER]}, "weight outside assistant", r"message 1 \(user\)"),
        ({"messages": [ASK, {**ANSWER, "weight": 0}]}, "nothing to learn", "weight 0"),
        ({"messages": [ASK, {**ANSWER, "thinking": 3}]}, "thinking is not text", "is a number"),
        ({"messages": [ASK, {**ANSWER, "thinking": "a", "reasoning": "b"}]}, "several reasonings", "that differ"),
        ({"messages": [{**ASK, "role": ["user"]}, ANSWER]}, "unknown role", "message 1"),
        ({"messages": [{**ASK, "tool_calls": [CALLED]}, ANSWER]}, "tool calls outside assistant", "message 1"),
        (from_value(("human", "q"), ("function_call", "f(x)"), ("gpt", "a")), "bad tool call", "is not JSON"),
        ({"conversations": [{"from": "human", "value": "q"}, ANSWER]}, "message without from", "message 2"),
        ({"instruction": "", "input": None, "output": "a"}, "nothing asked", "needed is text"),
        ({"messages": [ASK, ANSWER], "enable_thinking": "no"}, "bad enable_thinking", "true or false"),
        ({"messages": [ASK, ANSWER], "chat_template_kwargs": {"tools": []}}, "bad chat_template_kwargs", "sets tools"),
        ({"prompt": [ASK, ANSWER]}, "no question", "ends with assistant"),
        ({"input_ids": [1, 2], "labels": [1]}, "lengths differ", '"labels" has 1 entries, "input_ids" 2'),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "labels are other tokens", r"labels\[0\] is 2"),
        ({"input_ids": [1, -2]}, "input_ids is no token", "holds -2"),
        ({"input_ids": [2**70]}, "input_ids is no token", "which no vocabulary has"),
    ],
)  # fmt: skip
def test_what_is_refused(row: dict, reason: str, detail: str) -> None:
    with pytest.raises(BadRow, match=detail) as caught:
        read(row)
    assert caught.value.reason == reason
