from __future__ import annotations

import importlib.util
from typing import Any

import llmtune_kernels
import pytest
import torch
from llmtune_kernels import KERNELS, AutoKernelsConfig, selection
from transformers import AutoConfig, AutoModelForCausalLM

from llmtune import PlanError, RunContext

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def model(family: str = "llama", **changes: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | changes)))


def context(device: str = "cpu", mode: str = "train") -> RunContext:
    kinds = dict.fromkeys(("compute_dtype", "trainable_dtype", "gather_dtype"), torch.float32)
    return RunContext(mode=mode, device=device, ranks=1, **kinds)


def build(include: Any = "auto") -> Any:
    (plugin,) = llmtune_kernels.kernel_config()
    assert plugin.name == "auto"
    return plugin.build(AutoKernelsConfig(include_kernels=include))


@pytest.mark.parametrize("include", ["auto", True])
def test_auto_takes_all_that_suit(include: Any) -> None:
    change = build(include).apply(model(), context())
    assert set(change.ops) == {"linear_cross_entropy"} and change.attention == "llmtune_packed"
    lines = dict(line.split(": ", 1) for line in change.report)
    assert set(lines) == set(KERNELS)
    assert lines["linear_cross_entropy"] == "used for the loss, 64 MiB of logits at a time"
    assert lines["packed_attention"] == "used in 2 layers, each document by itself"
    assert lines["liger_rope"] == "not used, it runs on cuda, and this run is on cpu"


def test_no_key_means_auto() -> None:
    assert AutoKernelsConfig().asked_for is None


@pytest.mark.parametrize("include", [None, False, ""])
def test_none(include: Any) -> None:
    change = build(include).apply(model(), context())
    assert not change.ops and change.attention is None
    assert change.report == ["no kernels: include_kernels is off"]


def test_a_list_takes_only_these() -> None:
    change = build(" packed_attention , packed_attention").apply(model(), context())
    assert not change.ops and change.attention == "llmtune_packed"
    assert len(change.report) == 1


def test_an_unknown_id_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r'no such kernel "packed_atention".* Did you mean "packed_attention"\?'):
        AutoKernelsConfig(include_kernels="linear_cross_entropy, packed_atention")


def test_an_id_of_another_device_is_an_error() -> None:
    with pytest.raises(
        PlanError, match=r'"liger_rope" cannot be used: it runs on cuda, and this run is on cpu; remove'
    ):
        build("liger_rope").apply(model(), context())


def test_a_missing_package_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtune_kernels.spec.find_spec", lambda name: None)
    sentences = list(build("liger_swiglu,liger_rope").check(context("cuda"), model()))
    assert len(sentences) == 2
    assert "needs liger_kernel, which is not installed; run: pip install 'llmtune-kernels[liger]'" in sentences[0]


def test_two_ids_for_one_operation_are_an_error() -> None:
    (*_, sentence) = build("linear_cross_entropy,liger_linear_cross_entropy").check(context(), model())
    assert "both replace linear_cross_entropy; keep one" in sentence


def test_auto_takes_one_id_for_an_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtune_kernels.spec.find_spec", lambda name: True)
    monkeypatch.setattr(selection, "KERNELS", ("liger_linear_cross_entropy", "linear_cross_entropy"))
    change = build().apply(model(), context("cuda"))
    assert change.ops["linear_cross_entropy"].__name__ == "liger_linear_cross_entropy"
    assert (
        change.report[1] == "linear_cross_entropy: not used, liger_linear_cross_entropy replaces linear_cross_entropy"
    )


def test_inference_is_told_that_nothing_changes() -> None:
    change = build("linear_cross_entropy,packed_attention").apply(model(), context(mode="infer"))
    assert not change.ops and change.attention is None
    assert change.report[0] == "linear_cross_entropy: changes nothing in inference"


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma2", {"attn_logit_softcapping": 50.0}, "soft-caps attention scores"),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "attention sinks"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of the type conv"),
        ("llama", {"attn_implementation": "eager"}, "its attention is set to eager"),
    ],
)
def test_packed_attention_refuses(family: str, changes: dict[str, Any], reason: str) -> None:
    refused = model(family, **changes)
    (sentence,) = build("packed_attention").check(context(), refused)
    assert reason in sentence
    assert build().apply(refused, context()).attention is None


def test_nothing_is_imported_that_is_not_considered(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    real = selection.load
    monkeypatch.setattr(selection, "load", lambda name: loaded.append(name) or real(name))
    build("linear_cross_entropy").apply(model(), context())
    assert set(loaded) == {"linear_cross_entropy"}
    assert importlib.util.find_spec("liger_kernel") is None or "liger_kernel" not in __import__("sys").modules


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_states_what_it_is(name: str) -> None:
    spec = selection.load(name)
    assert spec.id == name and spec.summary and spec.models and spec.devices <= {"cpu", "cuda"}
