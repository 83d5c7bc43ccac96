"""What adapters start from besides random numbers: PiSSA and OLoRA are PEFT's own, on every kind of base."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from llmtune_lora import LoraRecipe, build
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

from llmtune import PlanError
from llmtune.testing import running, tiny_recipe

TARGETS = ("q_proj", "down_proj")
STARTS = {
    "pissa": {"pissa_init": True, "pissa_iter": -1},
    "pissa_niter_500": {"pissa_init": True, "pissa_iter": 500},
    "olora": {"init_lora_weights": "olora"},
}


def parts(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a sign of a singular vector does not change: the bases, and each layer's B A."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            name = name.removeprefix("base_model.model.")
            found[f"{name} base"] = layer.get_base_layer().weight.detach()
            found[f"{name} product"] = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
            found[f"{name} A"] = layer.lora_A["default"].weight.detach().abs()
    return found


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", STARTS)
def test_factors_and_what_is_left_are_pefts(tools: Any, start: str, rslora: bool) -> None:
    source = tools["original"](tools["config"]())
    expected = source(tools["ids"]).logits
    common = {"r": 4, "lora_alpha": 6, "use_rslora": rslora, "rank_pattern": {"down_proj": 6}}
    model, change = tools["adapted"](source, build(LoraRecipe(target_modules=TARGETS, **common, **STARTS[start])))
    torch.testing.assert_close(model(tools["ids"]).logits, expected, rtol=1e-4, atol=1e-5)
    theirs = get_peft_model(source, LoraConfig(target_modules=list(TARGETS), init_lora_weights=start, **common))
    mine, others = parts(model), parts(theirs)
    assert mine.keys() == others.keys() and len(mine) == 12
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert any("keeps the rest" in line for line in change.report)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_result_opens_in_plain_peft_on_the_original_base(
    tools: Any, tmp_path: Path, family: str, start: str
) -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 64}
    settings = tools["config"]() if family == "llama" else AutoConfig.for_model("gpt2", **sizes)
    targets = TARGETS if family == "llama" else ("c_attn", "c_proj")
    source = tools["original"](settings)
    keys = {"target_modules": targets, "use_rslora": True, "alpha_pattern": {targets[1]: 5}, "r": 4}
    edit = build(LoraRecipe(**keys, **STARTS[start]))
    model, _ = tools["adapted"](source, edit)
    tensors = tools["disturb"](model)
    expected = model(tools["ids"]).logits
    edit.save(model, tensors, tmp_path / "saved", tools["context"]())
    opened = PeftModel.from_pretrained(source, tmp_path / "saved").eval()
    torch.testing.assert_close(opened(tools["ids"]).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, opened.unload()(tools["ids"]).logits, atol=1e-2)

    # With pissa_init the same factors train on, on the same rest of the base; without, all of the wide adapter does.
    again = build(LoraRecipe(adapter_name_or_path=str(tmp_path / "saved"), r=4, use_rslora=True, **STARTS[start]))
    continued, _ = tools["adapted"](source, again)
    assert torch.equal(continued(tools["ids"]).logits, expected)
    for name, tensor in tensors.items():
        assert torch.equal(continued.get_parameter(name), tensor)
    again.save(continued, tensors, tmp_path / "again", tools["context"]())
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("saved", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    wide, _ = tools["adapted"](source, build(LoraRecipe(adapter_name_or_path=str(tmp_path / "saved"))))
    torch.testing.assert_close(wide(tools["ids"]).logits, expected, rtol=1e-4, atol=1e-5)
    edit.merge(model)
    torch.testing.assert_close(model(tools["ids"]).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal"])
def test_random_starts_are_pefts_in_law(tools: Any, start: str) -> None:
    source = tools["original"](tools["config"](hidden_size=64, head_dim=16))
    model, _ = tools["adapted"](source, build(LoraRecipe(r=32, target_modules="q_proj", init_lora_weights=start)))
    torch.testing.assert_close(model(tools["ids"]).logits, source(tools["ids"]).logits, rtol=1e-4, atol=1e-5)
    theirs = get_peft_model(
        source, LoraConfig(r=32, target_modules=["q_proj"], init_lora_weights=start)
    ).base_model.model
    (mine_a, mine_b), (their_a, their_b) = (
        [getattr(each.model.layers[0].self_attn.q_proj, side)["default"].weight for side in ("lora_A", "lora_B")]
        for each in (model, theirs)
    )
    assert abs(mine_a.std() / their_a.std() - 1) < 0.1
    if start == "gaussian":
        assert not mine_b.any() and abs(mine_a.std() * 32 - 1) < 0.05
    else:
        assert abs(mine_b.std() / their_b.std() - 1) < 0.1 and (mine_b @ mine_a).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"init_lora_weights": "loftq"}, 'found "loftq", which replaces the base'),
        ({"init_lora_weights": "eva"}, "needs a pass over data"),
        ({"init_lora_weights": False}, "change the model's answers"),
        ({"init_lora_weights": "pisa"}, "found 'pisa', allowed: true, gaussian"),
        ({"init_lora_weights": "olora", "pissa_init": True}, "beside pissa_init"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "needs even ranks"),
        ({"pissa_init": True, "use_dora": True}, "use_dora: set beside pissa"),
        ({"pissa_init": True, "pissa_iter": 0}, "pissa_iter: found 0"),
        ({"layers_pattern": "layers"}, "set without layers_to_transform"),
        ({"create_new_adapter": True}, "names no adapter to merge"),
        ({"adapter_folder": "sub"}, "names nothing that it could be in"),
    ],
)
def test_starts_that_are_refused(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LoraRecipe(**keys)


def test_layers_that_cannot_give_a_part(tools: Any) -> None:
    tied = tools["skeleton"](tools["original"](tools["config"](tie_word_embeddings=True)))
    with pytest.raises(PlanError, match="lm_head shares its weight with another module"):
        build(LoraRecipe(target_modules="lm_head", pissa_init=True)).apply(tied, tools["context"]())
    model = tools["skeleton"](tools["original"](tools["config"]()))
    with pytest.raises(PlanError, match=r"peft_config\.r: found 40 .* 32 inputs"):
        build(LoraRecipe(target_modules="q_proj", r=40, pissa_init=True)).apply(model, tools["context"]())


def test_a_quantised_base_keeps_the_quantised_rest(tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    peft = {"name": "lora", "r": 8, "pissa_init": True, "target_modules": "q_proj"}
    keys = tiny_recipe(
        tmp_path, sizes=sizes, peft_config=peft, quant_config={"name": "bnb", "double_quantization": False}
    )
    plan, _ = running.build(keys)
    plain, _ = running.build({**keys, "peft_config": None}, "infer")
    original = load_file(next(Path(keys["model"]).glob("*.safetensors")))
    for number in range(2):
        name = f"model.layers.{number}.self_attn.q_proj"
        layer, weight = plan.module.get_submodule(name), original[f"{name}.weight"]
        product = 2.0 * layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
        packed, state = quantize_4bit((weight - product).reshape(1, -1), blocksize=64, quant_type="nf4")
        rest = layer.get_base_layer().dequantize()
        torch.testing.assert_close(rest, dequantize_4bit(packed, state).view(64, 64), rtol=1e-5, atol=1e-6)
        rounded = plain.module.get_submodule(name).dequantize()
        assert (rest + product - weight).norm() < 0.9 * (rounded - weight).norm()


@pytest.mark.parametrize("quant", [None, "bnb"])
def test_the_reference_is_the_model_before_training(tmp_path: Path, quant: str | None) -> None:
    """A base without its adapters is not what it was, so that a frozen copy answers: the first loss is log 2."""
    peft = {"name": "lora", "r": 4, "lora_dropout": 0.0, "pissa_init": True}
    keys = tiny_recipe(
        tmp_path, kind="preference", peft_config=peft, quant_config=quant, stage_config="dpo", max_steps=2
    )
    rows = running.train(keys).metrics
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-5) and rows[1]["loss"] < rows[0]["loss"]
