"""Stages that compare answers: a loss over pairs or labels trains as a loop that looks at one answer at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmtune import Batch, StageContext, StageLoss
from llmtune.contract.records import ParallelDims
from llmtune.data import DataConfig, TokenSamples
from llmtune.data.batch_loader import BatchLoader
from llmtune.distributed.placement import full
from llmtune.distributed.ranks import Ranks
from llmtune.planning.objections import batch_objections
from llmtune.recipe.recipe import load_recipe
from llmtune.testing import running
from llmtune.training.building import make_training
from llmtune.training.loop import train
from tests.spawn import in_ranks

STEPS, PAIRS = 3, 11


class Answers:
    """Mean log-probability of every answer, then a loss over pairs, or over answers with a label."""

    def loss(self, model: Any, batch: Batch, context: StageContext) -> StageLoss:
        hidden_ND = context.hidden_states(model, batch).flatten(0, 1).index_select(0, batch.predict_at)
        losses_N = F.cross_entropy(context.head(model)(hidden_ND).float(), batch.targets, reduction="none")
        assert batch.target_sequence is not None
        zeros_S = losses_N.new_zeros(batch.sequences)
        sums_S = zeros_S.index_add(0, batch.target_sequence, -losses_N)
        counts_S = zeros_S.index_add(0, batch.target_sequence, torch.ones_like(losses_N))
        total = loss_of(sums_S / counts_S.clamp(min=1), batch.desirable)
        return StageLoss(total=total, metrics={"answers": torch.tensor(float(batch.sequences))})


def loss_of(means_S: Tensor, wanted: Tensor | None) -> Tensor:
    """Pairs: the logistic loss of their difference. Labelled answers: how far each is on the wrong side."""
    if wanted is None:
        return -F.logsigmoid(2.0 * (means_S[0::2] - means_S[1::2])).sum()
    return torch.where(wanted, 1 - torch.sigmoid(means_S), 0.3 * torch.sigmoid(means_S)).sum()


def answers(kind: str) -> TokenSamples:
    rng = np.random.default_rng(2)
    width = 2 if kind == "preference" else 1
    sequences = []
    for length in rng.integers(6, 40, PAIRS * width):
        mask = np.arange(length) >= rng.integers(2, 5)
        sequences.append((rng.integers(3, 300, length), mask))
    labels = rng.random(PAIRS) < 0.5 if kind == "labelled" else None
    return TokenSamples.from_lists(sequences, range(PAIRS), kind=kind, width=width, labels=labels)


class Losses:
    """A watcher that keeps what the loop reports."""

    def __init__(self) -> None:
        self.found: list[tuple[float, float]] = []

    def after_step(self, step: int, stats: Any) -> bool:
        self.found.append((stats.loss, stats.metrics["answers"]))
        return False


def feed_for(kind: str, packing: bool, ranks: Ranks, micro_steps: int) -> BatchLoader:
    return BatchLoader.make(
        answers(kind), DataConfig(packing=packing, cutoff_len=64), per_device=4 // (ranks.size * micro_steps), seed=1,
        micro_steps=micro_steps, ranks=ranks, flat=packing, pad_id=0,
    )  # fmt: skip


def run(keys: dict[str, Any], kind: str, packing: bool, micro_steps: int) -> tuple[list[Any], dict[str, Tensor]]:
    plan, objective = running.start(keys)
    objective.stage = Answers()
    feed, losses = feed_for(kind, packing, plan.ranks, micro_steps), Losses()
    training = replace(
        make_training(plan, objective, sgd(plan.model.module)), batches=feed, total_steps=STEPS, warmup_steps=0,
        max_grad_norm=0.0, seed=0,
    )  # fmt: skip
    assert train(training, losses) == STEPS
    return losses.found, {name: full(p).detach() for name, p in plan.model.module.named_parameters()}


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for group in optimizer.param_groups:
        group["initial_lr"] = 0.1
    return optimizer


def by_hand(folder: str, kind: str, feed: BatchLoader) -> tuple[list[Any], dict[str, Tensor]]:
    """Each answer alone through transformers' model, a mean over the step's samples."""
    from transformers import AutoModelForCausalLM

    samples, found = answers(kind), []
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = sgd(model)
    for step in range(STEPS):
        chosen = [sample for unit in feed.order.step_units(step) for sample in feed.units[unit]]
        total = torch.zeros(())
        for sample in chosen:
            means = []
            for part in samples.sequences(sample):
                ids, mask = torch.from_numpy(samples.ids[part]).long(), torch.from_numpy(samples.mask[part])
                logp = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
                means.append(logp[mask[1:]].mean())
            wanted = torch.tensor([samples.labels[sample]]) if samples.labels is not None else None
            total = total + loss_of(torch.stack(means), wanted)
        loss = total / len(chosen)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (STEPS - step) / STEPS
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), float(samples.width)))
    return found, dict(model.named_parameters())


def keys_of(folder: Path) -> dict[str, Any]:
    return running.tiny_recipe(
        folder, learning_rate=0.1, lr_scheduler_config="linear", disable_gradient_checkpointing=True
    )


def compare(found: tuple[list[Any], dict[str, Tensor]], expected: tuple[list[Any], dict[str, Tensor]]) -> None:
    assert np.array(found[0]) == pytest.approx(np.array(expected[0]), rel=1e-5)
    assert set(found[1]) == set(expected[1])
    for name, tensor in expected[1].items():
        torch.testing.assert_close(found[1][name], tensor.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["preference", "labelled"])
def test_a_stage_over_answers_trains_as_a_loop_by_hand(kind: str, packing: bool, tmp_path: Path) -> None:
    keys = keys_of(tmp_path)
    expected = by_hand(keys["model"], kind, feed_for(kind, packing, Ranks(), 2))
    compare(run(keys, kind, packing, 2), expected)
    if packing == (kind == "labelled"):  # each kind and each layout once
        compare(in_ranks(2, tmp_path / "ranks", run, keys, kind, packing, 1)[0], expected)


def test_batches_that_would_mix_or_cut_answers_are_refused(tmp_path: Path) -> None:
    data = load_recipe(keys_of(tmp_path)).data
    assert list(batch_objections("conversation", data, Ranks())) == []
    assert list(batch_objections("preference", data, Ranks())) == []
    joined = replace(data, packing=True, neat_packing=False)
    (sentence,) = batch_objections("preference", joined, Ranks())
    assert sentence.startswith("neat_packing: found false, but the data are preferences, which must not see each other")
    spread = Ranks(size=2, dims=ParallelDims(context=2))
    (sentence,) = batch_objections("preference", data, spread)
    assert "cp_size is 2, but the loss of preferences needs whole answers" in sentence
    for wrong in ((data, spread), (joined, Ranks())):  # a sample in pieces would count several times, or its tokens
        (sentence,) = batch_objections("conversation", *wrong, counts_samples=True)
        assert "samples that the stage counts" in sentence
    (sentence,) = batch_objections("prompt", joined, Ranks())
    assert sentence.startswith("packing: found true, but the data are prompts")
