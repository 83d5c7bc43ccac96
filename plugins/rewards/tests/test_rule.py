"""Rules: hand-computed verdicts, and what rows and recipes lack."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from llmtune_rewards import RuleConfig
from llmtune_rewards.numbers import last_number
from llmtune_rewards.rule import RuleReward

import llmtune
from llmtune import Completion, DataError, PlanError
from llmtune.testing import tiny_recipe

Made = Callable[..., Completion]
GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72"


def scores(completions: list[Completion], **keys: Any) -> list[float]:
    from llmtune_rewards import RuleConfig, build_rule

    return build_rule(RuleConfig(**keys)).score(completions, None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("It is 42.", 42),
        ("1,234,567.5 of them", Fraction(12345675, 10)),
        ("not 1,2 or 3,45", 45),
        ("-5", -5),
        ("\u22125 degrees", -5),
        ("10-5", 5),
        ("x=-3", -3),
        ("(7)-2", 2),
        ("-$3.50", Fraction(-7, 2)),
        ("$1,000", 1000),
        ("3/4", Fraction(3, 4)),
        ("1 1/2 cups", Fraction(3, 2)),
        ("\\boxed{\\frac{3}{4}}", Fraction(3, 4)),
        ("-\\dfrac{1}{3}", Fraction(-1, 3)),
        ("50%", 50),
        (".5", Fraction(1, 2)),
        ("0.1", Fraction(1, 10)),
        ("1.5e3", 1500),
        ("2e-3", Fraction(1, 500)),
        ("3 then 4", 4),
        ("version 1.2.3", 3),
        ("7th", 7),
        ("nothing", None),
        ("", None),
        ("1/0", None),
        ("9" * 5000, None),
        ("1e999999999", None),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, value: Any) -> None:
    began = time.monotonic()
    assert last_number(text) == value
    assert time.monotonic() - began < 5  # no power of ten is written out


def test_numbers_are_compared_exactly_or_within_a_share(completion: Made) -> None:
    said = [completion(text, answer=GSM8K) for text in ("It is 72.", "72.0", "It is 72 or 73", "71.5", "none")]
    keys: dict[str, Any] = {"match": "number", "column_pattern": "####(.*)"}
    assert scores(said, **keys) == [1, 1, 0, 0, 0]
    assert scores(said, **keys, tolerance=0.01, right_score=2.0, wrong_score=-1.0) == [2, 2, -1, 2, -1]
    assert scores([completion("0.1", answer="1/10"), completion("1,000", answer=1000.0)], match="number") == [1, 1]
    assert scores([completion("4", answer=["3", 4])], match="number") == [1]


def test_texts_are_compared_with_white_space_and_case_as_told(completion: Made) -> None:
    said = [completion("The  Sun\n", answer="the sun"), completion("The Sun", answer="The Sun")]
    assert scores(said) == [0, 1]
    assert scores(said, ignore_case=True) == [1, 1]
    assert scores(said, ignore_case=True, ignore_space=False) == [0, 1]
    assert scores([completion("b", target=["a", "b"])], column="target") == [1]


def test_a_pattern_takes_the_last_place_where_it_is_found(completion: Made) -> None:
    tags = "<answer>(.*?)</answer>"
    said = [
        completion(text, answer="four\nfive")
        for text in ("<answer>no</answer> <answer>four\nfive</answer>", "four\nfive", "<answer></answer>")
    ]
    assert scores(said, answer_pattern=tags) == [1, 0, 0]
    assert scores(said, match="regex", answer_pattern=tags) == [1, 0, 1]
    assert scores([completion("STOP")], match="regex", answer_pattern="stop") == [0]
    assert scores([completion("STOP")], match="regex", answer_pattern="stop", ignore_case=True) == [1]
    assert scores([completion("it is 4 now", answer="4")], answer_pattern=r"(?<=is )\d|x") == [1]


def test_a_choice_is_the_last_word_that_is_one(completion: Made) -> None:
    texts = ("A or B? I say B.", "(b)", "Bad", "It is B, not A", "")
    said = [completion(text, answer="B") for text in texts]
    assert scores(said, match="choice") == [1, 0, 0, 0, 0]
    assert scores(said, match="choice", ignore_case=True) == [1, 1, 0, 0, 0]
    words = [completion("not very good", answer="very good"), completion("good", answer="very good")]
    assert scores(words, match="choice", choices=("good", "very good")) == [1, 0]


def test_a_length_counts_the_tokens(completion: Made) -> None:
    said = [completion("a b c"), completion("a b c", cut=True), completion("")]
    assert [len(each.ids) for each in said] == [len(said[1].ids) + 1, len(said[1].ids), 1]
    assert scores(said, match="length", max_tokens=len(said[1].ids)) == [0, 1, 1]
    assert scores(said, match="length", min_tokens=2) == [1, 1, 0]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"match": "regex"}, "answer_pattern: match regex looks for it"),
        ({"answer_pattern": "("}, "answer_pattern: found '(', no regular expression"),
        ({"match": "length", "min_tokens": 5, "max_tokens": 4}, "max_tokens: found 4, allowed is min_tokens (5)"),
        ({"match": "near"}, 'match: found "near"'),
    ],
)
def test_keys_that_make_no_rule_are_refused(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(llmtune.LlmtuneError) as error:
        llmtune.plan(recipe(tmp_path, keys))
    assert words in str(error.value)


def recipe(folder: Path, keys: dict[str, Any], **more: Any) -> dict[str, Any]:
    stage = {"name": "grpo", "max_new_tokens": 4, "num_generations": 2}
    given = {"stage_config": stage, "reward_config": {"name": "rule", **keys}, **more}
    return tiny_recipe(folder, kind="prompt", **given)


@pytest.mark.parametrize(
    ("row", "keys", "words"),
    [
        ({}, {}, "has no column 'answer' to compare answers with"),
        ({"answer": None}, {"match": "number"}, "has no column 'answer'"),
        ({"answer": "four"}, {"match": "number"}, "has 'four' as answer, which holds no number"),
        ({"answer": "E"}, {"match": "choice"}, "has 'E' as answer, which holds no one of A, B, C, D"),
        ({"answer": "42"}, {"column_pattern": "####(.*)"}, "has '42' as answer, in which column_pattern is not found"),
    ],
)
def test_a_row_without_its_answer_is_named_before_training(
    row: dict[str, Any], keys: dict[str, Any], words: str, tmp_path: Path, completion: Made
) -> None:
    rows = [{"prompt": f"{at}?", "answer": "A #### 4", "more": 1} for at in range(9)] + [{"prompt": "9?", **row}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(PlanError) as error:
        llmtune.plan(recipe(tmp_path, keys, dataset=str(tmp_path / "rows.jsonl")))
    assert f"reward_config rule: {tmp_path / 'rows.jsonl'}:10 {words}" in str(error.value)
    with pytest.raises(DataError, match="the row of the prompt"):  # of a stream, whose rows come later
        scores([completion("4", **row)], **keys)


def test_a_missing_column_is_answered_with_those_that_are_there() -> None:
    rule = RuleReward(RuleConfig())
    said = "has no column 'answer' to compare answers with{}; name the one that holds the right answer in reward_config"
    assert said.format(", only solution, level") in str(rule.row_objection({"solution": "4", "level": 1}))
    assert said.format(" nor any other beside the prompt") in str(rule.row_objection({}))


def test_rules_without_columns_ask_for_none(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{at}?"}) + "\n" for at in range(8)))
    keys = {"match": "length", "max_tokens": 3}
    assert llmtune.plan(recipe(tmp_path, keys, dataset=str(tmp_path / "rows.jsonl"))).steps == 4


def test_rewards_without_answers_and_answers_without_rewards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="reward_config: not given, and stage_config grpo learns from"):
        llmtune.plan({**recipe(tmp_path, {}), "reward_config": None})
    with pytest.raises(PlanError, match="reward_config: found rule, but stage_config sft lets the model answer"):
        llmtune.plan(tiny_recipe(tmp_path, reward_config="rule"))


def test_a_run_reports_what_the_rule_says(tmp_path: Path) -> None:
    run = llmtune.train(recipe(tmp_path, {"match": "length", "max_tokens": 3, "right_score": 4.0}, max_steps=1))
    (row,) = run.metrics
    assert row["rewards/rule"] == pytest.approx(4 * (1 - row["completions/cut"]), abs=4.0) and row["reward"] >= 0
    assert math.isfinite(row["loss"])
