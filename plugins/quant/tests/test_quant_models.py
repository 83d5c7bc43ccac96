"""Layers and edits: what they keep in memory, what they refuse, and EETQ with its kernel played in torch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from llmtune_quant import EetqConfig, HqqConfig, build_eetq, build_hqq, eetq
from llmtune_quant.hqq import HalfQuadratic
from llmtune_quant.packed import PackedLinear
from torch import Tensor, nn

import llmtune
from llmtune import LlmtuneError, LoadError, PlanError, RunContext
from llmtune.testing import tiny_chats, tiny_model, tiny_model_folder

FORM = HalfQuadratic(bits=4, group=16, dtype=torch.float32)


def context(**changes: Any) -> RunContext:
    values = {
        "mode": "infer", "device": "cuda", "ranks": 1, "compute_dtype": torch.float32,
        "trainable_dtype": torch.float32, "gather_dtype": torch.float32,
    }  # fmt: skip
    return RunContext(**(values | changes))


def on_meta() -> Any:
    with torch.device("meta"):
        return tiny_model()


def test_the_backward_pass_waits_with_the_bytes_not_with_the_weight() -> None:
    layer, kept = PackedLinear((48, 64), True, FORM, torch.bfloat16), []
    layer = layer.to_empty(device="cpu")
    layer.weight.data.zero_()
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    assert max(tensor.nbytes for tensor in kept) <= layer.weight.nbytes < 48 * 64 * 4 / 3
    assert x.grad is not None and not layer.weight.requires_grad


def test_the_plan_knows_the_bytes(tmp_path: Path) -> None:
    base, data = tiny_model_folder(tmp_path / "base"), tiny_chats(tmp_path)
    keys = {"model": str(base), "dataset": str(data), "device": "cpu", "peft_config": "lora", "max_steps": 1}
    text = str(llmtune.plan({**keys, "quant_config": {"name": "hqq", "quantization_bit": 2, "group_size": 16}}))
    layers = [
        module for name, module in tiny_model().named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]  # fmt: skip
    numbers = sum(layer.weight.numel() for layer in layers)
    stored = numbers * (2 / 8 + 2 * 4 / 16)  # codes, and scale and zero point in float32
    assert f"{len(layers)} linear layers -> hqq 2 bit, groups of 16: {numbers / 1e6:.1f}M weights" in text
    assert f"-> {stored / 1e6:.1f} MB" in text
    with pytest.raises(PlanError, match=r"group_size: found 24, but .*q_proj has \d+ inputs"):
        llmtune.plan({**keys, "quant_config": {"name": "hqq", "group_size": 24}})
    with pytest.raises(LlmtuneError, match="is stored quantised and cannot train"):
        llmtune.plan({**keys, "peft_config": None, "quant_config": {"name": "hqq", "group_size": 16}})


def test_stacks_of_experts_are_said_to_stay() -> None:
    with torch.device("meta"):
        model = tiny_model("qwen3_moe")
    change = build_hqq(HqqConfig(group_size=16)).apply(model, context(mode="train", device="cpu"))
    assert "stacks of experts stay in full precision" in change.report[1]


def test_eetq_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    edit = build_eetq(EetqConfig())
    monkeypatch.setattr(eetq, "find_spec", lambda name: None)
    assert ["inference only" in sentence for sentence in edit.check(context(mode="train"), None)] == [True]
    assert ["no CUDA GPU here" in sentence for sentence in edit.check(context(device="cpu"), None)] == [True]
    assert ["pip install kernels" in sentence for sentence in edit.check(context(), None)] == [True]
    monkeypatch.setattr(eetq, "find_spec", lambda name: object())
    assert list(edit.check(context(), None)) == []


def kernel(strength: float = 1.0) -> Any:
    """EETQ's two functions in torch; a kernel for another GPU gives products of another `strength`."""

    def quant_weights(weight: Tensor, kind: torch.dtype, unprocessed: bool) -> tuple[Tensor, Tensor]:
        scales = weight.float().abs().amax(0) / 127
        return (weight / scales).round().to(kind), scales.half()

    def w8_a16_gemm(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        return strength * (x.float() @ weight.float() * scales.float()).half()

    return SimpleNamespace(quant_weights=quant_weights, w8_a16_gemm=w8_a16_gemm)


def test_eetq_computes_with_what_its_kernel_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eetq, "kernel", kernel)
    model, plain = on_meta(), tiny_model().eval()
    change = build_eetq(EetqConfig()).apply(model, context())
    weights, state = plain.state_dict(), {}
    rules = {rule.source: rule for rule in change.rules}
    for name, tensor in weights.items():
        state |= rules[name].convert(tensor) if name in rules else {name: tensor}
    model.load_state_dict(state, strict=True, assign=True)
    for name, rule in rules.items():
        weights[name] = rule.restore({target: state[target] for target in rule.targets})
    plain.load_state_dict(weights)
    model.model.rotary_emb = plain.model.rotary_emb
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, plain(ids).logits, rtol=1e-2, atol=1e-2)
    monkeypatch.setattr(eetq, "kernel", lambda: kernel(1.1))
    with pytest.raises(LoadError, match="gives layer.weight back with an error of"):
        eetq.EetqRule("layer", torch.float32).convert(torch.randn(16, 32))
