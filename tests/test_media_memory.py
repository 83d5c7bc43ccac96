"""The plan counts what pictures need: their tensors, and what towers that train keep of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.planning.media_memory import saved_per_piece, tower_layers
from llmtune.planning.micro_batch import largest
from tests.tiny_media import MODELS

pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def planned(place: Path) -> Any:
    """The plan of a model of tests/tiny_media.py, by its name and further keys."""
    folder = cache(lambda name: MODELS[name](place / name))

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
