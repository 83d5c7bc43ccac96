"""`llmtune serve` answers questions about videos as transformers does, whatever their heads say."""

from __future__ import annotations

import base64
import io
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
import transformers

from llmtune.media.loading import load_processor
from llmtune.media.processor import MediaProcessor
from llmtune.model.modalities import placeholders_of
from llmtune.serving.config import ServeConfig
from llmtune.serving.media import Refused, RequestMedia
from tests import tiny_media
from tests.served import serving
from tests.test_serve_media import TOKENS, ask, asked, content, made, png, shows, url_of
from tests.test_video_training import RATE, film, taken

pytest.importorskip("av")
LENGTHS = {"short": 1.0, "long": 3.0}


def video(path: Path) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url_of(path.read_bytes(), "video/mp4")}}


def jpegs(count: int) -> list[bytes]:
    from PIL import Image

    found = []
    for shade in range(count):
        held = io.BytesIO()
        Image.new("RGB", (32, 24), (60 * shade, 200 - 50 * shade, 90)).save(held, "JPEG")
        found.append(held.getvalue())
    return found


@torch.no_grad()
def theirs(model: Any, processor: Any, folder: Path, parts: tuple[str, ...], never: list[int]) -> tuple[str, int]:
    """What transformers answers to texts, pictures (by their colours) and videos, and the tokens of its prompt."""
    from PIL import Image

    turn, images, videos, about = [], [], [], []
    for part in parts:
        if part in LENGTHS:
            total = int(LENGTHS[part] * RATE)
            numbers, rate = sorted({int(at) for at in np.linspace(0, total - 1, int(LENGTHS[part] * 2))}), RATE
            videos.append(taken(folder / f"{part}.mp4", numbers)[0])
        elif part == "jpegs":
            total, numbers, rate = 3, [0, 1, 2], 2
            videos.append(np.stack([np.asarray(Image.open(io.BytesIO(each))) for each in jpegs(3)]))
        else:
            images += [Image.open(io.BytesIO(png(part)))] if part == "red" else []
            turn.append({"type": "image"} if part == "red" else {"type": "text", "text": part})
            continue
        turn.append({"type": "video"})
        about.append({"total_num_frames": total, "fps": rate, "duration": total / rate, "frames_indices": numbers})
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": turn}], tokenize=False, add_generation_prompt=True
    )
    batch = processor(
        text=[text], images=images or None, videos=videos, video_metadata=about, do_sample_frames=False,
        return_tensors="pt",
    )  # fmt: skip
    batch.pop("video_metadata", None)
    said = model.generate(**batch, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0, suppress_tokens=never)
    width = batch["input_ids"].shape[1]
    return processor.tokenizer.decode(said[0, width:], skip_special_tokens=True), width


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_questions_about_videos_are_answered_as_by_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together and one by one, of several lengths, in pictures, beside pictures, and streamed. The engine finds all of
    them read; what had no room it reads itself."""
    pytest.importorskip("torchvision")
    auto = transformers.AutoModelForImageTextToText
    folder = made(tmp_path / name, tiny_media.MODELS[name], auto)
    for each, seconds in LENGTHS.items():
        film(tmp_path / f"{each}.mp4", seconds)
    shot = {"type": "video_url", "video_url": {"url": url_of(b"", "video/jpeg") + ",".join(
        base64.b64encode(each).decode() for each in jpegs(3))}}  # fmt: skip
    parts = {
        **{each: video(tmp_path / f"{each}.mp4") for each in LENGTHS},
        "jpegs": shot,
        "red": shows(url_of(png("red"))),
    }
    questions = [("short", "what is"), ("how many", "long"), ("red", " and ", "short", "hello"), ("jpegs", "world"),
                 ("long", "short", "in the picture")]  # fmt: skip
    model, processor = auto.from_pretrained(folder).eval(), load_processor(folder)
    never = placeholders_of(model.config)
    expected = [theirs(model, processor, tmp_path, question, never) for question in questions]
    assert len({text for text, _ in expected}) > 2
    found: dict[int, Any] = {}
    in_engine: list[Any] = []
    usual = MediaProcessor.read
    monkeypatch.setattr(MediaProcessor, "read", lambda self, rows: in_engine.append(rows) or usual(self, rows))
    with serving(str(folder), model_name="m") as served:

        def one(at: int) -> None:
            turn = [
                {"role": "user", "content": [parts.get(each, {"type": "text", "text": each}) for each in questions[at]]}
            ]
            if at % 2:
                chunks = list(ask(served, turn, stream=True, stream_options={"include_usage": True}))
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
                found[at] = text, chunks[-1].usage.prompt_tokens
            else:
                answer = ask(served, turn, n=2)
                assert len({choice.message.content for choice in answer.choices}) == 1
                found[at] = answer.choices[0].message.content, answer.usage.prompt_tokens

        threads = [threading.Thread(target=one, args=(at,)) for at in range(len(questions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (offer, *_) = served.server.offers
        assert [found[at] for at in range(len(questions))] == expected
        assert not offer.ahead._held and not in_engine
        offer.ahead._room = 0
        one(0)
        assert found[0] == expected[0] and in_engine
        broken = video(tmp_path / "short.mp4")
        cut = (tmp_path / "short.mp4").read_bytes()
        middle = len(cut) // 3
        broken["video_url"]["url"] = url_of(cut[:middle] + bytes(200) + cut[middle + 200 :], "video/mp4")
        with pytest.raises(openai.BadRequestError, match="video-1 cannot be read|no video that can be read"):
            ask(served, content(broken))


def test_without_torchvision_a_video_is_refused_by_a_sentence_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film(tmp_path / "film.mp4", 1.0)
    folder = tiny_media.MODELS["qwen2_vl"](tmp_path / "m")
    monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: False)
    with serving(str(folder), model_name="m") as served:
        said = "m reads text and image, and 1 video was given; of a model that sees video, that part needs torchvision"
        with pytest.raises(openai.BadRequestError, match=said):
            ask(served, content(video(tmp_path / "film.mp4")))
        assert ask(served, asked("red", "hello")).choices


def refused(folder: Path, part: dict[str, Any], **keys: Any) -> str:
    """Why a server with these keys does not take a part; nothing if it does."""
    try:
        RequestMedia(ServeConfig(**keys), folder).taken(content(part), "m", ["image", "video"])
    except Refused as error:
        assert error.status == 400
        return str(error)
    return ""


def test_videos_are_checked_before_they_are_decoded(tmp_path: Path) -> None:
    """By their packets: a head that tells of one second, or of few pictures, is not believed."""
    path = film(tmp_path / "film.avi", 3.0)
    pixels = 30 * 32 * 24
    assert not refused(tmp_path, video(path), max_media_seconds=3, max_decoded_pixels=pixels, max_media_pixels=768)
    lying = bytearray(path.read_bytes())
    struct.pack_into("<I", lying, lying.index(b"strh") + 40, 5)
    (tmp_path / "lying.avi").write_bytes(lying)
    for each in (path, tmp_path / "lying.avi"):
        assert "a video of 3 s, allowed are 2; cut it" in refused(tmp_path, video(each), max_media_seconds=2)
        said = f"video of more than {pixels - 1:,} pixels, all its pictures together; make it smaller, or cut it"
        assert said in refused(tmp_path, video(each), max_decoded_pixels=pixels - 1)
        said = "a video with pictures of more than 767 pixels; make it smaller"
        assert said in refused(tmp_path, video(each), max_media_pixels=767)
    jpeg = ",".join(base64.b64encode(each).decode() for each in jpegs(3))
    shot = {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{jpeg}"}}
    assert not refused(tmp_path, shot, max_decoded_pixels=3 * 768)
    assert "video of more than 2,303 pixels" in refused(tmp_path, shot, max_decoded_pixels=3 * 768 - 1)
    for other in (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", b"", b"RIFF", b"\0\0\0\x18ftypmp42", png("red")):
        part = {"type": "video_url", "video_url": {"url": url_of(other, "video/mp4")}}
        assert "no video that can be read, allowed are mp4, mov, webm, mkv, avi" in refused(tmp_path, part)
    part = {"type": "video_url", "video_url": {"url": "/etc/passwd"}}
    assert "'/etc/passwd', allowed is a data URL" in refused(tmp_path, part)
    assert "video_url without url, allowed is data:video/TYPE;base64" in refused(tmp_path, {"type": "video_url"})
    assert not refused(tmp_path, {**part, "video_url": f"file://{path}"}, allowed_local_media_path=str(tmp_path))
