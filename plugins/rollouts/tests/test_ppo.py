"""PPO: the contract, a whole step against transformers, ranks, resuming, and answers that are left out."""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmtune
from llmtune import LlmtuneError
from llmtune.testing import Law, in_ranks, laws, running

FUNCTIONS = """
def vowels(completions):
    return [sum(letter in "aeiou" for letter in answer) / max(1, len(answer)) for answer in completions]

def spaces(completions):
    return [float(answer.count(" ")) for answer in completions]

def some(completions, prompts):
    return [None if len(prompt) % 2 else 1.0 for prompt in prompts]

def broken(completions):
    return [float("nan") for _ in completions]

calls = []

def fails_in_time(completions, call=3):
    calls.append(1)
    if len(calls) == call:
        raise ConnectionError("the endpoint is down")
    return vowels(completions)
"""
REWARD = {"name": "function", "function": "ppo_worth:vowels"}
SHORT = {"max_new_tokens": 8, "ppo_epochs": 2}
CHANGING = {"ppo_score_norm": True, "ppo_whiten_rewards": True, "horizon": 50, "ppo_target": 1.0}
LORA = {"peft_config": {"name": "lora", "lora_dropout": 0.0}}
ANSWERED = {"reward_config": REWARD, "learning_rate": 0.01}


@pytest.fixture(autouse=True)
def worth(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module of rewards that this process and ranks can import."""
    folder = tmp_path_factory.mktemp("worth")
    (folder / "ppo_worth.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    yield
    sys.modules.pop("ppo_worth", None)


FIXED = {"ppo_target": None, "ppo_whiten_rewards": True}


@pytest.mark.parametrize("law", laws("stage_config", "ppo", {**SHORT, **FIXED}, recipe=ANSWERED), ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    """With a cost that stays: laws ask for the same step twice."""
    law(tmp_path)


@pytest.mark.parametrize("law", laws("stage_config", "ppo", {**SHORT, **FIXED}, recipe={**ANSWERED, **LORA}), ids=str)
def test_contract_with_adapters(law: Law, tmp_path: Path) -> None:
    law(tmp_path)


def keys(folder: Path, stage: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    named = {"name": "ppo", **SHORT, **(stage or {})}
    return running.tiny_recipe(folder, kind="prompt", **{**ANSWERED, "stage_config": named, **more})


def prepared(plan: Any, objective: Any) -> list[Any]:
    """The micro-batches of the first step, as the stage prepares them."""
    batches = plan.data.batches.step(0, plan.device)
    with torch.no_grad():
        return objective(lambda: objective.stage.prepare(plan.model.module, batches, objective.context))


def shaken(model: Any, by: float = 0.01) -> None:
    """Move every weight at random."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for weight in model.parameters():
            weight += by * torch.randn_like(weight)


def test_answers_that_another_engine_drew_are_corrected(tmp_path: Path) -> None:
    """With both limits at 2 each token counts twice to the policy, and to the values as before."""
    sums = []
    for told in (None, -5.0):
        twice = {"sampling_correction": "token_truncate", "sampling_clip_max": 2.0, "sampling_clip_min": 2.0}
        plan, objective = running.start(keys(tmp_path, twice))
        usual = objective.context.generate

        def generate(*asked: Any, usual: Any = usual, told: float | None = told) -> Any:
            return [replace(one, logps=told and (told,) * len(one.ids)) for one in usual(*asked)]

        objective.context.generate = generate
        batches = prepared(plan, objective)
        shaken(plan.model.module)
        found = [objective(batch).metrics for batch in batches]
        sums.append([sum(each[name][0].item() for each in found) for name in ("policy_loss", "value_loss")])
        assert ("sampling/logp_difference" in found[0]) == bool(told)
    assert sums[1] == pytest.approx([2 * sums[0][0], sums[0][1]], rel=1e-5)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """trl.core.masked_whiten (TRL 0.9)."""
    mean = (values * mask).sum() / mask.sum()
    variance = ((values - mean) ** 2 * mask).sum() / (mask.sum() - 1)
    return ((values - mean) * torch.rsqrt(variance + 1e-8) + (0 if shift_mean else mean)) * mask


class Plain:
    """A policy with a value head as TRL 0.9 runs it: transformers' whole forward, a row at a time."""

    def __init__(self, model: Any, rows: list[tuple[list[int], int]], temperature: float) -> None:
        self.model, self.rows, self.temperature = model, rows, temperature
        self.width = max(len(ids) - first for ids, first in rows)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """(B, T) log-probabilities and values of the answers' tokens, padded with 0."""
        logps, values = [], []
        for ids, first in self.rows:
            found = self.model(torch.tensor([ids]), output_hidden_states=True)
            scores = (found.logits[0, first - 1 : -1].float() / self.temperature).log_softmax(-1)
            said = scores.gather(1, torch.tensor(ids[first:])[:, None]).squeeze(1)
            worth = self.model.value_head(found.hidden_states[-1][0, first - 1 : -1]).squeeze(-1)
            more = (0, self.width - len(said))
            logps.append(torch.nn.functional.pad(said, more))
            values.append(torch.nn.functional.pad(worth, more))
        return torch.stack(logps), torch.stack(values)


def test_a_step_is_trls(tmp_path: Path) -> None:
    stage = {
        "temperature": 0.8, "gamma": 0.98, "lam": 0.9, "cliprange": 0.15, "cliprange_value": 0.01, "vf_coef": 0.3,
        "missing_eos_penalty": 0.7, "ppo_whiten_rewards": True, "ppo_score_norm": True,
    }  # fmt: skip
    plan, objective = running.start(keys(tmp_path, stage, gradient_accumulation_steps=1, per_device_train_batch_size=6))
    model = plan.model.module
    reference = copy.deepcopy(model)
    shaken(model)  # away from the reference, and a value head that expects something
    policy: Any = objective.stage
    (batch,) = prepared(plan, objective)
    old = copy.deepcopy(model)
    shaken(model, 0.004)

    starts = [row.tolist().index(True) for row in batch.labels != -100]
    rows = list(zip(batch.rows(), starts, strict=True))
    mask = torch.zeros(len(rows), max(len(ids) - first for ids, first in rows))
    for row, (ids, first) in zip(mask, rows, strict=True):
        row[: len(ids) - first] = 1
    with torch.no_grad():
        old_logps, old_values = Plain(old, rows, 0.8)()
        ref_logps, _ = Plain(reference, rows, 0.8)()
    tokenizer = plan.model.tokenizer
    answers = [tokenizer.decode(ids[first:], skip_special_tokens=True).strip() for ids, first in rows]
    scores = torch.tensor([sum(x in "aeiou" for x in answer) / max(1, len(answer)) for answer in answers])
    cut = torch.tensor([float(ids[-1] not in (0, 2)) for ids, _ in rows])
    assert scores.std() > 0
    scores = scores - 0.7 * cut
    scores = (scores - scores.mean()) / (scores.std() + torch.finfo(torch.float32).eps)
    kl = old_logps - ref_logps
    rewards = -0.2 * kl
    rewards[range(len(rows)), mask.sum(1).long() - 1] += scores
    rewards = masked_whiten(rewards * mask, mask, shift_mean=False)
    last, backwards = torch.zeros(len(rows)), []
    for t in reversed(range(mask.shape[1])):
        after = old_values[:, t + 1] if t < mask.shape[1] - 1 else 0.0
        last = rewards[:, t] + 0.98 * after - old_values[:, t] + 0.98 * 0.9 * last
        backwards.append(last)
    advantages = torch.stack(backwards[::-1], 1)
    returns, advantages = advantages + old_values, masked_whiten(advantages, mask)

    plain = copy.deepcopy(model)
    logps, values = Plain(plain, rows, 0.8)()
    ratio = torch.exp(logps - old_logps)
    clipped = torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - 0.15, 1 + 0.15))
    near = torch.max(torch.min(values, old_values + 0.01), old_values - 0.01)
    policy_loss = (clipped * mask).sum() / mask.sum()
    value_loss = 0.5 * (torch.max((values - returns) ** 2, (near - returns) ** 2) * mask).sum() / mask.sum()
    expected = policy_loss + 0.3 * value_loss
    expected.backward()

    found = objective(batch)
    (found.total / batch.weight).backward()
    assert batch.weight == mask.sum()
    assert found.total.item() / batch.weight == pytest.approx(expected.item(), rel=1e-5)
    means = {name: (total / count).item() for name, (total, count) in found.metrics.items()}
    assert means["policy_loss"] == pytest.approx(policy_loss.item(), rel=1e-5)
    assert means["value_loss"] == pytest.approx(value_loss.item(), rel=1e-5)
    assert means["kl"] == pytest.approx((kl * mask).sum(1).mean().item(), rel=1e-5)
    assert means["kl_coef"] == pytest.approx(0.2)
    assert 0 < means["clipped"] < 1 and 0 < means["value_clipped"] < 1
    left = ((returns - old_values) * mask)[mask > 0].var(unbiased=False) / returns[mask > 0].var(unbiased=False)
    assert means["explained_variance"] == pytest.approx(1 - left.item(), rel=1e-4)
    assert means["completions/cut"] == pytest.approx(cut.mean().item())
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6, msg=name)
    expected_coef = 0.2 * (1 + max(-0.2, min(0.2, means["kl"] / 6 - 1)) * len(rows) / 10000)
    assert policy.kl_coef.value == pytest.approx(expected_coef, rel=1e-9)


def test_the_gradient_of_the_values_is_that_of_finite_differences(tmp_path: Path) -> None:
    plan, objective = running.start(keys(tmp_path, {"vf_coef": 1.0, "cliprange_value": 100.0}))
    shaken(plan.model.module)
    batch = prepared(plan, objective)[0]
    batch.extra = {**batch.extra, "advantages": torch.zeros_like(batch.extra["advantages"])}
    weight = plan.model.module.value_head.weight
    objective(batch).total.backward()
    for spot in (0, 7, 31):
        values = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                weight[0, spot] += step
                values.append(objective(batch).total.item())
                weight[0, spot] -= step
        slope = (values[0] - values[1]) / 2e-2
        assert weight.grad is not None and slope == pytest.approx(weight.grad[0, spot].item(), rel=1e-3, abs=1e-3)


BUFFERED = {**CHANGING, "ppo_buffer_size": 2}


def test_two_ranks_and_other_micro_batches_learn_the_same_from_a_buffer(tmp_path: Path) -> None:
    runs = []
    for rows, micros in ((4, 2), (8, 1), (2, 4)):
        folder = str(tmp_path / f"run-{rows}")
        changes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micros, "output_dir": folder}
        runs.append(running.train(keys(tmp_path, BUFFERED, max_steps=2, **changes)))
    spread = keys(tmp_path, BUFFERED, max_steps=2, gradient_accumulation_steps=1, output_dir=str(tmp_path / "two"))
    runs.append(in_ranks(2, tmp_path / "ranks", running.train, spread)[0])
    for run in runs[1:]:
        for row, other in zip(runs[0].metrics, run.metrics, strict=True):
            for name in ("loss", "grad_norm", "value_loss", "kl", "kl_coef", "reward", "returns", "tokens"):
                assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
        for name, tensor in runs[0].tensors.items():
            torch.testing.assert_close(run.tensors[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_each_epoch_learns_once_from_each_part_in_an_order_of_its_own(tmp_path: Path) -> None:
    stage = {"ppo_buffer_size": 3, "ppo_epochs": 12}
    plan, objective = running.start(keys(tmp_path, stage, per_device_train_batch_size=2))
    policy: Any = objective.stage
    made, orders = prepared(plan, objective), set()
    asked = [set(part.sample_ids) for part in plan.data.batches.step(0, plan.device)]
    assert [set.union(*asked[at : at + 2]) for at in (0, 2, 4)] == [
        set(made[at].sample_ids) | set(made[at + 1].sample_ids) for at in (0, 2, 4)
    ]
    places = {id(batch): place for place, batch in enumerate(made)}
    for epoch in range(12):
        parts = [policy.update(3 * epoch + turn, made, objective.context) for turn in range(3)]
        found = [tuple(places[id(batch)] for batch in part) for part in parts]
        assert sorted(found) == [(0, 1), (2, 3), (4, 5)]
        orders.add(tuple(found))
    assert len(orders) > 2


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    given = keys(tmp_path, BUFFERED, max_steps=5, save_steps=3)
    whole = running.train(given)
    start = tmp_path / "run" / "checkpoints" / "step-00000003"
    state = json.loads((start / "manifest.json").read_text())["numbers"]["stage"]
    assert abs(state["kl_coef"] - 0.2) > 1e-3 and state["scores"]["count"] > 24
    resumed = running.train({**given, "output_dir": str(tmp_path / "again"), "resume_from_checkpoint": str(start)})
    for name, tensor in whole.tensors.items():
        assert torch.equal(resumed.tensors[name], tensor), name
    seconds = {"tokens_per_second", "peak_memory_bytes", "mfu"}
    for row, other in zip(whole.metrics[3:], resumed.metrics, strict=True):
        assert {k: v for k, v in row.items() if k not in seconds} == {
            k: v for k, v in other.items() if k not in seconds
        }


def test_evaluations_change_nothing(tmp_path: Path) -> None:
    given = keys(tmp_path, CHANGING, val_size=4, max_steps=3)
    plain = running.train(given)
    looked = running.train({**given, "output_dir": str(tmp_path / "looked"), "eval_strategy": "steps", "eval_steps": 1})
    for name, tensor in plain.tensors.items():
        assert torch.equal(looked.tensors[name], tensor), name


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_rewards_rise(seed: int, tmp_path: Path) -> None:
    reward = {**REWARD, "function": "ppo_worth:spaces"}
    given = keys(
        tmp_path, {"init_kl_coef": 0.02, "max_new_tokens": 12}, reward_config=reward, seed=seed, max_steps=16,
        per_device_train_batch_size=12,
    )  # fmt: skip
    found = [row["reward"] for row in running.train(given).metrics]
    assert sum(found[-3:]) / 3 > 1 + sum(found[:3]) / 3, found


@pytest.mark.parametrize(
    "more",
    [
        LORA,
        {**LORA, "quant_config": "bnb"},
        {"peft_config": {"name": "freeze", "freeze_trainable_layers": 1}},
        {"kernel_config": "auto"},
        {"activation_checkpointing": "full"},
        {"init_config": "init_on_rank0", "bf16": True},
    ],
    ids=["lora", "qlora", "freeze", "kernels", "checkpointing", "bf16"],
)
def test_it_goes_with(more: dict[str, Any], tmp_path: Path) -> None:
    outcome, plan = running.train_and_keep(keys(tmp_path, max_steps=3, **more))
    assert all(math.isfinite(value) for row in outcome.metrics for value in row.values())
    assert plan.model.module.value_head.weight.detach().abs().max() > 0
    assert not any("value_head" in name for name in outcome.tensors)
    if more in ({"kernel_config": "auto"}, {"activation_checkpointing": "full"}):
        plain = running.train(keys(tmp_path, max_steps=3, output_dir=str(tmp_path / "plain")))
        for name in ("loss", "grad_norm", "value_loss", "reward"):  # later answers may differ by a tie
            assert outcome.metrics[0][name] == pytest.approx(plain.metrics[0][name], rel=1e-3)


def test_answers_that_no_reward_speaks_of_are_left_out(tmp_path: Path) -> None:
    plan, objective = running.start(keys(tmp_path, reward_config={**REWARD, "function": "ppo_worth:some"}))
    for batch in prepared(plan, objective):
        silent = batch.extra["reward"].isnan()
        trained = torch.bincount(batch.target_sequence, minlength=batch.sequences) > 0
        assert torch.equal(trained, ~silent) and torch.equal(batch.extra["kl"].isnan(), silent)
        assert math.isfinite(objective(batch).total.item())


def test_without_a_cost_of_distance_there_is_no_reference(tmp_path: Path) -> None:
    free = llmtune.plan(keys(tmp_path, {"init_kl_coef": 0}))
    assert not free.further and set(llmtune.plan(keys(tmp_path)).further) == {"reference"}
    row = running.train(keys(tmp_path, {"init_kl_coef": 0}, max_steps=1)).metrics[0]
    assert "kl" not in row and row["kl_coef"] == 0


def test_rewards_count_by_their_weights(tmp_path: Path) -> None:
    both = [REWARD, {**REWARD, "function": "ppo_worth:spaces"}]
    plan, objective = running.start(keys(tmp_path, {"reward_weights": [2.0, -0.5]}, reward_config=both))
    extra = prepared(plan, objective)[0].extra
    expected = 2 * extra["rewards/function"] - 0.5 * extra["rewards/function#2"]
    torch.testing.assert_close(extra["reward"], expected)
    with pytest.raises(LlmtuneError, match="reward_weights: found 1 numbers, allowed is one for each of the 2 rewards"):
        running.plan(keys(tmp_path, {"reward_weights": [1.0]}, reward_config=both))


def test_a_fixed_cost_stays(tmp_path: Path) -> None:
    rows = running.train(keys(tmp_path, {"ppo_target": None, "horizon": 1}, max_steps=3)).metrics
    assert [row["kl_coef"] for row in rows] == pytest.approx([0.2] * 3)


def test_a_reward_that_is_no_number_ends_the_run_in_a_sentence(tmp_path: Path) -> None:
    given = keys(tmp_path, reward_config={**REWARD, "function": "ppo_worth:broken"})
    with pytest.raises(LlmtuneError, match="reward_config function: .* gave nan for the answer .*nothing was learnt"):
        running.train(given)


@pytest.mark.parametrize(
    ("call", "more"),
    [
        (3, {}),
        (3, {"streaming": True}),
        (4, {"val_size": 4, "per_device_eval_batch_size": 4, "eval_strategy": "steps", "eval_steps": 1}),
    ],
    ids=["in step 3", "in step 3 of a stream", "in the evaluation of step 2"],
)
def test_a_reward_that_fails_loses_nothing_that_was_learnt(call: int, more: dict[str, Any], tmp_path: Path) -> None:
    given = keys(tmp_path, CHANGING, max_steps=3, per_device_train_batch_size=2, **more)
    whole = running.train(given)
    shutil.rmtree(tmp_path / "run")
    reward = {**REWARD, "function": "ppo_worth:fails_in_time", "arguments": {"call": call}}
    down = {**given, "reward_config": reward}
    with pytest.raises(llmtune.RewardError, match=r"the endpoint is down.*; step 2 is saved"):
        running.train(down)
    again = running.train(down)  # the endpoint is up again
    for name, tensor in whole.tensors.items():
        assert torch.equal(again.tensors[name], tensor), name
    seen, seen_again = ([row["eval_loss"] for row in run.metrics if "eval_loss" in row] for run in (whole, again))
    assert seen_again == seen[len(seen) - len(seen_again) :] and len(seen_again) == (2 if seen else 0)


def test_data_that_cannot_fill_the_parts_of_a_step(tmp_path: Path) -> None:
    rows = Path(keys(tmp_path)["dataset"]).read_text().splitlines()
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(rows[:3]))
    with pytest.raises(LlmtuneError, match="learn from 4 parts of a step, and the data are 3"):
        llmtune.plan(keys(tmp_path, {"ppo_buffer_size": 4}, dataset=str(few)))
    short = llmtune.plan(keys(tmp_path, {"ppo_buffer_size": 2}, dataset=str(few)))
    assert short.data.batches.micro_steps == 2
