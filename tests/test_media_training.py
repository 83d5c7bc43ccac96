"""Models that read pictures learn from rows that show some what a loop in transformers and PEFT teaches them, which
takes ids and tensors from the processor's own `apply_chat_template`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.contract.structure import transformer_layers
from llmtune.media.loading import load_processor, without_video
from llmtune.model.modalities import parts_of
from llmtune.testing.ranks import in_ranks
from tests.tiny_media import MODELS

pytest.importorskip("PIL")
NAMES = tuple(name for name in MODELS if name != "pixtral" or find_spec("torchvision"))
"""All, but those whose processors are not there without torchvision: test_torchvision brings it along."""
RATE, STEPS = 1e-2, 2
EPSILON = 1e-3
"""Of AdamW: gradients that are rounding alone move nothing."""
PACKED = tuple(name for name in NAMES if name != "mllama")
TRAINED = {"freeze_vision_tower": False, "freeze_multi_modal_projector": False}
"""Towers and projector train, too."""


@pytest.fixture(scope="module")
def models(place: Path) -> Any:
    return cache(lambda name: MODELS[name](place / name))


def conversations(place: Path) -> Iterator[list[dict[str, Any]]]:
    """The rows as transformers wants them."""
    from PIL import Image

    for row in json.loads((place / "rows.json").read_text()):
        files, found = iter(row.get("images", ())), []
        for message in row["messages"]:
            parts: list[dict[str, Any]] = []
            for number, text in enumerate(message["content"].split("<image>")):
                if number:
                    parts.append({"type": "image", "image": Image.open(place / next(files)).convert("RGB")})
                parts += [{"type": "text", "text": text}] if text else []
            found.append({"role": message["role"], "content": parts})
        yield found


def inputs_by_hand(folder: Path, place: Path) -> tuple[dict[str, Any], torch.Tensor]:
    """(what the model is given, labels (B, T) with -100 where nothing is learnt)."""
    from transformers import ProcessorMixin

    processor, rows = load_processor(folder), list(conversations(place))

    def made(rows: Any, **options: Any) -> Any:
        return ProcessorMixin.apply_chat_template(  # SmolVLM's own asks for the part that needs torchvision
            processor,
            rows,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right"},
            **options,
        )

    # Where torchvision is installed, Mllama's wants the first and last row to show some.
    if folder.name == "mllama" and find_spec("torchvision"):
        batch = {key: value[1:-1] for key, value in made([rows[0], *rows, rows[0]]).items()}
    else:
        batch = dict(made(rows))
    labels = torch.full_like(batch["input_ids"], -100)
    for number, row in enumerate(rows):
        for at, message in enumerate(row):
            if message["role"] == "assistant":  # what follows the generation prompt, less the line break at the end
                start = made([row[:at]], add_generation_prompt=True)["input_ids"].shape[1]
                stop = made([row[: at + 1]])["input_ids"].shape[1] - 1
                labels[number, start:stop] = batch["input_ids"][number, start:stop]
    return batch, labels


def by_hand(
    folder: Path, place: Path, frozen: tuple[str, ...] = (), adapter: Path | None = None
) -> list[tuple[float, float]]:
    """(loss, norm of the gradients) of each step; with `adapter` that alone is trained, else all but the `frozen`."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    batch, labels = inputs_by_hand(folder, place)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, found = torch.optim.AdamW(trained, lr=RATE, eps=EPSILON, weight_decay=0.0), []
    for _ in range(STEPS):
        logits = model(**batch, use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        found.append((loss.item(), torch.nn.utils.get_total_norm(gradients).item()))
        optimizer.step()
    return found


def learnt(folder: Path, place: Path, run: Path, **keys: Any) -> list[tuple[float, float]]:
    """The same of a run of llmtune that takes all rows in each step."""
    llmtune.train(recipe(folder, place, run, **keys))
    return losses(run)


def recipe(folder: Path, place: Path, run: Path, **keys: Any) -> dict[str, Any]:
    return {
        "model": str(folder), "dataset": str(place / "rows.json"), "output_dir": str(run), "stage_config": "sft",
        "max_steps": STEPS, "per_device_train_batch_size": 8, "cutoff_len": 1024, "learning_rate": RATE,
        "lr_scheduler_config": "constant", "optim_config": {"name": "adamw", "weight_decay": 0.0, "eps": EPSILON},
        "logging_steps": 1, "max_grad_norm": 0, "image_max_pixels": None, "image_min_pixels": None,
        "preprocessing_num_workers": 1, **keys,
    }  # fmt: skip


def losses(run: Path) -> list[tuple[float, float]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(step["loss"], step["grad_norm"]) for step in found if "loss" in step]


def same(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> None:
    assert len(found) == STEPS
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_all_that_trains_learns_as_by_hand(name: str, place: Path, models: Any, tmp_path: Path) -> None:
    """In one batch, and in batches of one row each, some of which show nothing, and whose layers are computed again."""
    expected = by_hand(models(name), place)
    same(learnt(models(name), place, tmp_path / "whole", **TRAINED), expected)
    rowwise = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "activation_checkpointing": "full"}
    same(learnt(models(name), place, tmp_path / "rowwise", **TRAINED, **rowwise), expected)


@pytest.mark.skipif(not find_spec("torchvision"), reason="compares with what torchvision does: see test_torchvision")
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl", "gemma4"])
def test_processors_are_themselves_less_their_part_for_video(name: str, models: Any, place: Path) -> None:
    from PIL import Image
    from transformers import AutoProcessor

    whole = AutoProcessor.from_pretrained(models(name))
    assert whole.video_processor is not None
    less = without_video(type(whole)).from_pretrained(models(name))
    assert "video_processor" not in vars(less)
    content = [{"type": "image"}, {"type": "text", "text": "what"}]
    given = {"text": [whole.apply_chat_template([{"role": "user", "content": content}])], "return_tensors": "pt"}
    made = [each(images=[[Image.open(place / "0.png")]], **given) for each in (whole, less)]
    assert made[0].keys() == made[1].keys()
    for key in dict(made[0]):
        torch.testing.assert_close(made[0][key], made[1][key], rtol=0, atol=0)


TOWER = r"model\.(visual\.(blocks|patch_embed|pos_embed)|vision_tower|vision_model|audio_tower)\."
PROJECTOR = r"model\.(visual\.(merger|deepstack_merger_list)|multi_modal_projector|connector|embed_(vision|audio))\."
LANGUAGE = r"(lm_head|model\.(language_model|text_model))\."


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_found_in_the_structure_and_layers_of_towers_are_spread_one_by_one(name: str, models: Any) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(models(name))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    parts = parts_of(model)
    assert set(parts.values()) == {"vision_tower", "multi_modal_projector", "language_model"}
    patterns = {
        "vision_tower": TOWER,
        "multi_modal_projector": PROJECTOR + r"|model\.image_newline$",
        "language_model": LANGUAGE,
    }
    assert [key for key, part in parts.items() if not re.match(patterns[part], key)] == []
    spread = tuple(f"{layer}." for layer, _ in transformer_layers(model))
    repeated = [key for key in parts if re.search(r"\.(layers|layer|blocks)\.\d+\.", key)]
    assert any(parts[key] == "vision_tower" for key in repeated)
    assert [key for key in repeated if not key.startswith(spread)] == []


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parts_stay_and_the_rest_learns_as_by_hand(name: str, place: Path, models: Any, tmp_path: Path) -> None:
    frozen = ("vision", "visual", "audio_tower", "embed_audio", "projector", "connector", "image_newline")
    same(learnt(models(name), place, tmp_path / "run"), by_hand(models(name), place, frozen))
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    before, after = (load_file(folder / "model.safetensors") for folder in (models(name), tmp_path / "run" / "model"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert not [key for key in changed if any(part in key for part in frozen)]
    assert (tmp_path / "run" / "model" / "processor_config.json").exists()
    _, found = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]


@pytest.mark.parametrize("name", ["gemma3"])
def test_an_adapter_learns_as_in_peft_on_one_rank_and_on_two(
    name: str, place: Path, models: Any, tmp_path: Path
) -> None:
    """It adapts the language model alone. On two ranks one of a step's batches shows nothing."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    new = {"name": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    llmtune.train(recipe(models(name), place, tmp_path / "new", peft_config=new, max_steps=1))
    own = json.loads((tmp_path / "new" / "model" / "adapter_config.json").read_text())["target_modules"]
    torch.manual_seed(1)
    base = AutoModelForImageTextToText.from_pretrained(models(name), dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=own, init_lora_weights="gaussian", task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(base, config)
    layers = {key.rpartition(".lora_A")[0] for key, _ in adapted.named_parameters() if ".lora_A" in key}
    assert layers
    assert all("language_model" in layer for layer in layers)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = by_hand(models(name), place, adapter=tmp_path / "adapter")
    keys = {"peft_config": {**new, "adapter_name_or_path": str(tmp_path / "adapter")}}
    same(learnt(models(name), place, tmp_path / "one", **keys), expected)
    two = {**keys, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    in_ranks(2, tmp_path / "ranks", _train, recipe(models(name), place, tmp_path / "two", **two))
    same(losses(tmp_path / "two"), expected)


@pytest.mark.parametrize("name", ["idefics3", "mllama", "llava_next"])
def test_towers_learn_on_two_ranks_what_they_learn_on_one(name: str, place: Path, models: Any, tmp_path: Path) -> None:
    """A rank whose batch shows nothing takes part in what the towers exchange."""
    keys = {
        **TRAINED,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "init_config": "init_on_meta",
    }
    in_ranks(2, tmp_path / "ranks", _train, recipe(models(name), place, tmp_path / "two", **keys))
    same(losses(tmp_path / "two"), by_hand(models(name), place))


def _train(keys: dict[str, Any]) -> None:
    llmtune.train(keys)


@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_teach_what_rows_of_their_own_teach(name: str, place: Path, models: Any, tmp_path: Path) -> None:
    packed = learnt(models(name), place, tmp_path / "packed", packing=True, **TRAINED)
    same(packed, learnt(models(name), place, tmp_path / "whole", **TRAINED))


def test_rows_that_show_nothing_to_what_alone_trains_are_told(models: Any, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": turns}] * 8))
    with pytest.raises(llmtune.PlanError, match="a batch reaches nothing that trains, .* take rows that show what"):
        llmtune.train(recipe(models("llava"), tmp_path, tmp_path / "run", train_mm_proj_only=True))


def test_a_model_that_cannot_keep_packed_pictures_apart_is_found_before_training(
    place: Path, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With transformers' own masks Gemma 3 sees the pictures of a row's first document in others, too."""
    monkeypatch.setattr("llmtune.training.building.mask_pictures_by_document", lambda model: None)
    with pytest.raises(llmtune.PlanError, match="packing: Gemma3.* reads documents beside ones that show media otherw"):
        llmtune.train(recipe(models("gemma3"), place, tmp_path / "run", packing=True))


def test_a_model_that_shows_pictures_to_whole_rows_is_refused_in_the_plan(
    place: Path, models: Any, tmp_path: Path
) -> None:
    with pytest.raises(llmtune.PlanError, match="packing: Mllama.* shows pictures to whole rows by cross attention"):
        llmtune.plan(recipe(models("mllama"), place, tmp_path / "run", packing=True))


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "idefics3", "mllama", "gemma4"])
def test_answers_about_pictures_are_preferred_as_by_hand(name: str, place: Path, models: Any, tmp_path: Path) -> None:
    """SimPO (arXiv 2405.14734, equation 6): means of log-probabilities, compared pair by pair."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    asked = [
        ("<image>what is in the picture", ["0.png"]),
        ("hello", []),
        ("how <image> and <image> differ", ["1.png", "2.png"]),
    ]
    pairs = [("red square", "blue"), ("world", "how many"), ("blue", "red circle")]
    written = [
        {"prompt": text, "chosen": better, "rejected": worse, **({"images": images} if images else {})}
        for (text, images), (better, worse) in zip(asked, pairs, strict=True)
    ]
    (place / "pairs.json").write_text(json.dumps(written))
    processor = load_processor(models(name))
    model: Any = AutoModelForImageTextToText.from_pretrained(models(name), dtype=torch.float32)

    def mean_logp(text: str, images: list[str], answer: str) -> torch.Tensor:
        files, parts = iter(images), []
        for number, piece in enumerate(text.split("<image>")):
            parts += [{"type": "image", "image": Image.open(place / next(files))}] if number else []
            parts += [{"type": "text", "text": piece}] if piece else []
        turns = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        how: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        start = processor.apply_chat_template(turns[:1], add_generation_prompt=True, **how)["input_ids"].shape[1]
        batch = processor.apply_chat_template(turns, **how)
        ids, logps = batch["input_ids"][0], model(**batch).logits[0].float().log_softmax(-1)
        return torch.stack([logps[at - 1, ids[at]] for at in range(start, len(ids) - 1)]).mean()

    losses_by_hand = [
        -torch.nn.functional.logsigmoid(2.0 * (mean_logp(*each, better) - mean_logp(*each, worse)) - 0.5).item()
        for each, (better, worse) in zip(asked, pairs, strict=True)
    ]
    stage = {"name": "dpo", "pref_loss": "simpo", "pref_beta": 2.0, "simpo_gamma": 0.5}
    keys = {
        "dataset": str(place / "pairs.json"),
        "stage_config": stage,
        "per_device_train_batch_size": 3,
        "max_steps": 1,
    }
    llmtune.train(recipe(models(name), place, tmp_path / "run", **keys))
    assert losses(tmp_path / "run")[0][0] == pytest.approx(sum(losses_by_hand) / 3, rel=1e-5)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "smolvlm"])
def test_rows_that_ranks_share_teach_what_whole_rows_teach(name: str, place: Path, models: Any, tmp_path: Path) -> None:
    keys = {**TRAINED, "kernel_config": "auto", "dist_config": {"name": "fsdp2", "cp_size": 2}}
    in_ranks(2, tmp_path / "ranks", _train, recipe(models(name), place, tmp_path / "two", **keys))
    same(losses(tmp_path / "two"), by_hand(models(name), place))


def test_groups_of_shifted_attention_are_of_the_language_model_alone(place: Path, models: Any, tmp_path: Path) -> None:
    """A tower attends to all of its picture."""
    found: Any = llmtune.plan(recipe(models("llava"), place, tmp_path / "run", shift_attn=True)).model.module
    assert found.config.text_config._attn_implementation.startswith("llmtune_shifted")
    assert found.config.vision_config._attn_implementation == "sdpa"
