"""Every family of models, trained in every way, against transformers and PEFT; what cannot be is refused in a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune.contract.errors import LlmtuneError, PlanError
from tests.matrix.axes import Combo, pairwise
from tests.matrix.families import FAMILIES, family_combos
from tests.matrix.reference import References
from tests.matrix.runner import Result, check_refusals, expected_sentences, quiet, run_all
from tests.matrix.scene import Scene
from tests.runs import FLOAT32, stored_types

LEGAL = pairwise([combo for combo in family_combos() if not expected_sentences(combo)])
REFUSED = [combo for combo in family_combos() if expected_sentences(combo) and combo.kernels == "none"]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    quiet()
    return Scene(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def results(scene: Scene) -> dict[Combo, Result]:
    return {result.combo: result for result in run_all(scene, References(scene), LEGAL, timeout_s=500)}


@pytest.mark.parametrize("combo", LEGAL, ids=lambda combo: combo.name)
def test_a_family_trains_as_transformers_and_peft_train_it(combo: Combo, results: dict[Combo, Result]) -> None:
    result = results[combo]
    assert result.outcome == "equal", result


def test_what_a_family_cannot_do_is_said_in_the_plan(scene: Scene) -> None:
    found = list(check_refusals(scene, REFUSED))
    assert {result.combo.family for result in found} == {
        name for name, family in FAMILIES.items() if family.refused or family.unpackable
    }
    assert [result for result in found if result.outcome != "refused"] == []


def test_the_plan_says_that_experts_get_no_adapter_and_how_they_would(scene: Scene, tmp_path: Path) -> None:
    plan = llmtune.plan(scene.recipe(Combo(family="qwen3_moe"), tmp_path / "run"))
    assert "stacks of experts get no adapter: 4 weights (experts.gate_up_proj, experts.down_proj)" in str(plan)
    keys = scene.recipe(Combo(family="qwen3_moe", method="experts"), tmp_path / "run")
    assert "8 layers and 4 stacks of experts" in str(llmtune.plan(keys))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lora_dropout": 0.1}, "set lora_dropout: 0"),
        ({"use_dora": True}, "use_dora: found true beside target_parameters"),
        ({"target_parameters": "experts.gate_proj"}, 'Did you mean "gate_up_proj"'),
    ],
)
def test_experts_that_cannot_be_adapted_are_refused(
    changes: dict[str, Any], sentence: str, scene: Scene, tmp_path: Path
) -> None:
    keys = scene.recipe(Combo(family="qwen3_moe", method="experts"), tmp_path / "run")
    with pytest.raises(LlmtuneError, match=sentence):
        llmtune.plan({**keys, "peft_config": {**keys["peft_config"], **changes}})


def test_experts_are_merged_into_their_stacks(scene: Scene, tmp_path: Path) -> None:
    """`export` compares the merged model with base and adapter itself; a difference is an error."""
    combo = Combo(family="mixtral", method="experts")
    run = llmtune.train({**scene.recipe(combo, tmp_path / "run"), "learning_rate": 1e-2})
    assert stored_types(run.export(tmp_path / "merged")) == FLOAT32
    with pytest.raises(PlanError, match="needs whole stacks of experts"):
        llmtune.plan({**scene.recipe(combo, tmp_path / "b"), "dist_config": {"name": "fsdp2", "tp_size": 2}}, nproc=2)
