"""Every stage on rows that show pictures: numbers are those of transformers, of formulas on its log-probabilities, and
those of one rank on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from tests.media_by_hand import Asked, Plain, shaken
from tests.runs import killed_at
from tests.test_media_training import inputs_by_hand
from tests.test_resume import assert_equal_runs, forget_after
from tests.tiny_media import MODELS

pytest.importorskip("PIL")
ASKED = (
    Asked("<image>what is in the picture", ["0.png"]),
    Asked("hello"),
    Asked("how <image> and <image> differ", ["1.png", "2.png"]),
    Asked("is it <image>", ["4.png"]),
)
BETTER = ("red square", "world", "blue", "red circle here")
WORSE = ("blue", "how many", "red circle", "what")


@pytest.fixture(scope="module")
def gemma(place: Path) -> Path:
    """Its pictures' tokens have a type of their own, and see each other in both directions."""
    return MODELS["gemma3"](place / "gemma3")


@pytest.fixture(scope="module")
def reference(gemma: Path, place: Path) -> Path:
    return shaken(gemma, place / "reference")


def recipe(model: Path, place: Path, name: str, written: list[dict[str, Any]], **keys: Any) -> dict[str, Any]:
    """A recipe of one step that sees all rows."""
    data = place / f"{name}.json"
    data.write_text(json.dumps(written))
    return {
        "model": str(model), "dataset": str(data), "output_dir": str(place / f"run-{name}"), "max_steps": 1,
        "per_device_train_batch_size": 4, "cutoff_len": 1024, "learning_rate": 0.01, "lr_scheduler_config": "constant",
        "optim_config": {"name": "adamw", "weight_decay": 0.0}, "logging_steps": 1, "max_grad_norm": 0,
        "image_max_pixels": None, "image_min_pixels": None, "preprocessing_num_workers": 1, "disable_shuffling": True,
        **keys,
    }  # fmt: skip


def trained(keys: dict[str, Any]) -> dict[str, float]:
    """What the first step reported."""
    return llmtune.train(keys).metrics[0]


def labelled() -> list[dict[str, Any]]:
    """One answer of each label to each question in turn."""
    found = []
    for number, (asked, better, worse) in enumerate(zip(ASKED, BETTER, WORSE, strict=True)):
        wanted = number % 2 == 0
        found.append(asked.row(completion=better if wanted else worse, label=wanted))
    return found


def test_kto_learns_trls_loss_from_answers_before_other_questions_pictures(
    place: Path, gemma: Path, reference: Path
) -> None:
    """Row by row, too, where each batch holds answers of one label."""
    written, beta, weights = labelled(), 0.5, {True: 0.7, False: 1.3}
    with torch.no_grad():
        model, judge = Plain(gemma, gemma, place), Plain(reference, gemma, place)
        answers = [model.answer(asked, row["completion"]) for asked, row in zip(ASKED, written, strict=True)]

        def ratio(asked: Asked, answer: list[int]) -> float:
            return (model.logps(asked, answer).sum() - judge.logps(asked, answer).sum()).item()

        crossed = [ratio(asked, answer) for asked, answer in zip(ASKED, [*answers[1:], answers[0]], strict=True)]
        own = [ratio(asked, answer) for asked, answer in zip(ASKED, answers, strict=True)]
    kl = max(0.0, sum(crossed) / 4)
    assert kl > 0.01
    loss = 0.0
    for row, each in zip(written, own, strict=True):
        apart = each - kl if row["label"] else kl - each
        loss += weights[row["label"]] * (1 - torch.sigmoid(torch.tensor(beta * apart)).item()) / 4
    stage = {"name": "kto", "pref_beta": beta, "kto_chosen_weight": 0.7, "kto_rejected_weight": 1.3,
             "ref_model": str(reference)}  # fmt: skip
    keys = recipe(gemma, place, "kto", written, stage_config=stage)
    by_row = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "output_dir": str(place / "kto-rows")}
    found, rowwise = trained(keys), trained({**keys, **by_row})
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["kl"] == pytest.approx(kl, rel=1e-4)
    assert found["rewards/chosen"] == pytest.approx(beta * (own[0] + own[2]) / 2, rel=1e-4)
    for name in ("loss", "kl", "grad_norm", "rewards/chosen", "rewards/rejected"):
        assert rowwise[name] == pytest.approx(found[name], rel=1e-5), name


STREAMED = {"max_steps": 6, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "save_steps": 1,
            "save_total_limit": None, "on_bad_record": "skip", "freeze_vision_tower": False}  # fmt: skip
"""Six steps of two rows: a pass through eight of them ends on the way."""


@pytest.fixture(scope="module")
def llava(place: Path) -> Path:
    return MODELS["llava"](place / "llava")


def shown(place: Path) -> list[dict[str, Any]]:
    """Eight rows that can be used, and one whose picture is missing."""
    found = json.loads((place / "rows.json").read_text())
    return [*found[:3], {**found[0], "images": ["missing.png"] * len(found[0]["images"])}, *found[3:]]


@pytest.fixture(scope="module")
def streamed(place: Path, llava: Path) -> dict[str, Any]:
    """A streamed run to its end, and its recipe."""
    keys = recipe(llava, place, "streamed", shown(place), stage_config="sft", **{**STREAMED, "streaming": True})
    llmtune.train(keys)
    return keys


def test_a_stream_of_pictures_is_the_same_run_as_rows_read_before(
    place: Path, llava: Path, streamed: dict[str, Any]
) -> None:
    """The row that cannot be used is left out, and told of."""
    llmtune.train(recipe(llava, place, "before", shown(place), stage_config="sft", **STREAMED))
    found, expected = (llmtune.load(place / f"run-{name}").metrics for name in ("streamed", "before"))
    assert len(found) == len(expected) == 6
    for one, other in zip(found, expected, strict=True):
        assert [one[name] for name in ("loss", "grad_norm", "tokens")] == pytest.approx(
            [other[name] for name in ("loss", "grad_norm", "tokens")], rel=1e-6
        )
    bad = [json.loads(line) for line in (place / "run-streamed" / "quarantine.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in bad] == ["missing media", "missing media"]  # once in each pass


def test_a_stream_of_pictures_that_was_killed_goes_on_bit_by_bit(place: Path, streamed: dict[str, Any]) -> None:
    keys = {**streamed, "output_dir": str(place / "killed")}
    killed_at(3, place / "killed", lambda: llmtune.train(keys))
    llmtune.train(keys)
    assert_equal_runs(place / "run-streamed", place / "killed")


def test_rows_with_pictures_grouped_by_length_go_on_bit_by_bit_and_are_evaluated_as_by_hand(
    place: Path, llava: Path
) -> None:
    """The loss of an evaluation, in batches of three rows and one of two, is that of a loop over the result."""
    keys = recipe(
        llava, place, "grouped", [], dataset=str(place / "rows.json"), stage_config="sft", max_steps=4,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, group_by_length=True, disable_shuffling=False,
        eval_dataset=str(place / "rows.json"), per_device_eval_batch_size=3, eval_strategy="steps",
        eval_steps=4, save_steps=1,
        save_total_limit=None, preprocessing_num_workers=2, freeze_vision_tower=False,
    )  # fmt: skip
    metrics = llmtune.train(keys).metrics
    broken = {**keys, "output_dir": str(place / "broken")}
    llmtune.train(broken)
    forget_after(place / "broken", 1)
    llmtune.train(broken)
    assert_equal_runs(place / "run-grouped", place / "broken")
    batch, labels = inputs_by_hand(llava, place)
    with torch.no_grad():
        logits = Plain(place / "run-grouped" / "model", llava, place).model(**batch).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    (found,) = [row["eval_loss"] for row in metrics if "eval_loss" in row]
    assert found == pytest.approx(loss.item(), rel=1e-5)


def test_plain_texts_learn_what_stands_around_their_pictures(place: Path, llava: Path) -> None:
    """The loss is that of transformers on the processor's own tokens, without those that its template writes for a
    picture: a mark and a line break."""
    from PIL import Image

    texts = [("<image>red square", ["0.png"]), ("hello <image> and <image>", ["1.png", "2.png"]), ("how many", [])]
    written = [{"text": text, **({"images": images} if images else {})} for text, images in texts]
    keys = recipe(llava, place, "texts", written, stage_config="pt", per_device_train_batch_size=3)
    plain, total, count = Plain(llava, llava, place), 0.0, 0
    end = plain.processor.tokenizer.eos_token or ""
    (line,) = plain.processor.tokenizer.encode("\n", add_special_tokens=False)
    shows = torch.tensor([plain.model.config.image_token_id, line])
    for text, images in texts:
        opened = [Image.open(place / name) for name in images]
        batch = plain.processor(
            text=text.replace("<image>", "<image>\n") + end, images=opened or None, return_tensors="pt"
        )
        with torch.no_grad():
            logits = plain.model(**batch).logits[0, :-1]
        labels = batch["input_ids"][0, 1:]
        learnt = ~torch.isin(labels, shows)
        total += torch.nn.functional.cross_entropy(logits[learnt], labels[learnt], reduction="sum").item()
        count += int(learnt.sum())
    assert trained(keys)["loss"] == pytest.approx(total / count, rel=1e-5)
