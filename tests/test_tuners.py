"""Each tuner of PEFT that `peft_config: peft` takes: as PEFT in a loop written by hand, on two ranks as on one, read by
plain PEFT, merged; and a reason for each that it does not take."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from llmtune_tuners import kinds
from llmtune_tuners.edit import TunerStart, inject, tensors_of
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

import llmtune
from llmtune.testing import in_ranks, running, tiny_model_folder
from tests.by_hand import assert_same, train_by_hand
from tests.test_parity import recipe, train_each

TARGETS = {"target_modules": ["q_proj", "down_proj"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "BOFT": {"boft_block_size": 4}, "C3A": {"block_size": 8}, "FOURIERFT": {"n_frequency": 20}, "HIRA": {"r": 4},
    "IA3": {"feedforward_modules": ["down_proj"]}, "MISS": {"r": 4}, "ROAD": {"group_size": 8},
    "WAVEFT": {"n_frequency": 20},
}  # fmt: skip
"""What PEFT's defaults are too large for here, or lack."""
IDS = torch.tensor([[1, *range(20, 60, 3)]])
UNMERGED = {"BEFT": "has no bias, cannot merge"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model_folder(tmp_path_factory.mktemp("model"), initializer_range=0.2))


def block(kind: str) -> dict[str, Any]:
    return {"name": "peft", "tuner": kind, "options": {**TARGETS, **OPTIONS.get(kind, {})}}


def keys_for(kind: str, model: str, data: str, output: Path, **changes: Any) -> dict[str, Any]:
    return recipe(model, data, output, max_steps=2, learning_rate=5e-3, peft_config=block(kind), **changes)


def adapt(kind: str, base: Any, ours: Any) -> Any:
    """PEFT's own model, every trained tensor of which starts from ours; PEFT's own start has the same spread."""
    torch.manual_seed(0)
    starts = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    places = dict(ours.named_buffers())
    adapted = get_peft_model(base, kinds.config_class(kind)(**block(kind)["options"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                start = starts.pop(name.removeprefix("base_model.model.")).detach()
                assert float(parameter.norm()) / 2 <= float(start.norm()) <= 2 * float(parameter.norm())
                parameter.copy_(start)
        for name, buffer in adapted.named_buffers():  # such as the places of the values that train
            buffer.copy_(places[name.removeprefix("base_model.model.")])
    assert not starts
    return adapted


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.float()


@pytest.fixture(scope="module")
def two_ranks(model: str, chats: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two")
    half = {"gradient_accumulation_steps": 1}
    in_ranks(
        2,
        root / "ranks",
        train_each,
        [keys_for(kind, model, chats, root / kind, **half) for kind in sorted(kinds.TRAINS)],
    )
    return root


@pytest.mark.parametrize("kind", sorted(kinds.TRAINS))
def test_a_tuner_trains_as_in_peft(kind: str, model: str, chats: str, two_ranks: Path, tmp_path: Path) -> None:
    keys = keys_for(kind, model, chats, tmp_path / "run")
    built, _ = llmtune.build(dict(keys))
    theirs = adapt(kind, AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), built)
    expected = train_by_hand(keys, theirs, llmtune.plan(keys))
    trained, plan = running.train_and_keep(keys)
    found = [(row["loss"], row["grad_norm"]) for row in trained.metrics]
    assert_same(found, expected)
    assert expected[-1][0] < expected[0][0]
    weights = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters() if p.requires_grad}
    for name, tensor in trained.tensors.items():
        torch.testing.assert_close(tensor, weights[name].detach(), rtol=1e-5, atol=1e-5, msg=name)
    run = llmtune.load(two_ranks / kind)
    assert_same([(row["loss"], row["grad_norm"]) for row in run.metrics if "loss" in row], found)

    answer = logits(plan.model.module)
    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(tmp_path / "run" / "model"))
    torch.testing.assert_close(logits(read), answer, rtol=1e-4, atol=1e-4)
    reopened, _ = llmtune.load(tmp_path / "run").model()
    torch.testing.assert_close(logits(reopened), answer, rtol=1e-5, atol=1e-5)
    (part,) = plan.model.parts.at("peft_config")
    with part.built.disabled(plan.model.module):
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        torch.testing.assert_close(logits(plan.model.module), logits(base), rtol=1e-5, atol=1e-5)
    if kind in UNMERGED:
        with pytest.raises(llmtune.PlanError, match=UNMERGED[kind]):
            part.built.merge(plan.model.module)
        return
    part.built.merge(plan.model.module)
    assert not any("base_layer" in name for name, _ in plan.model.module.named_modules())
    torch.testing.assert_close(logits(plan.model.module), answer, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", sorted(kinds.TRAINS))
def test_the_start_does_not_hang_on_weights_that_come_later(kind: str, model: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config, own = kinds.config_class(kind)(**block(kind)["options"]), tensors_of(base).keys()
    start = TunerStart(copy.deepcopy(base).to("meta"), config)
    torch.manual_seed(0)
    inject(base, copy.deepcopy(config), low_cpu_mem_usage=False)
    new = {name: tensor for name, tensor in tensors_of(base).items() if name.replace(".base_layer", "") not in own}
    assert new
    torch.manual_seed(0)
    for name, tensor in new.items():
        start.fill(name, drawn := torch.empty_like(tensor))
        torch.testing.assert_close(drawn, tensor, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("kind", sorted(kinds.ON_QUANTISED))
def test_on_a_quantised_base_it_is_the_tuner_on_its_rounded_weights(
    kind: str, model: str, chats: str, tmp_path: Path
) -> None:
    keys = keys_for(kind, model, chats, tmp_path, quant_config={"name": "bnb"})
    module, _ = llmtune.build(keys)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear) and hasattr(layer, "dequantize"):
            plain.get_submodule(name.replace(".base_layer", "")).weight.data = layer.dequantize().float()
    starts = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in starts.values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    adapted = get_peft_model(plain, kinds.config_class(kind)(**block(kind)["options"], task_type="CAUSAL_LM"))
    own = {name.removeprefix("base_model.model."): p for name, p in adapted.named_parameters()}
    for name, tensor in starts.items():
        own[name].data.copy_(tensor.detach())
    torch.testing.assert_close(logits(module), logits(adapted), rtol=1e-4, atol=1e-4)


def test_every_tuner_of_peft_is_taken_or_refused_with_a_reason(model: str) -> None:
    installed = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert not kinds.TRAINS & kinds.REFUSED.keys()
    assert installed <= kinds.TRAINS | kinds.REFUSED.keys()
    page = (Path(__file__).parents[1] / "plugins" / "tuners" / "README.md").read_text(encoding="utf-8")
    for kind in installed:
        assert f"| `{kind}` |" in page, f"{kind} is not in the README of llmtune-tuners"
    for kind in installed - kinds.TRAINS:
        with pytest.raises(llmtune.PlanError, match=r"PEFT's \w+ .*(;|and) .*There are: BEFT"):
            kinds.require_trainable(kind)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"peft_config": {"name": "peft", "tuner": "IA4"}}, 'found "IA4", .* Did you mean "IA3"'),
        ({"peft_config": {"name": "peft"}}, "tuner: not given; name a tuner of PEFT"),
        ({"peft_config": {"name": "peft", "tuner": "VeraConfig"}}, "PEFT's VERA shares tensors between layers"),
        ({"peft_config": {"name": "peft", "tuner": "PREFIX_TUNING"}}, "virtual tokens before each text"),
        ({"peft_config": {"name": "peft", "tuner": "HRA", "options": {"rank": 3}}}, "PEFT.s HRA has no such option"),
        (
            {"peft_config": {"name": "peft", "tuner": "HRA", "options": {"target_modules": ["q_projj"]}}},
            'found the target "q_projj", which names nothing in .* linear layers are q_proj, k_proj',
        ),
        ({"peft_config": block("HRA"), "quant_config": "bnb"}, "HRA computes with the weight of a layer"),
        ({"peft_config": {"name": "oft", "oft_rank": 4}}, "oft_rank: found 4 beside oft_block_size 32"),
        ({"peft_config": {"name": "oft", "oft_target": "gate"}}, 'the target "gate", which names nothing'),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_go_is_said(
    changes: dict[str, Any], sentence: str, model: str, chats: str, tmp_path: Path
) -> None:
    with pytest.raises(llmtune.LlmtuneError, match=sentence):
        llmtune.plan(recipe(model, chats, tmp_path, **changes))


@pytest.mark.parametrize("kind", ["HRA", "GLORA"])
def test_an_adapter_of_plain_peft_is_continued_and_used(kind: str, model: str, chats: str, tmp_path: Path) -> None:
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), kinds.config_class(kind)(target_modules=["q_proj"])
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path / "theirs")
    peft = {"name": "peft", "adapter_name_or_path": str(tmp_path / "theirs")}
    keys = recipe(model, chats, tmp_path / "run", max_steps=2, peft_config=peft)
    built, _ = llmtune.build(dict(keys))
    torch.testing.assert_close(logits(built), logits(adapted), rtol=1e-5, atol=1e-5)
    run = llmtune.train(keys)
    for file in (tmp_path / "theirs").iterdir():  # what it went on from is needed no more
        file.unlink()
    opened, _ = run.model()
    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(tmp_path / "run" / "model"))
    torch.testing.assert_close(logits(opened), logits(read), rtol=1e-5, atol=1e-5)
