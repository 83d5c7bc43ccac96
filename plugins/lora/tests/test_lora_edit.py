"""Which layers get an adapter, what adapters start from, and what a recipe may not say."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from llmtune_lora import LoraRecipe, build
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from llmtune import PlanError, split_names


def lora_layers(model: nn.Module) -> set[str]:
    return {name.rpartition(".lora_A")[0] for name, _ in model.named_modules() if name.endswith(".lora_A")}


def test_all_means_every_linear_layer_but_the_head(tools: Any) -> None:
    model, change = tools["adapted"](tools["original"](tools["config"]()), build(LoraRecipe()))
    assert len(lora_layers(model)) == 14 and "lm_head" not in lora_layers(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{layer}.lora_{part}.default.weight" for layer in lora_layers(model) for part in "AB"}
    assert change.report[0].startswith("LoRA r=8 alpha=16 on 14 layers: q_proj, k_proj, v_proj, o_proj")


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        ("q_proj", 2),
        ("q_proj, v_proj", 4),
        (("q_proj", "mlp.up_proj"), 4),
        ("model.layers.1.mlp.up_proj", 1),
        ("lm_head", 1),
    ],
)
def test_targets_by_name_list_and_comma_string(tools: Any, wanted: Any, count: int) -> None:
    model, _ = tools["adapted"](tools["original"](tools["config"]()), build(LoraRecipe(target_modules=wanted)))
    assert len(lora_layers(model)) == count


@pytest.mark.parametrize("dora", [False, True])
def test_an_untrained_adapter_changes_nothing(tools: Any, dora: bool) -> None:
    source = tools["original"](tools["config"]())
    model, _ = tools["adapted"](source, build(LoraRecipe(use_dora=dora)))
    torch.testing.assert_close(model(tools["ids"]).logits, source(tools["ids"]).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dora_magnitudes_are_pefts_own(tools: Any, family: str) -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 64}
    settings = tools["config"]() if family == "llama" else AutoConfig.for_model("gpt2", **sizes)
    source = tools["original"](settings)
    targets = ["q_proj", "down_proj"] if family == "llama" else ["c_attn", "wte"]
    model, _ = tools["adapted"](source, build(LoraRecipe(use_dora=True, target_modules=tuple(targets))))
    theirs = get_peft_model(source, LoraConfig(use_dora=True, target_modules=targets)).state_dict()
    mine = {name: tensor for name, tensor in model.named_parameters() if "magnitude" in name}
    assert mine
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[f"base_model.model.{name}"])


def test_starting_values_are_pefts_in_law(tools: Any) -> None:
    source = tools["original"](tools["config"](hidden_size=64, head_dim=16))
    model, change = tools["adapted"](source, build(LoraRecipe(r=32, target_modules=("q_proj", "embed_tokens"))))
    a = model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    bound = math.sqrt(1 / 64)  # kaiming with a = sqrt(5): uniform in +-1/sqrt(inputs)
    assert a.abs().max() <= bound and a.abs().max() > 0.98 * bound
    assert abs(a.std() - bound / math.sqrt(3)) < 0.02 * bound
    assert not model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.any()
    assert not model.model.embed_tokens.lora_embedding_A["default"].any()
    assert abs(model.model.embed_tokens.lora_embedding_B["default"].std() - 1) < 0.1
    assert set(change.fresh) == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 32 / 16), (True, 32 / 4)])
def test_scaling(tools: Any, rslora: bool, scaling: float) -> None:
    source = tools["original"](tools["config"]())
    model, _ = tools["adapted"](
        source, build(LoraRecipe(r=16, lora_alpha=32, use_rslora=rslora, target_modules="q_proj"))
    )
    tools["disturb"](model)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    delta = scaling * (x @ layer.lora_A["default"].weight.t() @ layer.lora_B["default"].weight.t())
    torch.testing.assert_close(layer(x), layer.base_layer(x) + delta)


def test_modules_to_save_start_as_copies_and_are_kept_out_of_all(tools: Any) -> None:
    source = tools["original"](tools["config"](tie_word_embeddings=True))
    model, change = tools["adapted"](source, build(LoraRecipe(modules_to_save="lm_head, down_proj")))
    assert "model.layers.0.mlp.down_proj" not in lora_layers(model) and len(lora_layers(model)) == 12
    copy = model.lm_head.modules_to_save["default"].weight
    assert copy is not model.model.embed_tokens.weight and torch.equal(copy, model.model.embed_tokens.weight)
    assert model.lm_head.original_module.weight is model.model.embed_tokens.weight
    assert copy.requires_grad and not model.model.embed_tokens.weight.requires_grad
    assert any("shares its weight" in line and line.startswith("lm_head") for line in change.report)


def test_a_classification_head_is_trained_with_the_adapter(tools: Any) -> None:
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(tools["config"](num_labels=3))
    edit = build(LoraRecipe())
    change = edit.apply(model, tools["context"]())
    assert change.copies == {"score.modules_to_save.default.weight": "score.original_module.weight"}
    assert edit.saved_config.task_type == "SEQ_CLS"


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"target_modules": "q_porj"}, 'found "q_porj", which names nothing in this model. Did you mean "q_proj"'),
        ({"target_modules": "mlp"}, "not a linear layer but holds some; name these: gate_proj, up_proj, down_proj"),
        ({"target_modules": ""}, "found nothing to adapt"),
        ({"target_modules": ("q_proj", "proj")}, 'found "proj", which names nothing'),
        ({"rank_pattern": {"q_porj": 2}}, 'rank_pattern: found "q_porj".*Did you mean "q_proj"'),
        ({"alpha_pattern": {"q_proj": 0.5}}, "alpha_pattern.q_proj: found 0.5, allowed is a whole number"),
        ({"exclude_modules": "lm_head"}, 'exclude_modules: found "lm_head", which names nothing'),
        ({"layers_to_transform": 7}, "leave no layer of target_modules"),
        ({"modules_to_save": "lm_haed"}, 'peft_config.modules_to_save: found "lm_haed".*Did you mean "lm_head"'),
        ({"modules_to_save": "layers"}, "is a list of modules"),
        (
            {"target_modules": "lm_head", "modules_to_save": "lm_head"},
            "named by both target_modules and modules_to_save",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_with_the_fix(tools: Any, keys: dict[str, Any], sentence: str) -> None:
    model = tools["skeleton"](tools["original"](tools["config"]()))
    with pytest.raises(PlanError, match=sentence):
        build(LoraRecipe(**keys)).apply(model, tools["context"]())


PATTERNS = {
    "ranks": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6}, "alpha_pattern": {"q_proj": 7}},
    "some layers": {"layers_to_transform": 1, "exclude_modules": "k_proj, mlp.up_proj"},
    "a list of layers": {
        "layers_to_transform": (0, 1),
        "layers_pattern": "layers",
        "exclude_modules": "layers.0.mlp.up_proj",
    },
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_are_pefts_and_open_in_peft(tools: Any, tmp_path: Path, pattern: str) -> None:
    keys = {"r": 4, "target_modules": ("q_proj", "k_proj", "up_proj", "down_proj"), **PATTERNS[pattern]}
    source = tools["original"](tools["config"]())
    edit = build(LoraRecipe(**keys))
    model, _ = tools["adapted"](source, edit)
    edit.save(model, tools["disturb"](model), tmp_path, tools["context"]())
    theirs = copy.deepcopy(source)
    lists = {key: list(split_names(keys[key])) for key in ("target_modules", "exclude_modules") if key in keys}
    get_peft_model(theirs, LoraConfig(lora_alpha=16, **{**keys, **lists}))
    mine, others = (
        {
            name: (layer.r["default"], layer.scaling["default"])
            for name, layer in each.named_modules()
            if hasattr(layer, "r")
        }
        for each in (model, theirs)
    )
    assert mine == others and len({rank for rank, _ in mine.values()}) == (3 if pattern == "ranks" else 1)
    opened = PeftModel.from_pretrained(source, tmp_path).eval()
    assert torch.equal(opened(tools["ids"]).logits, model(tools["ids"]).logits)
    said = LoraConfig.from_pretrained(tmp_path)
    assert (said.rank_pattern, said.layers_to_transform) == (
        keys.get("rank_pattern", {}),
        list(x) if isinstance(x := keys.get("layers_to_transform"), tuple) else x,
    )
    again, _ = tools["adapted"](opened.unload(), build(LoraRecipe(adapter_name_or_path=str(tmp_path), **keys)))
    assert torch.equal(again(tools["ids"]).logits, model(tools["ids"]).logits)
