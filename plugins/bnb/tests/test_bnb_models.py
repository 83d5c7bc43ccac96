"""Whole models: the same numbers as transformers' own path, training that evaluation does not disturb, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llmtune_bnb import AutoConfig, BnbConfig, build, build_auto, quant_config
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.bnb import Linear4bit as LoraOn4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmtune import EditError


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("kind", "double", "dtype"), [("nf4", True, torch.bfloat16), ("fp4", False, torch.float32)])
def test_4bit_logits_equal_from_pretrained(
    tools: Any, tmp_path: Path, family: str, kind: str, double: bool, dtype: torch.dtype
) -> None:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64} if family == "gpt2" else {}
    settings = type(tools["config"](family))(**sizes) if family == "gpt2" else tools["config"](family)
    source = tools["original"](settings).eval()
    source.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=double,
        ),
    ).train()  # in eval mode bitsandbytes may repack on some CPUs and round differently
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    where = tools["context"](compute_dtype=dtype, gather_dtype=dtype)
    edit = build(BnbConfig(quantization_type=kind, double_quantization=double))
    ours, _ = tools["quantised"](source, edit, where)
    with torch.no_grad():
        mine, other = ours.eval()(tools["ids"]).logits, theirs(tools["ids"]).logits
    assert torch.equal(mine, other)
    assert not torch.equal(mine.float(), source(tools["ids"]).logits)


def test_evaluation_between_steps_changes_nothing(tools: Any) -> None:
    def losses(evaluate: bool) -> list[float]:
        model, _ = tools["quantised"](tools["original"](tools["config"]()), build(BnbConfig()), tools["context"]())
        torch.manual_seed(1)
        model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), model)
        wrapped = model.model.layers[0].self_attn.q_proj
        assert isinstance(wrapped, LoraOn4bit)
        packed = wrapped.base_layer.weight.detach().clone()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        seen = []
        for _ in range(4):
            if evaluate:
                with torch.no_grad():
                    model.eval()(tools["ids"])
            loss = model.train()(tools["ids"], labels=tools["ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        assert torch.equal(wrapped.base_layer.weight.view(torch.uint8), packed.view(torch.uint8))
        return seen

    without = losses(evaluate=False)
    assert losses(evaluate=True) == without
    assert without[-1] < without[0]


def test_gradients_through_a_4bit_layer_are_those_of_its_dequantised_weight(tools: Any) -> None:
    model, _ = tools["quantised"](tools["original"](tools["config"]()), build(BnbConfig()), tools["context"]())
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).square().sum().backward()
    plain = x.detach().clone().requires_grad_()
    (plain @ layer.dequantize().t()).square().sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)


def test_heads_embeddings_and_norms_stay(tools: Any) -> None:
    model, change = tools["quantised"](tools["original"](tools["config"]()), build(BnbConfig()), tools["context"]())
    assert type(model.lm_head) is torch.nn.Linear
    assert len(change.rules) == 14
    assert change.report[0].startswith("14 linear layers -> nf4 (double quantisation): ")
    assert {rule.source for rule in change.rules} == {
        name + ".weight" for name, module in model.named_modules() if name.endswith("_proj")
    }


def test_the_plan_says_that_experts_are_not_quantised(tools: Any) -> None:
    settings = tools["config"]("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    experts = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "experts" in name)
    change = build(BnbConfig()).apply(model, tools["context"]())
    count = 2 * settings.num_hidden_layers
    assert change.report[1] == f"{count} stacks of experts stay in full precision: {experts / 1e6:.1f} MB"


def test_nothing_is_materialised_by_the_edit(tools: Any) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tools["config"]())
    build(BnbConfig()).apply(model, tools["context"]())
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_8bit_equals_bitsandbytes_own_layer(tools: Any) -> None:
    import bitsandbytes as bnb

    source = tools["original"](tools["config"]())
    model, _ = tools["quantised"](source, build(BnbConfig(quantization_bit=8)), tools["context"](mode="infer"))
    theirs = bnb.nn.Linear8bitLt(64, 128, bias=False, has_fp16_weights=False, threshold=6.0)
    theirs.weight = bnb.nn.Int8Params(source.model.layers[0].mlp.up_proj.weight.detach(), requires_grad=False)
    theirs = theirs.to("cpu").eval()
    x = torch.randn(2, 5, 64)
    x[..., 7] *= 20  # an outlier column, multiplied in floating point
    with torch.no_grad():
        assert torch.equal(model.model.layers[0].mlp.up_proj(x), theirs(x))
        near = (model(tools["ids"]).logits - source(tools["ids"]).logits).abs().max() / source(
            tools["ids"]
        ).logits.abs().max()
    assert near < 0.05


def test_8bit_is_refused_for_training_and_allowed_for_inference(tools: Any) -> None:
    edit = build(BnbConfig(quantization_bit=8))
    (sentence,) = edit.check(tools["context"](), None)
    assert "inference only" in sentence and "quantization_bit: 4" in sentence
    assert list(edit.check(tools["context"](mode="infer"), None)) == []
    assert list(build(BnbConfig()).check(tools["context"](), None)) == []


def test_auto_means_bitsandbytes_with_4_bits_unless_told() -> None:
    assert build_auto(AutoConfig()).config == BnbConfig()
    assert build_auto(AutoConfig(quantization_bit=8)).config.quantization_bit == 8
    assert [plugin.name for plugin in quant_config()] == ["bnb", "auto"]
    assert all("quantized_base" in plugin.gives for plugin in quant_config())


def test_a_model_without_linear_layers_is_an_error(tools: Any) -> None:
    model = torch.nn.Sequential()
    model.lm_head = torch.nn.Linear(4, 4, device="meta")
    with pytest.raises(EditError, match="no linear layer besides its output head"):
        build(BnbConfig()).apply(model, tools["context"]())
