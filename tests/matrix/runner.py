"""Run combinations, many in one set of processes, and compare each with its reference."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import shutil
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import llmtune
from llmtune.contract.errors import LlmtuneError
from tests.matrix.axes import Combo, refusals
from tests.matrix.families import FAMILIES
from tests.matrix.reference import References, reloaded_logits
from tests.matrix.scene import STEPS, Scene
from tests.spawn import in_ranks

TOLERANCE = 1e-5
"""Of losses and gradient norms, relative, and of the reloaded model's logits, as a share of the largest. float32 sums
taken in another order differ by a twentieth of it."""
ROUNDED: dict[str, tuple[float, float]] = {
    "muon": (1e-4, 1e-3), "dpo": (5e-5, TOLERANCE), "kto_pair": (5e-5, TOLERANCE),
}  # fmt: skip
"""The same where rounding counts for more: of losses and norms, and of logits. Muon makes every direction of a gradient
as large, those of noise too; a log-ratio of 1e-2 is the difference of two sums of 100 that are rounded to 1e-5."""
LEARNT = 1e-3
"""Training must have changed the logits by more than this share, or that they are equal means nothing."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a combination."""

    combo: Combo
    outcome: str
    """`equal`, `refused` (as it must be), or `wrong`."""
    loss: float = 0.0
    """Largest relative deviation of a step's loss."""
    norm: float = 0.0
    """Largest relative deviation of a step's gradient norm."""
    logits: float = 0.0
    """Largest deviation of the reloaded model's logits, as a share of the largest logit."""
    note: str = ""
    """The refusal's sentence, or what went wrong."""

    def line(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, line: str) -> Result:
        """Back from `line`."""
        tree = json.loads(line)
        return cls(**{**tree, "combo": Combo(**tree["combo"])})


def check_refusals(scene: Scene, combos: Iterable[Combo]) -> Iterator[Result]:
    """Plan each of these; the plan must refuse with one sentence that gives the reason written down for it."""
    for combo in combos:
        expected = expected_sentences(combo)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                llmtune.plan(scene.recipe(combo, scene.root / "refused"), nproc=combo.ranks)
        except LlmtuneError as error:
            sentence = str(error)
            good = any(says in sentence for says in expected) and len(sentence.splitlines()) == 1
            yield Result(combo=combo, outcome="refused" if good else "wrong", note=sentence)
        except Exception:
            yield Result(combo=combo, outcome="wrong", note=f"no sentence: {traceback.format_exc()[-500:]}")
        else:
            yield Result(combo=combo, outcome="wrong", note="it was planned, and must be refused")


def expected_sentences(combo: Combo) -> list[str]:
    """Parts of sentences, one of which must refuse the combination; empty for a legal one."""
    family = FAMILIES[combo.family]
    packing = [family.unpackable] if family.unpackable and combo.packing else []
    return [refusal.says for refusal in refusals(combo)] + packing + ([family.refused] if family.refused else [])


def run_all(scene: Scene, references: References, combos: Sequence[Combo], timeout_s: float = 240) -> Iterator[Result]:
    """Train each and compare it. One set of processes for each number of ranks."""
    for ranks in sorted({combo.ranks for combo in combos}):
        mine = [combo for combo in combos if combo.ranks == ranks]
        root = scene.root / f"runs{ranks}"
        folders = [root / str(index) for index in range(len(mine))]
        recipes = [scene.recipe(combo, folder) for combo, folder in zip(mine, folders, strict=True)]
        if ranks == 1:
            problems = train_each(recipes)
        else:
            problems = in_ranks(ranks, root / "ranks", train_each, recipes, timeout_s=timeout_s)[0]
        for combo, folder, problem in zip(mine, folders, problems, strict=True):
            yield (
                Result(combo=combo, outcome="wrong", note=problem)
                if problem
                else compare(scene, references, combo, folder)
            )
        shutil.rmtree(root, ignore_errors=True)


def train_each(recipes: Sequence[dict[str, Any]]) -> list[str]:
    """Train recipe after recipe in this process, one of the ranks; for each what went wrong, or nothing."""
    problems = []
    for keys in recipes:
        problem = ""
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                llmtune.train(keys)
        except Exception:
            problem = traceback.format_exc()[-1500:]
        problems.append(problem)
        gc.collect()  # a sharded model is a circle of references
        gc.freeze()  # what is left is modules and caches: looking through them again takes longer than a step
    return problems


def compare(scene: Scene, references: References, combo: Combo, folder: Path) -> Result:
    """The run in `folder` with the reference, and what it saved with the reference's model."""
    expected = references.of(combo)
    run = llmtune.load(folder)
    found = [(row["loss"], row["grad_norm"]) for row in run.metrics if "loss" in row]
    if len(found) != STEPS:
        return Result(combo=combo, outcome="wrong", note=f"{len(found)} steps instead of {STEPS}")
    pairs = list(zip(found, expected.numbers, strict=True))
    loss, norm = (max(abs(a[i] - b[i]) / abs(b[i]) for a, b in pairs) for i in (0, 1))
    try:
        saved = reloaded_logits(scene, combo, folder)
    except Exception as error:
        return Result(
            combo=combo,
            outcome="wrong",
            loss=loss,
            norm=norm,
            note=f"cannot be reloaded: {type(error).__name__}: {error}",
        )
    size = expected.logits.abs().max()
    apart = float((saved - expected.logits).abs().max() / size)
    learnt = float((expected.logits - expected.before).abs().max() / size)
    numbers, near = ROUNDED.get(combo.optimizer, ROUNDED.get(combo.stage, (TOLERANCE, TOLERANCE)))
    good = max(loss, norm) < numbers and apart < near and learnt > LEARNT
    note = "" if good else f"training itself changed the logits by {learnt:.0e} of their size"
    return Result(combo=combo, outcome="equal" if good else "wrong", loss=loss, norm=norm, logits=apart, note=note)


def quiet() -> None:
    """One thread, as the models are tiny; no progress bars, as they load in a millisecond."""
    import logging

    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
