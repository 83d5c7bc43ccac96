"""The sets of preferences that ship with llmtune: made by the script beside them, and held-out rows are held out."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune.testing import running

SETS = Path(llmtune.__file__).parent / "data" / "sets"
MADE = runpy.run_path(str(SETS / "make_preferences.py"))
RECIPES = Path(__file__).parents[1] / "recipes"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SETS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_files_are_what_the_script_makes() -> None:
    for ending, parts in (
        ("", ("TRAINED", "ROUNDABOUT", "EVASIVE")),
        ("_held_out", ("HELD_OUT", "OTHER_ROUNDABOUT", "OTHER_EVASIVE")),
    ):
        given = [MADE[part] for part in parts]
        assert rows(f"preferences{ending}") == list(MADE["pairs"](*given))
        assert rows(f"labelled{ending}") == list(MADE["labelled"](MADE["pairs"](*given)))


def test_held_out_rows_share_no_question_and_no_way_of_evading_one() -> None:
    trained, held = rows("preferences"), rows("preferences_held_out")
    assert (len(trained), len(held)) == (80, 40)
    assert not {row["prompt"] for row in trained} & {row["prompt"] for row in held}
    assert not {row["chosen"] for row in trained} & {row["chosen"] for row in held}
    assert not {*MADE["ROUNDABOUT"], *MADE["EVASIVE"]} & {*MADE["OTHER_ROUNDABOUT"], *MADE["OTHER_EVASIVE"]}
    for row in (*trained, *held):
        assert row["chosen"].endswith(".") and row["prompt"].endswith("?") and len(row["chosen"].split()) <= 12
    # The worse answer is the longer one in some pairs and the shorter one in others.
    shorter = [len(row["rejected"]) < len(row["chosen"]) for row in trained]
    assert 0.2 < sum(shorter) / len(shorter) < 0.4


@pytest.mark.parametrize("stage", ["dpo", "kto", "rm"])
def test_a_recipe_of_preferences_trains_on_its_sets(stage: str, tmp_path: Path) -> None:
    tiny = running.tiny_recipe(tmp_path)
    changes = {key: tiny[key] for key in ("model", "output_dir", "device", "bf16", "kernel_config")}
    lines = [line for line in (RECIPES / f"{stage}.yaml").read_text(encoding="utf-8").splitlines() if line.strip()]
    assert 15 <= len(lines) <= 35
    run = llmtune.train(str(RECIPES / f"{stage}.yaml"), max_steps=1, max_samples=8, **changes)
    assert run.status == "done" and any("eval_rewards/chosen" in row for row in run.metrics)
