"""Every schedule against transformers', at every step, warm-up and the step after the last included."""

from __future__ import annotations

import pytest
import torch
from llmtune_schedules import Constant, Cosine, Linear, Polynomial, lr_scheduler_config

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


def test_ends() -> None:
    assert Linear().factor(100, 100, 10) == 0.0
    assert Cosine(min_lr_ratio=0.25).factor(100, 100, 10) == pytest.approx(0.25)
    assert Polynomial(power=3.0, lr_end_ratio=0.5).factor(250, 100, 10) == 0.5
    assert Polynomial(power=2.0).factor(55, 100, 10) == pytest.approx(0.25)


def test_plugins_and_their_bounds() -> None:
    plugins = {plugin.name: plugin for plugin in lr_scheduler_config()}
    assert set(plugins) == {"linear", "cosine", "constant", "polynomial"}
    config, problems = read_keys(plugins["cosine"].config, {"min_lr_ratio": 0.5})
    assert not problems
    assert plugins["cosine"].build(config).factor(10, 10, 0) == pytest.approx(0.5)
    _, problems = read_keys(plugins["polynomial"].config, {"lr_end_ratio": 1e3, "power": 0})
    assert [problem.partition(":")[0] for problem in problems] == ["lr_end_ratio", "power"]
