"""BAdam against its authors' package, its blocks, and what a run makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llmtune_optim.badam import BAdamFactory
from llmtune_optim.configs import BAdamConfig
from torch import nn

import llmtune
from llmtune import PlanError
from llmtune.testing import create_for, in_ranks, read_keys, tiny_recipe

SHAPES = {
    "model.embed_tokens.weight": (10, 8),
    **{
        f"model.layers.{i}.{name}": shape
        for i in range(3)
        for name, shape in (("a.weight", (12, 10)), ("n.weight", (9,)))
    },
    "lm_head.weight": (10, 8),
}
LAYERS = [f"model.layers.{i}" for i in range(3)]


def parameters() -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in SHAPES.items()]


def made(named: list[tuple[str, nn.Parameter]], **keys: Any) -> Any:
    return create_for(BAdamFactory(BAdamConfig(**keys)), named, 1e-2, layers=LAYERS)


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def go(named: list[tuple[str, nn.Parameter]], optimizer: Any, step: int) -> list[str]:
    """One step; the layers that trained."""
    optimizer.at_step(step)
    for name, parameter in named:
        parameter.grad = gradients(step)[name] if parameter.requires_grad else None
    trained = {name.removeprefix("model.")[:8] for name, parameter in named if parameter.requires_grad}
    optimizer.step()
    return sorted(trained)


def assert_equal(mine: list[tuple[str, nn.Parameter]], other: list[tuple[str, nn.Parameter]]) -> None:
    for (name, a), (_, b) in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("mode", ["ascending", "descending"])
def test_layers_are_the_authors(mode, capsys) -> None:
    """Theirs has a step less for its first block; told to begin a step earlier it has as many."""
    published = pytest.importorskip("badam")
    mine, other = parameters(), parameters()
    ours = made(mine, switch_interval=3, switch_mode=mode)
    base = torch.optim.AdamW([p for _, p in other], lr=1e-2, weight_decay=0.0, foreach=False)
    theirs = published.BlockOptimizer(base, other, switch_block_every=3, switch_mode=mode, verbose=0)
    theirs.global_step = -1
    for step in range(14):
        go(mine, ours, step)
        for name, parameter in other:
            parameter.grad = gradients(step)[name] if parameter.requires_grad else None
        theirs.step()
        assert_equal(mine, other)


def test_shares_are_the_authors(capsys) -> None:
    """Adjacent numbers of each parameter. Theirs shares a mask among parameters of one shape, which here move alike."""
    published = pytest.importorskip("badam")
    mine, other = parameters(), parameters()
    ours = made(mine, mode="ratio", switch_interval=4, update_ratio=0.3)
    theirs = published.BlockOptimizerRatio(
        [{"params": [p for _, p in other]}], other, update_ratio=0.3, switch_every=4, lr=1e-2, keep_mask=False,
        preserve_threshold=0,
    )  # fmt: skip
    for step in range(14):
        go(mine, ours, step)
        theirs.zero_grad()
        for name, parameter in other:
            if parameter.requires_grad:
                (parameter * gradients(step)[name]).sum().backward()
        theirs.step()
        assert_equal(mine, other)


def test_a_scattered_share_moves_through_all_numbers() -> None:
    named = parameters()
    optimizer, before = made(named, mode="ratio", mask_mode="scatter", switch_interval=1, update_ratio=0.25), []
    for step in range(4):
        start = named[1][1].detach().clone()
        go(named, optimizer, step)
        before.append((named[1][1] != start).flatten())
    moved = torch.stack(before)
    assert moved.sum(1).tolist() == [30] * 4 and moved.any(0).all()
    assert moved[0].nonzero().flatten().tolist() != list(range(30))
    assert torch.equal(named[0][1], parameters()[0][1])


ORDERS = {
    "ascending": ({}, [0, 0, 1, 1, 2, 2, 0]),
    "from the second": ({"start_block": 1}, [1, 1, 2, 2, 0, 0, 1]),
    "descending": ({"switch_mode": "descending"}, [2, 2, 1, 1, 0, 0, 2]),
    "fixed": ({"switch_mode": "fixed", "start_block": 2}, [2] * 7),
    "never switched": ({"switch_interval": -1, "start_block": 1}, [1] * 7),
}


@pytest.mark.parametrize("case", ORDERS)
def test_order_of_blocks(case) -> None:
    keys, expected = ORDERS[case]
    named = parameters()
    optimizer = made(named, **{"switch_interval": 2, **keys})
    assert [go(named, optimizer, step) for step in range(7)] == [[f"layers.{block}"] for block in expected]


def test_random_blocks_come_once_in_each_turn_and_are_a_function_of_the_step() -> None:
    named = parameters()
    optimizer = made(named, switch_mode="random", switch_interval=1)
    found = [go(named, optimizer, step) for step in range(12)]
    for turn in range(4):
        assert sorted(found[3 * turn : 3 * turn + 3]) == [["layers.0"], ["layers.1"], ["layers.2"]]
    assert len({str(found[3 * turn : 3 * turn + 3]) for turn in range(4)}) > 1
    late = made(parameters(), switch_mode="random", switch_interval=1)
    assert go(parameters(), late, 7) is not None and late.blocks[late.block(7)][0] == f"model.{found[7][0]}"


def test_state_is_that_of_one_block() -> None:
    named = parameters()
    optimizer = made(named, switch_interval=2)
    for step in range(3):
        go(named, optimizer, step)
    assert {name for name, parameter in named if optimizer.state.get(parameter)} == {
        "model.layers.1.a.weight", "model.layers.1.n.weight",
    }  # fmt: skip


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(PlanError, match=r"start_block: found 3, allowed is 0 to 2, as so many blocks"):
        made(parameters(), start_block=3)
    assert read_keys(BAdamConfig, {"switch_interval": 0})[1][0].endswith(
        "allowed is a number from 1, or -1 to stay with one block"
    )
    assert "which has none" in read_keys(BAdamConfig, {"mode": "ratio", "weight_decay": 0.1})[1][0]


BLOCKS = {"name": "badam", "switch_interval": 2, "verbose": 1}
SHARES = {"name": "badam", "mode": "ratio", "switch_interval": 2, "update_ratio": 0.3}


def run(keys: dict[str, Any]) -> list[Any]:
    """Metrics, and the saved weights' sums."""
    from safetensors.torch import load_file

    done = llmtune.train(keys)
    weights = load_file(Path(keys["output_dir"]) / "model" / "model.safetensors")
    return [[(row["loss"], row["grad_norm"]) for row in done.metrics if "loss" in row], weights]


@pytest.mark.parametrize("optimizer", [BLOCKS, SHARES], ids=lambda keys: keys.get("mode", "layer"))
def test_a_run_continues_within_a_block_and_on_two_ranks(optimizer, tmp_path: Path, capsys) -> None:
    keys = tiny_recipe(tmp_path, max_steps=6, save_steps=3, learning_rate=0.01, optim_config=optimizer)
    straight = run({**keys, "output_dir": str(tmp_path / "straight")})
    if optimizer is BLOCKS:
        assert "badam: from step 3 on model.layers.1 trains" in capsys.readouterr().err
    place = str(tmp_path / "straight" / "checkpoints" / "step-00000003")
    again = run({**keys, "output_dir": str(tmp_path / "again"), "resume_from_checkpoint": place})
    assert again[0] == straight[0][3:]
    assert all(torch.equal(tensor, straight[1][name]) for name, tensor in again[1].items())
    onto = {**keys, "output_dir": str(tmp_path / "ranks"), "resume_from_checkpoint": place}
    ranked = in_ranks(2, tmp_path / "scratch", run, onto)[0]
    assert torch.allclose(torch.tensor(ranked[0]), torch.tensor(straight[0][3:]), rtol=1e-5)
    for name, tensor in straight[1].items():
        torch.testing.assert_close(ranked[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_an_adapter_is_saved_whole_while_a_part_of_it_trains(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    lora = {"name": "lora", "lora_dropout": 0.0}
    keys = tiny_recipe(tmp_path, max_steps=3, save_steps=1, peft_config=lora, optim_config=BLOCKS)
    llmtune.train(keys)
    folder = Path(keys["output_dir"]) / "checkpoints"
    first, last = (load_file(folder / f"step-0000000{n}" / "adapter" / "adapter_model.safetensors") for n in (2, 3))
    changed = {name for name, tensor in last.items() if not torch.equal(tensor, first[name])}
    assert first.keys() == last.keys()
    assert changed and all(".layers.1." in name for name in changed)


def test_a_plan_counts_state_and_gradients_of_one_block(tmp_path: Path) -> None:
    keys = tiny_recipe(tmp_path, sizes={"num_hidden_layers": 6}, save_steps=None)
    found = {}
    for name in ("adamw", "badam"):
        cost = llmtune.plan({**keys, "optim_config": name}).cost
        found[name] = cost.quick.most
        assert cost.traced.at_peak.optimizer == pytest.approx(cost.quick.most.optimizer, rel=0.01)
    layer = 6 * 32 * 64 + 2 * 32 * 32 + 2 * 32 * 16 + 2 * 32  # at least the MLP of one, at most a layer and a bit
    assert found["badam"].optimizer < 8 * layer < found["adamw"].optimizer / 4
    assert found["badam"].gradients < found["adamw"].gradients / 4
