"""Each optimiser against what its authors, torch or transformers publish, step by step on one device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from llmtune_optim import optim_config
from llmtune_optim.whole import seed_of
from torch import nn

from llmtune import PlanError
from llmtune.testing import create_for, read_keys

Named = list[tuple[str, nn.Parameter]]
SHAPES = {"a.q_proj.weight": (24, 16), "a.up_proj.weight": (16, 40), "a.down_proj.weight": (32, 32)}
PLUGINS = {plugin.name: plugin for plugin in optim_config()}
RATE = 3e-3


def built(name: str, **keys: Any) -> Any:
    config, problems = read_keys(PLUGINS[name].config, keys)
    assert not problems
    return PLUGINS[name].build(config)


def parameters(shapes: dict[str, tuple[int, ...]]) -> Named:
    generator = torch.Generator().manual_seed(0)
    return [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes.items()]


def give_gradients(named: Named, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for _, parameter in named:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def compare(ours: tuple[Named, Any], theirs: tuple[Named, Any], steps: int = 9, atol: float = 1e-5) -> None:
    """After every step, also as the learning rate falls."""
    start = [parameter.detach().clone() for _, parameter in ours[0]]
    for step in range(steps):
        for named, optimizer in (ours, theirs):
            give_gradients(named, step)
            for group in optimizer.param_groups:
                group["lr"] = RATE / (1 + step / 4)
            optimizer.step()
        for (name, a), (_, b) in zip(ours[0], theirs[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=atol, msg=lambda said, n=name, s=step: f"{n}, {s}: {said}")
    assert all((a - b).abs().max() > 1e-3 for (_, a), b in zip(ours[0], start, strict=True))


def pair(name: str, make: Callable[[Named], Any], shapes: dict[str, tuple[int, ...]] | None = None, **keys: Any) -> Any:
    mine, other = parameters(shapes or SHAPES), parameters(shapes or SHAPES)
    return (mine, create_for(built(name, **keys), mine, RATE)), (other, make(other))


@pytest.mark.parametrize(
    "keys", [{}, {"nesterov": False}, {"adjust_lr_fn": "original", "ns_steps": 3, "momentum": 0.8}]
)
def test_muon_is_torchs(keys) -> None:
    theirs = {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.1, **keys}
    make = lambda named: torch.optim.Muon([p for _, p in named], lr=RATE, **theirs)  # noqa: E731
    # Products of bfloat16 matrices may be added up in another order.
    compare(*pair("muon", make, weight_decay=0.1, **keys), atol=1e-3)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "right", "left", "full"])
def test_galore_is_the_authors(proj_type) -> None:
    published = pytest.importorskip("galore_torch")
    # From both sides a gradient becomes its singular values. What lies beside the diagonal is rounding, 1e-7, which
    # Adam would scale to whole steps.
    eps = 1e-4 if proj_type == "full" else 1e-8

    def make(named: Named) -> Any:
        group = {"params": [p for _, p in named], "rank": 4, "update_proj_gap": 3, "scale": 0.5, "proj_type": proj_type}
        return published.GaLoreAdamW([group], lr=RATE, eps=eps, no_deprecation_warning=True)

    compare(*pair("galore", make, rank=4, update_interval=3, scale=0.5, proj_type=proj_type, eps=eps))


@pytest.mark.parametrize(
    "keys",
    [
        {}, {"proj": "svd"}, {"scale_type": "tensor"}, {"scale_front": True}, {"proj_type": "std", "scale": 4.0},
        {"rank": 1, "scale": 128.0, "scale_type": "tensor"},
    ],
    ids=str,
)  # fmt: skip
def test_apollo_is_the_authors(keys, monkeypatch) -> None:
    """Their random directions are drawn from our seeds."""
    published = pytest.importorskip("apollo_torch")
    keys = {"rank": 4, "update_interval": 3, **keys}
    chain = {seed_of(0, name, i): seed_of(0, name, i + 1) for name in SHAPES for i in range(9)}
    monkeypatch.setattr("apollo_torch.random_projector.next_seed", chain.__getitem__)

    def make(named: Named) -> Any:
        group = {
            "params": [p for _, p in named], "rank": keys["rank"], "update_proj_gap": 3,
            "scale": keys.get("scale", 32.0), "proj": keys.get("proj", "random"), "proj_type": "std",
            "scale_type": keys.get("scale_type", "channel"),
        }  # fmt: skip
        optimizer = published.APOLLOAdamW([group], lr=RATE, eps=1e-8, scale_front=keys.get("scale_front", False))
        for name, parameter in named:
            optimizer.state[parameter]["seed"] = seed_of(0, name, 0)
        return optimizer

    compare(*pair("apollo", make, **keys))


def test_adam_mini_is_the_authors(capsys) -> None:
    published = pytest.importorskip("adam_mini")
    roles = {
        "model.embed_tokens.weight": "embedding", "lm_head.weight": "head", "model.norm.weight": "norm",
        "self_attn.q_proj.bias": "bias",
    }  # fmt: skip
    shapes = {
        "model.embed_tokens.weight": (20, 16), "self_attn.q_proj.weight": (16, 16), "self_attn.k_proj.weight": (8, 16),
        "self_attn.v_proj.weight": (8, 16), "self_attn.o_proj.weight": (16, 16), "mlp.up_proj.weight": (24, 16),
        "self_attn.q_proj.bias": (16,), "model.norm.weight": (16,), "lm_head.weight": (20, 16),
    }  # fmt: skip
    mine, other = parameters(shapes), parameters(shapes)
    facts = {"heads": 4, "head_size": 4, "text_layers": ["self_attn"]}
    ours = create_for(built("adam_mini", weight_decay=0.1), mine, RATE, roles=roles, **facts)
    theirs = published.Adam_mini(other, lr=RATE, weight_decay=0.1, dim=16, n_heads=4, n_kv_heads=2, verbose=False)
    for group in theirs.param_groups:  # which decays biases, too
        if group["params"][0].dim() < 2:
            group["weight_decay"] = 0.0
    compare((mine, ours), (other, theirs))


def test_adam_mini_knows_the_heads_of_text_layers_only() -> None:
    named = parameters({"text.0.q_proj.weight": (8, 6), "tower.0.q_proj.weight": (8, 6)})
    optimizer = create_for(built("adam_mini"), named, RATE, heads=2, head_size=4, text_layers=["text.0"])
    give_gradients(named, 0)
    optimizer.step()
    assert [len(optimizer.state[parameter]["row_sq"].unique()) for _, parameter in named] == [2, 8]


@pytest.mark.parametrize("keys", [{}, {"scale_parameter": True}, {"decay_rate": -0.5, "clip_threshold": 0.3}], ids=str)
def test_adafactor_is_transformers(keys) -> None:
    from transformers import Adafactor

    make = lambda named: Adafactor(  # noqa: E731
        [p for _, p in named], lr=RATE, relative_step=False, warmup_init=False, **{"scale_parameter": False, **keys}
    )
    compare(*pair("adafactor", make, SHAPES | {"norm.weight": (16,)}, **keys))


def test_adafactor_with_a_mean_of_updates_is_transformers() -> None:
    """At one learning rate: transformers' mean is of updates that are multiplied by it."""
    from transformers import Adafactor

    mine, other = parameters(SHAPES), parameters(SHAPES)
    ours = create_for(built("adafactor", beta1=0.9), mine, RATE)
    theirs = Adafactor([p for _, p in other], lr=RATE, relative_step=False, scale_parameter=False, beta1=0.9)
    for step in range(6):
        for named, optimizer in ((mine, ours), (other, theirs)):
            give_gradients(named, step)
            optimizer.step()
    for (_, a), (_, b) in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_lion_is_the_papers() -> None:
    """Program 1: the sign of one mean, and another mean that is kept."""

    class Written:
        def __init__(self, named: Named) -> None:
            self.named, self.param_groups = named, [{"lr": RATE}]
            self.m = {name: torch.zeros_like(p) for name, p in named}

        @torch.no_grad()
        def step(self) -> None:
            lr = self.param_groups[0]["lr"]
            for name, p in self.named:
                update = (0.8 * self.m[name] + 0.2 * p.grad).sign() + 0.1 * p
                p -= lr * update
                self.m[name] = 0.95 * self.m[name] + 0.05 * p.grad

    compare(*pair("lion", Written, betas=[0.8, 0.95], weight_decay=0.1))


@pytest.mark.parametrize(
    "keys", [{}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.3}], ids=str
)
def test_sgd_is_torchs(keys) -> None:
    make = lambda named: torch.optim.SGD([p for _, p in named], lr=RATE, weight_decay=0.1, **keys)  # noqa: E731
    compare(*pair("sgd", make, weight_decay=0.1, **keys))


@pytest.mark.parametrize("name", ["muon", "galore", "apollo"])
def test_all_but_matrices_of_layers_is_adamw(name) -> None:
    """An embedding, a head, a norm, a bias and a convolution, beside a matrix that is not looked at."""
    roles = {
        "embed.weight": "embedding", "head.weight": "head", "norm.weight": "norm", "l.bias": "bias",
        "conv.weight": "convolution",
    }  # fmt: skip
    shapes = {
        "l.weight": (8, 8), "embed.weight": (12, 8), "head.weight": (12, 8), "norm.weight": (8,), "l.bias": (8,),
        "conv.weight": (8, 3, 4, 4),
    }  # fmt: skip
    mine, other = parameters(shapes), parameters(shapes)
    ours = create_for(built(name, weight_decay=0.1), mine, RATE, roles=roles)
    plain = create_for(built("adamw", weight_decay=0.1, fused=False), other, RATE, roles=roles)
    for step in range(5):
        for named, optimizer in ((mine, ours), (other, plain)):
            give_gradients(named, step)
            optimizer.step()
    for (name, a), (_, b) in zip(mine, other, strict=True):
        if name != "l.weight":
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_stacks_of_experts_are_updated_one_by_one() -> None:
    for name, keys in (("galore", {"rank": 2}), ("apollo", {"rank": 2, "proj": "svd"}), ("muon", {})):
        stack = parameters({"experts.up": (3, 6, 10)})
        apart = [(f"experts.up{i}", nn.Parameter(stack[0][1][i].detach().clone())) for i in range(3)]
        optimizers = [create_for(built(name, **keys), named, RATE) for named in (stack, apart)]
        for step in range(3):
            give_gradients(stack, step)
            for i, (_, parameter) in enumerate(apart):
                parameter.grad = stack[0][1].grad[i].clone()
            for optimizer in optimizers:
                optimizer.step()
        tolerance = 1e-3 if name == "muon" else 1e-5
        torch.testing.assert_close(stack[0][1], torch.stack([p for _, p in apart]), rtol=1e-5, atol=tolerance)


NUMBERS = {
    # Of a matrix of m x n, as the papers say; r the rank, and for APOLLO one norm.
    ("galore", "rank=4"): lambda m, n: 2 * 4 * max(m, n) + 4 * min(m, n),
    ("apollo", "rank=4"): lambda m, n: 2 * 4 * max(m, n) + 4 * min(m, n) + 1,
    ("muon", ""): lambda m, n: m * n,
    ("adam_mini", ""): lambda m, n: m * n + m,
    ("adafactor", ""): lambda m, n: m + n,
    ("lion", ""): lambda m, n: m * n,
    ("sgd", ""): lambda m, n: 0,
    ("adamw", ""): lambda m, n: 2 * m * n + 1,
}


@pytest.mark.parametrize(("name", "keys"), NUMBERS, ids=lambda value: str(value))
def test_state_is_as_small_as_the_papers_say(name, keys) -> None:
    given = {key: int(value) for key, _, value in (one.partition("=") for one in filter(None, keys.split()))}
    named = parameters(SHAPES)
    optimizer = create_for(built(name, **given), named, RATE)
    for step in range(2):
        give_gradients(named, step)
        optimizer.step()
    for _, parameter in named:
        state = [v for v in optimizer.state.get(parameter, {}).values() if isinstance(v, torch.Tensor)]
        assert sum(v.numel() for v in state) == NUMBERS[name, keys](*parameter.shape)
        assert math.isfinite(sum(v.sum().item() for v in state))


@pytest.mark.parametrize("name", ["galore", "apollo"])
def test_without_matrices_of_layers_it_is_refused(name) -> None:
    named = [("l.lora_A.weight", nn.Parameter(torch.ones(4, 8)))]
    with pytest.raises(PlanError, match=f"optim_config: {name} projects the gradients of layers' matrices, and peft"):
        create_for(built(name), named, roles={"l.lora_A.weight": "adapter_a"})


def test_a_target_that_is_not_there_is_refused_and_others_are_left_to_adamw() -> None:
    with pytest.raises(
        PlanError, match='target: found "q_prj", allowed is all or names of layers that train, such as d'
    ):
        create_for(built("galore", target="q_prj,up_proj"), parameters(SHAPES))
    mine = parameters(SHAPES)
    optimizer = create_for(built("galore", target="a.q_proj,up_proj", rank=2), mine)
    give_gradients(mine, 0)
    optimizer.step()
    projected = [
        name
        for name, parameter in mine
        if "left" in optimizer.state[parameter] or "right" in optimizer.state[parameter]
    ]
    assert projected == ["a.q_proj.weight", "a.up_proj.weight"]
