"""Models that hear learn from rows of sounds what a loop in transformers and PEFT teaches them, row by row, from what
the processor makes of each row alone."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.media.loading import load_processor
from llmtune.testing.ranks import in_ranks
from tests.test_media_training import EPSILON, RATE, STEPS, TRAINED, losses, recipe, same
from tests.tiny_audio import MODELS, heard, rows, tone
from tests.tiny_media import draw

pytest.importorskip("av")
WHOLE = {"per_device_train_batch_size": 6}
"""All rows in one batch."""
OPENED_BY = {
    "qwen2_audio": "AutoModelForMultimodalLM",
    "audio_flamingo": "AutoModelForSeq2SeqLM",
    "omni": "AutoModelForImageTextToText",
    "omni3": "AutoModelForImageTextToText",
    "gemma4": "AutoModelForImageTextToText",
    "glm_asr": "AutoModelForMultimodalLM",
    "qwen3_asr": "AutoModelForMultimodalLM",
}
"""The class of transformers that opens what was trained."""
THINKERS = {
    "omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "omni3": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
"""The part of a whole that reads and answers."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    rows(folder)
    return folder


@pytest.fixture(scope="module")
def models(place: Path) -> Any:
    return cache(lambda name: MODELS[name](place / name))


def opened(folder: Path, name: str) -> Any:
    """The model in `folder` as transformers opens it; of Qwen-Omni the part that reads and answers."""
    import transformers

    kind = THINKERS.get(name, OPENED_BY.get(name, "AutoModelForImageTextToText"))
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).train()
    for key, parameter in model.named_parameters():  # sinusoids, frozen by their class, which loading forgets
        parameter.requires_grad_("embed_positions" not in key)
    return model


def rows_by_hand(folder: Path, place: Path) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """(what the model is given, labels (1, T) with -100 where nothing is learnt) of each row."""
    from PIL import Image

    processor, found = load_processor(folder), []
    how: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for row in json.loads((place / "rows.json").read_text()):
        question, answer = (message["content"] for message in row["messages"])
        sounds = ({"type": "audio", "audio": heard(place / name)} for name in row.get("audios", ()))
        images = ({"type": "image", "image": Image.open(place / name)} for name in row.get("images", ()))
        parts = [
            next(sounds) if text == "<audio>" else next(images) if text == "<image>" else {"type": "text", "text": text}
            for text in re.split("(<audio>|<image>)", question)
            if text
        ]
        asked = [{"role": "user", "content": parts}]
        start = processor.apply_chat_template(asked, add_generation_prompt=True, **how)["input_ids"].shape[1]
        said = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        batch = dict(processor.apply_chat_template(said, **how))
        labels = torch.full_like(batch["input_ids"], -100)
        labels[0, start:-1] = batch["input_ids"][0, start:-1]  # less the line break at the end
        found.append((batch, labels))
    return found


def by_hand(model: Any, rows: list[tuple[dict[str, Any], torch.Tensor]]) -> list[tuple[float, float]]:
    """(loss, norm of the gradients) of each step of what trains of `model`, rows one by one."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, found = torch.optim.AdamW(trained, lr=RATE, eps=EPSILON, weight_decay=0.0), []
    targets = sum(int((labels[:, 1:] != -100).sum()) for _, labels in rows)
    for _ in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for batch, labels in rows:
            logits = model(**batch, use_cache=False).logits.float()
            summed = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
            (summed / targets).backward()
            total += summed.item() / targets
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        found.append((total, torch.nn.utils.get_total_norm(gradients).item()))
        optimizer.step()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_all_that_trains_learns_as_by_hand(name: str, place: Path, models: Any, tmp_path: Path) -> None:
    """In one batch of sounds of several lengths and rows without any, and row by row or packed; the result opens."""
    import transformers

    expected = by_hand(opened(models(name), name), rows_by_hand(models(name), place))
    llmtune.train(recipe(models(name), place, tmp_path / "whole", **TRAINED, **WHOLE))
    same(losses(tmp_path / "whole"), expected)
    rowwise = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}
    other = rowwise if name in THINKERS else {"packing": True, "cutoff_len": 128, **WHOLE}
    llmtune.train({**recipe(models(name), place, tmp_path / "other", **TRAINED), **other})
    same(losses(tmp_path / "other"), expected)
    result = tmp_path / "whole" / "model"
    model, told = getattr(transformers, OPENED_BY[name]).from_pretrained(result, output_loading_info=True)
    assert not told["missing_keys"]
    assert type(model) is type(opened(models(name), name))
    assert type(load_processor(result)).__name__ == type(load_processor(models(name))).__name__


@pytest.mark.parametrize("name", MODELS)
def test_towers_stay_and_the_rest_learns_as_by_hand(name: str, place: Path, models: Any, tmp_path: Path) -> None:
    before = opened(models(name), name)
    for key, parameter in before.named_parameters():
        parameter.requires_grad_("language_model" in key or key == "lm_head.weight")
    kept = {key: value.clone() for key, value in before.state_dict().items()}
    expected = by_hand(before, rows_by_hand(models(name), place))
    llmtune.train(recipe(models(name), place, tmp_path / "run", **WHOLE))
    same(losses(tmp_path / "run"), expected)
    after = opened(tmp_path / "run" / "model", name).state_dict()
    changed = {key for key in kept if not torch.equal(kept[key], after[key])}
    assert changed
    assert all("language_model" in key or key == "lm_head.weight" for key in changed)


@pytest.mark.parametrize("name", ["qwen2_audio", "omni"])
def test_an_adapter_learns_as_in_peft(name: str, place: Path, models: Any, tmp_path: Path) -> None:
    """It adapts the language model alone; of Qwen2-Audio on two ranks, too."""
    from peft import LoraConfig, PeftModel, get_peft_model

    linear = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=rf".*language_model.*\.({linear})", init_lora_weights="gaussian"
    )
    torch.manual_seed(1)
    get_peft_model(opened(models(name), name), config).save_pretrained(tmp_path / "start")
    started = PeftModel.from_pretrained(opened(models(name), name), tmp_path / "start", is_trainable=True)
    expected = by_hand(started, rows_by_hand(models(name), place))
    lora = {"name": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    keys = {"peft_config": {**lora, "adapter_name_or_path": str(tmp_path / "start")}}
    llmtune.train(recipe(models(name), place, tmp_path / "one", **keys, **WHOLE))
    same(losses(tmp_path / "one"), expected)
    tuned = PeftModel.from_pretrained(opened(models(name), name), tmp_path / "one" / "model")
    batch, _ = rows_by_hand(models(name), place)[0]
    torch.testing.assert_close(tuned.eval()(**batch).logits, started.eval()(**batch).logits, rtol=1e-4, atol=1e-4)
    if name == "qwen2_audio":
        two = {**keys, **TRAINED, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
        in_ranks(2, tmp_path / "ranks", llmtune.train, recipe(models(name), place, tmp_path / "two", **two))
        same(losses(tmp_path / "two"), expected)


def test_omni_learns_from_sounds_and_pictures_together_as_by_hand(models: Any, tmp_path: Path) -> None:
    """In one batch, whose positions in three dimensions are those of each row alone."""
    for at, size in enumerate(((32, 24), (24, 40))):
        draw(tmp_path / f"{at}.png", "red", "circle", size)
        tone(tmp_path / f"{at}.wav", 440, 0.3 + at)
    shown: list[tuple[str, dict[str, Any]]] = [
        ("<image>see and <audio>hear", {"images": ["0.png"], "audios": ["0.wav"]}),
        ("<audio>what", {"audios": ["1.wav"]}),
        ("<image><image>how many", {"images": ["1.png", "0.png"]}),
        ("hello", {}),
    ]
    found = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "red"}], **files}
        for text, files in shown
    ]
    (tmp_path / "rows.json").write_text(json.dumps(found))
    keys = recipe(models("omni"), tmp_path, tmp_path / "run", per_device_train_batch_size=4, **TRAINED)
    llmtune.train(keys)
    same(losses(tmp_path / "run"), by_hand(opened(models("omni"), "omni"), rows_by_hand(models("omni"), tmp_path)))


def test_sounds_in_columns_of_hub_data_sets_are_read(place: Path, models: Any, tmp_path: Path) -> None:
    """Parquet as `datasets` writes it, with what files hold inside: the run learns what it learns from the files."""
    import shutil

    from datasets import Audio, Dataset, Sequence

    found = [{"audios": [], **row} for row in json.loads((place / "rows.json").read_text())]
    for row in found:
        row["audios"] = [{"bytes": (place / name).read_bytes(), "path": name} for name in row["audios"]]
    data: Any = Dataset.from_list(found).cast_column("audios", Sequence(Audio(decode=False)))
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data" / "rows.parquet")
    model = shutil.copytree(models("qwen2_audio"), tmp_path / "model")
    keys = recipe(model, tmp_path, tmp_path / "run", max_steps=1, **WHOLE)
    llmtune.train({**keys, "dataset": str(tmp_path / "data" / "rows.parquet")})
    (row_loss, _), *_ = by_hand(opened(model, "qwen2_audio"), rows_by_hand(model, place))
    assert losses(tmp_path / "run")[0][0] == pytest.approx(row_loss, rel=1e-5)
