"""What an optimiser is told of its parameters: roles, rates, decay; and factories of an earlier llmtune."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llmtune import ModelEdit, PlanError, PluginError
from llmtune.model.edits import Ledger
from llmtune.model.parameter_groups import group_parameters, optimizer_context, parameter_roles
from llmtune.testing import create_for, tiny_model, tiny_recipe
from llmtune.testing.running import plan


def test_roles_of_a_model() -> None:
    model = tiny_model("qwen2")
    roles = parameter_roles(model, {})
    found = {
        role: {name.removeprefix("model.layers.0.") for name in roles if roles[name] == role} for role in roles.values()
    }
    assert found["embedding"] == {"model.embed_tokens.weight"}
    assert found["head"] == {"lm_head.weight"}
    assert {"input_layernorm.weight", "model.norm.weight"} <= found["norm"]
    assert {"self_attn.q_proj.bias", "self_attn.v_proj.bias"} <= found["bias"]
    assert {"self_attn.q_proj.weight", "mlp.down_proj.weight"} <= found["matrix"]


def test_a_tied_head_is_an_embedding() -> None:
    roles = parameter_roles(tiny_model("llama", tie_word_embeddings=True), {})
    assert roles["model.embed_tokens.weight"] == "embedding"
    assert "head" not in roles.values()


def test_roles_of_adapters(tmp_path: Path) -> None:
    made = plan(tiny_recipe(tmp_path, peft_config={"name": "lora", "use_dora": True}, kernel_config="auto")).model
    roles = parameter_roles(made.module, made.ledger.roles)
    trained = {name: roles[name] for name in made.trainable}
    assert {role for name, role in trained.items() if ".lora_A." in name} == {"adapter_a"}
    assert {role for name, role in trained.items() if ".lora_B." in name} == {"adapter_b"}
    assert {role for name, role in trained.items() if "magnitude" in name} == {"norm"}


def test_facts_of_a_model() -> None:
    context = optimizer_context(tiny_model("llama"), 0.1, 7)
    assert (context.hidden_size, context.heads, context.key_value_heads, context.head_size) == (32, 4, 2, 8)
    assert context.layers == ["model.layers.0", "model.layers.1"]
    assert (context.learning_rate, context.seed) == (0.1, 7)


def test_layers_of_a_tower_are_no_text_layers_and_its_patches_no_matrix() -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **small)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(vocab_size=64, **small))
    )
    context = optimizer_context(model, 0.1, 7)
    assert context.text_layers == ["model.language_model.layers.0"]
    assert set(context.layers) == {*context.text_layers, "model.vision_tower.encoder.layers.0"}
    roles = parameter_roles(model, {})
    assert [name for name in roles if roles[name] == "convolution"] == [
        "model.vision_tower.embeddings.patch_embedding.weight"
    ]


def test_groups_have_one_role_and_one_rate_and_the_recipes_rate_is_first() -> None:
    named = [(name, nn.Parameter(torch.ones(shape))) for name, shape in (("a", (2, 2)), ("b", (2, 2)), ("c", (2,)))]
    groups = group_parameters(named, {"a": "adapter_a", "b": "adapter_b", "c": "bias"}, {"a": 4.0}, 0.5)
    assert [(g.role, g.lr, g.lr_factor, g.decays) for g in groups] == [
        ("adapter_b", 0.5, 1.0, True), ("bias", 0.5, 1.0, False), ("adapter_a", 2.0, 4.0, True),
    ]  # fmt: skip
    assert [name for g in groups for name, _ in g.parameters] == ["b", "c", "a"]


class Moves:
    """An edit that asks for rates, and one that wraps what it asked them for."""

    def __init__(self, wraps: bool) -> None:
        self.wraps = wraps

    def apply(self, model, context):
        if self.wraps:
            model.first = nn.Sequential(model.first)
            return ModelEdit()
        return ModelEdit(roles={"first.weight": "adapter_b"}, lr_factor=lambda name: 3.0 if "first" in name else 1.0)


def test_what_an_edit_says_follows_its_tensors() -> None:
    model = nn.Module()
    model.first, model.second = nn.Linear(2, 2), nn.Linear(2, 2)
    ledger = Ledger(model)
    for wraps in (False, True):
        ledger.apply("moves", Moves(wraps), None)  # type: ignore[arg-type]
    assert ledger.roles == {"first.0.weight": "adapter_b"}
    assert ledger.lr_factors == {"first.0.weight": 3.0, "first.0.bias": 3.0}


class Former:
    """A factory of the contract's first version."""

    def create(self, decay, no_decay, lr):
        self.given = ([name for name, _ in decay], [name for name, _ in no_decay], lr)
        return torch.optim.SGD([parameter for _, parameter in (*decay, *no_decay)], lr=lr)


def test_a_factory_of_an_earlier_version_gets_its_two_lists() -> None:
    named = [("w", nn.Parameter(torch.ones(2, 2))), ("b", nn.Parameter(torch.ones(2)))]
    factory = Former()
    optimizer = create_for(factory, named, 0.3)  # type: ignore[arg-type]
    assert factory.given == (["w"], ["b"], 0.3)
    assert optimizer.param_groups[0]["initial_lr"] == 0.3
    with pytest.raises(PlanError, match="one rate for all, and peft_config asks for 4 times the learning rate for w"):
        create_for(factory, named, 0.3, lr_factors={"w": 4.0})  # type: ignore[arg-type]


def test_any_other_signature_is_named() -> None:
    class Odd:
        def create(self, parameters):
            return None

    with pytest.raises(PluginError, match=r"create\(parameters\) of the optimiser has to be create\(groups, context\)"):
        create_for(Odd(), [("w", nn.Parameter(torch.ones(2, 2)))])  # type: ignore[arg-type]
