"""Plugins: every block is checked strictly, records are plain values, runs in one process do not touch each other."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.recipe.blocks import decode_block
from llmtune.recipe.recipe import load_recipe
from llmtune.recipe.registry import Registry
from tests.guards import one_step, start
from tests.runs import recipe

USABLE = [row for row in Registry().listing() if row.state == "ok" and all(met for _, met in row.requires)]
NAMED = sorted({(row.point, row.name) for row in USABLE if row.point != "observe"})


def problems(point: str, block: dict[str, Any]) -> list[str]:
    """What is wrong with a block that names a plugin."""
    found = load_recipe({"model": "m", point: block})
    plugin = Registry().find(point, block["name"]).plugin
    return [str(error) for error in decode_block(found.blocks, found.places, point, 0, plugin.config)[1]]


REQUIRED: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1}, "warmup_stable_decay": {"num_decay_steps": 3},
    "endpoint": {"url": "http://localhost:1"}, "function": {"function": "math:floor"}, "model": {"reward_model": "m"},
    "peft": {"tuner": "IA3"}, "benchmark": {"task": "tiny"},
}  # fmt: skip
"""What plugins cannot do without."""


@pytest.mark.parametrize(("point", "name"), NAMED)
def test_every_plugins_block_is_strict(point: str, name: str) -> None:
    """An unknown key, and for every known one a value of no allowed type, are named; nothing is ignored."""
    block = {"name": name, **REQUIRED.get(name, {})}
    assert problems(point, block) == []
    (said,) = problems(point, {**block, "nonexistent": 1})
    assert f"{point}.nonexistent: no such key" in said
    config = Registry().find(point, name).plugin.config
    for field in dataclasses.fields(config):
        if "Any" in str(field.type) or not field.init:
            continue
        said = "; ".join(problems(point, {**block, field.name: {"not": {"a": "value"}}}))
        assert f"{point}.{field.name}" in said, field.name


@pytest.mark.parametrize(
    ("point", "block", "said"),
    [
        ("quant_config", {"name": "bnb", "quantization_type": "nf5"}, 'found "nf5", allowed is one of'),
        ("quant_config", {"name": "bnb", "quantization_bit": 3}, "found 3, allowed is one of"),
        ("quant_config", {"name": "bnb", "double_quantization": "no way"}, "allowed is true or false"),
        ("peft_config", {"name": "lora", "r": 8.5}, "found 8.5, allowed is a whole number"),
        ("peft_config", {"name": "lora", "lora_droput": 0.1}, 'Did you mean "lora_dropout"'),
        ("kernel_config", {"name": "auto", "include_kernel": "x"}, 'Did you mean "include_kernels"'),
        ("optim_config", {"name": "adamw", "betas": [0.9]}, "optim_config.betas"),
        ("dist_config", {"name": "fsdp2", "reshard_after_foward": True}, 'Did you mean "reshard_after_forward"'),
    ],
)
def test_values_and_misspellings_get_a_sentence(point: str, block: dict[str, Any], said: str) -> None:
    assert said in "; ".join(problems(point, block))


@pytest.mark.parametrize(("point", "name"), NAMED)
def test_what_a_plugin_offers_is_a_plain_value(point: str, name: str) -> None:
    """It can be asked for names it lacks, copied and compared; it stands for itself and delegates to nothing."""
    offer = Registry().find(point, name)
    assert not hasattr(offer.plugin, "nonexistent")
    assert copy.copy(offer.plugin) == offer.plugin == copy.deepcopy(offer.plugin)
    config = offer.plugin.config(**REQUIRED.get(name, {}))
    assert copy.copy(config) == config == pickle.loads(pickle.dumps(config))


def gradients(training: Any) -> list[torch.Tensor]:
    training.optimizer.zero_grad()
    one_step(training)
    return [weight.grad.clone() for weight in training.parameters]


def test_two_runs_in_one_process_do_not_touch_each_other(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    """Another precision, base, kernel and packing, step by step in turn with the first run."""
    keys = recipe(tiny_llama, chats, tmp_path / "one", gradient_accumulation_steps=1)
    _, first = start(keys)
    expected = gradients(first)
    other = {"packing": True, "kernel_config": "auto", "quant_config": "bnb", "bf16": True}
    _, second = start({**keys, **other, "output_dir": str(tmp_path / "two")})
    alone = gradients(second)
    for _ in range(2):
        for training, wanted in ((first, expected), (second, alone)):
            assert all(torch.equal(a, b) for a, b in zip(gradients(training), wanted, strict=True))
    _, again = start(keys)
    assert all(torch.equal(a, b) for a, b in zip(gradients(again), expected, strict=True))


def test_an_impossible_pair_is_found_by_the_plan(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    """By what plugins say of themselves, before a weight is read: both sides are named."""
    keys = recipe(tiny_llama, chats, tmp_path / "run", quant_config="bnb", peft_config="freeze")
    with pytest.raises(llmtune.LlmtuneError, match="freeze cannot be used with quant_config bnb"):
        llmtune.plan(keys)
    assert not (tmp_path / "run").exists()


def fails(*_: Any, **__: Any) -> None:
    raise ValueError("no such luck")


@pytest.mark.parametrize(
    ("point", "block", "where", "doing"),
    [
        ("init_config", "init_on_meta", "llmtune_init.ways.OnMeta.fetch", "fetch of "),
        ("dist_config", {"name": "fsdp2", "offload_params": True}, "llmtune.distributed.fsdp2.Fsdp2.apply", "apply"),
    ],
)
def test_an_error_while_a_model_is_built_carries_the_plugins_name(
    point: str, block: Any, where: str, doing: str, tiny_llama: str, chats: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(where, fails)
    with pytest.raises(llmtune.PluginError, match=rf"^{point}: .* failed in {doing}.*: ValueError: no such luck"):
        llmtune.train(recipe(tiny_llama, chats, tmp_path / "run", **{point: block}))


@pytest.mark.parametrize(
    ("where", "note"),
    [
        ("llmtune_sft.NextToken.loss", "raised within loss of stage_config: "),
        ("torch.optim.AdamW.step", "raised within step of optim_config: "),
    ],
)
def test_an_error_within_a_step_keeps_its_type_and_carries_the_plugins_name(
    where: str, note: str, tiny_llama: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cause may be the model: whoever mends it needs the traceback."""
    monkeypatch.setattr(where, fails)
    with pytest.raises(ValueError, match="no such luck") as caught:
        llmtune.train(recipe(tiny_llama, chats, tmp_path / "run"))
    (said,) = caught.value.__notes__
    assert said.startswith(note)
    assert said in json.loads((tmp_path / "run" / "run.json").read_text())["error"]
