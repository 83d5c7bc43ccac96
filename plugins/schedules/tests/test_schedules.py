"""Every schedule against transformers', at every step, warm-up and the step after the last included."""

from __future__ import annotations

import pytest
import torch
from llmtune_schedules import (
    Constant,
    Cosine,
    CosineWithMinLr,
    CosineWithRestarts,
    InverseSqrt,
    Linear,
    Polynomial,
    WarmupStableDecay,
    lr_scheduler_config,
)
from llmtune_schedules.plateau import ReduceOnPlateau, ReduceOnPlateauConfig

from llmtune.testing import read_keys

LR = 3e-4

CASES = [
    (Linear(), "linear", {}),
    (Constant(), "constant_with_warmup", {}),
    (Cosine(), "cosine", {}),
    (Cosine(num_cycles=1.75), "cosine", {"num_cycles": 1.75}),
    (Cosine(min_lr_ratio=0.1), "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    (Polynomial(lr_end_ratio=1e-7 / LR), "polynomial", {}),
    (Polynomial(power=2.5, lr_end_ratio=0.2), "polynomial", {"power": 2.5, "lr_end": 0.2 * LR}),
    (CosineWithRestarts(), "cosine_with_restarts", {}),
    (CosineWithRestarts(num_cycles=3), "cosine_with_restarts", {"num_cycles": 3}),
    (CosineWithMinLr(min_lr_rate=0.1), "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    (CosineWithMinLr(min_lr_rate=0.3, num_cycles=1.5), "cosine_with_min_lr", {"min_lr_rate": 0.3, "num_cycles": 1.5}),
    (InverseSqrt(), "inverse_sqrt", {}),
    (InverseSqrt(timescale=5), "inverse_sqrt", {"timescale": 5}),
    (WarmupStableDecay(num_decay_steps=1), "warmup_stable_decay", {"num_decay_steps": 1}),
]


def rates_of_transformers(name: str, keys: dict, total: int, warmup: int, count: int) -> list[float]:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=keys)
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("schedule", "name", "keys"), CASES)
@pytest.mark.parametrize(("total", "warmup"), [(40, 0), (40, 7), (1, 0), (11, 10)])
def test_equals_transformers_at_every_step(schedule, name, keys, total, warmup) -> None:
    expected = rates_of_transformers(name, keys, total, warmup, total + 1)
    ours = [
        LR * (step / max(1, warmup) if step < warmup else schedule.factor(step, total, warmup))
        for step in range(total + 1)
    ]
    assert ours == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("schedule", [case[0] for case in CASES])
def test_warm_up_over_the_whole_run_divides_by_nothing(schedule) -> None:
    assert 0.0 <= schedule.factor(5, 5, 5) <= 1.0


WSD = [
    {"num_decay_steps": 10},
    {"num_decay_steps": 9, "decay_type": "linear"},
    {"num_decay_steps": 9, "decay_type": "1-sqrt", "num_stable_steps": 20},
    {"num_decay_steps": 10, "num_cycles": 1.25, "num_stable_steps": 3},
    {"num_decay_steps": 12, "min_lr_ratio": 0.2},
]


@pytest.mark.parametrize("keys", WSD)
@pytest.mark.parametrize("warmup", [0, 7])
def test_warmup_stable_decay_equals_transformers_at_every_step(keys, warmup) -> None:
    """Warm-up begins at the lowest rate there, which is `warmup_start_ratio` here."""
    expected = rates_of_transformers("warmup_stable_decay", keys, 40, warmup, 44)
    schedule, low = WarmupStableDecay(**keys), keys.get("min_lr_ratio", 0.0)
    ours = [
        LR * (low + (1 - low) * step / warmup if step < warmup else schedule.factor(step, 40, warmup))
        for step in range(44)
    ]
    assert ours == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_a_decay_longer_than_the_run_takes_all_of_it() -> None:
    schedule = WarmupStableDecay(num_decay_steps=100, decay_type="linear")
    assert [schedule.factor(step, 14, 4) for step in (4, 9, 14)] == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    "keys",
    [
        {"patience": 0}, {"patience": 1, "factor": 0.5}, {"patience": 1, "cooldown": 2, "threshold": 0.3},
        {"patience": 0, "threshold_mode": "abs", "threshold": 0.05},
    ],
)  # fmt: skip
@pytest.mark.parametrize("greater", [False, True])
def test_plateau_equals_torch_after_every_evaluation(keys, greater) -> None:
    generator = torch.Generator().manual_seed(3)
    values = (1.0 + torch.rand(40, generator=generator)).tolist()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max" if greater else "min", min_lr=1e-3, eps=0.0, **keys
    )
    ours = ReduceOnPlateau(ReduceOnPlateauConfig(min_lr_ratio=1e-3, **keys))
    seen = set()
    for number, value in enumerate(values):
        theirs.step(value)
        ours.evaluated(value, greater)
        if number == 20:  # continued from a checkpoint
            state, ours = ours.state(), ReduceOnPlateau(ReduceOnPlateauConfig(min_lr_ratio=1e-3, **keys))
            ours.restore(state)
        assert ours.factor(number, 100, 0) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        seen.add(ours.factor(number, 100, 0))
    assert len(seen) > 2


def test_plateau_takes_nan_for_no_improvement() -> None:
    schedule = ReduceOnPlateau(ReduceOnPlateauConfig(patience=0, factor=0.5))
    for value in (float("nan"), 1.0, float("nan")):
        schedule.evaluated(value, False)
    assert schedule.factor(0, 1, 0) == 0.25


def test_ends() -> None:
    assert Linear().factor(100, 100, 10) == 0.0
    assert Cosine(min_lr_ratio=0.25).factor(100, 100, 10) == pytest.approx(0.25)
    assert Polynomial(power=3.0, lr_end_ratio=0.5).factor(250, 100, 10) == 0.5
    assert Polynomial(power=2.0).factor(55, 100, 10) == pytest.approx(0.25)


def test_plugins_and_their_bounds() -> None:
    plugins = {plugin.name: plugin for plugin in lr_scheduler_config()}
    assert set(plugins) == {
        "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "inverse_sqrt", "constant", "polynomial",
        "warmup_stable_decay", "reduce_lr_on_plateau",
    }  # fmt: skip
    config, problems = read_keys(plugins["cosine"].config, {"min_lr_ratio": 0.5})
    assert not problems
    assert plugins["cosine"].build(config).factor(10, 10, 0) == pytest.approx(0.5)
    _, problems = read_keys(plugins["polynomial"].config, {"lr_end_ratio": 1e3, "power": 0})
    assert [problem.partition(":")[0] for problem in problems] == ["lr_end_ratio", "power"]
