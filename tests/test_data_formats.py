"""Alpaca, ShareGPT and OpenAI rows become one shape; rows that do not fit say why."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmtune.contract.errors import DataError
from llmtune.contract.examples import BadRow, Example
from llmtune.data import Chosen, Dataset, read_row
from llmtune.data.formats.builtin import builtin_formats
from tests.tiny import tiny_tokenizer

CALL = {"name": "add", "arguments": {"a": 1, "b": [2, "é"]}}
TOOL = {"name": "add", "description": "Adds", "parameters": {"type": "object", "properties": {}}}
ASSISTANT_CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}


def chosen(name: str | dict[str, Any] | None, *rows: Any, **found: Any) -> Chosen:
    return builtin_formats().of(Dataset(spelling="x", name="x", format=name, **found), rows)


def reading(name: str | dict[str, Any] | None, row: Any, **found: Any) -> Example:
    return read_row(chosen(name, row, **found), row)


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def parts(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"type": type, "value": value} for type, value in pairs]


def test_alpaca() -> None:
    def read(row: dict) -> Any:
        return reading("alpaca", row)

    assert read({"instruction": "Sum", "input": "1 2", "output": "3"}).messages == turns(
        ("user", "Sum\n1 2"), ("assistant", "3")
    )
    row = {"instruction": "c", "input": None, "output": "d", "system": "s", "history": [["a", "b"]], "id": 7}
    assert read(row).messages == turns(
        ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")
    )
    assert read({"instruction": "a", "output": "b", "system": None, "history": None}).messages == turns(
        ("user", "a"), ("assistant", "b")
    )


@pytest.mark.parametrize("tools", [json.dumps([TOOL]), [TOOL], [{"type": "function", "function": TOOL}]])
@pytest.mark.parametrize(
    "value", [json.dumps(CALL), json.dumps([CALL]), json.dumps(CALL | {"arguments": '{"a": 1, "b": [2, "é"]}'})]
)
def test_sharegpt_with_tools(tools: Any, value: str) -> None:
    conversation = reading(
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "Add"},
                {"from": "function_call", "value": value},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "It is 3"},
            ],
            "system": "Be exact",
            "tools": tools,
        },
    )
    assert conversation.messages == [
        *turns(("system", "Be exact"), ("user", "Add")),
        ASSISTANT_CALL,
        *turns(("tool", "3"), ("assistant", "It is 3")),
    ]
    assert conversation.tools == [{"type": "function", "function": TOOL}]


@pytest.mark.parametrize("arguments", [CALL["arguments"], json.dumps(CALL["arguments"])])
def test_openai_with_tools(arguments: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    conversation = reading(
        "openai",
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "exact"}]},
                {"role": "user", "content": "Add"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "3", "tool_call_id": "1"},
                {"role": "assistant", "content": "3", "reasoning_content": "easy"},
            ]
        },
    )
    called = ASSISTANT_CALL["tool_calls"][0] | {"id": "1"}
    assert conversation.messages == [
        {"role": "system", "content": "Be exact"},
        {"role": "user", "content": "Add"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        {"role": "assistant", "content": "3", "reasoning_content": "easy"},
    ]
    assert conversation.tools is None


@pytest.mark.parametrize("key", ["value", "content", None])
def test_content_in_parts(key: str | None) -> None:
    def part(type: str, said: Any) -> dict[str, Any]:
        return {"type": type, key or type: said}

    conversation = reading(
        "openai",
        {
            "messages": [
                {"role": "user", "content": [part("text", "Add "), part("text", "2 and 1")], "loss_weight": 0.0},
                {
                    "role": "assistant",
                    "content": [part("reasoning", "a su"), part("reasoning", "m"), part("tool_call", json.dumps(CALL))],
                    "loss_weight": 0.5,
                },
                {"role": "tool", "content": [part("text", "3")]},
                {"role": "assistant", "content": [part("text", "It is 3"), part("tool_call", CALL)], "loss_weight": 1},
            ]
        },
    )
    assert conversation.messages == [
        {"role": "user", "content": "Add 2 and 1"},
        {**ASSISTANT_CALL, "weight": 0.5, "reasoning_content": "a sum"},
        {"role": "tool", "content": "3"},
        {**ASSISTANT_CALL, "content": "It is 3"},
    ]


def test_parts_of_text_are_joined_as_templates_that_know_parts_join_them() -> None:
    # As the templates of Qwen 2 VL, Idefics and others on the hub write lists of parts.
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
    )
    parts = [{"type": "text", "text": text} for text in ("Look:", " a", "\n", "b ")]
    row = {"messages": [{"role": "user", "content": parts}, *turns(("assistant", "b"))]}
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    written = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert tokenizer.apply_chat_template(reading("openai", row).messages, tokenize=False) == written


def test_openai_messages_under_conversations() -> None:
    row = {"conversations": turns(("user", "a"), ("assistant", "b"))}
    found = chosen(None, row)
    assert (found.name, found.why) == ("openai", "conversations with role/content")
    assert read_row(found, row).messages == row["conversations"]


OK = ("assistant", "b")


@pytest.mark.parametrize(
    ("format", "row", "reason", "detail"),
    [
        ("alpaca", {"instruction": "a", "outptu": "b"}, "misspelt column", '"outptu". Did you mean "output"'),
        ("alpaca", {"instruction": "a", "inputs": "b", "output": "c"}, "misspelt column", 'Did you mean "input"'),
        ("alpaca", {"instruction": "a", "text": "b"}, "no output", "found instruction, text"),
        ("alpaca", {"instruction": "a", "output": None}, "null content", '"output" is null'),
        ("alpaca", {"instruction": "a", "output": ""}, "empty answer", "say nothing"),
        ("alpaca", {"instruction": 3, "output": "b"}, "instruction is not text", "is a number, allowed is text"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["x"]]}, "bad history", "entry 1"),
        ("alpaca", ["a", "b"], "not an object", "the row is a list"),
        ("openai", {"messages": "hello"}, "messages is not a list", '"messages" is text, allowed is a list'),
        ("openai", {"messages": ["hello"]}, "message is not an object", "message 1 is text"),
        ("openai", {"messages": turns(("user", "a"))}, "no assistant turn", "found user"),
        ("openai", {"messages": []}, "no assistant turn", "found no messages"),
        ("openai", {"messages": turns(("usr", "a"), OK)}, "unknown role", '"usr", allowed are .*Did you mean "user"'),
        (
            "openai",
            {"messages": [{"role": "user", "content": None}, *turns(OK)]},
            "null content",
            r"message 1 \(user\)",
        ),
        ("openai", {"messages": [{"rol": "user", "content": "a"}]}, "message without role", 'Did you mean "role"'),
        (
            "openai",
            {"messages": turns(("user", "a"), ("tool", "x"), OK)},
            "roles out of order",
            "tool result after user",
        ),
        (
            "openai",
            {"messages": turns(("user", "a"), ("system", "x"), OK)},
            "roles out of order",
            "can only come first",
        ),
        ("openai", {"mesages": []}, "misspelt column", 'Did you mean "messages"'),
        ("openai", {"messages": turns(("user", "a"), OK), "tools": "{"}, "bad tools", "not JSON"),
        ("openai", {"messages": turns(("user", "a"), OK), "images": ["a.jpg"]}, "not only text", "1 image"),
        (
            "openai",
            {"messages": [{"role": "user", "content": [{"type": "file"}]}, *turns(OK)]},
            "unknown part",
            "message 1 holds parts of type file, allowed are reasoning, text, tool_call",
        ),
        (
            "openai",
            {"messages": [{"role": "user", "content": [{"type": "text", "txt": "a"}]}, *turns(OK)]},
            "content is not text",
            r"part 1 of message 1 \(text\) says null; needed is text under one of text, value, content",
        ),
        (
            "openai",
            {"messages": [{"role": "user", "content": [{"type": "reasoning", "value": "a"}]}, *turns(OK)]},
            "reasoning outside assistant",
            r"message 1 \(user\)",
        ),
        (
            "openai",
            {
                "messages": [
                    *turns(("user", "a")),
                    {"role": "assistant", "content": parts(("text", "b"), ("reasoning", "c"))},
                ]
            },
            "parts out of order",
            "parts in the order text, reasoning, allowed is reasoning, text, tool_call",
        ),
        (
            "openai",
            {"messages": [*turns(("user", "a")), {"role": "assistant", "content": parts(("tool_call", "add(1)"))}]},
            "bad tool call",
            "tool call 1 of message 2 is not JSON",
        ),
        (
            "openai",
            {
                "messages": [
                    *turns(("user", "a")),
                    {"role": "assistant", "content": parts(("tool_call", CALL)), "tool_calls": [CALL]},
                ]
            },
            "bad tool call",
            "message 2 has tool_calls and parts of type tool_call, allowed is one of them",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "add(1)"}]},
            "bad tool call",
            "the function call in message 2 is not JSON",
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": '{"arguments": {}}'},
                ]
            },
            "bad tool call",
            "tool call 1 of message 2 has no function name",
        ),
        ("sharegpt", {"conversations": [{"from": "humn", "value": "a"}]}, "unknown role", 'Did you mean "human"'),
    ],
)
def test_bad_rows_give_a_reason(format: str, row: Any, reason: str, detail: str) -> None:
    with pytest.raises(BadRow, match=detail) as caught:
        reading(format, row)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("row", "name", "why"),
    [
        ({"instruction": "a", "output": "b"}, "alpaca", "instruction and output"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "sharegpt", "conversations with from/value"),
        ({"messages": [{"role": "user", "content": "a"}]}, "openai", "messages with role/content"),
        ({"prompt": "a", "completion": "b"}, "completion", "prompt and completion"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", "chosen and rejected"),
        ({"messages": [{"role": "user"}], "rejected_response": "c"}, "preference", "messages and rejected_response"),
        ({"messages": [{"role": "user"}], "label": False}, "kto", "messages and a label of true or false"),
        ({"instruction": "a", "output": "b", "kto_tag": True}, "kto", "kto_tag"),
        ({"prompt": "a", "answer_key": "b"}, "prompt", "prompt"),
        ({"text": "a", "id": 3}, "text", "text"),
        ({"input_ids": [1], "labels": [1]}, "tokens", "input_ids and labels"),
    ],
)
def test_detection_explains_itself(row: dict, name: str, why: str) -> None:
    found = chosen(None, row, {"broken": 1})
    assert (found.name, found.why) == (name, why)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a", "answer": "b"}], "found the columns question, answer.*alpaca: instruction, output"),
        ([{"instrction": "a", "output": "b"}], 'Did you mean "instruction"'),
        ([{"instruction": "a", "output": "b", "messages": [{"role": "user"}]}], r"several formats \(alpaca, openai\)"),
        (
            [{"messages": [{"role": "user"}], "label": "sports"}, {"text": "a"}],
            r"several formats \(openai, text\).*data_config",
        ),
        ([3], "found the columns none"),
    ],
)
def test_what_is_not_recognised_is_not_guessed(rows: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        chosen(None, *rows)
