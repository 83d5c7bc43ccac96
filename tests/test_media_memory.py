"""The plan counts what pictures and sounds need: their tensors, what towers that train keep of them, and FLOPs."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.cost.flops import count
from llmtune.planning.media_memory import saved_per_piece, tower_layers
from llmtune.planning.micro_batch import largest
from tests.tiny_audio import qwen2_audio, tone
from tests.tiny_audio import rows as sounds
from tests.tiny_media import MODELS
from tests.tiny_media import rows as pictures

pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def planned(place: Path) -> Any:
    """The plan of a model of tests/tiny_media.py, by its name and further keys."""
    folder = cache(lambda name: {**MODELS, "qwen2_audio": qwen2_audio}[name](place / name))

    def made(name: str, **keys: Any) -> Any:
        always = {"bf16": False, "per_device_train_batch_size": 2, "activation_checkpointing": "none"}
        files = {"model": str(folder(name)), "dataset": str(place / "rows.json"), "output_dir": str(place / "run")}
        return llmtune.plan({**files, **always, **keys})

    return made


def seen(plan: Any) -> tuple[int, int, int]:
    """What the layers of a real tower see and keep of the longest row: pieces, bytes, layers."""
    from transformers import AutoModelForImageTextToText

    batches = plan.data.batches
    longest = max(range(len(batches.units)), key=lambda unit: batches.units.tokens[unit])
    media = batches.batch([longest]).media
    model = AutoModelForImageTextToText.from_pretrained(plan.model.files.folder, dtype=torch.float32)
    layers, entered, kept = tower_layers(model), [], {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    own |= {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if inside and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inside: list[Any] = []

    def enter(module: Any, args: Any, keys: Any) -> None:
        inside.append(module)
        hidden = args[0] if args else keys["hidden_states"]
        entered.append(hidden.numel() // hidden.shape[-1])

    for layer in layers:
        layer.register_forward_pre_hook(enter, with_kwargs=True)
        layer.register_forward_hook(lambda *_: inside.clear())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = model.get_image_features(**media)  # held, so that no address is given twice
    assert features is not None
    return entered[0], sum(kept.values()), len(layers)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3", "gemma3", "internvl"])
def test_what_a_tower_that_trains_keeps_is_about_what_a_real_one_keeps(planned: Any, name: str) -> None:
    plan, frozen = planned(name, freeze_vision_tower=False), planned(name)
    batch, towers = largest(plan), tower_layers(plan.model.module)
    found, kept, layers = seen(plan)
    assert layers == len(towers)
    assert batch.media.pieces == pytest.approx(2 * found, rel=0.15)  # InternVL's adds one of its own to each tile
    counted = 4 * batch.media.pieces * sum(map(saved_per_piece, towers))
    assert counted == pytest.approx(2 * kept, rel=0.4)
    more = plan.cost.quick.most.activations - frozen.cost.quick.most.activations
    assert more >= 0.99 * counted
    assert frozen.cost.quick.most.activations > batch.media.tensor_bytes


TRAINS = {
    "towers and projector": {"freeze_vision_tower": False, "freeze_multi_modal_projector": False},
    "the language model": {},
    "the projector": {"train_mm_proj_only": True},
    "an adapter": {"peft_config": {"name": "lora", "r": 4, "target_modules": "all"}},
}


@pytest.mark.parametrize("trains", TRAINS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "qwen2_audio"])
def test_products_of_towers_and_projector_count_by_what_passes_them(
    planned: Any, place: Path, name: str, trains: str
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from llmtune.training.building import build_objective

    (place / name).mkdir(exist_ok=True)
    every = json.loads((sounds if name == "qwen2_audio" else pictures)(place / name).read_text())
    if name == "qwen2_audio":  # whose projector sees each sound as filled up to the length that the tower hears
        for at in range(len(every)):
            tone(place / name / f"{at}.wav", 440, 2.0)
    showing = [row for row in every if row.keys() & {"images", "audios"}]
    (place / name / "showing.json").write_text(json.dumps(showing))
    keys = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": len(showing), **TRAINS[trains]}
    plan = planned(name, dataset=str(place / name / "showing.json"), flash_attn="sdpa", **keys)
    objective = build_objective(plan.model).train()
    batches = plan.data.batches.step(0, plan.device)  # of one row each, which leaves no padding
    objective(batches[0])  # the first call compares head and logits
    with FlopCounterMode(display=False) as counter:
        for batch in batches:
            objective(batch).total.backward()
    counted = counter.get_flop_counts()["Global"]
    expected = sum(flops for operation, flops in counted.items() if not re.search("attention|bmm", str(operation)))
    tokens = sum(batch.input_ids.numel() for batch in batches)
    shape = largest(plan)
    assert count(plan.model, shape, causal=0).total * tokens == pytest.approx(expected, rel=0.05)
    more = planned(name, dataset=str(place / name / "rows.json"))  # rows of text alone add no media
    assert largest(more).media_share * more.data.batches.units.tokens.sum() == pytest.approx(shape.media_share * tokens)


def test_a_plan_tells_media_and_their_tokens_from_all(planned: Any, place: Path) -> None:
    """Of one data set, of a mix that draws some rows twice, of a stream, and of text."""
    model = planned("llava").model
    folders = [place / name for name in ("one", "two")]
    for folder, rows in zip(folders, (3, 9), strict=True):
        folder.mkdir()
        pictures(folder, rows)

    def counted(samples: Any) -> tuple[dict[str, int], int, int]:
        ids = [token for at in range(len(samples)) for token in samples.sample(at)[0].tolist()]
        shown = sum(len(one.media) for at in range(len(samples)) for one in samples.shown(at))
        return {"image": shown}, sum(map(model.media.placeholders.count, ids)), len(ids)

    mix = {"dataset": [{"path": str(folder / "rows.json")} for folder in folders]}
    stream = {"streaming": True, "max_steps": 2}
    cases = {"an epoch shows": [{}, mix, {**mix, "mix_strategy": "interleave_over"}], "the first rows show": [stream]}
    for begin, keys in [(begin, keys) for begin, some in cases.items() for keys in some]:
        plan = planned("llava", **keys)
        share = plan.media
        assert (share.media, share.tokens, share.of) == counted(plan.data.batches.samples)
        assert 0 < share.tokens < share.of
        count = f"{share.media['image']:,} images; {share.tokens:,} of {share.of:,} tokens stand for them"
        assert f"Media       {begin} {count}" in str(plan)
        assert plan.cost.as_dict()["media"] == {"media": share.media, "tokens": share.tokens, "of": share.of}
    (place / "text.json").write_text(
        json.dumps([row for row in json.loads((place / "rows.json").read_text()) if "images" not in row])
    )
    text = planned("llava", dataset=str(place / "text.json"))
    assert text.media is None and text.cost.as_dict()["media"] is None
    assert "\nMedia" not in str(text)
