"""What `llmtune plan` says of memory and FLOPs, against what steps really take."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.contract.errors import PlanError
from llmtune.cost.advice import replan
from llmtune.cost.flops import count
from llmtune.planning.devices import GIB, describe
from llmtune.planning.memory import CATEGORIES, Memory
from llmtune.recipe.registry import Registry
from llmtune.testing import tiny_recipe
from tests.tiny import tiny_config, tiny_model_folder, tiny_tokenizer

SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 8, "num_key_value_heads": 2, "head_dim": 32}
LORA = {"name": "lora", "r": 4}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"peft_config": LORA},
    "qlora": {"peft_config": LORA, "quant_config": "bnb"},
    "freeze": {"peft_config": {"name": "freeze", "freeze_trainable_layers": 2}},
}

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model large enough that its tensors outweigh small change."""
    return str(tiny_model_folder(tmp_path_factory.mktemp("cost"), **SIZES))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows that all reach the cutoff."""
    talk = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": "The quick brown fox. " * 200}]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text((json.dumps({"messages": talk}) + "\n") * 16)
    return str(path)


@pytest.fixture
def make(folder: str, rows: str, tmp_path: Path) -> Make:
    """A plan of the model on those rows."""

    def plan(ranks: int | None = None, device: str | None = None, **keys: Any) -> Any:
        recipe = {"model": folder, "dataset": rows, "cutoff_len": 128, "output_dir": str(tmp_path / "run")}
        return llmtune.plan(recipe | {"per_device_train_batch_size": 2} | keys, ranks=ranks, device=device)

    return plan


def allocator_peak(plan: Any) -> int:
    """Highest level of torch's CPU allocator during two steps, by torch's own profiler."""
    import gc

    from torch.profiler import ProfilerActivity, profile, record_function

    from llmtune.training.building import build_objective, make_training
    from llmtune.training.loop import train
    from llmtune.training.optim import make_optimizer

    class Quiet:
        def after_step(self, step: int, stats: Any) -> bool:
            return False

    gc.collect()  # what earlier tests left behind must not be freed while this one counts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        objective = build_objective(plan.model)
        optimizer = make_optimizer(plan)
        training = replace(make_training(plan, objective, optimizer), total_steps=2, warmup_steps=0, seed=0)
        with record_function("steps begin"):
            pass
        train(training, Quiet())
    level, highest, running = 0, 0, False
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        running = running or event.name() == "steps begin"
        if event.name() == "[memory]":
            level += event.nbytes()
            highest = max(highest, level) if running else 0
    return highest


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_the_trace_is_what_the_allocator_sees(make: Make, method: str, checkpointing: str) -> None:
    plan = make(activation_checkpointing=checkpointing, **METHODS[method])
    traced, quick = plan.cost.traced, plan.cost.quick
    assert traced is not None, plan.cost.untraced
    measured = allocator_peak(plan)
    assert traced.at_peak.total == pytest.approx(measured, rel=0.1)
    assert quick.at_peak.total == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("keys", [{"kernel_config": "auto"}, {"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_kernels_accumulation_and_mixed_precision_are_seen_too(make: Make, keys: dict[str, Any]) -> None:
    plan = make(activation_checkpointing="selective", **keys)
    assert plan.cost.traced.at_peak.total == pytest.approx(allocator_peak(plan), rel=0.1)


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_formulas_and_trace_agree_on_what_a_rank_holds(make: Make, method: str, checkpointing: str, ranks: int) -> None:
    cost = make(ranks, "24GB", activation_checkpointing=checkpointing, **METHODS[method]).cost
    assert cost.traced is not None, cost.untraced
    for name in ("weights", "adapters", "optimizer", "gradients"):
        found, expected = getattr(cost.quick.most, name), getattr(cost.traced.most, name)
        assert found == pytest.approx(expected, rel=0.05, abs=40_000), name
    assert cost.quick.at_peak.total == pytest.approx(cost.traced.at_peak.total, rel=0.35)


@pytest.mark.parametrize("method", ["full", "lora", "freeze"])
def test_layers_left_out_of_the_trace_are_counted(make: Make, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtune.cost import trace

    for ranks in (1, 4):
        keys = {"activation_checkpointing": "full", "ranks": ranks, "device": "24GB", **METHODS[method]}
        cut = make(**keys).cost.traced
        monkeypatch.setattr(trace, "KEPT", 8)
        whole = make(**keys).cost.traced
        monkeypatch.undo()
        assert cut.at_peak.total == pytest.approx(whole.at_peak.total, rel=0.01)
        assert cut.moment == whole.moment


def test_the_trace_agrees_with_torchs_own_memory_tracker() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.utils._pytree import tree_leaves

    from llmtune.cost.tracker import Tracker, by_category

    def step(tracker: Any) -> None:
        with FakeTensorMode():
            model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
            optimizer = torch.optim.AdamW(model.parameters(), fused=False, foreach=False)
            if isinstance(tracker, MemTracker):
                tracker.track_external(model, optimizer)
            else:
                tracker.assign(tree_leaves(list(model.parameters())), "weights")
                tracker.mark("start")
            with tracker:
                model(torch.zeros(512, 64)).sum().backward()
                optimizer.step()

    theirs, ours = MemTracker(), Tracker()
    step(theirs)
    step(ours)
    (expected,) = (snapshot["Total"] for snapshot in theirs.get_tracker_snapshot("peak").values())
    (segment,) = ours.segments
    assert by_category(segment.peak).total == pytest.approx(expected, rel=0.01)


def test_more_ranks_and_more_recomputation_never_take_more(make: Make) -> None:
    def peak(ranks: int, **keys: Any) -> int:
        cost = make(ranks, "80GB", **keys).cost
        assert cost.traced is not None, cost.untraced
        return cost.traced.at_peak.total

    by_ranks = [peak(ranks) for ranks in (2, 8, 64)]
    assert by_ranks == sorted(by_ranks, reverse=True) and by_ranks[0] > by_ranks[-1]
    by_level = [peak(1, activation_checkpointing=level) for level in ("none", "selective", "full")]
    assert by_level == sorted(by_level, reverse=True) and by_level[0] > by_level[-1]
    by_rows = [peak(1, per_device_train_batch_size=rows) for rows in (1, 2, 4)]
    assert by_rows == sorted(by_rows) and by_rows[0] < by_rows[-1]


def test_offloaded_state_is_host_memory(make: Make) -> None:
    held = make(2, "80GB").cost
    off = make(2, "80GB", dist_config={"name": "fsdp2", "offload_params": True}).cost
    assert off.traced is not None, off.untraced
    assert off.traced.at_peak.optimizer == 0 and off.traced.at_peak.total < held.traced.at_peak.total
    assert off.traced.most.host >= held.traced.most.optimizer + held.traced.most.weights


def test_gradients_wait_whole_unless_they_are_accumulated_in_shards(make: Make) -> None:
    keys = {"gradient_accumulation_steps": 2, "ranks": 8, "device": "80GB"}
    whole = make(**keys).cost
    sharded = make(**keys, dist_config={"name": "fsdp2", "accumulate_sharded": True}).cost
    trained, _ = whole.plan.model.parameters()
    assert whole.traced.most.gradients > 4 * trained > 6 * sharded.traced.most.gradients
    assert whole.quick.most.gradients == pytest.approx(whole.traced.most.gradients, rel=0.05)


def test_what_is_said_to_fit_fits(make: Make) -> None:
    peak = make(1, "80GB", activation_checkpointing="none").cost.traced.at_peak.total
    device = f"{(0.8 * peak / GIB + 1) / 0.96:.4f}GB"
    cost = make(1, device, activation_checkpointing="none").cost
    assert not cost.fits and "DOES NOT FIT" in repr(cost)
    named = {str(found.change): found for found in cost.advice.single}
    assert "activation_checkpointing: full, disable_gradient_checkpointing: false" in named
    assert any(found.fits for found in named.values())
    for found in {frozenset(found.change.keys): found for found in cost.advice.single}.values():  # one of each kind
        keys = {"activation_checkpointing": "none", **found.change.keys}
        changed = make(found.change.ranks or 1, device, **keys).cost
        assert found.fits is changed.fits, found
        assert found.peak == pytest.approx(changed.memory.at_peak.total, rel=0.001), found


def test_changes_are_added_up_where_none_is_enough(make: Make) -> None:
    least = make(1, "80GB", per_device_train_batch_size=1, **METHODS["qlora"]).cost.traced.at_peak.total
    device = f"{(1.6 * least / GIB + 1) / 0.96:.4f}GB"
    cost = make(1, device, activation_checkpointing="none", per_device_train_batch_size=8, cutoff_len=1024).cost
    assert not cost.fits
    assert not any(found.fits for found in cost.advice.single)
    if cost.advice.together is not None:
        assert replan(cost.plan, cost.advice.together.change, Registry()).cost.fits


@pytest.mark.parametrize("method", ["full", "lora", "freeze"])
def test_flops_are_those_that_torch_counts(make: Make, method: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from llmtune.training.building import build_objective

    # Plain attention computes what a causal mask throws away, and torch counts it.
    plan = make(flash_attn="disabled", activation_checkpointing="none", **METHODS[method])
    cost = plan.cost
    objective = build_objective(plan.model).train()
    (batch,) = plan.data.batches.step(0, plan.device)
    objective(batch)  # the first call compares head and logits
    with FlopCounterMode(display=False) as counter:
        objective(batch).total.backward()
    tokens = batch.input_ids.numel()
    expected = count(plan.model, cost.shape, causal=batch.input_ids.shape[1]).total
    assert expected == pytest.approx(counter.get_total_flops() / tokens, rel=0.015)


def test_mfu_is_speed_times_flops_over_the_peak(make: Make) -> None:
    cost = make(4, "a100").cost
    seconds = cost.step_seconds(0.25)
    assert cost.mfu(4 * cost.step_tokens / seconds) == pytest.approx(0.25)
    assert make(2, "24GB").cost.mfu(1000.0) is None


def test_causal_attention_counts_half_and_recomputation_not_at_all(make: Make) -> None:
    plain, again = make(activation_checkpointing="none").cost, make(activation_checkpointing="full").cost
    length, width, layers = 128, 4 * SIZES["head_dim"], SIZES["num_hidden_layers"]
    assert plain.shape.attended == (length + 1) / 2
    whole = count(plain.plan.model, plain.shape, causal=length).forward
    assert whole - plain.flops.forward == pytest.approx(4 * width * layers * (length - 1) / 2)
    assert again.flops.total == plain.flops.total and again.flops.recomputed > 0
    assert again.flops.expected_mfu < plain.flops.expected_mfu == 0.5


def test_experts_that_a_token_does_not_visit_cost_memory_but_no_flops(rows: str, tmp_path: Path) -> None:
    def cost(experts: int) -> Any:
        sizes = {"num_local_experts": experts, "num_experts_per_tok": 2}
        folder = tiny_model_folder(tmp_path / str(experts), "mixtral", **sizes)
        recipe = {"model": str(folder), "dataset": rows, "cutoff_len": 64, "output_dir": str(tmp_path / "run")}
        return llmtune.plan(recipe).cost

    few, many = cost(2), cost(8)
    router = 2 * 3 * tiny_config("mixtral").hidden_size * 6 * 2
    assert many.flops.total - few.flops.total == pytest.approx(router)
    assert many.quick.most.weights > 2 * few.quick.most.weights


def test_a_folder_without_weights_can_be_planned_for_a_device_but_not_trained(rows: str, tmp_path: Path) -> None:
    folder = tmp_path / "described"
    tiny_config("llama", num_hidden_layers=6).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    recipe = {"model": str(folder), "dataset": rows, "cutoff_len": 64, "output_dir": str(tmp_path / "run")}
    plan = llmtune.plan(recipe, ranks=16, device="h100")
    assert plan.model.context.device == "cuda" and plan.model.precision.autocast and plan.ranks.size == 16
    assert plan.cost.traced is not None, plan.cost.untraced
    assert plan.cost.step_seconds(1.0) > 0
    with pytest.raises(llmtune.LoadError, match="holds no weights"):
        llmtune.plan(recipe)


def test_devices() -> None:
    assert describe("H100").memory == 80 * GIB and describe("24 GB").memory == 24 * GIB
    assert describe("nvidia a100").flops == 312e12
    with pytest.raises(PlanError, match="allowed are b200, h200"):
        describe("abacus")
    with pytest.raises(PlanError, match='found "0GB"'):
        describe("0GB")


def test_a_device_without_bfloat16_gets_none(make: Make) -> None:
    assert make(1, "t4").model.precision.compute == torch.float32
    with pytest.raises(PlanError, match="no bfloat16 units"):
        make(1, "t4", bf16=True)


def test_json_and_html(make: Make, rows: str, tiny_llama: str, tmp_path: Path, capsys: Any) -> None:
    from llmtune.cli import main

    recipe = tmp_path / "r.yaml"
    keys = {"model": tiny_llama, "peft_config": "lora", "dataset": rows, "cutoff_len": 64}
    recipe.write_text(json.dumps({**keys, "output_dir": str(tmp_path / "run")}))
    assert main(["plan", str(recipe), "--ranks", "2", "--device", "h100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True and found["advice"] is None and found["ranks"] == 2
    assert found["memory"]["peak"] == sum(found["memory"]["at_peak"][name] for name in CATEGORIES)
    assert main(["plan", str(recipe), "--ranks", "2", "--device", "1GB"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out
    html = make(1, "h100").cost._repr_html_()
    assert "<table>" in html and "Fits:" in html


def test_what_writing_the_whole_model_takes_is_told(make: Make, tmp_path: Path) -> None:
    whole = make(1, "h100")
    weights = sum(p.numel() for p in whole.model.module.parameters())
    assert whole.cost.result_bytes == 2 * weights  # in bfloat16, as it is saved
    assert "of host memory on rank 0 while the model is written" in whole.cost.detail_text
    assert make(1, "h100", peft_config=LORA).cost.result_bytes == 0
    assert make(bf16=False).cost.result_bytes == 0  # on a CPU what lies there is written as it lies


def test_an_optimizer_that_needs_values_is_still_counted(make: Make) -> None:
    plain, small = make(1, "80GB").cost, make(1, "80GB", optim_config="adamw_8bit").cost
    trained, _ = small.plan.model.parameters()
    assert small.quick.most.optimizer == pytest.approx(small.traced.most.optimizer, rel=0.001)
    assert 2 * trained < small.traced.most.optimizer < 0.75 * plain.traced.most.optimizer
    assert small.traced.most.gradients == plain.traced.most.gradients


def test_memory_adds_by_category() -> None:
    found = Memory(weights=3, host=5) + Memory(weights=1, logits=2).times(2)
    assert (found.weights, found.logits, found.total) == (5, 4, 9)
    assert found.most(Memory(gradients=7)).total == 16 and (found - found).total == 0


def test_the_cache_of_answers_is_counted(tmp_path: Path) -> None:
    """As large as transformers makes it for prompts and answers of the greatest length."""
    stage = {"name": "grpo", "max_new_tokens": 40, "num_generations": 3}
    reward = {"name": "rule", "match": "length", "max_tokens": 4096}
    keys = tiny_recipe(tmp_path, kind="prompt", stage_config=stage, reward_config=reward)
    plan = llmtune.plan(keys)
    model = plan.model.module.to_empty(device="cpu")
    longest = plan.data.prepared.train.longest + 40
    with torch.no_grad():
        cache = model(torch.zeros(3 * 4, longest, dtype=torch.int64), use_cache=True)["past_key_values"]
    assert plan.cost.memory.most.cache == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert plan.cost.memory.most.logits >= 3 * 4 * model.config.vocab_size * 20
