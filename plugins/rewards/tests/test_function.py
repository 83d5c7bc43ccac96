"""Functions: what they are called with, and everything that can be wrong with one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune import Completion, DataError, PluginError
from llmtune.testing import in_ranks, tiny_recipe

Made = Callable[..., Completion]


def reward(function: str, **arguments: Any) -> Any:
    from llmtune_rewards import FunctionConfig, build_function

    return build_function(FunctionConfig(function=function, arguments=arguments))


def test_a_function_gets_the_lists_that_it_names(functions: str, completion: Made) -> None:
    said = [completion("one two", answer="12345"), completion("", cut=True, answer="1", number=3)]
    assert reward(f"{functions}:words").score(said, None) == [2.0, 0.0]
    assert reward(f"{functions}:near").score(said, None) == [-2.0, -1.0]
    assert reward(f"{functions}:near", scale=4).score(said, None) == [-0.5, -0.25]
    assert reward(f"{functions}:tokens").score(said, None) == [len(said[0].ids), len(said[1].ids) - 100]
    assert reward(f"{functions}:some").score(said, None) == [1.0, None]
    assert reward(f"{functions}:words").score([], None) == []


def test_functions_of_trl_work_as_they_are(completion: Made) -> None:
    rewards = pytest.importorskip("trl.rewards", reason="needs trl, whose functions are called")
    overlong = rewards.get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2)
    import llmtune_rewards.function as module

    module.overlong = overlong  # what a package of functions would hold
    said = [completion("a"), completion("a b c d e f g h")]
    assert reward("llmtune_rewards.function:overlong").score(said, None) == overlong([list(each.ids) for each in said])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("words", None),
        ("nothing", "has nothing of that name; name a function of it"),
        ("NUMBER", "has a int, no function"),
        ("later", "which is an async function"),
        ("unasked", "which takes no answers: it has the parameters question, number"),
        ("by_position", "which takes completions by position only"),
    ],
)
def test_what_is_no_reward_function_is_told_by_the_plan(
    name: str, words: str | None, functions: str, tmp_path: Path
) -> None:
    given = recipe(tmp_path, f"{functions}:{name}")
    if words is None:
        assert "function (llmtune-rewards" in str(llmtune.plan(given))
        return
    with pytest.raises(llmtune.PlanError) as error:
        llmtune.plan(given)
    assert f'reward_config function: function: found "{functions}:{name}"' in str(error.value)
    assert words in str(error.value)


def test_modules_arguments_and_columns_that_are_not_there(functions: str, tmp_path: Path) -> None:
    def refused(function: str, **keys: Any) -> str:
        with pytest.raises(llmtune.PlanError) as error:
            llmtune.plan(recipe(tmp_path, function, **keys))
        return str(error.value)

    assert "acme_none cannot be imported (ModuleNotFoundError" in refused("acme_none:score")
    assert "allowed is module:function of a package that is installed" in refused("score")
    assert "takes no setting 'scale'; its parameters are completions" in refused(
        f"{functions}:words", arguments={"scale": 2}
    )
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps({"prompt": f"{at}?"}) + "\n" for at in range(8)))
    said = refused(f"{functions}:near", dataset=str(tmp_path / "bare.jsonl"))
    assert f"bare.jsonl:1 has no column 'answer', which {functions}:near takes" in said


def test_a_column_that_a_row_of_a_stream_lacks_is_told(functions: str, completion: Made) -> None:
    with pytest.raises(DataError, match="reward_config function: the row of the prompt .* has no column 'answer'"):
        reward(f"{functions}:near").score([completion("a", answer="b"), completion("a")], None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fails", "acme_rewards.py:29: RuntimeError: no such answer, sorry; nothing was learnt from this step"),
        ("lost", "acme_rewards:lost returned [1.0] for 8 answers, allowed is a list of as many numbers"),
        ("text", "acme_rewards:text returned ['good', 'good'"),
    ],
)
def test_a_function_that_fails_ends_the_run_in_one_sentence(
    name: str, words: str, functions: str, tmp_path: Path
) -> None:
    with pytest.raises(PluginError) as error:
        llmtune.train(recipe(tmp_path, f"{functions}:{name}"))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert llmtune.load(tmp_path / "run").status == "failed"


def recipe(folder: Path, function: str, arguments: Any = None, **more: Any) -> dict[str, Any]:
    given = {"name": "function", "function": function, "arguments": arguments or {}}
    stage = {"name": "grpo", "max_new_tokens": 4, "num_generations": 2}
    more = {"stage_config": stage, "reward_config": given, "max_steps": 2, **more}
    return tiny_recipe(folder, kind="prompt", per_device_train_batch_size=2, **more)


def ended(keys: dict[str, Any]) -> str:
    try:
        llmtune.train(keys)
    except llmtune.LlmtuneError as error:
        return str(error)
    return "nothing"


def test_a_nan_on_one_rank_ends_all_before_the_update(functions: str, tmp_path: Path) -> None:
    """The prompt with four is on one of the ranks only."""
    keys = recipe(tmp_path, f"{functions}:nan_for_four", disable_shuffling=True)
    first, second = in_ranks(2, tmp_path / "ranks", ended, keys)
    for said in (first, second):
        assert f"reward_config function: {functions}:nan_for_four gave nan for the answer" in said
        assert "nothing was learnt from this step" in said
    assert not [row for row in llmtune.load(tmp_path / "run").metrics if row.get("step", 0) > 1]


def test_two_rewards_count_as_much_as_their_weights(functions: str, tmp_path: Path) -> None:
    both = [
        {"name": "function", "function": f"{functions}:words"},
        {"name": "rule", "match": "number", "label": "right"},
    ]
    keys = recipe(
        tmp_path, "", reward_config=both,
        stage_config={"name": "grpo", "max_new_tokens": 6, "num_generations": 4, "reward_weights": [0.5, 3.0]},
    )  # fmt: skip
    for row in llmtune.train(keys).metrics:
        total = 0.5 * row["rewards/function"] + 3.0 * row["rewards/right"]
        assert row["reward"] == pytest.approx(total, abs=1e-6)


PACKAGE = {
    "pyproject.toml": '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
    '[project]\nname = "acme-judge"\nversion = "1.0"\n',
    "acme_judge/__init__.py": "def brevity(completions, most=20):\n"
    "    return [max(0.0, 1 - len(text) / most) for text in completions]\n",
}


def test_a_function_of_a_strangers_package_that_pip_installs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, site = tmp_path / "source", tmp_path / "installed"
    for name, text in PACKAGE.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True)
    monkeypatch.syspath_prepend(str(site))
    keys = recipe(tmp_path, "acme_judge:brevity", arguments={"most": 40})
    one = [row["rewards/function"] for row in llmtune.train({**keys, "output_dir": str(tmp_path / "one")}).metrics]
    assert len(one) == 2 and all(0 <= value <= 1 for value in one)
    found = in_ranks(2, tmp_path / "ranks", rewarded, {**keys, "gradient_accumulation_steps": 1})
    assert found[0] == pytest.approx(one, rel=1e-4)


def rewarded(keys: dict[str, Any]) -> list[float]:
    return [row["rewards/function"] for row in llmtune.train(keys).metrics]
