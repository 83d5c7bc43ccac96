"""Rows that show pictures are answered and measured, after training and while it lasts, as transformers answers them,
on any number of ranks, and on from what a kill has left."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.contract.errors import PlanError
from llmtune.testing.ranks import in_ranks
from llmtune.training.predict import read_predictions
from tests.media_by_hand import AnswersByHand, decided_by_what_is_shown
from tests.test_media_training import STEPS, inputs_by_hand, recipe
from tests.tiny_media import MODELS, draw

pytest.importorskip("PIL")
GREEDY: dict[str, Any] = {
    "do_sample": False, "max_new_tokens": 6, "per_device_eval_batch_size": 3, "skip_special_tokens": False,
    "image_min_pixels": None,
}  # fmt: skip
NAME = "generated_predictions.jsonl"


def parts(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row up to its last answer, with parts that name its pictures."""
    files, found = iter(row.get("images", ())), []
    for message in row["messages"][:-1]:
        content: list[dict[str, Any]] = []
        for number, text in enumerate(message["content"].split("<image>")):
            content += [{"type": "image", "image": next(files)}] if number else []
            content += [{"type": "text", "text": text}] if text else []
        found.append({"role": message["role"], "content": content})
    return found


@pytest.fixture(scope="module")
def models(place: Path) -> Any:
    return cache(lambda name: decided_by_what_is_shown(MODELS[name](place / name)))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_rows_that_show_pictures_are_answered_as_by_transformers(
    name: str, models: Any, place: Path, tmp_path: Path
) -> None:
    data, theirs = json.loads((place / "rows.json").read_text()), AnswersByHand(models(name), place)
    found = llmtune.predict(models(name), place / "rows.json", output_dir=str(tmp_path), device="cpu", **GREEDY).rows
    assert [row["predict"] for row in found] == [theirs.answer(parts(row)) for row in data]
    assert all(row["label"].startswith(said["messages"][-1]["content"]) for row, said in zip(found, data, strict=True))
    assert len({row["predict"] for row in found}) > 2
    assert max(len(row["prompt"]) for row in found) < 300  # a picture has one place in the text


@pytest.fixture(scope="module")
def run(models: Any, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is measured while it lasts and at its end, and answers its rows and two sample prompts."""
    folder = tmp_path_factory.mktemp("run") / "run"
    keys = recipe(
        models("llava"), place, folder, peft_config={"name": "lora", "r": 4, "lora_dropout": 0.0},
        eval_dataset=str(place / "rows.json"), eval_steps=1, eval_strategy="steps", do_predict=True,
        media_dir=str(place), eval_config=["accuracy", "generate"], device="cpu",
        sample_prompts=["<image>0.png</image>what is it", "hello"], **GREEDY,
    )  # fmt: skip
    llmtune.train(keys)
    return folder


def test_a_run_is_measured_by_what_it_answers(run: Path, place: Path) -> None:
    trained, told = llmtune.load(run), [row for row in llmtune.load(run).metrics if "eval_accuracy" in row]
    model, _ = trained.model()
    batch, labels = inputs_by_hand(place / "llava", place)
    with torch.no_grad():
        likeliest = model(**batch).logits[:, :-1].argmax(-1)
    counted = labels[:, 1:] != -100
    right = (likeliest == labels[:, 1:])[counted].float().mean().item()
    assert len(told) == STEPS and told[-1]["eval_accuracy"] == pytest.approx(right)
    found = read_predictions(run)
    again = trained.predict(place / "rows.json", output_dir=str(run / "again"), device="cpu", **GREEDY)
    assert found == again.rows and len({row["predict"] for row in found}) > 2
    exact = sum(row["predict"] == row["label"] for row in found) / len(found)
    assert told[-1]["eval_exact_match"] == pytest.approx(100 * exact) or told[-1]["eval_exact_match"] == exact
    config = {"do_sample": False, "max_new_tokens": 6, "skip_special_tokens": True}
    said = [trained.chat("what is it", images=[place / "0.png"], **config)]
    trained = llmtune.load(run)
    said.append(trained.chat("hello", **config))
    assert [after for _, _, after in trained.answers] == said


def predicted(run: str, rows: str, folder: str) -> None:
    llmtune.predict(run, rows, output_dir=folder, device="cpu", **GREEDY)


def test_two_ranks_write_what_one_does_and_go_on_where_another_was_killed(
    run: Path, place: Path, tmp_path: Path
) -> None:
    rows = str(place / "rows.json")
    in_ranks(2, tmp_path / "two", predicted, str(run), rows, str(tmp_path / "o2"))
    written = (run / NAME).read_bytes()
    assert (tmp_path / "o2" / NAME).read_bytes() == written
    (tmp_path / "o2" / NAME).write_bytes(written[: len(written) // 2])  # in the midst of a line
    predicted(str(run), rows, str(tmp_path / "o2"))
    assert (tmp_path / "o2" / NAME).read_bytes() == written


def test_a_picture_that_is_another_one_makes_other_predictions(models: Any, place: Path, tmp_path: Path) -> None:
    asked = {"messages": [{"role": "user", "content": "<image>what"}], "images": ["a.png"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(asked) + "\n")
    source = {"path": str(tmp_path / "rows.jsonl"), "format": "prompt"}
    shutil.copy(place / "0.png", tmp_path / "a.png")
    keys: dict[str, Any] = {"output_dir": str(tmp_path / "out"), "device": "cpu", **GREEDY}
    llmtune.predict(models("llava"), source, **keys)
    draw(tmp_path / "a.png", "blue", "square", (24, 20))
    with pytest.raises(PlanError, match="was made with other settings"):
        llmtune.predict(models("llava"), source, **keys)


WRONG = {
    "<image>gone.png</image>what": "sample_prompts: there is no file .*gone.png",
    "<image>what": "sample_prompts: found 1 mark <image>",
    "<audio>0.png</audio>what": "sample_prompts: .* reads text and image, and 1 audio was given",
}


@pytest.mark.parametrize("question", WRONG)
def test_a_sample_prompt_that_cannot_be_shown_is_told_before_the_run(
    question: str, models: Any, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=WRONG[question]):
        llmtune.plan(recipe(models("llava"), place, tmp_path / "run", sample_prompts=[question], media_dir=str(place)))
