"""More kinds of models that read pictures learn what a loop in transformers teaches them, a row at a time; and all that
transformers has are understood, or refused in a sentence."""

from __future__ import annotations

import copy
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ProcessorMixin

import llmtune
from llmtune.media.loading import load_processor
from llmtune.model.modalities import parts_of
from llmtune.training.objective import Objective
from tests import tiny_families, tiny_newer, tiny_older
from tests.media_table import COMPARED, page
from tests.test_audio_training import by_hand
from tests.test_media_training import TRAINED, conversations, learnt, recipe, same
from tests.tiny_families import paligemma
from tests.tiny_media import draw, rows

pytest.importorskip("PIL")
MODELS = {**tiny_families.MODELS, **tiny_newer.MODELS, **tiny_older.MODELS}
NEED_TORCHVISION = (
    "mistral3", "lfm2_vl", "cohere2_vision", "kimi", "minicpmv", "video_llava", "mistral_large4", "gemma4_unified",
    "phi4",
)  # fmt: skip
NEEDS = {
    **dict.fromkeys(NEED_TORCHVISION, ("torchvision",)),
    **dict.fromkeys(("perception_lm", "fast_vlm", "gemma3n"), ("torchvision", "timm")),
}
"""What a kind's processor or tower is not there without."""
UNPACKED = {
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "minicpmv"), "has recurrent layers"),
    "gemma4_unified": "reads documents beside ones that show media otherwise",
    "lfm2_vl": "cannot keep documents apart",
    "hunyuan_vl": "has positions in four dimensions",
}
"""What keeps documents of a packed row from being told apart."""
TOWER = r"model\.(visual|vision_(tower|model|encoder)|(image|video|audio)_tower|high_res_vision_model|vqmodel"
TOWER += r"|embed_tokens_extend\.(image_embed\.img_processor|audio_embed\.encoder))\."
PROJECTOR = (
    r"(.*\.(merger|deepstack_merger_list|connector|patch_merger)|model\.(multi_modal_)?projector|model\.mm_projector"
)
PROJECTOR += r"|model\.vision_projection|model\.(generation_)?aligner|model\.generation_(embeddings|head)"
PROJECTOR += r"|model\.resampler_model|model\.high_res_vision_(neck|proj|alpha)|model\.image_newline"
PROJECTOR += r"|model\.(visual_embeddings_table|view_separator|embed_(vision|audio)))(\.|$)"


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
    how: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for row in conversations(place):
        written = processor.chat_template or processor.tokenizer.chat_template  # Chameleon's processor keeps none
        batch = dict(ProcessorMixin.apply_chat_template(processor, row, chat_template=written, **how))
        ids, labels = batch["input_ids"][0].tolist(), torch.full_like(batch["input_ids"], -100)
        for at in range(len(begin), len(ids)):
            if ids[at - len(begin) : at] == begin:
                stop = ids.index(end, at) + 1
                labels[0, at:stop] = batch["input_ids"][0, at:stop]
        found.append((batch, labels))
    return found


def part_by_name(key: str) -> str:
    """Which part of a model a parameter is in, as people read its name."""
    if re.match(PROJECTOR, key):
        return "multi_modal_projector"
    if re.match(TOWER, key):
        return "vision_tower"
    return "multi_modal_projector" if "embed_tokens_extend" in key else "language_model"


def opened(folder: Path) -> Any:
    """The model as transformers makes it."""
    import transformers

    (kind,) = transformers.AutoConfig.from_pretrained(folder).architectures
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).train()
    for module in model.modules():
        module.training &= not isinstance(module, torch.nn.BatchNorm2d)
    return model


def made(name: str, folder: Path) -> Path:
    """Folder of a model of this kind, where what it needs is installed."""
    if missing := [package for package in NEEDS.get(name, ()) if not find_spec(package)]:
        pytest.skip(f"needs {' and '.join(missing)}: see test_torchvision")
    return MODELS[name](folder)


@pytest.mark.parametrize("name", MODELS)
def test_all_classes_learn_as_by_hand(name: str, place: Path, tmp_path: Path) -> None:
    """All parts in one batch; the language model alone with layers that are computed again, packed, which a model may
    refuse, else row by row. What is a tower and what a projector is found."""
    model = made(name, tmp_path / "model")
    plain, partly = opened(model), opened(model)
    assert type(plain).__name__.removesuffix("ForConditionalGeneration") in COMPARED
    parts = {key: part_by_name(key) for key, _ in plain.named_parameters()}
    assert parts.items() <= parts_of(plain).items()
    by_rows = rows_by_hand(model, place)
    same(learnt(model, place, tmp_path / "whole", cutoff_len=2048, **TRAINED), by_hand(plain, by_rows))
    for key, parameter in partly.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and parts[key] == "language_model")
    other: dict[str, Any] = {"packing": True, "cutoff_len": 2048}
    if name in UNPACKED:
        with pytest.raises(llmtune.PlanError, match=UNPACKED[name]):
            llmtune.train(recipe(model, place, tmp_path / "packed", **other))
        other = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    again = learnt(model, place, tmp_path / "other", activation_checkpointing="full", **other)
    same(again, by_hand(partly, by_rows))


def test_a_tower_that_takes_its_own_type_alone_is_given_it(place: Path, tmp_path: Path) -> None:
    """Aria's, whose processor gives float32, in bfloat16: as transformers' examples cast what a processor makes."""
    model = made("aria", tmp_path / "model")
    found = learnt(model, place, tmp_path / "run", pure_bf16=True, **TRAINED)
    given = rows_by_hand(model, place)
    for batch, _ in given:
        batch |= {key: value.bfloat16() for key, value in batch.items() if value.is_floating_point()}
    expected = by_hand(opened(model).to(torch.bfloat16), given)
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-2, atol=0)


def test_layers_that_normalise_over_a_batch_keep_their_statistics() -> None:
    """Those of towers that trained with many more pictures than a batch shows."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout())
    objective = Objective(model, None, {}, None)
    objective.eval().train()
    assert model[2].training
    rows = torch.randn(4, 3)
    alone = copy.deepcopy(model[:2]).eval()(rows[:1])
    torch.testing.assert_close(objective(lambda: model[:2](rows))[:1], alone)
    assert model[1].num_batches_tracked == 0


@pytest.mark.skipif(not find_spec("torchvision"), reason="its processor needs torchvision: see test_torchvision")
def test_a_model_that_transformers_cannot_run_is_refused(place: Path, tmp_path: Path) -> None:
    """Llama 4 of transformers 5.24 asks its language model for pictures."""
    with pytest.raises(llmtune.PlanError, match="Llama4.* cannot read what its processor makes of .*image_outputs"):
        llmtune.train(recipe(tiny_newer.llama4(tmp_path / "model"), place, tmp_path / "run"))


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
