"""Which format a data set has, and what its columns, keys and roles are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from llmtune.contract.errors import DataError, LlmtuneError
from llmtune.contract.examples import BadRow, Text
from llmtune.data import Dataset, Formats, read_row
from llmtune.data.formats import check_kind
from llmtune.data.formats.builtin import builtin_formats
from llmtune.data.formats.chats import ShareGpt
from llmtune.data.formats.choose import facts_of
from llmtune.data.formats.messages_in import TagsConfig
from llmtune.data.misspelt import misspelt
from llmtune.recipe.parts import find_parts, formats_of
from llmtune.recipe.recipe import load_recipe
from llmtune.recipe.registry import Registry

PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SPOKEN = {"conversations": [{"who": "client", "what": "q"}, {"who": "bot", "what": "a"}]}
TAGS = {"role_tag": "who", "content_tag": "what", "user_tag": "client", "assistant_tag": "bot"}


def read(row: Any, format: Any = None, formats: Formats | None = None, **found: Any) -> tuple[str, str, Any]:
    """(name of the format, what it was recognised by, the messages)."""
    chosen = (formats or builtin_formats()).of(Dataset(spelling="x", name="x", format=format, **found), [row])
    return chosen.name, chosen.why, getattr(read_row(chosen, row), "messages", None)


@pytest.mark.parametrize(
    ("format", "why"),
    [
        ("sharegpt", "as named"),
        ({"name": "sharegpt"}, "as named"),
        (None, "conversations with who/what"),
        ("auto", "conversations with who/what"),
    ],
)
def test_tags_say_how_keys_and_roles_are_called(format: Any, why: str) -> None:
    assert read(SPOKEN, format, tags=TAGS) == ("sharegpt", why, PAIR)


def test_tags_may_be_parameters_of_the_format() -> None:
    assert read(SPOKEN, {"name": "sharegpt", **TAGS})[2] == PAIR


def test_tags_of_one_data_set_stand_beside_those_of_the_recipe() -> None:
    config = TagsConfig(role_tag="who", content_tag="what")
    formats = Formats(
        known={}, find=builtin_formats().find, default=ShareGpt(config), default_name="sharegpt",
        default_config=config, default_facts=facts_of(config, "llmtune"),
    )  # fmt: skip
    assert read(SPOKEN, formats=formats, tags={"user_tag": "client", "assistant_tag": "bot"})[2] == PAIR


def test_the_recipes_format_takes_the_tags_of_an_entry() -> None:
    recipe = load_recipe({"model": "m", "dataset": "x", "data_config": {"name": "sharegpt", "role_tag": "who"}})
    registry = Registry([])
    problems: list[LlmtuneError] = []
    formats = formats_of(find_parts(recipe, registry, problems, ("data_config",)), registry)
    assert not problems
    tags = {name: tag for name, tag in TAGS.items() if name != "role_tag"}
    assert read(SPOKEN, formats=formats, tags=tags) == ("sharegpt", "as named", PAIR)


def test_roles_that_change_places() -> None:
    row = {"conversations": [{"from": "gpt", "value": "q"}, {"from": "human", "value": "a"}]}
    assert read(row, tags={"user_tag": "gpt", "assistant_tag": "human"})[2] == PAIR


@pytest.mark.parametrize("format", ["alpaca", None])
def test_columns_by_other_names(format: str | None) -> None:
    columns = {"instruction": "input", "input": "context", "output": "reply"}
    row = {"input": "q", "context": "r", "reply": "a", "instruction": "not this"}
    name, _, messages = read(row, format, columns=columns)
    assert (name, messages) == ("alpaca", [{"role": "user", "content": "q\nr"}, PAIR[1]])


def test_a_mapped_column_that_some_rows_lack_is_told() -> None:
    row = {"question": "q", "context": "r", "output": "a"}
    found = read(row, "alpaca", columns={"instruction": "question", "input": "passage"})
    assert found == ("alpaca", "as named; none of the first 1 rows has passage", PAIR)


@pytest.mark.parametrize(
    ("format", "found", "message"),
    [
        ("alpaca", {"columns": {"inptu": "b"}}, 'names "inptu", which alpaca has not. Did you mean "input"'),
        ("alpaca", {"columns": {"input": "outpt"}}, '"outpt", which no row has. Did you mean "output"'),
        ("alpaca", {"columns": {"instruction": "b", "input": "b"}}, 'reads instruction, input from "b"'),
        ("alpaca", {"tags": {"role_tag": "b"}}, 'tags names "role_tag", which alpaca has not. Allowed: none'),
        ("openai", {"tags": {"rol_tag": "b"}}, 'tags names "rol_tag", .* Did you mean "role_tag"'),
        ("openai", {"tags": {"user_tag": "b", "assistant_tag": "b"}}, 'assistant_tag: found "b", which user_tag is'),
        ("opnai", {}, 'x: no format "opnai". Did you mean "openai"'),
        ({"name": "openai", "rol_tag": "b"}, {}, 'format.rol_tag: .*Did you mean "role_tag"'),
        ({"name": "auto", "role_tag": "b"}, {}, "format.role_tag: no such key"),
        ({"role_tag": "b"}, {}, "format has no name"),
    ],
)
def test_what_is_wrong_with_an_entry(format: Any, found: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read({"instruction": "a", "output": "c"}, format, **found)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hello"}, r'Read as openai, .*"messages" is text, allowed is a list.*openai: messages of role'),
        ({"prompt": "q", "chosen": "a"}, 'Read as preference, .*needs the column "rejected"'),
        ({"instructions": "q", "outputs": "a"}, 'Did you mean "instruction"'),
        ({"query": "q", "response": "a"}, "found the columns query, response. Known formats need"),
        ({"input_ids": [1], "messages": PAIR}, r"several formats \(openai, tokens\)"),
        ({"messages": PAIR, "label": "yes"}, "label is not true or false"),
    ],
)
def test_what_keeps_rows_from_being_recognised_is_said(row: dict, message: str) -> None:
    with pytest.raises((DataError, BadRow), match=message):
        read(row)


def test_labels_of_several_classes_are_no_truth_values() -> None:
    rows = [{"messages": PAIR, "label": label} for label in ("0", "1", "2")]
    with pytest.raises(DataError, match=r"several formats \(kto, openai\)"):
        builtin_formats().of(Dataset(spelling="x", name="x"), rows)
    assert read(rows[0], "openai")[2] == PAIR


def test_columns_that_are_nobodys_misspelling() -> None:
    known = ("prompt", "messages", "conversation", "rejected_response", "tools", "output")
    own = ("prompt_id", "promptId", "conversation_id", "rejected_reason", "message_count", "my_output", "tokens", "id")
    assert misspelt(own, known) is None
    assert [misspelt((name,), known) for name in ("mesages", "Output", "tool", "rejected-response")] == [
        ("mesages", "messages"), ("Output", "output"), ("tool", "tools"), ("rejected-response", "rejected_response"),
    ]  # fmt: skip
    assert misspelt(("message", "messages"), known) is None


def test_a_stage_says_what_it_learns_from() -> None:
    formats = formats_of(None, Registry())
    check_kind("preference", ("preference",), "dpo", "pairs.json", formats)
    said = "x: holds preferences, and sft takes conversations, texts; choose stage_config dpo or rm for these rows"
    with pytest.raises(DataError, match=said):
        check_kind("preference", ("conversation", "text"), "sft", "x", formats)
    with pytest.raises(
        DataError, match="dpo takes preferences; name the format with data_config if they were read wrongly"
    ):
        check_kind("unheard of", ("preference",), "dpo", "x", formats)


class Liar:
    kind, columns, required = "conversation", ("body",), ("body",)

    def recognise(self, row: Mapping[str, Any]) -> str | None:
        return "body"

    def convert(self, row: Mapping[str, Any]) -> Any:
        return Text(text=row["body"])


def test_a_format_that_makes_other_examples_than_it_says_is_named() -> None:
    formats = Formats(known={}, find=builtin_formats().find, default=Liar(), default_name="liar")
    with pytest.raises(DataError, match="liar says its rows become conversation, and made Text of one"):
        read({"body": "a"}, formats=formats)
