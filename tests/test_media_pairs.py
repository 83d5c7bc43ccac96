"""Pairs of answers about pictures, and rows with pictures over ranks: numbers are those of transformers, and those of
one rank on two."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

import llmtune
from llmtune.inference.reward import rewards_of_rows
from llmtune.testing import running
from llmtune.testing.ranks import in_ranks
from llmtune.training.isolation import check_media_isolation
from tests.media_by_hand import Plain, shaken
from tests.test_media_stages import ASKED, BETTER, STREAMED, WORSE, labelled, recipe, shown
from tests.test_parity import train_each
from tests.tiny_families import MODELS as FAMILIES
from tests.tiny_media import MODELS

pytest.importorskip("PIL")
BETA = 0.5


@pytest.fixture(scope="module")
def gemma(place: Path) -> Path:
    return MODELS["gemma3"](place / "gemma3")


@pytest.fixture(scope="module")
def other(gemma: Path, place: Path) -> Path:
    return shaken(gemma, place / "other")


@pytest.fixture(scope="module")
def adapter(gemma: Path, place: Path) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(2)
    base = AutoModelForImageTextToText.from_pretrained(gemma, dtype=torch.float32)
    names = r".*language_model.*\.(q_proj|v_proj)"
    made: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=32, target_modules=names, init_lora_weights=False))
    made.save_pretrained(place / "adapter")
    return place / "adapter"


def pairs(**more: Any) -> list[dict[str, Any]]:
    found = zip(ASKED, BETTER, WORSE, strict=True)
    return [asked.row(chosen=better, rejected=worse, **more) for asked, better, worse in found]


def said(model: Plain) -> tuple[torch.Tensor, torch.Tensor]:
    """(pairs, 2) the summed log-probabilities of the answers, and their tokens."""
    with torch.no_grad():
        logps = [[model.logps(a, model.answer(a, text)) for text in both]
                 for a, *both in zip(ASKED, BETTER, WORSE, strict=True)]  # fmt: skip
    sums = torch.tensor([[each.sum().item() for each in both] for both in logps])
    return sums, torch.tensor([[float(len(each)) for each in both] for both in logps])


def first(
    place: Path, name: str, model: Path, stage: dict[str, Any], written: Any = None, **keys: Any
) -> dict[str, Any]:
    return llmtune.train(recipe(model, place, name, written or pairs(), stage_config=stage, **keys)).metrics[0]


def dpo_loss(policy: torch.Tensor, judge: torch.Tensor) -> float:
    ratio = policy - judge
    return -logsigmoid(BETA * (ratio[:, 0] - ratio[:, 1])).mean().item()


def test_dpo_on_pictures_equals_its_formula_with_every_reference(
    place: Path, gemma: Path, other: Path, adapter: Path
) -> None:
    """A frozen copy, the same asked once before training, and the base of an adapter that goes on; where none is named
    it is the adapter as it was, so that nothing is apart."""
    from peft import PeftModel

    base, judge = Plain(gemma, gemma, place), Plain(other, gemma, place)
    own, _ = said(base)
    theirs, _ = said(judge)
    expected = dpo_loss(own, theirs)
    stage = {"name": "dpo", "pref_beta": BETA, "ref_model": str(other)}
    assert first(place, "frozen", gemma, stage)["loss"] == pytest.approx(expected, rel=1e-5)
    found = first(place, "asked-before", gemma, {**stage, "precompute_reference": True})
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    adapted: Any = PeftModel.from_pretrained(base.model, adapter)
    peft = {"name": "lora", "adapter_name_or_path": str(adapter), "lora_dropout": 0.0}
    stage = {"name": "dpo", "pref_beta": BETA}
    assert first(place, "as-it-was", gemma, stage, peft_config=peft)["loss"] == pytest.approx(math.log(2), rel=1e-6)
    found = first(place, "base", gemma, {**stage, "ref_model": str(gemma)}, peft_config=peft)
    expected = dpo_loss(said(Plain(adapted, gemma, place))[0], own)
    assert abs(expected - 0.6931) > 1e-3
    assert found["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_reference_is_asked_again_about_pictures_that_are_seen_otherwise(place: Path, gemma: Path) -> None:
    """They have the same tokens, whatever their size; the model that begins as its own reference learns of 0."""
    stage = {"name": "dpo", "pref_beta": BETA, "ref_model": str(gemma), "precompute_reference": True}
    for name, most in (("whole", None), ("small", 30)):
        found = first(place, f"seen-{name}", gemma, stage, image_max_pixels=most)
        assert found["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_pairs_end_to_end_are_checked_to_be_apart(place: Path, gemma: Path) -> None:
    """As attention that knows the bounds of documents has them: a sample is two, each with the pictures."""
    plan, objective = running.start(recipe(gemma, place, "apart", pairs(), stage_config="dpo"))
    loader = replace(plan.data.batches, flat=True)
    check_media_isolation(objective, plan.device, loader)

    def unbounded(module: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {name: value for name, value in given.items() if name not in ("position_ids", "cu_seq_lens_q")}

    objective.model.base_model.register_forward_pre_hook(unbounded, with_kwargs=True, prepend=True)
    with pytest.raises(llmtune.PlanError, match="reads documents beside ones that show media otherwise"):
        check_media_isolation(objective, plan.device, loader)


def test_orpo_on_pictures_equals_its_formula(place: Path, gemma: Path) -> None:
    sums, counts = said(Plain(gemma, gemma, place))
    means = sums / counts
    odds = (means[:, 0] - means[:, 1]) - (torch.log1p(-means[:, 0].exp()) - torch.log1p(-means[:, 1].exp()))
    expected = (-means[:, 0] - BETA * logsigmoid(odds)).mean().item()
    found = first(place, "orpo", gemma, {"name": "dpo", "pref_loss": "orpo", "pref_beta": BETA})["loss"]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5"])
def test_a_reward_model_of_pictures_learns_its_margins_as_by_hand(name: str, place: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = (MODELS | FAMILIES)[name](place / f"{name}-judged")
    keys = {"stage": {"name": "rm"}, "written": pairs(margin=0.3), "learning_rate": 1e-30}
    found = first(place, f"rm-{name}", model, **keys)
    done = place / f"run-rm-{name}"
    judge: Any = AutoModelForSequenceClassification.from_pretrained(done / "model", dtype=torch.float32)
    judge.eval()
    plain, scores = Plain(model, model, place), []
    with torch.no_grad():
        for asked, *both in zip(ASKED, BETTER, WORSE, strict=True):
            turns = [{"role": "assistant", "content": [{"type": "text", "text": text}]} for text in both]
            scores.append([judge(**plain.inputs([asked.turn(place), turn])).logits.item() for turn in turns])
    ahead = torch.tensor([better - worse - 0.3 for better, worse in scores])
    assert found["loss"] == pytest.approx(-logsigmoid(ahead).mean().item(), rel=1e-5)
    run = llmtune.load(done)
    for asked, better, (expected, _) in zip(ASKED, BETTER, scores, strict=True):
        files = [place / name for name in asked.images]
        assert run.reward(better, asked.text, images=files) == pytest.approx(expected, abs=1e-5)
    rows = list(rewards_of_rows(done, str(place / f"rm-{name}.json"), device="cpu"))
    assert [[row["chosen"], row["rejected"]] for row in rows] == [pytest.approx(both, abs=1e-5) for both in scores]


def test_rows_with_pictures_learn_on_two_ranks_what_they_learn_on_one(place: Path, gemma: Path, other: Path) -> None:
    """Where each rank has rows of its own, of a stream too and packed, and where they share every layer's products."""
    llava = MODELS["llava"](place / "llava")
    kto = {"name": "kto", "pref_beta": BETA, "ref_model": str(other)}
    streamed = {**STREAMED, "save_steps": None, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    recipes = {
        "kto": recipe(gemma, place, "kto", labelled(), stage_config=kto, max_steps=2),
        "stream": recipe(llava, place, "stream", shown(place), stage_config="sft", streaming=True, **streamed),
        "tensor": recipe(llava, place, "tensor", shown(place), stage_config="sft", on_bad_record="skip", max_steps=2),
    }
    spread: dict[str, dict[str, Any]] = {
        "kto": {"packing": True, "cutoff_len": 100},
        "stream": {"per_device_train_batch_size": 1},
        "tensor": {"dist_config": {"name": "fsdp2", "tp_size": 2}},
    }
    train_each([*recipes.values()])
    two = [{**recipes[name], **more, "output_dir": str(place / f"two-{name}")} for name, more in spread.items()]
    in_ranks(2, place / "ranks", train_each, two)
    for name in recipes:
        one, both = (llmtune.load(place / f"{kind}-{name}").metrics for kind in ("run", "two"))
        assert len(one) == len(both) > 1
        for ours, theirs in zip(one, both, strict=True):
            for metric in ("loss", "grad_norm", "tokens"):
                assert theirs[metric] == pytest.approx(ours[metric], rel=2e-5), (name, metric)
