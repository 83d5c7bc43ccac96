"""Stacks of experts: which weights they are, that their adapters are PEFT's own, and names PEFT takes to mean them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llmtune_lora import LoraRecipe, build
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from llmtune import ParallelDims, PlanError

MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
STACKS = "experts.gate_up_proj, experts.down_proj"
RECIPE = LoraRecipe(r=2, lora_alpha=4, lora_dropout=0.0, target_modules="q_proj", target_parameters=STACKS)


def mixture(tools: Any, **changes: Any) -> nn.Module:
    return tools["original"](tools["config"]("qwen3_moe", **MOE, num_experts=4, **changes))


def test_each_expert_has_an_adapter_and_peft_reads_the_file(tools: Any, tmp_path: Path) -> None:
    source = mixture(tools)
    edit = build(RECIPE)
    model, change = tools["adapted"](source, edit)
    assert change.report[0].startswith("LoRA r=2 alpha=4 on 2 layers and 4 stacks of experts: q_proj, gate_up_proj")
    assert sum(isinstance(module, ParamWrapper) for module in model.modules()) == 4
    with torch.no_grad():
        assert torch.equal(model(tools["ids"]).logits, source(tools["ids"]).logits)  # B starts as zeros
        trained = tools["disturb"](model)
        assert trained["model.layers.0.mlp.experts.base_layer.lora_A.default.weight"].shape[0] == 4 * 2
        logits = model(tools["ids"]).logits
    edit.save(model, trained, tmp_path, tools["context"]())
    theirs = PeftModel.from_pretrained(mixture(tools), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tools["ids"]).logits, logits)
        again, change = tools["adapted"](mixture(tools), build(LoraRecipe(adapter_name_or_path=str(tmp_path))))
        assert "on 2 layers and 4 stacks of experts: q_proj, down_proj, gate_up_proj, from" in change.report[0]
        torch.testing.assert_close(again(tools["ids"]).logits, logits)
        edit.merge(model)
        torch.testing.assert_close(model(tools["ids"]).logits, logits, rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == source.state_dict().keys()


def test_all_leaves_the_stacks_out_and_says_so(tools: Any) -> None:
    _, change = tools["adapted"](mixture(tools), build(LoraRecipe()))
    assert change.report[1] == (
        "stacks of experts get no adapter: 4 weights (experts.gate_up_proj, experts.down_proj); name them in "
        "target_parameters, with lora_dropout: 0"
    )


def test_names_that_peft_takes_to_mean_the_experts_get_no_adapter_elsewhere(tools: Any) -> None:
    source = mixture(tools, mlp_only_layers=[0])  # whose dense MLP has a gate_proj of its own
    model, change = tools["adapted"](source, build(LoraRecipe()))
    assert not any("mlp" in name for name, _ in model.named_modules() if "lora" in name)
    assert any(line.startswith("3 layers get no adapter, as PEFT takes their names") for line in change.report)
    with pytest.raises(PlanError, match='PEFT takes "gate_proj" in Qwen3MoeForCausalLM to mean its stacks of experts'):
        build(LoraRecipe(target_modules="gate_proj")).apply(tools["skeleton"](source), tools["context"]())


def test_a_router_with_code_of_its_own_is_no_linear_layer(tools: Any) -> None:
    sizes = {"num_local_experts": 4, "intermediate_size_mlp": 48, "attention_chunk_size": 16}
    source = tools["original"](tools["config"]("llama4_text", **sizes))
    model, _ = tools["adapted"](source, build(LoraRecipe()))
    assert any("shared_expert" in name for name, _ in model.named_modules() if name.endswith("lora_A"))
    assert not any("router" in name for name, _ in model.named_modules() if name.endswith("lora_A"))
    assert model(tools["ids"]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [({"lora_dropout": 0.1}, "set lora_dropout: 0"), ({"lora_dropout": 0.0, "use_dora": True}, "has no such DoRA")],
)
def test_what_adapters_on_stacks_cannot_do(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LoraRecipe(target_parameters=STACKS, **keys)


def test_unknown_stacks_and_split_ones_are_refused(tools: Any) -> None:
    unknown = build(LoraRecipe(lora_dropout=0.0, target_parameters="experts.gate_proj"))
    with pytest.raises(PlanError, match='found "experts.gate_proj", which names nothing'):
        unknown.apply(tools["skeleton"](mixture(tools)), tools["context"]())
    (sentence,) = build(RECIPE).check(tools["context"](ranks=2, dims=ParallelDims(tensor=2)), mixture(tools))
    assert "which tp_size and ep_size split" in sentence
