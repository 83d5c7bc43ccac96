"""Single keys of the model and of memory: each does what it says, against transformers or arithmetic written out."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import llmtune
from llmtune import PlanError, RecipeError
from llmtune.inference.reopen import open_model
from llmtune.model.shifted_attention import shifted_attention
from llmtune.recipe.recipe import load_recipe
from llmtune.testing.tiny import tiny_preferences
from tests.by_hand import encoded, mean_loss
from tests.runs import LORA, recipe, stored_types
from tests.spawn import in_ranks
from tests.tiny import tiny_model_folder


def numbers(run: llmtune.Run) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in run.metrics if "grad_norm" in row]


# ---- offload_activations -------------------------------------------------------------------------------------------


def test_offloaded_inputs_leave_the_device_and_change_no_number(
    chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmtune.distributed import activation_checkpointing as offloading

    held: list[weakref.ref[torch.Tensor]] = []
    copying, copying_back = offloading._to_host, offloading._back
    copied, alive = [], []

    def spy(tensor: torch.Tensor) -> Any:
        if tensor.numel() and tensor.is_floating_point():
            copied.append(tuple(tensor.shape[2:]))
            held.append(weakref.ref(tensor.untyped_storage()))
        return copying(tensor)

    def spy_back(kept: Any) -> torch.Tensor:
        if kept[1].numel():
            alive.append(sum(storage() is not None for storage in held[-6:]))
        return copying_back(kept)

    monkeypatch.setattr(offloading, "_to_host", spy)
    monkeypatch.setattr(offloading, "_back", spy_back)
    keys = {"max_steps": 2, "per_device_train_batch_size": 2, "peft_config": LORA}
    model = str(tiny_model_folder(tmp_path, num_hidden_layers=6))
    runs = [
        llmtune.train(recipe(model, chats, tmp_path / name, **keys, **more))
        for name, more in {
            "host": {"offload_activations": True}, "full": {"activation_checkpointing": "full"},
            "none": {"activation_checkpointing": "none"},
        }.items()
    ]  # fmt: skip
    assert numbers(runs[0]) == numbers(runs[1]) == numbers(runs[2])
    assert copied == [(32,)] * (6 * 2 * 2)  # layers, micro-batches, steps: the hidden states alone
    assert len(alive) == len(copied) and max(alive) <= 2  # inputs of six layers that are still the device's


def test_offloading_is_planned_and_combined_where_it_can_be(chats: str, tmp_path: Path) -> None:
    model = str(tiny_model_folder(tmp_path, num_hidden_layers=8))
    keys = recipe(model, chats, tmp_path / "run", per_device_train_batch_size=8)
    full, host = (
        llmtune.plan({**keys, "activation_checkpointing": "full", "offload_activations": on}, device="24GB", ranks=1)
        for on in (False, True)
    )
    assert "activation checkpointing full, kept in host memory" in str(host)
    for less, more in ((host.cost.quick, full.cost.quick), (host.cost.traced, full.cost.traced)):
        assert less is not None and more is not None, host.cost.untraced
        assert less.most.host > more.most.host == 0, less
        assert more.most.activations - less.most.activations == pytest.approx(less.most.host, rel=0.3)
    with pytest.raises(RecipeError, match="offload_activations: found true beside activation checkpointing none"):
        load_recipe({**keys, "offload_activations": True, "disable_gradient_checkpointing": True})


# ---- shift_attn ----------------------------------------------------------------------------------------------------


def by_mask(group: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The same with a mask over all positions for each head."""
    length, heads = query.shape[2], query.shape[1]
    at = torch.arange(length)
    causal, masks = at[:, None] >= at, []
    for head in range(heads):
        groups = (at + (group // 2 if head >= heads // 2 else 0)) // group
        masks.append(causal & (groups[:, None] == groups))
    key, value = (each.repeat_interleave(heads // each.shape[1], 1) for each in (key, value))
    scores = (query @ key.transpose(2, 3)) * 0.3
    return (scores.masked_fill(~torch.stack(masks), -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("length", [5, 8, 16, 23, 40])
def test_heads_attend_within_groups_and_shifted_groups(length: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, length, 6) for heads in (4, 2, 2))
    module = torch.nn.Module().train()
    found, _ = shifted_attention(8, module, query, key, value, None, scaling=0.3, dropout=0.0)
    torch.testing.assert_close(found, by_mask(8, query, key, value))


def test_shifted_attention_trains_alike_however_rows_are_batched(
    tiny_llama: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"shift_attn": True, "cutoff_len": 64, "max_steps": 3, "eval_dataset": chats, "eval_strategy": "steps"}
    made = [
        llmtune.train(
            recipe(tiny_llama, chats, tmp_path / str(rows), **keys, eval_steps=3, per_device_train_batch_size=rows,
                   gradient_accumulation_steps=8 // rows, peft_config=None, learning_rate=1e-3)
        )
        for rows in (8, 2)
    ]  # fmt: skip
    torch.testing.assert_close(torch.tensor(numbers(made[0])), torch.tensor(numbers(made[1])), rtol=1e-4, atol=1e-5)
    keys["shift_attn"] = False
    plain = llmtune.train(recipe(tiny_llama, chats, tmp_path / "plain", **keys, eval_steps=3, peft_config=None))
    assert abs(plain.metrics[0]["loss"] - made[0].metrics[0]["loss"]) > 1e-5
    # Used, the model attends to everything.
    ids = torch.arange(3, 60)[None]
    theirs = AutoModelForCausalLM.from_pretrained(made[0].output_dir / "model")
    with torch.no_grad():
        torch.testing.assert_close(made[0].model()[0](input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_shifted_attention_is_refused_where_it_would_be_wrong(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    preferences = str(tiny_preferences(tmp_path))

    def objection(model: str = tiny_llama, data: str = chats, nproc: int = 1, **keys: Any) -> str:
        with pytest.raises(PlanError) as caught:
            llmtune.plan(recipe(model, data, tmp_path / "run", shift_attn=True, **keys), nproc=nproc)
        return str(caught.value)

    assert "shift_attn: groups would run across the samples of a packed row" in objection(packing=True)
    assert "remove tp_size and cp_size" in objection(nproc=2, dist_config={"name": "fsdp2", "tp_size": 2})
    assert "train sft" in objection(data=preferences, stage_config="dpo")
    gemma = str(tiny_model_folder(tmp_path, "gemma2"))
    assert "Gemma2ForCausalLM attends in a way of its own (attn_logit_softcapping, sliding" in objection(gemma)


# ---- rope_scaling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "llama3"])
def test_positions_are_stretched_to_the_cutoff(name: str, tiny_llama: str, chats: str, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, max_position_embeddings=48)
    keys = recipe(str(folder), chats, tmp_path / "run", rope_scaling=name, cutoff_len=120, max_steps=1)
    run = llmtune.train(keys)
    config = AutoConfig.from_pretrained(folder)
    extra = {"yarn": {"original_max_position_embeddings": 48}, "linear": {}, "dynamic": {}, "llama3": {
        "original_max_position_embeddings": 48, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    }}[name]  # fmt: skip
    config.rope_parameters = {**config.rope_parameters, "rope_type": name, "factor": 3.0, **extra}
    if name != "dynamic":
        config.max_position_embeddings = 144
    theirs, ours = AutoModelForCausalLM.from_config(config).model.rotary_emb, run.model()[0].model.rotary_emb
    assert torch.equal(theirs.inv_freq, ours.inv_freq) and theirs.attention_scaling == ours.attention_scaling
    plan = llmtune.plan({**keys, "model": tiny_llama})
    assert plan.model.module.config.rope_parameters["rope_type"] == "default"
    assert "rope_scaling: nothing is stretched, as cutoff_len 120 is within the positions" in str(plan)
    whole = llmtune.train({**keys, "peft_config": None, "output_dir": str(tmp_path / "whole")})  # its files say it
    assert torch.equal(whole.model()[0].model.rotary_emb.inv_freq, theirs.inv_freq)
    scaled = open_model(folder, rope_scaling=name)[0].config.rope_parameters
    assert scaled["factor"] == 2.0  # no data whose length would say more


# ---- the others ----------------------------------------------------------------------------------------------------


def test_norms_are_kept_in_float32(chats: str, tmp_path: Path) -> None:
    made = tiny_model_folder(tmp_path)
    weights = load_file(made / "model.safetensors")
    for name in (name for name in weights if "norm" in name):  # no value of which is one of bfloat16
        weights[name] = 1 + 0.5 * torch.rand(weights[name].shape, generator=torch.Generator().manual_seed(1))
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    model = str(made)
    keys = recipe(model, chats, tmp_path / "run", bf16=True, upcast_layernorm=True)
    types = {
        name: parameter.dtype for name, parameter in llmtune.build(keys)[0].named_parameters() if "lora" not in name
    }
    assert {name for name, kept in types.items() if kept == torch.float32} == {name for name in types if "norm" in name}
    assert len([name for name in types if "norm" in name]) == 5
    frozen = {"peft_config": {"name": "freeze", "freeze_trainable_layers": 1}, "max_steps": 1}
    upcast, plain = (
        llmtune.train({**keys, **frozen, "output_dir": str(tmp_path / str(on)), "upcast_layernorm": on})
        for on in (True, False)
    )
    # The first loss is that of norms in float32 beside bfloat16, by hand; with the norms rounded it is another.
    by_hand = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    for name, parameter in by_hand.named_parameters():
        if "norm" in name:
            parameter.data = exact[name]
    plan, rows = llmtune.plan(keys), encoded(model, Path(chats).read_text())
    batch = [rows[row] for unit in plan.data.batches.order.step_units(0) for row in plan.data.batches.units[unit]]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = float(mean_loss(by_hand, batch, plan.model.tokenizer.pad_token_id))
    far = abs(numbers(plain)[0][0] - expected)
    assert abs(numbers(upcast)[0][0] - expected) < far / 5 and far > 3e-5, (numbers(upcast), numbers(plain), expected)
    assert stored_types(upcast.output_dir / "model") == {"torch.bfloat16"}  # the type that the run was asked for
    with pytest.raises(PlanError, match="upcast_layernorm: pure_bf16 computes all in one type"):
        llmtune.plan({**keys, "bf16": None, "pure_bf16": True})


def test_logits_are_float32_before_the_loss(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    """What `upcast_lmhead_output` asks for happens with either value."""
    keys = recipe(tiny_llama, chats, tmp_path / "run", bf16=True, max_steps=1)
    found = [numbers(llmtune.train({**keys, "output_dir": str(tmp_path / str(on)), "upcast_lmhead_output": on}))
             for on in (True, False)]  # fmt: skip
    assert found[0] == found[1]


def test_training_from_scratch_starts_as_transformers_does(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    bare = tiny_model_folder(tmp_path)
    (bare / "model.safetensors").unlink()  # its config and tokenizer are enough
    keys = recipe(
        str(bare), chats, tmp_path / "run", train_from_scratch=True, seed=5, cache_dir=str(tmp_path / "cache"),
        peft_config=None, max_steps=1, learning_rate=1e-9,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(bare), dtype=torch.float32)
    assert "Its weights start from random numbers." in str(llmtune.plan(keys))
    run = llmtune.train(keys)
    for name, tensor in run.model()[0].state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], atol=1e-6, rtol=0)
    learnt = llmtune.train({**keys, "learning_rate": 1e-2, "output_dir": str(tmp_path / "learnt")}).model()[0]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "learnt" / "model").state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in learnt.state_dict().items())
    assert not torch.allclose(saved["lm_head.weight"], expected.lm_head.weight, atol=1e-4)
    assert len(list((tmp_path / "cache" / "scratch").glob("llama-5-*"))) == 1
    adapted = {**keys, "peft_config": LORA, "output_dir": str(tmp_path / "lora"), "learning_rate": 1e-2}
    adapter = llmtune.train(adapted)
    again = adapter.export(tmp_path / "merged", infer_dtype="float32")  # on the same random base
    with torch.no_grad():
        ids = torch.arange(3, 30)[None]
        theirs = AutoModelForCausalLM.from_pretrained(again)(input_ids=ids).logits
        torch.testing.assert_close(theirs, adapter.model()[0](input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    other = llmtune.build({**keys, "seed": 6})[0].state_dict()
    assert not torch.equal(other["lm_head.weight"], expected.state_dict()["lm_head.weight"])


def test_parameters_are_listed(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    plan = llmtune.plan(recipe(tiny_llama, chats, tmp_path / "run", bf16=True, print_param_status=True))
    lines = [line.split() for line in str(plan).splitlines()]
    assert ["model.layers.0.self_attn.q_proj.lora_A.default.weight", "float32", "trains", "4", "x", "32"] in lines
    assert ["model.norm.weight", "bfloat16", "frozen", "32"] in lines


def train_all(recipes: list[dict[str, Any]]) -> None:
    for keys in recipes:
        llmtune.train(keys)


def test_two_ranks_take_the_same_options(chats: str, tmp_path: Path) -> None:
    """Random weights, norms in float32, inputs of layers in host memory and shifted attention, together."""
    bare = tiny_model_folder(tmp_path)
    (bare / "model.safetensors").unlink()
    keys: dict[str, Any] = {
        "max_steps": 3, "train_from_scratch": 3, "cache_dir": str(tmp_path / "cache"), "offload_activations": True,
        "shift_attn": True, "cutoff_len": 64, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    bf16 = {**keys, "bf16": True, "upcast_layernorm": True, "peft_config": {**LORA, "lora_dropout": 0.0}}
    kinds: dict[str, dict[str, Any]] = {"float32": {**keys, "peft_config": None}, "bfloat16": bf16}
    for name, more in kinds.items():
        llmtune.train(recipe(str(bare), chats, tmp_path / f"one {name}", **{**more, "per_device_train_batch_size": 8}))
    two = [recipe(str(bare), chats, tmp_path / f"two {name}", **more) for name, more in kinds.items()]
    in_ranks(2, tmp_path / "ranks", train_all, two)
    for name, exact in (("float32", 1e-5), ("bfloat16", 2e-2)):
        one, other = (numbers(llmtune.load(tmp_path / f"{count} {name}")) for count in ("one", "two"))
        assert other == [pytest.approx(row, rel=exact) for row in one], name
