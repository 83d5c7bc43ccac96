"""Runs over every kind of batch: what they learn, how many steps they take, what they report, what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import llmtune
from llmtune.contract.errors import PlanError
from llmtune.data import TokenSamples, collate
from llmtune.data.order import deal
from llmtune.planning.data_plan import plan_data
from llmtune.planning.objections import packing_obstacle
from llmtune.planning.plan import Plan
from llmtune.testing import running, tiny_chats, tiny_tokenizer
from llmtune.training.callbacks import StopRequest, TrainingCallbacks
from llmtune.training.isolation import check_isolation
from tests.by_hand import assert_same
from tests.runs import recipe as small_recipe
from tests.tiny import tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "padded": {"group_by_length": False},
    "grouped": {},
    "packed": {"packing": True},
    "joined": {"packing": True, "neat_packing": False},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    running.tiny_recipe(folder)
    return folder


def keys_of(place: Path, output: Path, **keys: Any) -> dict[str, Any]:
    return running.tiny_recipe(place, **{"output_dir": str(output), "cutoff_len": 64, **keys})


def numbers(found: running.Trained) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in found.metrics]


def test_dealing_rows_by_length_changes_nothing_that_is_learnt(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = keys_of(place, tmp_path / "dealt", per_device_train_batch_size=3, max_steps=6, learning_rate=1e-3)
    dealt = running.train(keys)

    def drawn(units: Any, *arguments: Any, **keys: Any) -> list[int]:
        assert sorted(deal(units, *arguments, **keys)) == sorted(units)
        return list(units)

    monkeypatch.setattr("llmtune.data.batch_loader.deal", drawn)
    plain = running.train({**keys, "output_dir": str(tmp_path / "plain")})
    assert_same(numbers(dealt), numbers(plain))
    for name, tensor in plain.tensors.items():
        torch.testing.assert_close(dealt.tensors[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_two_epochs_are_two_epochs(kind: str, place: Path, tmp_path: Path) -> None:
    keys = keys_of(place, tmp_path / "run", max_steps=None, num_train_epochs=2, **KINDS[kind])
    plan = llmtune.plan(keys)
    found = running.train(keys)
    last = found.metrics[-1]
    assert (last["epoch"], last["step"]) == (2.0, plan.steps)
    assert plan.steps == 2 * plan.data.batches.order.steps_per_epoch
    assert last["tokens"] == 2 * plan.data.prepared.train.tokens


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    "steps", [{"max_steps": 3}, {"max_steps": None, "num_train_epochs": 3}], ids=["steps", "epochs"]
)
def test_data_smaller_than_a_step_train_once_an_epoch(
    kind: str, steps: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    """Neither no step at all nor a loop without end; the plan says so."""
    (tmp_path / "data").mkdir()
    few = tiny_chats(tmp_path / "data", rows=5)
    keys = keys_of(
        place, tmp_path / "run", dataset=str(few), per_device_train_batch_size=64, **{**KINDS[kind], **steps}
    )
    assert "fewer than the 128 of a step: every step learns from all of them" in str(llmtune.plan(keys))
    found, plan = running.train_and_keep(keys)
    assert [row["epoch"] for row in found.metrics] == [1.0, 2.0, 3.0]
    assert found.metrics[-1]["tokens"] == 3 * plan.data.prepared.train.tokens
    assert found.metrics[-1]["loss"] < found.metrics[0]["loss"], "the model that is saved has learnt"


@pytest.mark.parametrize("kind", ["grouped", "joined"])
def test_a_stopped_run_goes_on_with_the_same_rows(kind: str, place: Path, tmp_path: Path) -> None:
    from tests.test_resume import assert_equal_runs, stop_after

    keys = keys_of(place, tmp_path / "straight", max_steps=6, **KINDS[kind])
    llmtune.train(keys)
    broken = {**keys, "output_dir": str(tmp_path / "broken")}
    stop_after(broken, 4)
    llmtune.train(broken)
    assert_equal_runs(tmp_path / "straight", tmp_path / "broken")


def in_sets(samples: TokenSamples) -> TokenSamples:
    """The samples as if every fourth were of a second set."""
    sets = (np.arange(len(samples)) % 4 == 0).astype(np.int32)
    return replace(samples, sets=sets, set_names=["large", "small"])


def with_samples(plan: Plan, samples: TokenSamples) -> Plan:
    """The plan of the same recipe on other samples."""
    prepared = replace(plan.data.prepared, train=samples)
    flat, stage = plan.data.batches.flat, plan.parts.one("stage_config").built
    return replace(plan, data=plan_data(plan.recipe, prepared, plan.ranks, plan.model.tokenizer, flat, stage))


def test_each_data_set_is_evaluated(place: Path, tmp_path: Path) -> None:
    keys = keys_of(
        place, tmp_path / "run", val_size=12, eval_strategy="steps", eval_on_each_dataset=True,
        per_device_eval_batch_size=2, metric_for_best_model="eval_small_loss",
    )  # fmt: skip
    plan, objective = running.start(keys)
    samples = in_sets(plan.data.prepared.evaluation)
    prepared = replace(plan.data.prepared, evaluation=samples)
    plan = replace(plan, data=replace(plan.data, prepared=prepared))
    keeper = TrainingCallbacks(plan, objective, None, None, [], StopRequest())  # type: ignore[arg-type]
    told: list[Any] = []
    keeper.observers.append(told.append)
    keeper.evaluate(1)
    metrics = told[-1].metrics
    sums = {name: 0.0 for name in samples.by_set()}
    with torch.no_grad():
        for name, chosen in samples.by_set().items():
            losses = [objective(collate([samples.sample(index)], flat=True, pad_id=0)).total.item() for index in chosen]
            sums[name] = sum(losses)
            assert metrics[f"eval_{name}_loss"] == pytest.approx(
                sum(losses) / samples.supervised[chosen].sum(), rel=1e-5
            )
    assert len(metrics) == 3 and len(sums) == 2
    assert metrics["eval_loss"] == pytest.approx(sum(sums.values()) / samples.supervised.sum(), rel=1e-5)
    assert keeper.best_value == metrics["eval_small_loss"]


def test_several_sets_are_mixed_and_the_plan_says_how(place: Path, tmp_path: Path) -> None:
    plan = llmtune.plan(keys_of(place, tmp_path / "run"))
    wish = replace(plan.recipe.data, mix_strategy="interleave_over")
    plan = with_samples(replace(plan, recipe=replace(plan.recipe, data=wish)), in_sets(plan.data.prepared.train))
    assert len(plan.data.batches.samples) == len(plan.data.batches.units) == 36
    assert "an epoch is mixed from 18 of large (18), 18 of small (6)" in str(plan)


def test_sets_of_a_recipe_are_mixed_and_evaluated_by_name(place: Path, tmp_path: Path) -> None:
    names = []
    for name, rows in (("small", 4), ("large", 9)):
        (tmp_path / name).mkdir()
        names.append(str(tiny_chats(tmp_path / name, rows).rename(tmp_path / f"{name}.jsonl")))
    keys = keys_of(
        place, tmp_path / "run", dataset=names, mix_strategy="interleave_over", interleave_probs=[0.5, 0.5],
        eval_dataset=names, eval_on_each_dataset=True, eval_strategy="epoch", max_steps=3,
        metric_for_best_model="eval_small_loss",
    )  # fmt: skip
    plan = llmtune.plan(keys)
    assert "an epoch is mixed from" in str(plan) and len(plan.data.batches.samples) >= 18
    run = llmtune.train(keys)
    (row,) = [row for row in run.metrics if "eval_loss" in row]
    held = plan.data.prepared.evaluation
    tokens = {name: held.supervised[at].sum() for name, at in held.by_set().items()}
    mean = sum(row[f"eval_{name}_loss"] * count for name, count in tokens.items()) / sum(tokens.values())
    assert set(tokens) == {"small", "large"} and row["eval_loss"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize(
    "changes", [{}, {"packing": True}, {"kernel_config": "auto"}], ids=["padded", "packed", "kernel"]
)
def test_a_message_counts_what_its_weight_says(changes: dict[str, Any], place: Path, tmp_path: Path) -> None:
    """Loss and gradient norm of a step, against a sum over tokens by hand from the file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.by_hand import encode

    rows = [json.loads(line)["messages"] for line in (place / "chats.jsonl").read_text().splitlines()]
    answers = [message for row in rows for message in row if message["role"] == "assistant"]
    for number, message in enumerate(answers):
        message["weight"] = (0.5, 1, 2, 0)[number % 4] if number else 3
    (tmp_path / "weighted.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    keys = keys_of(place, tmp_path / "run", dataset=str(tmp_path / "weighted.jsonl"), max_steps=1, **changes)
    keys |= {"per_device_train_batch_size": 32, "cutoff_len": 128, "max_grad_norm": 0, "on_bad_record": "skip"}
    (found,) = running.train(keys).metrics
    model = AutoModelForCausalLM.from_pretrained(keys["model"], dtype=torch.float32)
    tokenizer, total, weight = AutoTokenizer.from_pretrained(keys["model"]), torch.zeros(()), 0.0
    for row in rows:
        parts = [(*encode(tokenizer, [message]), message.get("weight", 0)) for message in row]
        ids = torch.tensor([token for part, _, _ in parts for token in part])
        labels = torch.tensor([label for _, part, _ in parts for label in part])
        counts = torch.tensor([float(count) for part, _, count in parts for _ in part]) * (labels != -100)
        losses = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        total, weight = total + (losses * counts[1:]).sum(), weight + counts[1:].sum().item()
    (total / weight).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert (found["loss"], found["grad_norm"]) == pytest.approx(((total / weight).item(), norm.item()), rel=1e-5)


def test_plain_text_is_pretrained_on_in_whole_rows(place: Path, tmp_path: Path) -> None:
    """Nothing of a text is lost to `cutoff_len`, and every token but a row's first is predicted."""
    lines = [json.dumps({"text": "The quick brown fox jumps over the lazy dog. " * (1 + n % 7)}) for n in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    keys = keys_of(
        place, tmp_path / "run", dataset=str(tmp_path / "text.jsonl"), stage_config="pt", packing=True,
        neat_packing=False, max_steps=None, num_train_epochs=1, cutoff_len=32, learning_rate=0.01,
    )  # fmt: skip
    plan = llmtune.plan(keys)
    tokenizer = plan.model.tokenizer
    expected = sum(len(tokenizer(json.loads(line)["text"])["input_ids"]) + 1 for line in lines)  # the end of each
    found = running.train(keys).metrics
    assert found[-1]["tokens"] == expected and found[-1]["epoch"] == 1.0
    rows = plan.data.batches.units
    batches = [batch for step in range(plan.steps) for batch in plan.data.batches.step(step, plan.device)]
    assert sum(batch.weight for batch in batches) == expected - len(rows)


ATTENTION = ("eager", "sdpa", "flex_attention", "llmtune_packed")


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_document_has_the_losses_it_has_alone(family: str, attention: str) -> None:
    """Packed, padded and alone, for every attention that computes here; gpt2 learns a vector for each position."""
    model: Any = tiny_model(family).eval().requires_grad_(False)  # torch has no gradient of flex_attention on a CPU
    if attention == "llmtune_packed":
        kernels = pytest.importorskip("llmtune_kernels.packed_attention")
        kernels._apply(model, SimpleNamespace(device="cpu"))
    if attention == "flex_attention" and not model._supports_flex_attn:
        pytest.skip(f"transformers has no flex_attention for {family}")
    model.set_attn_implementation(attention)
    assert packing_obstacle(model, model.config._attn_implementation) is None
    rng = np.random.default_rng(0)
    documents = [(rng.integers(3, 300, n).astype(np.int32), rng.random(n) < 0.7) for n in (9, 2, 20, 33)]

    def losses(flat: bool, chosen: list[Any]) -> torch.Tensor:
        batch = collate(chosen, flat=flat, pad_id=0)
        logits = model(**batch.model_inputs()).logits.flatten(0, 1)[batch.predict_at]
        return torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")

    with torch.compiler.set_stance("force_eager"):  # compiling flex_attention takes half a minute
        alone = torch.cat([losses(False, [document]) for document in documents])
        packed = losses(True, documents)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    if attention != "flex_attention":
        torch.testing.assert_close(losses(False, documents), alone, rtol=1e-5, atol=1e-5)


def test_an_attention_that_sees_no_bounds_is_refused_before_the_first_step(place: Path, tmp_path: Path) -> None:
    """transformers makes it no mask, and it asks for no bounds; the model itself tells."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("bare_attention", sdpa_attention_forward)
    plan, objective = running.build(keys_of(place, tmp_path / "run", packing=True))
    check_isolation(objective, plan.device, packing=True)
    plan.module.set_attn_implementation("bare_attention")
    with pytest.raises(PlanError, match=r"cannot keep documents apart .*set packing: false, or neat_packing: false"):
        check_isolation(objective, plan.device, packing=True)


def test_the_rounding_of_bfloat16_is_no_leak(place: Path, tmp_path: Path) -> None:
    """A row that is laid out differently gives states that differ in their last bits."""
    plan, objective = running.build(keys_of(place, tmp_path / "run", packing=True, pure_bf16=True, flash_attn="sdpa"))
    assert plan.module.dtype == torch.bfloat16 and plan.attention == "sdpa"
    check_isolation(objective, plan.device, packing=True)


def test_rows_are_joined_for_models_that_cannot_keep_documents_apart(chats: str, tmp_path: Path) -> None:
    """Recurrent models pretrain so. Kept apart they are refused."""
    from transformers import MambaConfig, MambaForCausalLM

    tokenizer = tiny_tokenizer()
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    keys = keys_of(
        tmp_path, tmp_path / "run", model=str(tmp_path / "mamba"), dataset=chats, packing=True, neat_packing=False,
        disable_gradient_checkpointing=True, max_steps=2, learning_rate=1e-3, dist_config="fsdp2",
    )  # fmt: skip
    assert llmtune.train(keys).status == "done"
    with pytest.raises(PlanError, match=r"packing: MambaForCausalLM takes no position ids"):
        llmtune.plan({**keys, "neat_packing": True, "output_dir": str(tmp_path / "other")})


def test_joined_rows_train_as_transformers_own_blocks_of_text(place: Path, tmp_path: Path) -> None:
    """As examples of pretraining group texts: labels are the rows themselves, the loss their mean."""
    from transformers import AutoModelForCausalLM

    keys = keys_of(
        place, tmp_path / "run", packing=True, neat_packing=False, train_on_prompt=True, max_steps=1,
        disable_shuffling=True, lr_scheduler_config="constant", cutoff_len=64,
    )  # fmt: skip
    plan = llmtune.plan(keys)
    (row,) = running.train(keys).metrics
    ids = torch.from_numpy(plan.data.prepared.train.ids[: 8 * 64].astype(np.int64)).view(8, 64)
    model = AutoModelForCausalLM.from_pretrained(keys["model"], dtype=torch.float32)
    assert row["loss"] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "done"


@pytest.mark.parametrize("kind", [*KINDS, "kernel", "pairs"])
def test_no_micro_batch_is_larger_than_the_plan_counts_on(kind: str, place: Path, tmp_path: Path) -> None:
    from llmtune.planning.micro_batch import largest

    keys = KINDS.get(kind, {"kernel_config": "auto"} if kind == "kernel" else {})
    plan = llmtune.plan(keys_of(place, tmp_path / "run", per_device_train_batch_size=3, **keys))
    if kind == "pairs":
        rng = np.random.default_rng(0)
        pairs = [(rng.integers(3, 300, n), np.arange(n) > 2) for n in rng.integers(4, 60, 34)]
        plan = with_samples(plan, TokenSamples.from_lists(pairs, range(17), width=2, kind="preference"))
    shape, sizes = largest(plan), []
    for step in range(plan.data.batches.order.steps_per_epoch):
        for batch in plan.data.batches.step(step, plan.device):
            assert batch.input_ids.shape[0] <= shape.rows and len(batch.targets) <= shape.targets
            assert batch.input_ids.shape[1] <= shape.length
            assert shape.masked or batch.attention_mask is None
            sizes.append(batch.input_ids.numel())
    assert max(sizes) > 0.6 * shape.tokens, "nor is it much smaller"


def test_a_step_has_no_more_micro_batches_than_there_are_rows(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    """A number with some zeros too many would otherwise make as many empty batches, and fill the memory with them."""
    keys = small_recipe(tiny_llama, chats, tmp_path / "run", gradient_accumulation_steps=100_000_000, max_steps=1)
    plan = llmtune.plan(keys)
    assert "gradient_accumulation_steps: 100,000,000 -> 24, as the others would have no row" in str(plan)
    assert len(plan.data.batches.step(0, plan.device)) == 24
    assert llmtune.train(keys).metrics[0]["loss"] > 0


def test_samples_beyond_the_models_positions_are_told(tmp_path: Path) -> None:
    keys = running.tiny_recipe(tmp_path, sizes={"max_position_embeddings": 16})
    assert "more than the 16 positions that the model was made for; set rope_scaling, or cutoff_len: 16" in str(
        llmtune.plan(keys)
    )
    assert "positions that the model" not in str(
        llmtune.plan(keys, model=running.tiny_recipe(tmp_path / "other")["model"])
    )
