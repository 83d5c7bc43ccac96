"""Two ranks, each with a part of every parameter, move as one rank does; and state stays a part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llmtune_optim import optim_config
from torch import nn

from llmtune.testing import create_for, in_ranks, read_keys, running, tiny_recipe

PLUGINS = {plugin.name: plugin for plugin in optim_config()}
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    # Name, keys, and how far numbers may be: sums over rows fall otherwise on shards.
    "muon": ("muon", {"weight_decay": 0.1}, 0.0),
    "galore": ("galore", {"rank": 3, "update_interval": 2, "weight_decay": 0.1}, 0.0),
    "galore_full": ("galore", {"rank": 3, "proj_type": "full"}, 0.0),
    "apollo": ("apollo", {"rank": 3, "update_interval": 2}, 0.0),
    "apollo_mini": ("apollo", {"rank": 1, "scale": 128.0, "scale_type": "tensor", "proj": "svd"}, 0.0),
    "adam_mini": ("adam_mini", {"weight_decay": 0.1}, 1e-6),
    "adafactor": ("adafactor", {"beta1": 0.9, "scale_parameter": True}, 1e-6),
    "lion": ("lion", {"weight_decay": 0.1}, 0.0),
    "sgd": ("sgd", {"momentum": 0.9, "weight_decay": 0.1}, 0.0),
}
SHAPES = {
    # Uneven on two ranks, fewer rows than ranks, a stack, and three alike, which two ranks share.
    "l0.q_proj.weight": (12, 8), "l0.up_proj.weight": (7, 12), "l0.down_proj.weight": (1, 6), "l0.experts.w": (3, 4, 5),
    "l0.norm.weight": (9,), "l0.o_proj.weight": (6, 6), "l1.o_proj.weight": (6, 6), "l2.o_proj.weight": (6, 6),
}  # fmt: skip


class Holder(nn.Module):
    """Just parameters."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.all = nn.ParameterList(torch.randn(shape, generator=generator) for shape in SHAPES.values())


def trained(model: nn.Module, case: str) -> tuple[list[torch.Tensor], dict[str, int]]:
    """Parameters after a few steps, whole, and this rank's numbers of state."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    name, keys, _ = CASES[case]
    named = list(zip(SHAPES, model.parameters(), strict=True))
    config, problems = read_keys(PLUGINS[name].config, keys)
    assert not problems
    optimizer = create_for(PLUGINS[name].build(config), named, 1e-2, heads=3, head_size=4, text_layers=["l0"])
    for step in range(5):
        for index, (_, parameter) in enumerate(named):
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + index))
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        named[5][1].grad = None if step == 2 else named[5][1].grad  # a batch of another size in between
        optimizer.step()
    parts = {
        f"{name}/{key}": (value.to_local() if isinstance(value, DTensor) else value).numel()
        for name, parameter in named
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }
    whole = [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]
    return whole, parts


def on_this_rank() -> dict[str, tuple[float, dict[str, int], dict[str, int]]]:
    """For each case the largest difference to one rank, and numbers of state of one rank and here."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for case in CASES:
        expected, alone = trained(Holder(), case)
        ours, parts = trained(fully_shard(Holder(), mesh=mesh), case)
        worst = max(float((a - b).abs().max()) for a, b in zip(expected, ours, strict=True))
        found[case] = (worst, alone, parts)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_ranks(2, tmp_path_factory.mktemp("ranks"), on_this_rank)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_move_as_one(case, found) -> None:
    for rank in found:
        assert rank[case][0] <= CASES[case][2]


@pytest.mark.parametrize("case", CASES)
def test_state_is_split_over_the_ranks(case, found) -> None:
    """Together they hold as much as one; but for what has one row."""
    for key, whole in found[0][case][1].items():
        parts = [rank[case][2][key] for rank in found]
        assert sum(parts) == whole or key.endswith("column_sq"), key
        assert max(parts) <= whole


TENSOR_PARALLEL = [
    {"name": "galore", "rank": 4, "update_interval": 2}, {"name": "adafactor", "scale_parameter": True},
    {"name": "badam", "mode": "ratio", "update_ratio": 0.5, "switch_interval": 2}, {"name": "adam_mini"},
    {"name": "muon"}, {"name": "apollo", "rank": 4, "update_interval": 2},
]  # fmt: skip


def losses(recipes: list[dict[str, Any]]) -> list[list[float]]:
    return [[row["loss"] for row in running.train(keys).metrics] for keys in recipes]


def test_parameters_that_are_cut_in_two_ways_move_as_on_one_rank(tmp_path: Path) -> None:
    """Tensor parallelism and shards at once: the order of pieces is not that of the ranks."""

    def recipes(tag: str, **changes: Any) -> list[dict[str, Any]]:
        places = [str(tmp_path / f"{tag}{number}") for number in range(len(TENSOR_PARALLEL))]
        return [
            tiny_recipe(tmp_path, learning_rate=0.005, max_steps=3, optim_config=optimizer, output_dir=place, **changes)
            for optimizer, place in zip(TENSOR_PARALLEL, places, strict=True)
        ]

    expected = losses(recipes("one"))
    both = recipes("four", dist_config={"name": "fsdp2", "tp_size": 2}, per_device_train_batch_size=2)
    found = in_ranks(4, tmp_path / "scratch", losses, both)[0]
    for keys, one, four in zip(TENSOR_PARALLEL, expected, found, strict=True):
        # Muon multiplies in bfloat16, which makes more of the order in which gradients were added up.
        assert four == pytest.approx(one, rel=1e-4 if keys["name"] == "muon" else 1e-5), keys["name"]


MOVED: dict[str, dict[str, Any]] = {
    "muon": {}, "apollo": {"rank": 4, "update_interval": 2}, "adam_mini": {}, "lion": {}, "sgd": {"momentum": 0.9},
}  # fmt: skip


def test_a_run_continues_on_two_ranks_and_on_one_again(tmp_path: Path) -> None:
    """Momenta, factors and moments are cut for two, and put together again."""

    def recipes(tag: str, rate: float = 0.002, **changes: Any) -> list[dict[str, Any]]:
        return [
            tiny_recipe(
                tmp_path, learning_rate=rate, optim_config={"name": name, **MOVED[name]}, save_steps=1,
                output_dir=str(tmp_path / f"{name}-{tag}"), **changes,
            )
            for name in MOVED
        ]  # fmt: skip

    def onto(keys: list[dict[str, Any]], tag: str, step: int) -> list[dict[str, Any]]:
        places = [tmp_path / f"{name}-{tag}" / "checkpoints" / f"step-{step:08}" for name in MOVED]
        return [{**one, "resume_from_checkpoint": str(place)} for one, place in zip(keys, places, strict=True)]

    straight = losses(recipes("straight"))
    two = in_ranks(2, tmp_path / "scratch", losses, onto(recipes("two"), "straight", 2))[0]
    one = losses(onto(recipes("one"), "two", 3))
    for name, expected, on_two, again in zip(MOVED, straight, two, one, strict=True):
        assert expected[0] - expected[-1] > 1e-3, name  # it learns, so that its state counts
        assert on_two[-2:] == pytest.approx(expected[2:], rel=1e-4), name
        assert again[-1] == pytest.approx(expected[3], rel=1e-4), name
