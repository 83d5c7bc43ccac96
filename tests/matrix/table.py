"""`docs/matrix.md`, from results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from tests.matrix.axes import (
    AXES,
    BASE_AXES,
    OPTIMIZER_AXES,
    QUANTISED,
    REFUSED,
    STAGE_AXES,
    USE_AXES,
    Combo,
    grid,
    refusals,
)
from tests.matrix.families import FAMILIES, WAYS, Family
from tests.matrix.runner import LEARNT, ROUNDED, TOLERANCE, Result, expected_sentences
from tests.matrix.scene import GLOBAL_BATCH, STEPS

PAGE = "docs/matrix.md"


def page(results: Sequence[Result]) -> str:
    """The whole page."""
    train = [r for r in results if r.combo.use == "training"]
    plain = [r for r in train if r.combo in _GRID]
    used = [r for r in results if r.combo.use == "inference"]
    others = [r for r in train if r.combo.optimizer != "adamw"]
    bases = [r for r in train if r.combo.base in BASE_AXES["base"]]
    stages = [r for r in train if r.combo.stage != "sft"]
    apart = {r.combo for r in [*others, *bases, *stages]}
    families = [r for r in train if r.combo not in _GRID and r.combo not in apart]
    parts = [
        _head(plain, used, families), _axes(plain), _methods(plain), _bases(bases), _optimizers(others),
        _stages(stages), _inference(used), _families(families),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


_GRID = set(grid())
_WORDS = {"loss": "loss", "norm": "gradient norm", "logits": "saved result's logits"}


def _head(plain: Sequence[Result], used: Sequence[Result], families: Sequence[Result]) -> str:
    legal = sum(not refusals(combo) for combo in _GRID)
    ran = [r for r in plain if not refusals(r.combo)]
    refused = [r for r in plain if refusals(r.combo)]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    wrong = sum(r.outcome == "wrong" for r in [*plain, *used, *families])
    return f"""# The matrix

Every way to load, quantise, adapt, speed up, spread and batch, combined: {len(_GRID):,} combinations. {legal:,} of them
can be trained and {len(_GRID) - legal:,} must be refused. `python -m tests.matrix` generates them, runs them on a tiny
model and writes this page; `tests/test_matrix.py` and `tests/test_families.py` run few that cover all pairs of values.

Each run is compared with one process of plain transformers and PEFT, trained by a loop written by hand
(`tests/by_hand.py`): padded rows, full logits, one mean over the step. It does {STEPS} optimiser steps of
{GLOBAL_BATCH} rows (or packs of rows) in float32 and evaluates after every other one, which must change nothing. Then
what it saved is opened by `PeftModel.from_pretrained` or `from_pretrained` on the same base.

- **equal**: loss and gradient norm of every step are within {TOLERANCE:.0e} of the reference's, and the reopened
  model's logits within {TOLERANCE:.0e} of the largest one; training had changed them by more than {LEARNT:.0e}.
- **refused**: `llmtune plan` says why in one sentence. Which combinations these are is written down by hand in
  `tests/matrix/axes.py`, not taken from the program.

On this page: {len(ran):,} of the {legal:,} were trained, {len(refused):,} of the {len(_GRID) - legal:,} refused;
{len(used)} uses of a trained result; {len(families)} runs or refusals of model families; {wrong or "none"} wrong.
{packages}, on a CPU.

```
python -m tests.matrix --pairwise                # a minute
python -m tests.matrix --families --inference
python -m tests.matrix --whole --slice 3/50      # hours without a slice; continues where it stopped
python -m tests.matrix --write                   # this page, from all results so far
```"""


def _axes(plain: Sequence[Result]) -> str:
    rows = []
    for axis, values in AXES.items():
        for value in values:
            ran = [r for r in plain if getattr(r.combo, axis) == value and not refusals(r.combo)]
            rows.append([axis, {True: "on", False: "off"}.get(value, str(value)) if axis == "packing" else str(value)])
            rows[-1] += [str(len(ran)), *(_largest(ran, what) for what in _WORDS)]
    return "## Axes\n\nLargest deviation among the runs with each value.\n\n" + _table(
        ["axis", "value", "runs", *_WORDS.values()], rows
    )


def _methods(plain: Sequence[Result]) -> str:
    rows = []
    for method in AXES["method"]:
        row = [method]
        for base in AXES["base"]:
            cell = [r for r in plain if (r.combo.base, r.combo.method) == (base, method)]
            every = sum((combo.base, combo.method) == (base, method) for combo in _GRID)
            row.append(_cell(cell, bool(refusals(Combo(base=base, method=method))), every))
        rows.append(row)
    reasons = "\n".join(f"- {_words(refusal.when)}: {refusal.why}." for refusal in REFUSED)
    return "## Methods on bases\n\n" + _table(["", *AXES["base"]], rows) + "\n\nRefused, and why:\n\n" + reasons


def _words(when: Mapping[str, tuple[Any, ...]]) -> str:
    texts = {("base", QUANTISED): "a quantised base"}
    return " with ".join(
        texts.get((axis, values), " or ".join(values)) for axis, values in when.items() if axis != "use"
    )


def _bases(bases: Sequence[Result]) -> str:
    rows = []
    for base in BASE_AXES["base"]:
        row = [base]
        for method in BASE_AXES["method"]:
            cell = [r for r in bases if (r.combo.base, r.combo.method) == (base, method)]
            row.append(_cell(cell, bool(refusals(Combo(base=base, method=method)))))
        ran = [r for r in bases if r.combo.base == base and not refusals(r.combo)]
        rows.append([*row, *(_largest(ran, what) for what in _WORDS)])
    text = """Every pair of a base by `hqq` (4 and 3 bits) with an init, method, number of ranks and checkpointing. The
reference has the weights that the format stands for, in plain layers; that they are those of the package hqq is
compared elsewhere (`plugins/quant/tests`)."""
    return f"## Other bases\n\n{text}\n\n" + _table(["", *BASE_AXES["method"], *_WORDS.values()], rows)


def _optimizers(others: Sequence[Result]) -> str:
    text = f"""Every pair of an optimiser with a base, method, number of ranks, accumulation and packing. The reference
steps with the same optimiser on one process's model; what each optimiser does is compared with its authors' program
elsewhere (`plugins/optim/tests`). `muon` makes rounding as large as everything else: its losses and norms may differ by
{ROUNDED["muon"][0]:.0e}, the saved result's logits by {ROUNDED["muon"][1]:.0e}."""
    return f"## Optimisers\n\n{text}\n\n" + _by_method(others, "optimizer", OPTIMIZER_AXES)


def _stages(stages: Sequence[Result]) -> str:
    text = f"""Every pair of a loss of preference pairs with a base, method, kernels, number of ranks, accumulation and
packing. The reference has the formulas written by hand (`tests/matrix/stages.py`) over whole logits, and asks the model
as it was at its start; with one, losses and norms may differ by {ROUNDED["dpo"][0]:.0e}, as log-ratios are small
differences of large sums. More of them, and reward models, KTO, GRPO and PPO, are compared with TRL and composed
elsewhere (`plugins/preference/tests`, `plugins/rollouts/tests`, `tests/test_preferences_composed.py`)."""
    return f"## Stages\n\n{text}\n\n" + _by_method(stages, "stage", STAGE_AXES)


def _by_method(results: Sequence[Result], axis: str, axes: Mapping[str, Sequence[Any]]) -> str:
    rows = []
    for value in axes[axis]:
        row, mine = [value], [r for r in results if getattr(r.combo, axis) == value]
        for method in axes["method"]:
            cell = [r for r in mine if r.combo.method == method]
            trained = [r for r in cell if not refusals(r.combo)]
            row.append(_cell(trained or cell, not trained))
        ran = [r for r in mine if not refusals(r.combo)]
        rows.append([*row, *(_largest(ran, what) for what in _WORDS)])
    return _table(["", *axes["method"], *_WORDS.values()], rows)


def _inference(used: Sequence[Result]) -> str:
    rows = []
    for method in USE_AXES["method"]:
        row = [method]
        for base in USE_AXES["base"]:
            cell = [r for r in used if (r.combo.base, r.combo.method) == (base, method)]
            row.append(_cell(cell))
        rows.append(row)
    text = "What was trained in full precision, opened by llmtune on each base, with and without kernels, against "
    return f"## Use\n\n{text}transformers and PEFT.\n\n" + _table(["", *USE_AXES["base"]], rows)


def _families(families: Sequence[Result]) -> str:
    rows = []
    for name, family in FAMILIES.items():
        mine = [r for r in families if r.combo.family == name]
        row = [name, family.has]
        for base, method in WAYS.values():
            cell = [r for r in mine if (r.combo.base, r.combo.method) == (base, method) and not _unpackable(family, r)]
            row.append(_cell(cell, bool(family.refused)) if family.experts or method != "experts" else "")
        row.append(_packing(family, mine))
        rows.append(row)
    trained = [r for r in families if not expected_sentences(r.combo)]
    worst = ", ".join(f"{words} {_largest(trained, what)}" for what, words in _WORDS.items())
    text = f"""Tiny random models from their configs, on 1 and 2 ranks, with and without kernels and packing. Largest
deviations: {worst}.

- The classifier is refused because the sft stage learns next tokens. Language models that transformers does not know
  as such (T5) are refused by their name.
- Where the structure does not tell whether packed documents are kept apart, the loaded model itself is asked before the
  first step (`llmtune/training/isolation.py`). Falcon, GPT-OSS and, without the kernel `packed_attention`, OPT are
  refused there.
- `target_modules: all` leaves out what PEFT cannot adapt as linear layers: stacks of experts (`target_parameters` names
  them), and dense layers and shared experts of Qwen3-MoE and DeepSeek-V3, whose names PEFT takes to mean the experts.
- PEFT refuses adapters on `out_proj` of Mamba layers; name other layers in `target_modules`."""
    return f"## Model families\n\n{text}\n\n" + _table(["family", "what it has", *WAYS, "packing"], rows)


def _unpackable(family: Family, result: Result) -> bool:
    return bool(family.unpackable) and result.combo.packing


def _packing(family: Family, mine: Sequence[Result]) -> str:
    if family.refused:
        return ""
    if family.unpackable:
        return f"refused: {family.unpackable}"
    return _cell([r for r in mine if r.combo.packing])


def _cell(cell: Sequence[Result], refused: bool = False, every: int = 0) -> str:
    """`equal (12)`, of how many there are if that is more; what is missing or wrong, loudly."""
    if wrong := [r for r in cell if r.outcome == "wrong"]:
        return f"**wrong: {len(wrong)} of {len(cell)}**"
    if not cell:
        return "not run"
    of = f" of {every}" if every > len(cell) else ""
    return f"{'refused' if refused else 'equal'} ({len(cell)}{of})"


def _largest(results: Sequence[Result], what: str) -> str:
    values = [getattr(result, what) for result in results]
    return f"{max(values):.0e}" if values else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
