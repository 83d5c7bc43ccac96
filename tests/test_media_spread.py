"""Twenty-five kinds of models that see or hear learn, as adapters on 4-bit weights on two ranks, what a loop in
transformers and PEFT teaches them; in turn packed or row by row, and adapted everywhere or in the language model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from llmtune.testing.ranks import in_ranks
from tests import tiny_audio, tiny_families, tiny_media
from tests.test_audio_training import THINKERS, by_hand, opened
from tests.test_audio_training import rows_by_hand as sounds_by_hand
from tests.test_media_families import NEED_TORCHVISION, UNPACKED
from tests.test_media_families import rows_by_hand as pictures_by_hand
from tests.test_media_training import TRAINED, losses, recipe, same
from tests.test_parity import LORA, train_each

pytest.importorskip("av")
pytest.importorskip("bitsandbytes")
HEARING = {name: make for name, make in tiny_audio.MODELS.items() if name not in tiny_media.MODELS}
CLASSES = tiny_media.MODELS | tiny_families.MODELS | HEARING
NAMES = [name for name in CLASSES if name not in (*NEED_TORCHVISION, "pixtral") or find_spec("torchvision")]
UNPACKABLE = (*UNPACKED, *THINKERS, "mllama")


class Run(NamedTuple):
    """What is compared of a class."""

    model: Path
    keys: dict[str, Any]
    expected: list[tuple[float, float]]


def round_to_4_bits(model: Any) -> None:
    """Give all linear layers but the head the values that bitsandbytes' 4-bit numbers stand for.

    As one long row each: its CPU kernel (0.50.2) is wrong where rows are no multiple of 64, as those of tiny models.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            row = layer.weight.data.reshape(1, -1)
            packed, state = quantize_4bit(row, blocksize=64, quant_type="nf4", compress_statistics=True)
            layer.weight.data = dequantize_4bit(packed, state).view_as(layer.weight)


def runs(names: Sequence[str], place: Path) -> Iterator[Run]:
    """Of each class a recipe and what a loop finds, from an adapter that PEFT has made."""
    from peft import LoraConfig, get_peft_model

    kinds = {"pictures": (tiny_media, 4), "sounds": (tiny_audio, 4), "mllama": (tiny_media, 5)}
    for kind, (written, count) in kinds.items():
        (place / kind).mkdir()
        written.rows(place / kind, count)
    shown = [row for row in json.loads((place / "mllama" / "rows.json").read_text()) if "images" in row]
    (place / "mllama" / "rows.json").write_text(json.dumps(shown))  # texts alone see a blank picture of their batch
    for name in names:
        number, hears = list(CLASSES).index(name), name in HEARING
        model = CLASSES[name](place / f"{name}-model")
        data = place / (name if name in kinds else "sounds" if hears else "pictures")
        rows = (sounds_by_hand if hears else pictures_by_hand)(model, data)
        base = opened(model, name)
        round_to_4_bits(base)
        everywhere, packed = number % 3 > 0, number % 2 > 0 and name not in UNPACKABLE
        linear = [key for key, each in base.named_modules() if isinstance(each, torch.nn.Linear) and key != "lm_head"]
        own = [key for key in linear if everywhere or "language_model" in key or "text_model" in key]
        torch.manual_seed(1)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=own, init_lora_weights="gaussian")
        adapted: Any = get_peft_model(base, config)
        adapted.save_pretrained(place / f"{name}-start")
        spread = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": len(rows) // 2}
        if packed:  # into rows as long as the longest, so that both ranks have some
            longest = max(len(batch["input_ids"][0]) for batch, _ in rows)
            spread = {"packing": True, "cutoff_len": longest + 2, "per_device_train_batch_size": len(rows)}
        lora = {"peft_config": {**LORA, "adapter_name_or_path": str(place / f"{name}-start")}, "quant_config": "bnb"}
        keys = {**lora, **spread, "save_strategy": "no", **(TRAINED if everywhere else {})}
        yield Run(model, recipe(model, data, place / f"{name}-run", **keys), by_hand(adapted, rows))


@pytest.fixture(scope="module")
def spread(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """What is compared of each class that is asked about, once all of them have learnt on two ranks."""
    asked = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    place = tmp_path_factory.mktemp("spread")
    found = dict(zip(asked, runs(asked, place), strict=True))
    in_ranks(2, place / "ranks", train_each, [run.keys for run in found.values()])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_on_4_bits_learns_on_two_ranks_as_in_peft(name: str, spread: dict[str, Run]) -> None:
    from peft import PeftModel

    run = spread[name]
    same(losses(Path(run.keys["output_dir"])), run.expected)
    tuned = PeftModel.from_pretrained(opened(run.model, name), Path(run.keys["output_dir"]) / "model")
    assert any(".lora_A" in key for key, _ in tuned.named_parameters())
