"""Keys are changed where they stand in a recipe's text, and nothing else is."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from llmtune_web.yaml_text import Values, quoted, with_value, without

RECIPE = """\
# About 2 minutes.
model: owner/name  # a hub id
peft_config: {name: lora, r: 16}

dataset:
  - one.jsonl   # first
  - two.jsonl
# of the optimiser
optim_config:
  name: adamw
  beta1: 0.9  # usual

learning_rate: 2.0e-3
default_system: |
  You are
  brief.
"""


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (["learning_rate"], "1e-4", "learning_rate: 1e-4"),
        (["model"], "other", "model: other  # a hub id"),
        (["peft_config", "r"], "8", "peft_config: {name: lora, r: 8}"),
        (["peft_config", "lora_alpha"], "8", "peft_config: {name: lora, r: 16, lora_alpha: 8}"),
        (["optim_config", "beta1"], "0.8", "  beta1: 0.8  # usual"),
        (["optim_config", "beta2"], "0.8", "  beta2: 0.8"),
        (["stage_config"], "dpo", "stage_config: dpo"),
        (["stage_config", "beta"], "0.1", "stage_config: {beta: 0.1}"),
        (["dataset"], "three.jsonl", "dataset: three.jsonl"),
        (["default_system"], quoted("Be kind: yes"), 'default_system: "Be kind: yes"'),
    ],
)
def test_a_value_is_changed_where_it_stands(path: list[str], value: str, line: str) -> None:
    changed = with_value(RECIPE, path, value)
    assert line in changed.splitlines()
    assert Values(changed).at(*path) == yaml.load(value, yaml.BaseLoader)
    assert "# of the optimiser" in changed and "# About 2 minutes." in changed
    gone = set(RECIPE.splitlines()) - set(changed.splitlines())
    assert all(path[0] in row or "jsonl" in row or "beta1" in row or row in ("  You are", "  brief.") for row in gone)
    again = without(changed, path)
    assert Values(again).at(*path) is None and "# of the optimiser" in again


def test_a_bare_name_becomes_a_block() -> None:
    assert with_value("peft_config: lora\n", ["peft_config", "r"], "4") == "peft_config: {name: lora, r: 4}\n"
    assert with_value("peft_config: null\n", ["peft_config", "name"], "lora") == "peft_config: {name: lora}\n"


def test_what_is_removed_leaves_no_empty_block() -> None:
    assert without("a: 1\nb:\n  c: 2\nd: 3\n", ["b", "c"]) == "a: 1\nd: 3\n"
    assert without("p: {name: x, r: 1}\n", ["p", "name"]) == "p: {r: 1}\n"
    assert without("p: {name: x, r: 1}\n", ["p", "r"]) == "p: {name: x}\n"
    assert without("a: 1\n", ["nothing"]) == "a: 1\n"


def test_an_empty_text_takes_a_first_key() -> None:
    assert with_value("", ["model"], "x") == "model: x\n"
    assert with_value("{}", ["model"], "x") == "{model: x}"
    assert with_value("# a comment\n", ["model"], "x") == "# a comment\nmodel: x\n"


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAMES = st.sampled_from(["model", "seed", "peft_config", "dataset", "template"])
VALUES = st.one_of(st.integers(-5, 5).map(str), TEXTS.map(quoted), st.just("[a, {b: c}]"), st.just("{name: x}"))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(NAMES, st.booleans(), VALUES), max_size=6))
def test_any_changes_read_back(changes: list[tuple[str, bool, str]]) -> None:
    text, wanted = RECIPE, yaml.load(RECIPE, yaml.BaseLoader)
    for name, removed, value in changes:
        text = without(text, [name]) if removed else with_value(text, [name], value)
        if removed:
            wanted.pop(name, None)
        else:
            wanted[name] = yaml.load(value, yaml.BaseLoader)
    assert yaml.load(text, yaml.BaseLoader) == wanted


@settings(max_examples=60)
@given(TEXTS)
def test_a_quoted_text_is_read_back(text: str) -> None:
    assert yaml.safe_load(quoted(text)) == text
