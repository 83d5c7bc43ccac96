"""Liger's kernels: what each class computes, told in plain torch and checked on any machine; the kernels on a GPU."""

from __future__ import annotations

import copy
import importlib.util
import sys
from typing import Any

import pytest
import torch
from llmtune_kernels import liger_rms_norm, liger_rope, liger_swiglu, selection
from llmtune_kernels.linear_cross_entropy import linear_cross_entropy
from llmtune_kernels.spec import transformers_class
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from llmtune import RunContext

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
MOE = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {"sliding_window": 4}, "mixtral": MOE, "ministral3": {}, "qwen2": {}, "qwen3": {},
    "qwen2_moe": MOE, "qwen3_moe": MOE, "phi3": {}, "granite": {}, "smollm3": {}, "gemma": {}, "gemma2": {},
    "gemma3_text": {}, "olmo2": {}, "olmo3": {},
}  # fmt: skip


def model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES[family] | changes))
    made = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.3)
    return made


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, casting: str, in_place: bool) -> Tensor:
    """What Liger documents for its two castings, in plain torch."""
    assert not in_place
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    if casting == "llama":
        return (weight + offset) * scaled.to(x.dtype)
    return (scaled * (weight.float() + offset)).to(x.dtype)


def run(made: Any) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = torch.arange(20).reshape(2, 10)
    logits = made(tokens, use_cache=False).logits
    made.zero_grad()
    logits.float().square().sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_norm_class_computes_its_variant(family: str) -> None:
    made = model(family, torch.bfloat16)
    norms = {transformers_class(part): part for part in made.modules() if "RMSNorm" in type(part).__name__}
    assert norms and set(norms) <= set(liger_rms_norm.VARIANTS)
    for name, norm in norms.items():
        variant = liger_rms_norm.VARIANTS[name]
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        x = torch.randn(64, norm.weight.shape[0], dtype=torch.bfloat16) * 3
        ours = reference_rms_norm(x, norm.weight, eps, variant.offset, variant.casting, False)
        assert torch.equal(norm(x), ours)  # bfloat16 and to the bit: where a class rounds shows


def test_every_class_of_the_table_is_tested() -> None:
    seen = {transformers_class(part) for family in FAMILIES for part in model(family).modules()}
    assert set(liger_rms_norm.VARIANTS) | set(liger_swiglu.CLASSES) | set(liger_rope.CLASSES) <= seen


@pytest.mark.parametrize("family", list(FAMILIES))
def test_replaced_norms_keep_the_model_and_its_parameters(family: str) -> None:
    made = model(family)
    logits, grads = run(made)
    before = dict(made.named_parameters())
    found = liger_rms_norm.replace_norms(made, reference_rms_norm)
    assert len(found) == sum("RMSNorm" in type(part).__name__ for part in made.modules())
    assert all(part is before[name] for name, part in made.named_parameters())
    logits_after, grads_after = run(made)
    assert torch.equal(logits_after, logits)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_after[name], grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()))


def test_another_model_of_the_class_is_left_alone() -> None:
    replaced, other = model("llama"), model("llama")
    liger_rms_norm.replace_norms(replaced, reference_rms_norm)
    assert type(replaced.model.norm) is not type(other.model.norm)
    assert isinstance(replaced.model.norm, type(other.model.norm))
    assert type(other.model.norm).__module__.startswith("transformers.")


def test_a_class_of_the_same_name_from_elsewhere_is_left_alone() -> None:
    stranger = type("LlamaRMSNorm", (nn.Identity,), {})
    assert not liger_rms_norm.replace_norms(nn.Sequential(stranger()), reference_rms_norm)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2"])
def test_replaced_mlps_compute_the_same(family: str) -> None:
    made = model(family)
    logits, grads = run(made)
    assert len(liger_swiglu.replace_mlps(made, lambda gate, up: nn.functional.silu(gate) * up)) == 2
    logits_after, grads_after = run(made)
    assert torch.equal(logits_after, logits)
    assert all(torch.equal(grads_after[name], grad) for name, grad in grads.items())


def test_an_mlp_with_another_activation_is_left_alone() -> None:
    assert not liger_swiglu.replace_mlps(model("llama", hidden_act="gelu"), torch.mul)


def test_adapted_projections_stay_adapted() -> None:
    peft = pytest.importorskip("peft")
    made = model("llama")
    config = peft.LoraConfig(target_modules=["gate_proj", "q_proj"], r=2, init_lora_weights=False)
    peft.inject_adapter_in_model(config, made)
    logits, grads = run(made)
    liger_swiglu.replace_mlps(made, lambda gate, up: nn.functional.silu(gate) * up)
    liger_rope.replace_attention(made, sys.modules[type(made.model).__module__].apply_rotary_pos_emb)
    logits_after, grads_after = run(made)
    assert torch.equal(logits_after, logits) and any("lora" in name for name in grads)
    assert all(torch.equal(grads_after[name], grad) for name, grad in grads.items())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_written_out_attention_is_transformers_own(family: str, attention: str) -> None:
    made = model(family, use_sliding_window=True, max_window_layers=1, sliding_window=4)
    made.set_attn_implementation(attention)
    logits, grads = run(made)
    plain = copy.deepcopy(made)
    rotate = sys.modules[type(made.model).__module__].apply_rotary_pos_emb
    assert len(liger_rope.replace_attention(made, rotate)) == 2
    logits_after, grads_after = run(made)
    assert torch.equal(logits_after, logits)
    assert all(torch.equal(grads_after[name], grad) for name, grad in grads.items())
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = torch.arange(7)[None]
    assert torch.equal(made.generate(prompt, **options), plain.generate(prompt, **options))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_written_out_attention_tells_the_attention_function_the_same(family: str) -> None:
    told: list[dict[str, Any]] = []

    def listen(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **arguments: Any) -> tuple:
        told.append({name: said for name, said in arguments.items() if not isinstance(said, Tensor)})
        return query.transpose(1, 2), None

    AttentionInterface.register("listen", listen)
    made = model(family, use_sliding_window=True, max_window_layers=1, sliding_window=4, attention_dropout=0.1)
    made.set_attn_implementation("listen")
    rotate = sys.modules[type(made.model).__module__].apply_rotary_pos_emb
    made.train()(torch.arange(9)[None], use_cache=False, max_length_q=9)
    liger_rope.replace_attention(made, rotate)
    made(torch.arange(9)[None], use_cache=False, max_length_q=9)
    assert len(told) == 4 and told[:2] == told[2:]
    assert told[0]["max_length_q"] == 9 and told[0]["dropout"] == 0.1


def test_partial_rotation_is_refused() -> None:
    made = model("llama")
    made.config.rope_parameters["partial_rotary_factor"] = 0.5
    assert selection.load("liger_rope").suits(made, None) == "it rotates a part of each head only"


def test_fused_loss_refuses_models_that_change_their_logits() -> None:
    suits = selection.load("liger_linear_cross_entropy").suits
    assert suits(model("llama"), None) is None
    assert suits(model("gemma2", final_logit_softcapping=30.0), None) == "it soft-caps its logits"
    assert suits(model("granite", logits_scaling=8.0), None) == "it scales its logits"


ON_CUDA = RunContext(
    mode="train", device="cuda", ranks=1,
    compute_dtype=torch.float32, trainable_dtype=torch.float32, gather_dtype=torch.float32,
)  # fmt: skip


def near(found: Tensor, expected: Tensor, share: float) -> None:
    torch.testing.assert_close(found.float(), expected.float(), rtol=share, atol=share * float(expected.abs().max()))


SUITED: dict[str, set[str]] = {
    "llama": {"liger_rms_norm", "liger_swiglu", "liger_rope"},
    "mistral": {"liger_rms_norm", "liger_swiglu", "liger_rope"},
    "qwen2": {"liger_rms_norm", "liger_swiglu", "liger_rope"},
    "qwen3": {"liger_rms_norm", "liger_swiglu", "liger_rope"},
    "smollm3": {"liger_rms_norm", "liger_swiglu"},  # some of its layers have no rotation
    "olmo2": {"liger_rms_norm", "liger_swiglu"},
    "olmo3": {"liger_rms_norm"},
    "ministral3": {"liger_rms_norm"},
    "granite": {"liger_rms_norm"},
    "mixtral": {"liger_rms_norm"},
    "phi3": {"liger_rms_norm"},  # gate and up are one projection
    "gemma": {"liger_rms_norm"},  # its MLPs use GELU
    "gemma2": {"liger_rms_norm"},
    "gemma3_text": {"liger_rms_norm"},
}
"""Which of Liger's modules each family can have."""


@pytest.mark.parametrize("family", list(SUITED))
def test_each_family_gets_the_kernels_that_suit_it(family: str) -> None:
    names = ("liger_rms_norm", "liger_swiglu", "liger_rope")
    made = model(family)
    assert {name for name in names if selection.load(name).suits(made, ON_CUDA) is None} == SUITED[family]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel")
class TestOnGpu:
    """Against the same model without the kernel."""

    @pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
    @pytest.mark.parametrize(
        ("family", "name"), [(family, name) for family in SUITED for name in sorted(SUITED[family])]
    )
    def test_module(self, family: str, name: str, dtype: torch.dtype, share: float) -> None:
        sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}
        plain = model(family, dtype, **sizes).cuda()
        for weight in plain.parameters():
            nn.init.normal_(weight, std=0.05)
        spec = selection.load(name)
        fused = copy.deepcopy(plain)
        assert "used in" in spec.apply(fused, ON_CUDA).report[0]
        torch.set_default_device("cuda")
        try:
            (logits, grads), (found, found_grads) = run(plain), run(fused)
        finally:
            torch.set_default_device(None)
        near(found, logits, share)
        for parameter, grad in grads.items():
            near(found_grads[parameter], grad, share)

    @pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
    @pytest.mark.parametrize("name", ["linear_cross_entropy", "liger_linear_cross_entropy"])
    def test_loss(self, name: str, dtype: torch.dtype, share: float) -> None:
        torch.manual_seed(0)
        made = model("llama").cuda()
        op = selection.load(name).apply(made, ON_CUDA).ops["linear_cross_entropy"]
        head = nn.Linear(256, 4096, bias=False, device="cuda", dtype=dtype)
        targets = torch.randint(4096, (300,), device="cuda")
        values = torch.randn(300, 256, device="cuda", dtype=dtype)
        results = []
        for function in (lambda h: nn.functional.cross_entropy(head(h).float(), targets, reduction="sum"),
                         lambda h: op(h, head, targets, None)):  # fmt: skip
            head.weight.grad = None
            hidden = values.clone().requires_grad_()
            loss = function(hidden)
            (loss / 300).backward()
            results.append((loss.detach(), hidden.grad, head.weight.grad))
        for expected, found in zip(*results, strict=True):
            near(found, expected, share)


def test_fused_loss_off_cuda_goes_the_chunked_way() -> None:
    op = selection.load("liger_linear_cross_entropy").apply(model("llama"), ON_CUDA).ops["linear_cross_entropy"]
    head, hidden, targets = nn.Linear(8, 16), torch.randn(5, 8), torch.randint(16, (5,))
    assert torch.equal(op(hidden, head, targets, None), linear_cross_entropy(hidden, head, targets, None))
