"""The laws of editing: no weight is lost, none invented, none materialised early, and one decides what trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmtune.contract.errors import EditError
from llmtune.contract.records import ModelEdit, RunContext
from llmtune.model.edits import Ledger, named_tensors, set_trainable
from llmtune.model.skeleton import build_skeleton
from tests.tiny import tiny_config

SITUATION = RunContext(
    mode="train",
    device="cpu",
    ranks=1,
    compute_dtype=torch.float32,
    trainable_dtype=torch.float32,
    gather_dtype=torch.float32,
)


def skeleton() -> Any:
    from transformers import AutoModelForCausalLM

    return build_skeleton(AutoModelForCausalLM, tiny_config(tie_word_embeddings=True), torch.float32, None)


class Edit:
    def __init__(self, work: Callable[[Any], ModelEdit]) -> None:
        self.work = work

    def apply(self, model: Any, context: RunContext) -> ModelEdit:
        return self.work(model)


class Wrapped(nn.Module):
    """Holds the module it replaces, as PEFT does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Rule:
    source = "model.norm.weight"
    targets = ("model.norm.packed",)

    def convert(self, source: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"model.norm.packed": source * 2}

    def restore(self, targets: dict[str, torch.Tensor]) -> torch.Tensor:
        return targets["model.norm.packed"] / 2

    def convert_part(self, part: Any) -> None:
        return None


def pack_norm(model: Any, rules: tuple[Any, ...]) -> ModelEdit:
    packed = nn.Module()
    packed.packed = nn.Parameter(torch.empty(32, device="meta"), requires_grad=False)
    model.model.norm = packed
    return ModelEdit(rules=rules)


def test_a_wrapped_module_is_followed_by_identity() -> None:
    model = skeleton()
    ledger = Ledger(model)

    def wrap(model: Any) -> ModelEdit:
        model.lm_head = Wrapped(model.lm_head)
        model.model.layers[0].mlp = Wrapped(model.model.layers[0].mlp)
        return ModelEdit()

    ledger.apply("wrap", Edit(wrap), SITUATION)
    assert ledger.direct["lm_head.weight"] == "lm_head.inner.weight"
    assert ledger.direct["model.embed_tokens.weight"] == "model.embed_tokens.weight"
    assert ledger.direct["model.layers.0.mlp.up_proj.weight"] == "model.layers.0.mlp.inner.up_proj.weight"


def test_a_rule_is_followed_through_later_edits() -> None:
    model = skeleton()
    ledger = Ledger(model)
    ledger.apply("pack", Edit(lambda model: pack_norm(model, (Rule(),))), SITUATION)

    def wrap(model: Any) -> ModelEdit:
        model.model.norm = Wrapped(model.model.norm)
        return ModelEdit()

    ledger.apply("wrap", Edit(wrap), SITUATION)
    assert ledger.rules["model.norm.weight"].where == {"model.norm.packed": "model.norm.inner.packed"}
    assert "model.norm.weight" not in ledger.direct


def test_losing_a_weight_is_an_error_naming_plugin_and_weight() -> None:
    with pytest.raises(EditError, match=r"plugin pack removed model\.norm\.weight and gave no rule"):
        Ledger(skeleton()).apply("pack", Edit(lambda model: pack_norm(model, ())), SITUATION)


def test_a_new_weight_without_a_source_is_an_error() -> None:
    def add(model: Any) -> ModelEdit:
        model.extra = nn.Parameter(torch.empty(3, device="meta"))
        return ModelEdit()

    with pytest.raises(EditError, match="plugin adder added extra and said neither how to load nor how to initialise"):
        Ledger(skeleton()).apply("adder", Edit(add), SITUATION)


def test_materialising_early_is_an_error() -> None:
    def add(model: Any) -> ModelEdit:
        model.extra = nn.Parameter(torch.zeros(3))
        return ModelEdit(fresh={"extra": nn.init.ones_})

    with pytest.raises(EditError, match="plugin adder materialised extra"):
        Ledger(skeleton()).apply("adder", Edit(add), SITUATION)


def test_reporting_what_is_not_there_is_an_error() -> None:
    with pytest.raises(EditError, match="plugin liar reported ghost, which the model does not have"):
        Ledger(skeleton()).apply("liar", Edit(lambda model: ModelEdit(fresh={"ghost": nn.init.ones_})), SITUATION)


def with_head(model: Any, **more: Any) -> ModelEdit:
    model.extra = nn.Linear(8, 1, device="meta")
    return ModelEdit(aside=frozenset({"extra.weight", "extra.bias"}), **more)


def test_what_is_set_aside_trains_whatever_else_does_and_is_no_original() -> None:
    ledger = Ledger(skeleton())
    ledger.apply("freeze", Edit(lambda model: ModelEdit(trainable=lambda name: name == "model.norm.weight")), SITUATION)
    fresh = {"extra.weight": torch.zero_, "extra.bias": torch.zero_}
    ledger.apply("ppo", Edit(lambda model: with_head(model, fresh=fresh)), SITUATION)
    assert set(set_trainable(ledger.model, ledger, torch.float32)) == {"model.norm.weight", *fresh}
    assert not set(fresh) & (set(ledger.direct) | set(ledger.direct.values()))


def test_setting_aside_what_has_no_values_is_an_error() -> None:
    with pytest.raises(EditError, match="added extra.weight.*said neither how to load"):
        Ledger(skeleton()).apply("ppo", Edit(with_head), SITUATION)
    with pytest.raises(EditError, match="sets model.norm.weight aside and did not say how to initialise"):
        aside = ModelEdit(aside=frozenset({"model.norm.weight"}))
        Ledger(skeleton()).apply("ppo", Edit(lambda model: aside), SITUATION)


def test_two_plugins_cannot_both_decide_what_trains() -> None:
    ledger = Ledger(skeleton())
    ledger.apply("one", Edit(lambda model: ModelEdit(trainable=lambda name: True)), SITUATION)
    with pytest.raises(EditError, match="both one and two decide which parameters train"):
        ledger.apply("two", Edit(lambda model: ModelEdit(trainable=lambda name: True)), SITUATION)


def test_trainable_parameters_are_stored_in_their_own_type_and_keep_their_ties() -> None:
    from transformers import AutoModelForCausalLM

    model = build_skeleton(AutoModelForCausalLM, tiny_config(tie_word_embeddings=True), torch.bfloat16, None)
    ledger = Ledger(model)
    ledger.apply("head", Edit(lambda model: ModelEdit(trainable=lambda name: "embed" in name)), SITUATION)
    assert set_trainable(model, ledger, torch.float32) == ["model.embed_tokens.weight"]
    tensors = named_tensors(model)
    assert tensors["lm_head.weight"] is tensors["model.embed_tokens.weight"]
    assert tensors["lm_head.weight"].dtype == torch.float32
    assert tensors["model.norm.weight"].dtype == torch.bfloat16
    assert not tensors["model.norm.weight"].requires_grad


def test_training_nothing_is_an_error() -> None:
    ledger = Ledger(skeleton())
    ledger.apply("none", Edit(lambda model: ModelEdit(trainable=lambda name: False)), SITUATION)
    with pytest.raises(EditError, match="nothing would train"):
        set_trainable(ledger.model, ledger, torch.float32)


class Halved:
    """A weight rule: half of the weight goes into a tensor of its own."""

    source = "model.norm.weight"
    targets = ("model.other_half",)
    new = True
    files = (Path("half.safetensors"),)

    def convert(self, weight: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return weight / 2, {"model.other_half": weight / 2}


def halve(model: Any) -> ModelEdit:
    model.model.other_half = nn.Parameter(torch.empty(32, device="meta"))
    return ModelEdit(weight_rules=[Halved()])


def test_a_weight_rule_comes_before_the_rule_that_packs_the_weight() -> None:
    model = skeleton()
    ledger = Ledger(model)
    packing = Rule()
    packing.targets = ("model.norm.weight",)

    def pack_in_place(model: Any) -> ModelEdit:
        model.model.norm.weight = nn.Parameter(torch.empty(32, device="meta"), requires_grad=False)
        return ModelEdit(rules=[packing])

    ledger.apply("pack", Edit(pack_in_place), SITUATION)
    ledger.apply("halve", Edit(halve), SITUATION)
    (early,) = ledger.weight_rules["model.norm.weight"]
    assert early.where == {"model.other_half": "model.other_half"} and "model.norm.weight" in ledger.rules
    assert ledger.read_files() == {Path("half.safetensors")}


def test_a_weight_rule_needs_a_weight_of_the_original_model() -> None:
    model = skeleton()
    ledger = Ledger(model)
    ledger.apply("pack", Edit(lambda model: pack_norm(model, (Rule(),))), SITUATION)
    with pytest.raises(EditError, match=r"plugin halve gave a weight rule for model\.norm\.weight, which is not"):
        ledger.apply("halve", Edit(halve), SITUATION)
