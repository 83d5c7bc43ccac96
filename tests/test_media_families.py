"""More kinds of models that read pictures learn what a loop in transformers teaches them, a row at a time; and all that
transformers has are understood, or refused in a sentence."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.media.loading import load_processor
from tests.media_table import COMPARED, page
from tests.test_audio_training import by_hand
from tests.test_media_training import TRAINED, conversations, learnt, recipe, same
from tests.tiny_families import MODELS, paligemma
from tests.tiny_media import draw, rows

pytest.importorskip("PIL")
NEED_TORCHVISION = ("mistral3",)
UNPACKED = {"qwen3_5": "has recurrent layers"}
"""What keeps documents of a packed row from being told apart."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    rows(folder)
    return folder


def rows_by_hand(folder: Path, place: Path) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """(what the model is given, labels (1, T) with -100 where nothing is learnt) of each row: what stands between the
    begin of an answer and its end."""
    processor, found = load_processor(folder), []
    begin, (end,) = (
        processor.tokenizer.encode(text, add_special_tokens=False) for text in ("<|im_start|>assistant\n", "<|im_end|>")
    )
    for row in conversations(place):
        batch = dict(processor.apply_chat_template(row, tokenize=True, return_dict=True, return_tensors="pt"))
        ids, labels = batch["input_ids"][0].tolist(), torch.full_like(batch["input_ids"], -100)
        for at in range(len(begin), len(ids)):
            if ids[at - len(begin) : at] == begin:
                stop = ids.index(end, at) + 1
                labels[0, at:stop] = batch["input_ids"][0, at:stop]
        found.append((batch, labels))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_all_classes_learn_as_by_hand(name: str, place: Path, tmp_path: Path) -> None:
    """All parts in one batch; the language model alone with layers that are computed again, packed, which a model may
    refuse, else row by row."""
    from transformers import AutoModelForImageTextToText

    if name in NEED_TORCHVISION and not find_spec("torchvision"):
        pytest.skip("its processor needs torchvision: see test_torchvision")
    model = MODELS[name](tmp_path / "model")
    plain, partly = (AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).train() for _ in range(2))
    assert type(plain).__name__.removesuffix("ForConditionalGeneration") in COMPARED
    by_rows = rows_by_hand(model, place)
    same(learnt(model, place, tmp_path / "whole", **TRAINED), by_hand(plain, by_rows))
    for key, parameter in partly.named_parameters():
        parameter.requires_grad_("language_model" in key or "text_model" in key or key == "lm_head.weight")
    other: dict[str, Any] = {"packing": True}
    if name in UNPACKED:
        with pytest.raises(llmtune.PlanError, match=UNPACKED[name]):
            llmtune.plan(recipe(model, place, tmp_path / "packed", **other))
        other = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    again = learnt(model, place, tmp_path / "other", activation_checkpointing="full", **other)
    same(again, by_hand(partly, by_rows))


def test_a_model_that_sees_what_it_is_to_say_is_refused(tmp_path: Path) -> None:
    draw(tmp_path / "0.png", "red", "circle", (32, 24))
    turns = [{"role": "user", "content": "<image>what"}, {"role": "assistant", "content": "red circle"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": turns, "images": ["0.png"]}] * 8))
    with pytest.raises(llmtune.PlanError, match="PaliGemma.* sees tokens before it is to say them"):
        llmtune.train(recipe(paligemma(tmp_path / "model"), tmp_path, tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_page_says_what_becomes_of_each_kind_that_transformers_has() -> None:
    import transformers

    if not transformers.__version__.startswith("5.24."):
        pytest.skip("the page is of transformers 5.24")
    assert page() == (Path(__file__).parent.parent / "docs" / "media-models.md").read_text()
