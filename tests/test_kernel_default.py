"""Kernels are on where a recipe says nothing, off where it says so, and no reason to stop where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune.distributed.ranks import Ranks, pick_device
from llmtune.planning.make import make_plan
from llmtune.planning.plan import Plan
from llmtune.recipe.packages import installed
from llmtune.recipe.recipe import load_recipe
from llmtune.recipe.registry import Registry
from llmtune.testing import running


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    """A recipe that does not mention kernels."""
    return {key: value for key, value in running.tiny_recipe(tmp_path).items() if key != "kernel_config"}


def kernels(plan: Plan) -> list[str]:
    return [part.plugin.name for part in plan.parts.at("kernel_config")]


def test_kernels_are_on_by_default(keys: dict[str, Any]) -> None:
    plan = llmtune.plan(keys)
    assert kernels(plan) == ["auto"] and plan.model.attention == "llmtune_packed"
    assert "linear_cross_entropy: used for the loss" in str(plan)


@pytest.mark.parametrize("none", [None, False])
def test_a_recipe_can_do_without(none: Any, keys: dict[str, Any]) -> None:
    plan = llmtune.plan({**keys, "kernel_config": none})
    assert kernels(plan) == [] and plan.model.attention == "sdpa"
    again = llmtune.plan(load_recipe({**keys, "kernel_config": none}).resolved)
    assert kernels(again) == []


def test_without_the_package_the_default_falls_away_with_a_note(keys: dict[str, Any]) -> None:
    registry = Registry([source for source in installed() if source.distribution != "llmtune-kernels"])
    plan = make_plan(load_recipe(keys), registry, Ranks(), pick_device("cpu"))
    assert kernels(plan) == [] and "Until then the recipe does without" in str(plan)
    with pytest.raises(llmtune.LlmtuneError, match='kernel_config: no plugin "auto" is installed'):
        make_plan(load_recipe({**keys, "kernel_config": "auto"}), registry, Ranks(), pick_device("cpu"))
