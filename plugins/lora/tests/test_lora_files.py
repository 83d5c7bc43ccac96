"""Adapters on disk: PEFT reads ours, we read PEFT's, and what does not fit is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llmtune_lora import LoraRecipe, build
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from llmtune import LoadError, PlanError

RECIPES = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 4},
    "dora": {"use_dora": True},
    "saved head": {"modules_to_save": "lm_head"},
    "saved norm": {"modules_to_save": "norm"},  # all norms of layers end with these letters
    "tied head": {"modules_to_save": "lm_head", "tie": True},
    "tied embedding": {"modules_to_save": ("embed_tokens",), "target_modules": "q_proj", "tie": True},
    "adapted embedding": {"target_modules": "q_proj, embed_tokens", "tie": True},
    "adapted head": {"target_modules": "q_proj, lm_head", "tie": True},
    "one layer": {"target_modules": "model.layers.1.mlp.up_proj"},
}


def trained(tools: Any, tie: bool = False, seed: int = 7, **keys: Any) -> tuple[Any, Any, Any, dict[str, torch.Tensor]]:
    """(base model, edit, adapted and disturbed model, trained tensors)."""
    source = tools["original"](tools["config"](tie_word_embeddings=tie))
    edit = build(LoraRecipe(**keys))
    model, _ = tools["adapted"](source, edit)
    return source, edit, model, tools["disturb"](model, seed)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")
def test_peft_reads_what_is_saved(tools: Any, tmp_path: Path, recipe: str) -> None:
    source, edit, model, tensors = trained(tools, **RECIPES[recipe])
    edit.save(model, tensors, tmp_path, tools["context"]())
    expected = model(tools["ids"]).logits
    assert not torch.allclose(expected, source(tools["ids"]).logits, atol=1e-3)
    theirs = PeftModel.from_pretrained(source, tmp_path).eval()
    assert torch.equal(theirs(tools["ids"]).logits, expected)
    again = {name: tensor for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    theirs.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == again.keys()


def test_config_file_says_what_peft_says(tools: Any, tmp_path: Path) -> None:
    _, edit, model, tensors = trained(tools, r=4, lora_alpha=8)
    edit.save(model, tensors, tmp_path, tools["context"]())
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert said["base_model_name_or_path"] == "some/base" and said["revision"] == "main"
    assert said["task_type"] == "CAUSAL_LM" and said["inference_mode"] is True and said["peft_type"] == "LORA"
    assert (said["r"], said["lora_alpha"], said["lora_dropout"]) == (4, 8, 0.05)


def test_target_names_are_not_shortened_where_that_would_name_more(tools: Any, tmp_path: Path) -> None:
    _, edit, model, tensors = trained(tools, target_modules="model.layers.1.mlp.up_proj, q_proj")
    edit.save(model, tensors, tmp_path, tools["context"]())
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "model.layers.1.mlp.up_proj" in said["target_modules"] and len(said["target_modules"]) == 3


@pytest.mark.parametrize("recipe", ["lora", "dora", "saved norm", "tied head", "adapted embedding"])
def test_a_saved_adapter_is_continued(tools: Any, tmp_path: Path, recipe: str) -> None:
    source, edit, model, tensors = trained(tools, **RECIPES[recipe])
    edit.save(model, tensors, tmp_path, tools["context"]())
    again = build(LoraRecipe(adapter_name_or_path=str(tmp_path)))
    continued, change = tools["adapted"](source, again)
    assert torch.equal(continued(tools["ids"]).logits, model(tools["ids"]).logits)
    now = {name: parameter for name, parameter in continued.named_parameters() if parameter.requires_grad}
    assert now.keys() == tensors.keys() and set(change.files) == now.keys()
    again.save(continued, now, tmp_path / "again", tools["context"]())
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


def test_an_adapter_of_peft_is_continued(tools: Any, tmp_path: Path) -> None:
    source = tools["original"](tools["config"]())
    theirs = get_peft_model(source, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)).eval()
    expected = theirs(tools["ids"]).logits
    theirs.save_pretrained(tmp_path / "model")
    plain = theirs.unload()
    model, change = tools["adapted"](plain, build(LoraRecipe(adapter_name_or_path=str(tmp_path))))
    assert torch.equal(model(tools["ids"]).logits, expected)
    assert change.report[0].startswith("LoRA r=3 alpha=8 on 14 layers")


@pytest.mark.parametrize(
    "recipe", ["lora", "dora", "rslora", "saved head", *[name for name in RECIPES if "ed " in name]]
)
def test_merged_model_answers_alike_and_is_plain(tools: Any, tmp_path: Path, recipe: str) -> None:
    source, edit, model, _ = trained(tools, **RECIPES[recipe])
    expected = model(tools["ids"]).logits
    edit.merge(model)
    torch.testing.assert_close(model(tools["ids"]).logits, expected, rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == set(source.state_dict())
    model.save_pretrained(tmp_path)
    reread = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(reread(tools["ids"]).logits, model(tools["ids"]).logits)
    edit.merge(model)  # nothing left to fold in
    assert torch.equal(reread(tools["ids"]).logits, model(tools["ids"]).logits)


@pytest.mark.parametrize("dora", [False, True])
def test_several_adapters_are_merged_in_order(tools: Any, tmp_path: Path, dora: bool) -> None:
    source = None
    for number in (1, 2):
        source, edit, model, tensors = trained(tools, seed=number, use_dora=dora, target_modules="q_proj, down_proj")
        edit.save(model, tensors, tmp_path / str(number), tools["context"]())
    both = build(LoraRecipe(adapter_name_or_path=(str(tmp_path / "1"), str(tmp_path / "2"))))
    merged, _ = tools["adapted"](source, both, tools["context"](mode="infer"))
    for number in (1, 2):  # PEFT, one after the other
        source = PeftModel.from_pretrained(source, tmp_path / str(number)).merge_and_unload()
    torch.testing.assert_close(merged(tools["ids"]).logits, source(tools["ids"]).logits, rtol=1e-5, atol=1e-6)
    both.merge(merged)
    assert set(merged.state_dict()) == set(source.state_dict())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.pop(next(iter(state))), r"missing: base_model\.model\.model\.layers\.0"),
        (lambda state: state.update(extra=torch.zeros(1)), "not part of this model: extra"),
        (
            lambda state: state.update({next(iter(state)): torch.zeros(2, 2)}),
            r"of another shape: .*\[2, 2\], wanted \[",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_an_error_that_lists_keys(
    tools: Any, tmp_path: Path, change: Any, sentence: str
) -> None:
    source, edit, model, tensors = trained(tools)
    edit.save(model, tensors, tmp_path, tools["context"]())
    state = dict(sorted(load_file(tmp_path / "adapter_model.safetensors").items()))
    change(state)
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoadError, match=sentence):
        tools["adapted"](source, build(LoraRecipe(adapter_name_or_path=str(tmp_path))))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"r": 16}, "peft_config.r: the recipe says 16, the adapter .* that is continued has 8"),
        ({"use_dora": True}, "peft_config.use_dora: the recipe says True"),
        ({"target_modules": "k_proj"}, r"target_modules: the recipe says \['k_proj'\].* has \['q_proj'\]"),
    ],
)
def test_a_recipe_that_contradicts_the_continued_adapter(
    tools: Any, tmp_path: Path, keys: dict[str, Any], sentence: str
) -> None:
    source, edit, model, tensors = trained(tools, target_modules="q_proj")
    edit.save(model, tensors, tmp_path, tools["context"]())
    with pytest.raises(PlanError, match=sentence):
        build(LoraRecipe(adapter_name_or_path=str(tmp_path), **keys)).apply(
            tools["skeleton"](source), tools["context"]()
        )
    agreeing = build(LoraRecipe(adapter_name_or_path=str(tmp_path), target_modules="q_proj", lora_dropout=0.2))
    continued, _ = tools["adapted"](source, agreeing)
    assert continued.model.layers[0].self_attn.q_proj.lora_dropout["default"].p == 0.2


def test_places_without_an_adapter(tools: Any, tmp_path: Path) -> None:
    model = tools["skeleton"](tools["original"](tools["config"]()))
    with pytest.raises(PlanError, match=r"holds no adapter_config\.json"):
        build(LoraRecipe(adapter_name_or_path=str(tmp_path))).apply(model, tools["context"]())
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(PlanError, match=r"has no adapter_model\.safetensors"):
        build(LoraRecipe(adapter_name_or_path=str(tmp_path))).apply(model, tools["context"]())


class Packed(torch.nn.Linear):
    """A quantised layer as far as this plugin can tell: it dequantises itself."""

    def dequantize(self) -> torch.Tensor:
        return self.weight


def test_a_quantised_layer_is_neither_copied_nor_merged_into(tools: Any) -> None:
    model = tools["skeleton"](tools["original"](tools["config"]()))
    model.model.layers[0].mlp.up_proj = Packed(32, 48, bias=False, device="meta")
    with pytest.raises(PlanError, match="stored quantised and cannot be trained in full"):
        build(LoraRecipe(modules_to_save="up_proj")).apply(model, tools["context"]())
    edit = build(LoraRecipe(target_modules="up_proj"))
    edit.apply(model, tools["context"]())
    with pytest.raises(PlanError, match="merged into an unquantised base"):
        edit.merge(model)
