"""Every pair of values of the matrix's axes, against transformers and PEFT; `python -m tests.matrix` runs the rest."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.matrix.__main__ import pairwise_both
from tests.matrix.axes import (
    AXES,
    BASE_AXES,
    OPTIMIZER_AXES,
    STAGE_AXES,
    USE_AXES,
    Combo,
    grid,
    pairwise,
    refusals,
    sliced,
)
from tests.matrix.inference import check_inference
from tests.matrix.reference import References
from tests.matrix.runner import Result, check_refusals, quiet, run_all
from tests.matrix.scene import Scene

LEGAL = [combo for combo in pairwise_both() if not refusals(combo)]
ILLEGAL = [combo for combo in pairwise_both() if refusals(combo)]
USES = [combo for combo in pairwise(grid(USE_AXES)) if combo.base == "int8"]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    quiet()
    return Scene(tmp_path_factory.mktemp("matrix"))


@pytest.fixture(scope="module")
def results(scene: Scene) -> dict[Combo, Result]:
    """All runs, in one set of processes for each number of ranks: starting those costs more than the runs."""
    return {result.combo: result for result in run_all(scene, References(scene), LEGAL, timeout_s=500)}


@pytest.mark.parametrize("combo", LEGAL, ids=lambda combo: combo.name)
def test_a_legal_combination_equals_transformers_and_peft(combo: Combo, results: dict[Combo, Result]) -> None:
    result = results[combo]
    assert result.outcome == "equal", result


def test_illegal_combinations_are_refused_with_one_sentence(scene: Scene) -> None:
    wrong = [result for result in check_refusals(scene, ILLEGAL) if result.outcome != "refused"]
    assert wrong == []


def test_eight_bit_bases_serve_what_was_trained(scene: Scene) -> None:
    found = list(check_inference(scene, USES))
    assert {result.combo.method for result in found} == set(AXES["method"])
    assert [result for result in found if result.outcome != "equal"] == []


def test_a_wrong_run_is_noticed(scene: Scene, tmp_path: Path) -> None:
    """Neither a legal combination among the refused, nor other numbers than the reference's, pass."""
    (planned,) = check_refusals(scene, [Combo()])
    assert planned.outcome == "wrong" and "must be refused" in planned.note

    class Unlike(References):
        def of(self, combo: Combo):  # type: ignore[no-untyped-def]
            return super().of(Combo(method="rslora"))

    (result,) = run_all(scene, Unlike(scene), [Combo()])
    assert result.outcome == "wrong" and result.norm > 0.1
    assert Result.read(result.line()) == result


def test_few_combinations_cover_every_pair() -> None:
    for axes in (AXES, OPTIMIZER_AXES, BASE_AXES, STAGE_AXES):
        legal = [combo for combo in grid(axes) if not refusals(combo)]

        def pairs(combos: list[Combo], axes: Any = axes) -> set[object]:
            values = [[(axis, getattr(combo, axis)) for axis in axes] for combo in combos]
            return {pair for row in values for pair in itertools.combinations(row, 2)}

        assert pairs(legal) == pairs([combo for combo in LEGAL if combo in set(legal)])
    assert len([combo for combo in LEGAL if combo in set(grid())]) < 40
    assert len(grid()) == 10800 and len([combo for combo in grid() if not refusals(combo)]) == 6696


def test_slices_hold_everything_once() -> None:
    everything = grid()
    parts = [sliced(everything, f"{number}/7") for number in range(1, 8)]
    assert sorted(itertools.chain(*parts)) == sorted(everything)
    with pytest.raises(ValueError, match='found "8/7"'):
        sliced(everything, "8/7")


def test_the_page_speaks_of_every_value() -> None:
    page = (Path(__file__).parents[1] / "docs" / "matrix.md").read_text(encoding="utf-8")
    assert [
        value for values in AXES.values() for value in values if not isinstance(value, bool) and str(value) not in page
    ] == []
    assert "**wrong" not in page and "not run" not in page
