"""New layers: where they are, what they start as, that they train as the same layers put in by hand, what is saved."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmtune import PlanError, load
from llmtune.testing import running, tiny_model, tiny_recipe

IDS = torch.tensor([[1, *range(20, 60, 3)]])
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {}, "gemma3_text": {"sliding_window": 4}, "phi3": {}, "olmo2": {}, "smollm3": {}, "gpt_neox": {},
    "qwen3_moe": EXPERTS, "gpt_oss": {"num_local_experts": 4},
}  # fmt: skip
"""Biases, layers of two kinds, fused products, norms behind products, lists in the config, experts."""


def pro(layers: int) -> dict[str, Any]:
    return {"peft_config": {"name": "llama_pro", "num_expanded_layers": layers}}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.float()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_expanded_model_begins_as_its_base(family: str, tmp_path: Path) -> None:
    keys = tiny_recipe(tmp_path, family, {"num_hidden_layers": 4, **FAMILIES[family]}, **pro(2))
    plan, _ = running.build(keys)
    base = AutoModelForCausalLM.from_pretrained(keys["model"], dtype=torch.float32)
    assert torch.equal(logits(plan.module), logits(base))
    assert plan.module.config.num_hidden_layers == 6
    trained = {re.findall(r"\.(\d+)\.", name)[0] for name in plan.trainable}
    assert trained == {"2", "5"}
    for one, other in ((2, 1), (5, 4)):  # all but the products that are zero is a copy
        here, there = (dict(plan.module.base_model.layers[number].named_parameters()) for number in (one, other))
        silent = {name for name, tensor in here.items() if not tensor.any() and there[name].any()}
        assert len(silent) >= 2
        assert all(torch.equal(tensor, there[name]) for name, tensor in here.items() if name not in silent)


def by_hand(base: str, folder: Path) -> str:
    """The base with its last layer twice, as the authors' script writes it."""
    source = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    state = source.state_dict()
    last = {name: tensor for name, tensor in state.items() if name.startswith("model.layers.1.")}
    for name, tensor in last.items():
        zero = "o_proj" in name or "down_proj" in name
        state[name.replace("layers.1.", "layers.2.")] = torch.zeros_like(tensor) if zero else tensor.clone()
    made = tiny_model("llama", vocab_size=source.config.vocab_size, num_hidden_layers=3)
    made.load_state_dict(state)
    made.save_pretrained(folder)
    for file in Path(base).glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_bytes((Path(base) / "chat_template.jinja").read_bytes())
    return str(folder)


def test_it_trains_and_is_saved_as_layers_put_in_by_hand(tmp_path: Path) -> None:
    common = {"learning_rate": 0.01, "packing": True, "save_steps": 2}
    ours = tiny_recipe(tmp_path, output_dir=str(tmp_path / "ours"), **common, **pro(1))
    model = by_hand(ours["model"], tmp_path / "hand")
    theirs = {
        **ours, "model": model, "output_dir": str(tmp_path / "theirs"),
        "peft_config": {"name": "freeze", "freeze_trainable_layers": 1},
    }  # fmt: skip
    mine, hand = running.train(ours), running.train(theirs)
    assert [row["loss"] for row in mine.metrics] == [row["loss"] for row in hand.metrics]
    assert mine.metrics[-1]["loss"] < mine.metrics[0]["loss"]
    assert mine.tensors.keys() == hand.tensors.keys()
    assert all(torch.equal(tensor, hand.tensors[name]) for name, tensor in mine.tensors.items())

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "ours" / "model", dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs" / "model", dtype=torch.float32)
    assert saved.config.num_hidden_layers == 3
    assert torch.equal(logits(saved), logits(expected))
    # The cache has a place for each layer: answers with it are those without.
    cached, plain = (
        saved.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=use, pad_token_id=0) for use in (True, False)
    )
    assert torch.equal(cached, plain)
    reopened, _ = load(tmp_path / "ours").model()
    assert torch.equal(logits(reopened), logits(saved))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (pro(3), "num_expanded_layers: found 3, but the model has 2 layers; give at most 2"),
        ({**pro(1), "quant_config": "bnb"}, "llama_pro cannot be used with quant_config bnb"),
    ],
    ids=["too many", "quantised"],
)
def test_what_cannot_be_expanded_is_refused(keys: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=sentence):
        running.plan(tiny_recipe(tmp_path, **keys))


def test_layers_that_depend_on_their_number_are_refused(tmp_path: Path) -> None:
    uneven = {**EXPERTS, "num_hidden_layers": 4, "decoder_sparse_step": 2}  # every second layer has experts
    keys = tiny_recipe(tmp_path, "qwen3_moe", uneven, **pro(2))
    with pytest.raises(PlanError, match="builds model.layers.2 otherwise than layer 1"):
        running.plan(keys)
    listed = tiny_recipe(tmp_path / "listed", "qwen3_moe", {**EXPERTS, "mlp_only_layers": [1]}, **pro(2))
    assert running.plan(listed).model.module.config.mlp_only_layers == [2, 3]
    with pytest.raises(PlanError, match="holds ln_1, which may add"):
        running.plan(tiny_recipe(tmp_path / "gpt2", "gpt2", **pro(1)))
    with pytest.raises(PlanError, match="has input_residual, by which it changes its input"):
        running.plan(tiny_recipe(tmp_path / "doge", "doge", **pro(1)))
