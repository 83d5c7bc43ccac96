"""Which parameters train, by layer and by name, on plain, expert and vision-language models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llmtune_freeze import FreezeConfig, build, peft_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from llmtune import ModelEdit, PlanError, RunContext

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32,
}  # fmt: skip


def model(family: str = "llama", **changes: Any) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | changes)))


def apply(target: torch.nn.Module, **keys: Any) -> ModelEdit:
    where = RunContext(
        mode="train", device="cpu", ranks=1, compute_dtype=torch.bfloat16, trainable_dtype=torch.float32,
        gather_dtype=torch.bfloat16,
    )  # fmt: skip
    return build(FreezeConfig(**keys)).apply(target, where)


def trained(target: torch.nn.Module, **keys: Any) -> set[str]:
    choose = apply(target, **keys).trainable
    assert choose is not None
    return {name for name, _ in target.named_parameters() if choose(name)}


def layer_of(name: str) -> str:
    return name.removeprefix("model.layers.").partition(".")[0]


@pytest.mark.parametrize(("count", "expected"), [(2, "23"), (1, "3"), (-1, "0"), (-3, "012"), (4, "0123")])
def test_positive_counts_from_the_end_negative_from_the_start(count: int, expected: str) -> None:
    names = trained(model(), freeze_trainable_layers=count)
    assert {layer_of(name) for name in names} == set(expected)
    assert len(names) == 9 * len(expected)


def test_modules_are_matched_by_whole_path_components() -> None:
    names = trained(model(), freeze_trainable_layers=1, freeze_trainable_modules="mlp, self_attn.q_proj")
    assert names == {
        f"model.layers.3.{part}.weight"
        for part in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj")
    }
    with pytest.raises(PlanError, match='found "proj", which names nothing'):
        trained(model(), freeze_trainable_modules=("proj",))


def test_expert_numbers_are_not_layer_numbers() -> None:
    mixtral = model("mixtral", num_local_experts=4, num_experts_per_tok=2)
    names = trained(mixtral, freeze_trainable_layers=-2)
    assert {layer_of(name) for name in names} == {"0", "1"}
    assert any("experts" in name for name in names)


def test_vision_blocks_are_not_layers() -> None:
    settings = AutoConfig.for_model(
        "qwen2_vl",
        text_config=SIZES
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
        vision_config={"depth": 6, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "mlp_ratio": 2},
    )
    with torch.device("meta"):
        vlm = AutoModelForImageTextToText.from_config(settings)
    names = trained(vlm, freeze_trainable_layers=1)
    assert {name.split(".self_attn")[0].split(".mlp")[0] for name in names if "norm" not in name} == {
        "model.language_model.layers.3"
    }
    assert not any("visual" in name for name in names)
    with pytest.raises(PlanError, match="has 4 layers"):
        trained(vlm, freeze_trainable_layers=6)
    assert "model.visual.merger.mlp.0.weight" in trained(vlm, freeze_extra_modules="visual.merger")


def test_extra_modules_and_ties() -> None:
    assert "lm_head.weight" in trained(model(), freeze_extra_modules=["lm_head", "norm"])
    assert "model.norm.weight" in trained(model(), freeze_extra_modules=["lm_head", "norm"])
    tied = model(tie_word_embeddings=True)
    change = apply(tied, freeze_extra_modules="lm_head")
    assert change.trainable is not None and change.trainable("model.embed_tokens.weight")
    assert "model.embed_tokens.weight trains too: it is the same tensor as lm_head.weight" in change.report


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"freeze_trainable_layers": 5}, "found 5, but LlamaForCausalLM has 4 layers"),
        ({"freeze_trainable_layers": -5}, "found -5, but LlamaForCausalLM has 4 layers"),
        ({"freeze_trainable_modules": "self_atn"}, 'Did you mean "self_attn"'),
        ({"freeze_trainable_modules": ""}, "found nothing"),
        ({"freeze_extra_modules": "lm_heat"}, 'Did you mean "lm_head"'),
        ({"freeze_extra_modules": "mlp"}, "names nothing in the model outside its layers"),
    ],
)
def test_what_does_not_fit_is_an_error_with_the_fix(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        apply(model(), **keys)


def test_zero_layers_is_refused_by_the_config() -> None:
    with pytest.raises(ValueError, match="found 0"):
        FreezeConfig(freeze_trainable_layers=0)


@pytest.mark.parametrize(("cast", "stored"), [(True, "float32"), (False, "compute")])
def test_stored_type(cast: bool, stored: str) -> None:
    assert apply(model(), cast_trainable_params_to_fp32=cast).store_trainable == stored


def test_structure_is_untouched_and_a_quantised_base_refused() -> None:
    target = model()
    before = dict(target.named_parameters())
    change = apply(target)
    assert dict(target.named_parameters()) == before
    assert not (change.rules or change.fresh or change.copies or change.files)
    (plugin,) = peft_config()
    assert plugin.refuses == {"quantized_base"} and build(FreezeConfig()).kind == "weights"
