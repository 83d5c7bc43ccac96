"""Rows that show video: the pictures that are taken of it are those that transformers takes, and a model that sees
video learns from them what a loop in transformers teaches it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llmtune
from llmtune.contract.examples import BadRow
from llmtune.media.config import MediaConfig
from llmtune.media.loading import load_processor
from llmtune.media.opening import open_video
from llmtune.testing import running
from tests.media_by_hand import decided_by_what_is_shown
from tests.test_audio_training import by_hand, opened
from tests.test_media_rollouts import prepared
from tests.test_media_training import TRAINED, losses, recipe, same
from tests.tiny_audio import omni, omni3
from tests.tiny_families import MODELS as FAMILIES
from tests.tiny_media import MODELS, draw

av = pytest.importorskip("av")
AS_THEY_ARE = {"video_fps": 4.0, "video_min_pixels": None, "video_max_pixels": None}
RATE = 10
"""Pictures a second of all files."""
SEEING = {**MODELS, **FAMILIES, "omni": partial(omni, patch=28), "omni3": partial(omni3, patch=28)}


def film(path: Path, seconds: float, size: tuple[int, int] = (32, 24)) -> Path:
    """A video of noise, of which no two pictures look alike."""
    drawn = np.random.default_rng(3).integers(0, 255, (int(seconds * RATE), size[1] // 8, size[0] // 8, 3), np.uint8)
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg2video" if path.suffix == ".ts" else "mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for picture in drawn:
            frame = av.VideoFrame.from_ndarray(picture.repeat(8, 0).repeat(8, 1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def taken(path: Path, indices: list[int]) -> tuple[np.ndarray, Any]:
    """(pictures, height, width, 3) of a video with these numbers, and what transformers says of them."""
    from transformers.video_utils import load_video

    return load_video(str(path), backend="pyav", sample_indices_fn=lambda metadata, **_: indices)


@pytest.mark.parametrize(
    ("keys", "indices"),
    [
        ({}, [0, 5, 11, 17, 23, 29]),
        ({"video_fps": 1.0}, [0, 14, 29]),
        ({"video_fps": 0.1}, [0, 29]),
        ({"video_fps": 10.0, "video_maxlen": 4}, [0, 9, 19, 29]),
    ],
)
def test_the_pictures_of_a_video_are_those_that_transformers_takes(
    keys: dict[str, Any], indices: list[int], tmp_path: Path
) -> None:
    path = film(tmp_path / "film.mp4", 3.0)
    found = open_video(str(path), MediaConfig(**keys))
    assert found.indices == indices
    frames, told = taken(path, found.indices)
    np.testing.assert_array_equal(found.frames, frames)
    assert (found.total, found.fps) == (told.total_num_frames, told.fps)


def told(name: bytes, skipped: int, form: str, value: int) -> Callable[[bytes], bytes]:
    """What writes a number so many bytes after a name in a file's head."""

    def write(content: bytes) -> bytes:
        changed = bytearray(content)
        struct.pack_into(form, changed, content.index(name) + len(name) + skipped, value)
        return bytes(changed)

    return write


LIES = {
    "avi": [told(b"strh", 36, "<I", 5), told(b"strh", 36, "<I", 10**6), told(b"avih", 20, "<I", 10**6)],
    "mp4": [told(b"stts", 8, ">I", 5), told(b"stts", 8, ">I", 2**30), told(b"mdhd", 16, ">I", 1),
            told(b"mdhd", 16, ">I", 2**31 - 1), told(b"mvhd", 16, ">I", 2**31 - 1)],
    "mkv": [told(bytes.fromhex("23E38384"), 0, ">I", 10**6), told(bytes.fromhex("23E38384"), 0, ">I", 4 * 10**9)],
}  # fmt: skip
"""Heads that tell of 5 pictures, or of a million, of a thousand a second, or one in four seconds."""


@pytest.mark.parametrize("kind", LIES)
def test_the_pictures_of_a_video_are_those_that_are_there_whatever_its_head_says(kind: str, tmp_path: Path) -> None:
    path = film(tmp_path / f"film.{kind}", 3.0)
    honest = open_video(str(path), MediaConfig())
    assert (honest.indices, honest.total, honest.fps) == ([0, 5, 11, 17, 23, 29], 30, RATE)
    np.testing.assert_array_equal(honest.frames, taken(film(tmp_path / "film.mp4", 3.0), honest.indices)[0])
    for number, lie in enumerate(LIES[kind]):
        lying = tmp_path / f"{number}.{kind}"
        lying.write_bytes(lie(path.read_bytes()))
        assert lying.read_bytes() != path.read_bytes()
        found = open_video(str(lying), MediaConfig())
        assert (found.indices, found.total, found.fps) == (honest.indices, honest.total, honest.fps)
        np.testing.assert_array_equal(found.frames, honest.frames)


def test_packets_that_show_nothing_are_no_pictures(tmp_path: Path) -> None:
    """As those of a recording that begins in the midst of pictures that hang on one before them."""
    with av.open(film(tmp_path / "whole.ts", 3.0)) as whole, av.open(tmp_path / "late.ts", "w") as late:
        stream = late.add_stream_from_template(whole.streams.video[0])
        packets = [packet for packet in whole.demux(video=0) if packet.size]
        shown = 30 - next(number for number, packet in enumerate(packets) if number >= 5 and packet.is_keyframe)
        assert shown < 25
        for packet in packets[5:]:
            packet.stream = stream
            late.mux(packet)
    found = open_video(str(tmp_path / "late.ts"), MediaConfig(video_fps=100.0))
    assert (found.total, found.indices) == (shown, list(range(shown)))
    whole_frames = open_video(str(tmp_path / "whole.ts"), MediaConfig(video_fps=100.0)).frames
    np.testing.assert_array_equal(found.frames, whole_frames[-shown:])


def test_a_video_whose_pictures_are_huge_later_on_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with av.open(tmp_path / "grows.mov", "w") as container:
        stream = container.add_stream("mjpeg", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuvj420p"
        large = av.CodecContext.create("mjpeg", "w")
        large.width, large.height, large.pix_fmt, large.time_base = 320, 240, "yuvj420p", Fraction(1, RATE)
        for number, codec in enumerate([stream] * 3 + [large] * 3):
            picture = np.full((codec.height, codec.width, 3), 40 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuvj420p")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            for packet in codec.encode(frame):
                packet.stream = stream
                container.mux(packet)
    config = MediaConfig(video_fps=100.0)
    assert open_video(str(tmp_path / "grows.mov"), config, 3 * (32 * 24 + 320 * 240)).total == 6
    with pytest.raises(BadRow, match="grows.mov has more than 232,703 pixels, all its pictures together"):
        open_video(str(tmp_path / "grows.mov"), config, 3 * (32 * 24 + 320 * 240) - 1)
    monkeypatch.setattr("llmtune.media.opening.MOST_PIXELS", 320 * 240 - 1)
    with pytest.raises(BadRow, match="grows.mov cannot be read"):
        open_video(str(tmp_path / "grows.mov"), config)


def test_pictures_of_a_video_have_the_sizes_of_the_recipe(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", 1.0)
    small = MediaConfig(video_max_pixels=192, video_min_pixels=None)
    assert open_video(str(path), small).frames.shape[1:] == (12, 16, 3)
    assert open_video(str(path), MediaConfig(video_min_pixels=48 * 64)).frames.shape[1:] == (48, 64, 3)


def rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of videos of two lengths, of a list of pictures, and of text alone."""
    film(folder / "short.mp4", 1.0)
    film(folder / "long.mp4", 2.5)
    shots = [str(draw(folder / f"{at}.png", "red", "circle", (32, 24)).name) for at in range(4)]
    asked = [("<video>what is it", "red", ["short.mp4"]), ("how <video> and <video>", "blue", ["long.mp4", shots]),
             ("hello", "world", [])]  # fmt: skip
    found = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}], "videos": videos}
        for text, answer, videos in asked
    ]
    (folder / "rows.json").write_text(json.dumps(found))
    return found


def asked_by_hand(folder: Path, row: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The question of a row as transformers wants it, and what its processor is given with the text."""
    from PIL import Image

    def shown(video: Any) -> tuple[np.ndarray, dict[str, Any]]:
        if isinstance(video, list):
            frames = np.stack([np.asarray(Image.open(folder / each)) for each in video])
            rate, numbers, total = 4.0, list(range(len(video))), len(video)
        else:
            total = {"short.mp4": 10, "long.mp4": 25}[video]
            numbers = sorted({int(at) for at in np.linspace(0, total - 1, int(total / RATE * 4))})
            frames, rate = taken(folder / video, numbers)[0], float(RATE)
        return frames, {"total_num_frames": total, "fps": rate, "duration": total / rate, "frames_indices": numbers}

    parts: list[dict[str, Any]] = []
    for number, text in enumerate(row["messages"][0]["content"].split("<video>")):
        parts += [{"type": "video"}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    given: dict[str, Any] = {"return_tensors": "pt"}
    if videos := [shown(video) for video in row["videos"]]:
        given |= {"videos": [frames for frames, _ in videos], "video_metadata": [about for _, about in videos],
                  "do_sample_frames": False}  # fmt: skip
    return [{"role": "user", "content": parts}], given


def rows_by_hand(folder: Path, place: Path) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """(what the model is given, labels (1, T) with -100 where nothing is learnt) of each row."""
    processor, made = load_processor(folder), []
    rate = {"fps": 4.0} if "Omni" in type(processor).__name__ else {}  # others take it from what is said of each video
    write = partial(processor.tokenizer.apply_chat_template, tokenize=False)
    for row in json.loads((place / "rows.json").read_text()):
        asked, given = asked_by_hand(place, row)
        given |= rate if row["videos"] else {}
        start = write(asked, add_generation_prompt=True)
        answer = {"role": "assistant", "content": [{"type": "text", "text": row["messages"][1]["content"]}]}
        batch = {
            key: each
            for key, each in processor(text=[write([*asked, answer])], **given).items()
            if key != "video_metadata"
        }
        labels = torch.full_like(batch["input_ids"], -100)
        first = processor(text=[start], **given)["input_ids"].shape[1]
        labels[0, first:-1] = batch["input_ids"][0, first:-1]
        made.append((batch, labels))
    return made


@pytest.mark.parametrize(
    "name", ["qwen2_5_vl", "qwen3_vl", "gemma4", "internvl", "smolvlm", "glm4v", "video_llama3", "omni", "omni3"]
)
def test_a_model_that_sees_video_learns_as_by_hand(name: str, tmp_path: Path) -> None:
    """Videos of several lengths in one batch; `video_fps` reaches the positions in time."""
    pytest.importorskip("torchvision")
    model, found = SEEING[name](tmp_path / "model"), rows(tmp_path)
    if name == "internvl":  # which takes no two lengths in a row
        found[1] = {**found[1], "messages": [{"role": "user", "content": "how <video>"}, found[1]["messages"][1]]}
        found[1]["videos"] = found[1]["videos"][:1]
        (tmp_path / "rows.json").write_text(json.dumps(found))
    made = rows_by_hand(model, tmp_path)
    expected = by_hand(opened(model, name), made)
    keys = {**TRAINED, **AS_THEY_ARE, "cutoff_len": 4096}
    llmtune.train(recipe(model, tmp_path, tmp_path / "run", **{"per_device_train_batch_size": 3, **keys}))
    same(losses(tmp_path / "run"), expected)


def test_videos_that_a_model_cannot_be_given_together_are_found_before_training(tmp_path: Path) -> None:
    """LLaVA-OneVision takes one length in a batch, SmolVLM's processor pictures or video in a row."""
    pytest.importorskip("torchvision")
    found = rows(tmp_path)
    found[1]["videos"], found[1]["messages"][0]["content"] = ["long.mp4"], "how <video>"
    (tmp_path / "rows.json").write_text(json.dumps(found))
    keys = recipe(FAMILIES["llava_onevision"](tmp_path / "model"), tmp_path, tmp_path / "run", **AS_THEY_ARE)
    with pytest.raises(llmtune.LlmtuneError, match="videos of several lengths, .* set per_device_train_batch_size: 1"):
        llmtune.train(keys)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    llmtune.train(keys, per_device_train_batch_size=1)
    found[0]["images"], found[0]["messages"][0]["content"] = ["0.png"], "<image><video>what"
    (tmp_path / "rows.json").write_text(json.dumps(found))
    with pytest.raises(llmtune.LlmtuneError, match="SmolVLMProcessor makes one thing of pictures and video"):
        llmtune.plan(recipe(MODELS["smolvlm"](tmp_path / "smolvlm"), tmp_path, tmp_path / "run2", **AS_THEY_ARE))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_what_a_model_that_sees_video_says_is_read_as_by_hand(name: str, tmp_path: Path) -> None:
    """Log-probabilities of its answers in a roll-out are those of transformers, a row at a time."""
    pytest.importorskip("torchvision")
    from transformers import AutoModelForImageTextToText

    model, asked = MODELS[name](tmp_path / "model"), rows(tmp_path)
    keys = {"video_fps": 4.0, "video_min_pixels": None, "video_max_pixels": None, "per_device_train_batch_size": 3}
    stage = {"name": "grpo", "num_generations": 2, "max_new_tokens": 5, "num_iterations": 2}
    plan, objective = running.start(
        recipe(model, tmp_path, tmp_path / "run", **keys)
        | {"stage_config": stage, "reward_config": "reference", "disable_shuffling": True}
    )
    processor = load_processor(model)
    plain: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    for batch in prepared(plan, objective):
        for number, (sample, row) in enumerate(zip(batch.sample_ids, batch.rows(), strict=True)):
            question, given = asked_by_hand(tmp_path, asked[sample])
            text = processor.apply_chat_template(question, add_generation_prompt=True)
            inputs = dict(processor(text=[text], **given))
            prompt, mine = inputs["input_ids"], batch.target_sequence == number
            ids = torch.tensor([row[-int(mine.sum()) :]])
            assert [*prompt[0].tolist(), *ids[0].tolist()] == row
            for key in [key for key, each in inputs.items() if each.shape[:2] == prompt.shape]:
                more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}.get(key, torch.zeros_like(ids))
                inputs[key] = torch.cat([inputs[key], more], 1)
            logits = plain(**inputs).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
            expected = logits.gather(1, ids[0, :, None])[:, 0]
            torch.testing.assert_close(batch.extra["old_logps"][mine], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "gemma4"])
@torch.no_grad()
def test_what_a_model_that_sees_video_answers_is_what_transformers_answers(name: str, tmp_path: Path) -> None:
    """Asked about rows together, of videos of several lengths, and in a conversation; by hand one by one."""
    pytest.importorskip("torchvision")
    from transformers import AutoModelForImageTextToText

    model, found = decided_by_what_is_shown(MODELS[name](tmp_path / "model")), rows(tmp_path)
    shots = found[1]["videos"].pop()
    found[1]["messages"][0]["content"] = "how <video>"
    found.append({"messages": [{"role": "user", "content": "and <video>"}, found[1]["messages"][1]], "videos": [shots]})
    (tmp_path / "rows.json").write_text(json.dumps(found))
    plain: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    processor, expected = load_processor(model), []
    never = [*processor.image_token_ids, *processor.video_token_ids, *processor.audio_token_ids]
    for row in found:
        asked, given = asked_by_hand(tmp_path, row)
        text = processor.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        inputs = {key: each for key, each in processor(text=[text], **given).items() if key != "video_metadata"}
        said = plain.generate(
            **inputs, do_sample=False, max_new_tokens=8, suppress_tokens=[each for each in never if each],
            eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id,
        )  # fmt: skip
        expected.append(processor.tokenizer.decode(said[0, inputs["input_ids"].shape[1] :]).strip())
    keys: dict[str, Any] = {"device": "cpu", "do_sample": False, "max_new_tokens": 8, **AS_THEY_ARE}
    keys |= {"skip_special_tokens": False}
    done = llmtune.predict(
        model, tmp_path / "rows.json", output_dir=str(tmp_path / "out"), per_device_eval_batch_size=3, **keys
    )
    assert [row["predict"] for row in done.rows] == expected
    assert len(set(expected)) > 2
    chat = llmtune.open_chat(model, **keys)
    parts = [{"type": "text", "text": "how "}, {"type": "video", "video": str(tmp_path / "long.mp4")}]
    assert chat.ask(parts) == expected[1]
