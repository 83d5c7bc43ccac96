"""Run parts of the matrix and write its table: `python -m tests.matrix --help`."""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.matrix.axes import BASE_AXES, OPTIMIZER_AXES, STAGE_AXES, USE_AXES, Combo, grid, pairwise, sliced
from tests.matrix.families import family_combos
from tests.matrix.inference import check_inference
from tests.matrix.reference import References
from tests.matrix.runner import Result, check_refusals, expected_sentences, quiet, run_all
from tests.matrix.scene import Scene
from tests.matrix.table import PAGE, page

BATCH = 256
"""Combinations run in one set of processes; what a batch found is on disk when it ends."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--pairwise", action="store_true", help="a few combinations that cover all pairs of values")
    parser.add_argument("--whole", action="store_true", help="every combination (hours; see --slice)")
    parser.add_argument("--families", action="store_true", help="every way of training every family of models")
    parser.add_argument("--inference", action="store_true", help="every trained result on every base")
    parser.add_argument("--slice", default="1/1", metavar="3/50", help="run only this part of what is asked for")
    parser.add_argument(
        "--results", type=Path, default=Path("runs/matrix.jsonl"), help="kept between calls (%(default)s)"
    )
    parser.add_argument("--again", action="store_true", help="run what the results already hold, too")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE} from all results")
    options = parser.parse_args()
    quiet()
    results = read(options.results)
    wanted = [combo for combo in chosen(options) if options.again or combo.name not in results]
    with tempfile.TemporaryDirectory() as scratch:
        for result in run(Scene(Path(scratch)), wanted):
            results[result.combo.name] = result
            append(options.results, result)
    wrong = [result for result in results.values() if result.outcome == "wrong"]
    print(f"{len(wanted)} run now, {len(results)} known, {len(wrong)} of them wrong")
    for result in wrong:
        print(f"WRONG {result.combo.name}: {result.note}")
    if options.write:
        Path(PAGE).write_text(page(list(results.values())), encoding="utf-8")
    sys.exit(bool(wrong))


def chosen(options: argparse.Namespace) -> list[Combo]:
    """What the options ask for, each once."""
    combos: list[Combo] = []
    if options.whole:
        combos += grid() + grid(OPTIMIZER_AXES) + grid(BASE_AXES) + grid(STAGE_AXES)
    elif options.pairwise:
        combos += pairwise_both()
    if options.families:
        combos += family_combos()
    if options.inference:
        combos += grid(USE_AXES)
    return sliced(list(dict.fromkeys(combos)), options.slice)


@functools.cache
def pairwise_both() -> list[Combo]:
    """All pairs among the legal combinations, and all pairs among those that must be refused, of each grid."""
    found = []
    for everything in (grid(), grid(OPTIMIZER_AXES), grid(BASE_AXES), grid(STAGE_AXES)):
        found += pairwise([combo for combo in everything if not expected_sentences(combo)])
        found += pairwise([combo for combo in everything if expected_sentences(combo)])
    return found


def run(scene: Scene, combos: Sequence[Combo]) -> Iterator[Result]:
    """Each combination as it must be treated."""
    used = [combo for combo in combos if combo.use == "inference"]
    refused = [combo for combo in combos if combo.use != "inference" and expected_sentences(combo)]
    legal = [combo for combo in combos if combo.use != "inference" and not expected_sentences(combo)]
    yield from check_refusals(scene, refused)
    yield from check_inference(scene, used)
    references = References(scene)
    for start in range(0, len(legal), BATCH):
        yield from run_all(scene, references, legal[start : start + BATCH], timeout_s=60 + 10 * BATCH)
        print(f"{min(start + BATCH, len(legal))} of {len(legal)} trained", flush=True)


def read(path: Path) -> dict[str, Result]:
    """Results of earlier calls, by the combination's name."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {result.combo.name: result for result in map(Result.read, lines)}


def append(path: Path, result: Result) -> None:
    """Keep one result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(result.line() + "\n")


if __name__ == "__main__":
    main()
