"""AdamW and 8-bit AdamW: the update, the groups, exact continuation, one rank against two."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llmtune_optim import AdamW8bitConfig, AdamWConfig, build_adamw, build_adamw_8bit, optim_config
from torch import nn

from llmtune import PlanError
from llmtune.testing import create_for


def parameters(*shapes: tuple[int, ...], seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    return [(f"p{i}", nn.Parameter(torch.randn(shape, generator=generator))) for i, shape in enumerate(shapes)]


def steps(optimizer: torch.optim.Optimizer, named, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for _, parameter in named:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()
        optimizer.zero_grad()


def adamw_by_hand(x, gradients, rates, decay, betas=(0.8, 0.95), eps=1e-6):
    """The update as Loshchilov & Hutter write it (algorithm 2), in float64."""
    x, m, v = x.double(), 0.0, 0.0
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        m = betas[0] * m + (1 - betas[0]) * g.double()
        v = betas[1] * v + (1 - betas[1]) * g.double() ** 2
        x = x * (1 - lr * decay)
        x = x - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return x


def gradients_of(named, index: int, count: int) -> list[torch.Tensor]:
    """The gradients that `steps` gives to parameter `index`."""
    found = []
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        found.append([torch.randn(p.shape, generator=generator) for _, p in named][index])
    return found


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (build_adamw, AdamWConfig(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)),
        (build_adamw, AdamWConfig(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3, fused=False)),
        (build_adamw_8bit, AdamW8bitConfig(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3, min_8bit_size=10**9)),
    ],
    ids=["fused", "plain", "bitsandbytes-32bit-states"],
)
def test_update_is_adamw_and_only_matrices_decay(build, config) -> None:
    named = parameters((7, 5), (5,))
    start = [parameter.detach().clone() for _, parameter in named]
    steps(create_for(build(config), named, 1e-2), named, 0, 8)
    rates = [1e-2 / (1 + step) for step in range(8)]
    for index, decay in enumerate((0.3, 0.0)):
        expected = adamw_by_hand(start[index], gradients_of(named, index, 8), rates, decay)
        torch.testing.assert_close(named[index][1].double(), expected, rtol=1e-5, atol=1e-6)


def test_fused_is_the_default_and_equals_torch() -> None:
    named, other = parameters((33, 21), (21,)), parameters((33, 21), (21,))
    ours = create_for(build_adamw(AdamWConfig()), named, 1e-2)
    theirs = torch.optim.AdamW([p for _, p in other], lr=1e-2, weight_decay=0.0, fused=True)
    assert all(group["fused"] for group in ours.param_groups)
    steps(ours, named, 0, 4)
    steps(theirs, other, 0, 4)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(named, other, strict=True))


def test_fused_where_it_cannot_be_is_refused_or_left_out() -> None:
    named = [("w", nn.Parameter(torch.empty(4, 4, device="meta")))]
    with pytest.raises(PlanError, match=r"optim_config\.fused: found true, but w is torch\.float32 on meta"):
        create_for(build_adamw(AdamWConfig(fused=True)), named, 1e-2)
    assert create_for(build_adamw(AdamWConfig()), named, 1e-2).param_groups[0]["fused"] is False


def test_restored_step_counters_move_to_their_parameter() -> None:
    from llmtune_optim.adamw import place_step_counters

    optimizer = create_for(build_adamw(AdamWConfig()), [("w", nn.Parameter(torch.empty(2, 2, device="meta")))], 1e-2)
    parameter = optimizer.param_groups[0]["params"][0]
    optimizer.state[parameter]["step"] = torch.tensor(3.0)
    place_step_counters(optimizer)
    assert optimizer.state[parameter]["step"].device.type == "meta"


@pytest.mark.parametrize("build", [build_adamw, build_adamw_8bit])
def test_nothing_to_train_is_an_error(build) -> None:
    config = AdamWConfig() if build is build_adamw else AdamW8bitConfig()
    with pytest.raises(PlanError, match="no parameter of the model trains"):
        create_for(build(config), [], 1e-3)


def test_paged_needs_cuda() -> None:
    with pytest.raises(PlanError, match=r"optim_config: paged: found true, but parameters are on cpu"):
        create_for(build_adamw_8bit(AdamW8bitConfig(paged=True)), parameters((64, 64)), 1e-3)


def test_8bit_states_for_large_parameters_only() -> None:
    named = parameters((64, 64), (63, 65), (64, 64))
    named = [("layer.weight", named[0][1]), ("small.weight", named[1][1]), ("model.embed_tokens.weight", named[2][1])]
    optimizer = create_for(build_adamw_8bit(AdamW8bitConfig()), named, 1e-2)
    steps(optimizer, named, 0, 2)
    large, small, embedding = (optimizer.state[parameter] for _, parameter in named)
    assert large["state1"].dtype == large["state2"].dtype == torch.uint8
    assert large["absmax1"].shape == (16,)
    assert small["state1"].dtype == embedding["state1"].dtype == torch.float32
    assert set(large) == {"step", "state1", "state2", "absmax1", "absmax2"}
    assert set(small) == {"step", "state1", "state2"}


def regression(build, config, count: int = 120) -> float:
    """Loss of a linear regression after `count` full-batch steps."""
    torch.manual_seed(0)
    x_NI, weight_IO = torch.randn(256, 64), torch.randn(64, 80)
    model = nn.Linear(64, 80)
    optimizer = create_for(build(config), list(model.named_parameters()), 3e-2)
    for _ in range(count):
        loss = nn.functional.mse_loss(model(x_NI), x_NI @ weight_IO)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def test_8bit_learns_like_32bit() -> None:
    start, full, narrow = (
        regression(build_adamw, AdamWConfig(), 1),
        regression(build_adamw, AdamWConfig()),
        regression(build_adamw_8bit, AdamW8bitConfig()),
    )
    assert full < 0.05 * start
    assert abs(narrow - full) < 0.01 * start
    assert narrow != full  # 8-bit states were in use


def saved(optimizer: torch.optim.Optimizer, named) -> list[tuple[str, str, object]]:
    """State the way checkpoints keep it: (name, key, a copy of the value)."""
    return [
        (name, key, value.clone() if isinstance(value, torch.Tensor) else value)
        for name, parameter in named
        for key, value in optimizer.state[parameter].items()
    ]


@pytest.mark.parametrize(
    ("build", "config"), [(build_adamw, AdamWConfig()), (build_adamw_8bit, AdamW8bitConfig(min_8bit_size=200))]
)
@pytest.mark.parametrize("way", ["by name", "state_dict"])
def test_ten_steps_equal_five_and_five_after_a_restart(build, config, way) -> None:
    shapes = [(64, 65), (15, 16), (70,)]  # many blocks, the last one partial; one block only; 32-bit states
    straight, broken = parameters(*shapes), parameters(*shapes)
    steps(create_for(build(config), straight, 1e-2), straight, 0, 10)
    first = create_for(build(config), broken, 1e-2)
    steps(first, broken, 0, 5)
    again = [(name, nn.Parameter(parameter.detach().clone())) for name, parameter in broken]
    second = create_for(build(config), again, 1e-2)
    if way == "by name":
        by_name = dict(again)
        for name, key, value in saved(first, broken):
            # Checkpoints cannot tell one block's maximum of shape (1,) from a scalar.
            scalar = isinstance(value, torch.Tensor) and value.shape == (1,)
            second.state[by_name[name]][key] = value.reshape(()) if scalar else value
    else:
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(second, again, 5, 10)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(straight, again, strict=True))


def test_continuing_leaves_the_saved_state_alone() -> None:
    named = parameters((64, 64))
    first = create_for(build_adamw_8bit(AdamW8bitConfig()), named, 1e-2)
    steps(first, named, 0, 2)
    kept = {key: value for _, key, value in saved(first, named)}
    before = copy.deepcopy(kept)
    second = create_for(build_adamw_8bit(AdamW8bitConfig()), named, 1e-2)
    second.state[named[0][1]].update(kept)
    steps(second, named, 2, 4)
    assert all(torch.equal(kept[key], before[key]) for key in ("state1", "state2", "absmax1", "absmax2"))


def test_parameter_without_gradient_stays() -> None:
    named = parameters((64, 64), (64, 64))
    optimizer = create_for(build_adamw_8bit(AdamW8bitConfig()), named, 1e-2)
    start = [parameter.detach().clone() for _, parameter in named]
    named[0][1].grad = torch.ones(64, 64)
    optimizer.step()
    assert not torch.equal(named[0][1], start[0])
    assert torch.equal(named[1][1], start[1])
    assert not optimizer.state.get(named[1][1])


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    script = Path(__file__).with_name("optim_ranks.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=180) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    result = json.loads(outputs[0][0].splitlines()[-1])
    assert result["plain"] == [0.0] * 8
    assert max(result["fused"]) < 1e-7  # the CPU kernel rounds the end of a shard differently
    assert result["8bit"][0] == 0.0  # whole blocks on both ranks
    assert max(result["8bit"]) < 1e-7
    assert result["columns"] < 1e-7
    assert result["resumed"] == [True, True]


def test_importing_bitsandbytes_says_nothing() -> None:
    code = "from llmtune_optim import *; build_adamw_8bit(AdamW8bitConfig())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_entry_module_is_light_and_describes_itself() -> None:
    plugins = {plugin.name: plugin for plugin in optim_config()}
    assert set(plugins) == {
        "adamw", "adamw_8bit", "muon", "galore", "apollo", "adam_mini", "adafactor", "lion", "sgd", "badam",
    }  # fmt: skip
    code = "import sys, llmtune_optim; print([m for m in ('torch', 'bitsandbytes') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_8bit_state_is_cut_anew_without_loss_where_blocks_stay() -> None:
    """Rows of 128: blocks of 256 are two rows, so two pieces of four rows hold whole blocks, pieces of three do not."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(8, 128))
    optimizer = create_for(build_adamw_8bit(AdamW8bitConfig(min_8bit_size=1)), [("w", parameter)], 1e-2)
    for _ in range(3):
        parameter.grad = torch.randn(8, 128)
        optimizer.step()
    state = {key: value for key, value in optimizer.state[parameter].items() if key != "step"}
    assert state["state1"].dtype == torch.uint8
    whole = optimizer.unpack(state)
    again = optimizer.pack(parameter, whole)
    assert again.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(again[key], value, rtol=1e-6, atol=0)  # codes are whole numbers: equal
    lower = optimizer.pack(parameter, {key: value[4:] for key, value in whole.items()})
    assert torch.equal(lower["state1"], state["state1"][4:]) and torch.equal(lower["state2"], state["state2"][4:])
    moved = optimizer.unpack(optimizer.pack(parameter, {key: value[3:] for key, value in whole.items()}))
    for key, value in whole.items():
        assert (moved[key] - value[3:]).abs().max() < 0.02 * value.abs().max()
