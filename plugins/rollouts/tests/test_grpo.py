"""GRPO: the contract, TRL's loss and advantages, ranks, a continued run, and what it learns."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.testing import Law, in_ranks, laws, running

GIVEN = {
    "num_generations": 3,
    "max_new_tokens": 6,
    "num_iterations": 2,
    "beta": 0.1,
    "temperature": 1.3,
    "epsilon": 10.0,
}
LORA = {"peft_config": {"name": "lora", "r": 4, "lora_dropout": 0.0}, "learning_rate": 0.002}
ANSWERS = 4


@pytest.mark.parametrize("law", laws("stage_config", "grpo", GIVEN, recipe={"seed": 1}), ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    """With a seed that draws no padding token, whose embedding transformers lets have no gradient."""
    law(tmp_path)


@pytest.mark.parametrize("law", laws("stage_config", "grpo", {**GIVEN, "loss_type": "grpo"}, recipe=LORA), ids=str)
def test_contract_with_adapters(law: Law, tmp_path: Path) -> None:
    law(tmp_path)


def keys(folder: Path, stage: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    block = {"name": "grpo", "num_generations": ANSWERS, "max_new_tokens": 8, **(stage or {})}
    given = {"stage_config": block, "reward_config": "reference", "disable_shuffling": True, **more}
    return running.tiny_recipe(folder, kind="prompt", **given)


def prepared(plan: Any, objective: Any) -> list[Any]:
    batches = plan.data.batches.step(0, plan.device)
    with torch.no_grad():
        return list(objective(lambda: objective.stage.prepare(objective.model, batches, objective.context)))


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo"}, {"loss_type": "grpo"}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"loss_type": "dr_grpo"}),
    "dapo": ({"loss_type": "dapo"}, {"loss_type": "dapo"}),
    "bnpo": ({"loss_type": "bnpo"}, {"loss_type": "bnpo"}),
    "plain kl": (
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
    ),
    "kl": ({"loss_type": "grpo", "beta": 0.3}, {"loss_type": "grpo", "beta": 0.3}),
    "high": ({"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.4}, {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.4}),
    "sequence": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
    "hot": ({"temperature": 1.7, "beta": 0.3}, {"temperature": 1.7, "beta": 0.3}),
    **{
        f"drawn elsewhere, {mode}": (
            {"sampling_correction": mode, "sampling_clip_max": 1.1, "sampling_clip_min": 0.9, "beta": 0.3},
            {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.1,
             "vllm_importance_sampling_clip_min": 0.9, "beta": 0.3},
        )
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_trls(case: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="needs trl, which the loss is compared with")
    from datasets import Dataset
    from transformers import AutoTokenizer

    given, theirs = CASES[case]
    elsewhere = case.startswith("drawn elsewhere")
    given = keys(tmp_path, {"num_iterations": 2, **given}, gradient_accumulation_steps=1)
    plan, objective = running.start(given)
    if elsewhere:
        usual = objective.context.generate
        objective.context.generate = lambda *asked: [
            replace(each, logps=tuple(drawn_with(each.ids))) for each in usual(*asked)
        ]
    reference = copy.deepcopy(plan.model.module).eval()
    batches = prepared(plan, objective)
    with torch.no_grad(), torch.random.fork_rng():  # between two updates, so that probabilities have moved
        torch.manual_seed(1)
        for weight in plan.model.module.parameters():
            weight += 0.02 * torch.randn_like(weight)
    model = copy.deepcopy(plan.model.module)
    answers, weight = sum(batch.sequences for batch in batches), sum(batch.weight for batch in batches)
    found = [objective(batch) for batch in batches]
    total = sum(one.total for one in found) / weight
    total.backward()
    config = trl.GRPOConfig(
        output_dir=str(tmp_path / "trl"), report_to=[], use_cpu=True, bf16=False, num_generations=ANSWERS,
        per_device_train_batch_size=answers, max_completion_length=8, num_iterations=2, **{"beta": 0.0, **theirs},
    )  # fmt: skip
    judge = trl.GRPOTrainer(
        model=model, args=config, reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": "How much?"}] * answers),
        processing_class=AutoTokenizer.from_pretrained(given["model"]),
    )  # fmt: skip
    judge.current_gradient_accumulation_steps = 1
    inputs = laid_out(batches, reference, given["stage_config"].get("temperature", 1.0))
    if elsewhere:
        inputs["importance_sampling_ratio"] = ratio = trls_ratio(judge, reference, inputs)
        within = (ratio > 0.91) & (ratio < 1.09)
        assert within.any() and not within.all()
    expected = judge._compute_loss(model.train(), inputs)
    expected.backward()
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in one.parameters() if p.grad is not None]).item()
        for one in (plan.model.module, model)
    ]
    assert total.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    if case == "plain kl":
        kl = [one.metrics["kl"] for one in found]
        ours = sum(value for value, _ in kl) / sum(count for _, count in kl)
        assert float(ours) == pytest.approx(judge._metrics["train"]["kl"][0], rel=1e-5)


def drawn_with(ids: Sequence[int]) -> list[float]:
    """What an engine could tell of tokens that it has drawn, about as likely as they are, all but the first."""
    logps = -5.5 + 0.1 * torch.randn(len(ids), generator=torch.Generator().manual_seed(sum(ids)))
    return [math.nan, *logps.tolist()[1:]]


def trls_ratio(judge: Any, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What TRL multiplies the loss of these answers by, if they are vLLM's."""
    asked, said = (
        [ids[mask == 1].tolist() for ids, mask in zip(inputs[f"{part}_ids"], inputs[f"{part}_mask"], strict=True)]
        for part in ("prompt", "completion")
    )
    answers = asked, said, None, [""] * len(said), [*map(drawn_with, said)], {}, None, None
    judge.use_vllm, judge._generate = True, lambda prompts: answers
    trained = copy.deepcopy(judge.model.state_dict())
    judge.model.load_state_dict(model.state_dict())
    found = judge._generate_and_score_completions([{"prompt": "How much?"}] * len(said))["importance_sampling_ratio"]
    judge.model.load_state_dict(trained)
    return found


def laid_out(batches: list[Any], reference: Any, temperature: float) -> dict[str, torch.Tensor]:
    """All answers as TRL lays them out: prompts padded on the left, answers on the right."""
    rows: list[tuple[list[int], list[int], torch.Tensor, torch.Tensor]] = []
    for batch in batches:
        for number, ids in enumerate(batch.rows()):
            mine = batch.target_sequence == number
            said = int(mine.sum())
            known = batch.extra["old_logps"][mine]
            rows.append((ids[: len(ids) - said], ids[len(ids) - said :], known, batch.extra["advantages"][number]))
    before, after = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    size = len(rows)
    prompt, prompt_mask = torch.zeros(size, before, dtype=torch.int64), torch.zeros(size, before, dtype=torch.int64)
    answer, answer_mask = torch.zeros(size, after, dtype=torch.int64), torch.zeros(size, after, dtype=torch.int64)
    old = torch.zeros(size, after)
    for at, (asked, said, known, _) in enumerate(rows):
        prompt[at, before - len(asked) :], prompt_mask[at, before - len(asked) :] = torch.tensor(asked), 1
        answer[at, : len(said)], answer_mask[at, : len(said)] = torch.tensor(said), 1
        old[at, : len(said)] = known
    ids, mask = torch.cat([prompt, answer], 1), torch.cat([prompt_mask, answer_mask], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = reference(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, before - 1 : -1]
    ref = (logits / temperature).log_softmax(-1).gather(-1, answer[..., None]).squeeze(-1)
    return {
        "prompt_ids": prompt, "prompt_mask": prompt_mask, "completion_ids": answer, "completion_mask": answer_mask,
        "advantages": torch.stack([row[3] for row in rows]), "old_per_token_logps": old,
        "ref_per_token_logps": ref, "num_items_in_batch": answer_mask.sum(),
    }  # fmt: skip


def test_advantages_are_rewards_among_the_answers_to_the_same_prompt(tmp_path: Path) -> None:
    _, objective = running.start(keys(tmp_path, {"scale_rewards": "group"}))
    stage: Any = objective.stage
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 5.0, 0.0, torch.nan, 1.0, torch.nan])
    found, deviation = stage.advantages(rewards, objective.context)
    first = torch.tensor([1.0, 2.0, 3.0, 6.0])
    torch.testing.assert_close(found[:4], (first - 3) / (first.std() + 1e-4))
    assert found[4:8].tolist() == [0, 0, 0, 0] and deviation[4] == 0
    torch.testing.assert_close(found[8:], torch.tensor([-0.5, 0, 0.5, 0]) / (torch.tensor([0.0, 1.0]).std() + 1e-4))
    for scale in ("none", "batch"):
        _, objective = running.start(keys(tmp_path, {"scale_rewards": scale}))
        stage = objective.stage
        found, _ = stage.advantages(rewards, objective.context)
        real = rewards[~rewards.isnan()]
        by = 1.0 if scale == "none" else real.std() + 1e-4
        torch.testing.assert_close(found[:4], (first - 3) / by)


def test_rewards_are_weighted_and_those_that_say_nothing_left_out(tmp_path: Path) -> None:
    from llmtune_rollouts.answering import weighted

    scores = torch.tensor([[1.0, 2.0], [torch.nan, 4.0], [torch.nan, torch.nan]])
    found = weighted(scores, (0.5, 2.0))
    assert found[:2].tolist() == [4.5, 8.0] and found[2].isnan()


def test_answers_that_were_cut_teach_nothing_where_the_recipe_says_so(tmp_path: Path) -> None:
    plan, objective = running.start(keys(tmp_path, {"mask_truncated_completions": True}))
    cut = whole = 0
    for batch in prepared(plan, objective):
        for number, was_cut in enumerate(batch.extra["cut"].tolist()):
            trained = int((batch.target_sequence == number).sum())
            assert trained == (0 if was_cut else int(batch.extra["length"][number]))
            cut, whole = cut + bool(was_cut), whole + (not was_cut)
    assert cut and whole


def test_an_answer_depends_on_its_prompt_alone(tmp_path: Path) -> None:
    """Whatever micro-batch a prompt is in, and again in a run that is continued."""
    seen = []
    for rows, micros in ((8, 1), (2, 4)):
        plan, objective = running.start(
            keys(tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=micros)
        )
        found = [
            (sample, tuple(ids))
            for batch in prepared(plan, objective)
            for sample, ids in zip(batch.sample_ids, batch.rows(), strict=True)
        ]
        assert len(found) == 8 * ANSWERS
        assert len(set(found)) > 8 * (ANSWERS - 1)  # the answers to a prompt differ
        seen.append(sorted(found))
    assert seen[0] == seen[1]


def test_one_rank_equals_two(tmp_path: Path) -> None:
    stage = {"num_iterations": 2, "beta": 0.1, "scale_rewards": "batch"}
    one = running.train(keys(tmp_path, stage, learning_rate=0.002))
    two = keys(
        tmp_path, stage, learning_rate=0.002, gradient_accumulation_steps=1, output_dir=str(tmp_path / "two")
    )  # fmt: skip
    in_ranks(2, tmp_path / "ranks", running.train, two)
    rows = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines() if line]
    assert len(rows) == len(one.metrics) == 4
    for ours, theirs in zip(one.metrics, rows, strict=True):
        for name in ("loss", "grad_norm", "reward", "reward_std", "kl", "clipped", "completions/length", "tokens"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-6), name


def test_a_rank_without_prompts_takes_part(tmp_path: Path) -> None:
    """Five prompts for two ranks: in the last step one has none."""
    given = keys(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=1, max_steps=None, num_train_epochs=1,
        val_size=0, max_samples=5,
    )  # fmt: skip
    in_ranks(2, tmp_path / "ranks", running.train, given)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().split()) > 0


def test_a_prompt_that_fills_the_context_is_left_out(tmp_path: Path) -> None:
    given = {**keys(tmp_path), "cutoff_len": 4096}
    plan = running.plan(given)
    limit = plan.model.module.config.max_position_embeddings
    assert plan.recipe.data.cutoff_len == limit - 1
    assert f"cutoff_len: 4,096 -> {limit - 1:,}" in str(plan)


def test_the_reward_rises(tmp_path: Path) -> None:
    """The share of even tokens, from what chance gives."""
    given = keys(tmp_path, {"num_generations": 8}, max_steps=30, learning_rate=0.02, lr_scheduler_config="constant")
    rewards = [row["reward"] for row in running.train(given).metrics]
    assert sum(rewards[:3]) / 3 < 0.65 and sum(rewards[-3:]) / 3 > 0.85


def test_answers_of_the_same_worth_are_told_to_teach_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    alike = {"name": "rule", "match": "length", "max_tokens": 4096}
    rows = running.train(keys(tmp_path, reward_config=alike, max_steps=3)).metrics
    assert all(row["frac_reward_zero_std"] == 1 and row["grad_norm"] == 0 for row in rows)
    told = "the gradient was 0 in steps 1 to 3, so that nothing was learnt: the rewards told no answer from another"
    assert capfd.readouterr().err.count(told) == 1


def test_a_conversation_is_asked_for_its_last_answer(tmp_path: Path) -> None:
    given = running.tiny_recipe(
        tmp_path, kind="conversation", reward_config="reference",
        stage_config={"name": "grpo", "num_generations": 2, "max_new_tokens": 4},
    )  # fmt: skip
    plan = running.plan(given)
    (batch,) = plan.data.batches.step(0, plan.device)[:1]
    texts = plan.model.tokenizer.batch_decode(batch.rows())
    assert all(text.rstrip().endswith(("assistant", "assistant>", "assistant\n")) for text in texts), texts
    assert all("answer" in row and "messages" in row for row in batch.columns)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"reward_config": None}, "reward_config: not given, and stage_config grpo learns from what answers are worth"),
        ({"stage_config": "sft", "reward_config": "reference"}, "stage_config sft"),
        (
            {
                "metric_for_best_model": "eval_rewrad", "val_size": 4, "load_best_model_at_end": True,
                "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2,
            },
            "eval_reward",
        ),
        (
            {
                "optim_config": {"name": "adamw", "layerwise": True}, "gradient_accumulation_steps": 1,
                "max_grad_norm": 0,
            },
            "sums the gradients of 4 micro-batches of answers",
        ),
        ({"packing": True}, "prompts, which are answered one by one; set packing: false"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_a_sentence(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    given = {**keys(tmp_path), **change}
    if change.get("stage_config"):
        given = running.tiny_recipe(tmp_path, **change)
    with pytest.raises(llmtune.LlmtuneError) as caught:
        running.plan(given)
    assert sentence in str(caught.value)
