"""Rows of sounds in every form in which they are written; and the towers of models that hear."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtune.contract.examples import BadRow, Media, ShownText
from llmtune.data.formats import Chosen, read_row
from llmtune.data.formats.chats import Alpaca, OpenAi, ShareGpt
from llmtune.data.formats.pairs import PreferencePairs
from llmtune.media.files import MediaFiles
from llmtune.media.opening import open_audio
from llmtune.media.processor import MediaProcessor
from llmtune.model.modalities import parts_of
from tests.tiny_audio import audio_flamingo, ears, heard, qwen2_audio, tone
from tests.tiny_media import tokenizer

pytest.importorskip("av")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sounds")
    tone(made / "a.wav", 440, 0.3)
    return made


def test_sounds_are_found_in_every_form(folder: Path) -> None:
    """And opened as they are: PyAV's samples are those of Python's own reader."""
    content = (folder / "a.wav").read_bytes()
    data = base64.b64encode(content).decode()
    question = "what is it"
    answer = {"role": "assistant", "content": "A tone."}

    def asks(content: Any, **columns: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": content}, answer], **columns}

    def part(**said: Any) -> dict[str, Any]:
        return asks([said, {"type": "text", "text": question}])

    turns = [{"from": "human", "value": f"<audio>{question}"}, {"from": "gpt", "value": "A tone."}]
    rows: list[tuple[Any, dict[str, Any]]] = [
        (OpenAi(), part(type="input_audio", input_audio={"data": data, "format": "wav"})),
        (OpenAi(), part(type="audio", audio="a.wav")),
        (OpenAi(), part(type="audio", path=str(folder / "a.wav"))),
        (OpenAi(), part(type="audio", audio={"bytes": content, "path": None})),
        (OpenAi(), part(type="audio_url", audio_url={"url": f"data:audio/wav;base64,{data}"})),
        (OpenAi(), asks(f"<audio>{question}", audios=["a.wav"])),
        (OpenAi(), asks(f"<audio>{question}", audio={"bytes": content, "path": "far/away.wav"})),
        (OpenAi(), asks(question, audios=[{"bytes": None, "path": "a.wav"}])),
        (ShareGpt(), {"conversations": turns, "audios": ["a.wav"]}),
        (Alpaca(), {"instruction": f"<audio>{question}", "input": "", "output": "A tone.", "audios": ["a.wav"]}),
        (PreferencePairs(), {"prompt": question, "chosen": "A tone.", "rejected": "No.", "audio": "a.wav"}),
    ]
    for form, row in rows:
        found: Any = read_row(Chosen(format=form, name="", why="", media=MediaFiles(folder=folder)), row)
        (medium,) = found.media
        assert medium.kind == "audio", row
        np.testing.assert_array_equal(open_audio(str(medium.path), 16000), heard(folder / "a.wav"))
        asked = (found.prompt if isinstance(form, PreferencePairs) else found.messages)[0]["content"]
        assert asked[1:] == question


def test_features_of_as_many_bands_as_there_are_tokens_stay_as_they_are(folder: Path, tmp_path: Path) -> None:
    """Laid end to end: two sounds of eight bands beside two texts of eight tokens."""
    model = qwen2_audio(tmp_path / "model")
    from transformers import AutoTokenizer

    media = MediaProcessor(folder=model, tokenizer=AutoTokenizer.from_pretrained(model))
    tone(tmp_path / "short.wav", 440, 0.15)
    row = ShownText("<|AUDIO|>", (Media("audio", str(tmp_path / "short.wav")),))
    length = len(media.encode(row, [])[0])
    text = "<|AUDIO|>" + "<|audio_eos|>" * (8 - length)
    rows = [ShownText(text, row.media)] * 2
    ids = [media.encode(each, [])[0] for each in rows]
    assert [len(each) for each in ids] == [8, 8]
    found = media.tensors(rows, ids, "flat")
    assert {name: tuple(value.shape[:2]) for name, value in found.items()} == {
        "input_features": (2, 8), "feature_attention_mask": (2, 200),
    }  # fmt: skip


def test_a_processor_that_takes_one_sound_of_each_text_says_so(folder: Path, tmp_path: Path) -> None:
    model = audio_flamingo(tmp_path / "model")
    from transformers import AutoTokenizer

    media = MediaProcessor(folder=model, tokenizer=AutoTokenizer.from_pretrained(model))
    sound = Media("audio", str(folder / "a.wav"))
    with pytest.raises(BadRow, match="AudioFlamingo3Processor says: Got 1 text but 2 audios; they must match 1:1"):
        media.encode(ShownText("<sound><sound>", (sound, sound)), [])


def test_a_row_whose_sound_would_be_cut_is_a_bad_row(folder: Path, tmp_path: Path) -> None:
    """Of a processor that cuts sounds at two seconds, and of one that takes them in windows of two."""
    import llmtune
    from llmtune.media.loading import load_processor

    tone(folder / "long.wav", 440, 2.5), tone(folder / "padded.wav", 440, 2.05)
    model = qwen2_audio(tmp_path / "model")
    part = load_processor(model).feature_extractor
    whole, start = (
        part(sound, sampling_rate=16000)["input_features"]
        for sound in (heard(folder / "long.wav"), heard(folder / "long.wav")[:32000])
    )
    assert np.array_equal(whole, start)  # what is refused is lost indeed
    found = MediaProcessor(folder=model, tokenizer=load_processor(model).tokenizer)
    found.opened(Media("audio", str(folder / "padded.wav")))
    with pytest.raises(BadRow, match=r"long.wav takes 2.5 seconds, of which the model hears 2; cut it") as caught:
        found.opened(Media("audio", str(folder / "long.wav")))
    assert caught.value.reason == "sound beyond hearing"
    windows = audio_flamingo(tmp_path / "windows")
    all_of_it = MediaProcessor(folder=windows, tokenizer=load_processor(windows).tokenizer)
    assert len(all_of_it.opened(Media("audio", str(folder / "long.wav")))) == 40000
    asks = [{"role": "user", "content": "<audio>what is it"}, {"role": "assistant", "content": "red"}]
    rows = [{"messages": asks, "audios": [str(folder / name)]} for name in ("a.wav", "long.wav")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    keys = {"model": str(model), "dataset": str(tmp_path / "rows.json"), "output_dir": str(tmp_path / "run")}
    plan = llmtune.plan({**keys, "bf16": False, "on_bad_record": "skip", "media_dir": str(folder)})
    assert "1 of 2 rows (sound beyond hearing 1)" in str(plan)
    assert plan.media is not None and plan.media.media == {"audio": 1}


def test_sounds_of_voxtral_are_refused(folder: Path) -> None:
    """Its processor leaves the tokens of sounds to mistral-common."""
    from transformers import VoxtralProcessor

    held = tokenizer()
    media = MediaProcessor(folder=folder, tokenizer=held)
    media.__dict__["processor"] = VoxtralProcessor.__new__(VoxtralProcessor)
    media.processor.feature_extractor = ears()
    with pytest.raises(BadRow, match="VoxtralProcessor takes text alone, and a message shows audio"):
        media.encode(ShownText("what", (Media("audio", str(folder / "a.wav")),)), [])


@pytest.mark.parametrize(
    ("kind", "auto_class", "tower", "projector"),
    [
        ("qwen2_audio", "AutoModelForMultimodalLM", "audio_tower", "multi_modal_projector"),
        ("granite_speech", "AutoModelForMultimodalLM", "model.encoder.", "model.projector."),
        ("phi4_multimodal", "AutoModelForCausalLM", "audio_embed.encoder.", "audio_embed.up_proj_for_speech"),
    ],
)
def test_the_parts_of_models_that_hear(kind: str, auto_class: str, tower: str, projector: str) -> None:
    """Also where transformers has no usual name for the tower, or holds it in the decoder."""
    import transformers

    config: Any = transformers.AutoConfig.for_model(kind)
    with torch.device("meta"):
        parts = parts_of(getattr(transformers, auto_class).from_config(config))
    inside = {name for name in parts if tower in name}
    between = {name for name in parts if projector in name}
    assert inside
    assert between
    assert {parts[name] for name in inside} == {"vision_tower"}
    assert {parts[name] for name in between} == {"multi_modal_projector"}
    layers = [name for name in parts if name.startswith(("model.layers.", "model.language_model.layers."))]
    assert layers
    assert {parts[name] for name in layers} == {"language_model"}
