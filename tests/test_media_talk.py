"""Conversations in which pictures and sounds are shown are answered as transformers answers them: its processor's own
`apply_chat_template`, then its `generate`."""

from __future__ import annotations

import base64
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune.contract.errors import DataError
from llmtune.inference.chat import asked
from tests import tiny_audio, tiny_media
from tests.media_by_hand import AnswersByHand, decided_by_what_is_shown

pytest.importorskip("PIL")
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "device": "cpu", "skip_special_tokens": False}
FILES = {"image": ("red.png", "blue.png"), "audio": ("low.wav", "high.wav")}
"""What is shown, by its kind."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talk")
    tiny_media.draw(folder / "red.png", "red", "circle", (40, 30))
    tiny_media.draw(folder / "blue.png", "blue", "square", (36, 36))
    tiny_audio.tone(folder / "low.wav", 220, 0.4)
    tiny_audio.tone(folder / "high.wav", 880, 0.7)
    return folder


@pytest.fixture(scope="module")
def models(place: Path) -> Callable[[str], Path]:
    every = {**tiny_media.MODELS, **tiny_audio.MODELS}
    return cache(lambda name: decided_by_what_is_shown(every[name](place / name)))


CASES = {"llava": "image", "qwen2_vl": "image", "gemma3": "image", "qwen2_audio": "audio"}
"""Models, and what they are shown."""


@pytest.mark.parametrize("name", CASES)
def test_answers_of_a_conversation_are_those_of_transformers(
    name: str, models: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second question sees the first one's picture, and shows another."""
    kind = CASES[name]
    if kind == "audio":
        pytest.importorskip("av")
    theirs, (one, two) = AnswersByHand(models(name), place), FILES[kind]
    monkeypatch.chdir(place)
    talk = llmtune.open_chat(models(name), **GREEDY)
    first = asked(talk, f"what is <{kind}> in the picture", **{kind: [one]})
    content = [
        {"type": "text", "text": "what is "},
        {"type": kind, kind: one},
        {"type": "text", "text": " in the picture"},
    ]
    turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
    assert first == theirs.answer(turns)
    second = "".join(talk.stream([{"type": "text", "text": "and "}, {"type": kind, kind: two}])).strip()
    turns += [{"role": "assistant", "content": first}]
    turns += [{"role": "user", "content": [{"type": "text", "text": "and "}, {"type": kind, kind: two}]}]
    assert second == theirs.answer(turns)
    assert talk.messages == [*turns, {"role": "assistant", "content": second}]
    talk.clear()
    assert talk.ask("hello") == theirs.answer([{"role": "user", "content": "hello"}])
    other = [{"type": "text", "text": "what is "}, {"type": kind, kind: two}, content[-1]]
    assert theirs.answer([{"role": "user", "content": other}]) != first, "what is shown does not decide the answer"


def test_what_is_shown_may_come_in_any_form(models: Any, place: Path) -> None:
    from PIL import Image

    talk = llmtune.open_chat(models("llava"), **GREEDY)
    content = (place / "red.png").read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    found = set()
    for source in (place / "red.png", str(place / "red.png"), content, url, Image.open(place / "red.png")):
        talk.clear()
        found.add(asked(talk, "what", image=[source]))
        talk.clear()
        found.add(talk.ask([{"type": "image_url", "image_url": {"url": source}}, {"type": "text", "text": "what"}]))
    found.add(asked(talk, [{"role": "user", "content": "what"}], image=[url]))
    assert len(found) == 1


WRONG: dict[str, tuple[str, dict[str, list[str]], str]] = {
    "no file": ("<image> what", {}, "found 1 mark <image> and no image beside the text; name its file"),
    "too many files": (
        "<image> what",
        {"image": ["red.png", "red.png"]},
        "found 1 mark <image> for 2 images; each",
    ),
    "missing": ("what", {"image": ["gone.png"]}, "there is no file .*gone.png; paths count from"),
    "broken": ("what", {"image": ["broken.png"]}, "broken.png cannot be read"),
    "another kind": ("what", {"audio": ["low.wav"]}, "llava reads text and image, and 1 audio was given"),
    "an address": ("what", {"image": ["https://localhost/a.png"]}, "set media_from_network: true"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_shown_is_told_in_a_sentence(
    name: str, models: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    (place / "broken.png").write_bytes((place / "red.png").read_bytes()[:60])
    talk, (text, files, said) = llmtune.open_chat(models("llava"), **GREEDY), WRONG[name]
    with pytest.raises(DataError, match=said) as found:
        asked(talk, text, **files)
    assert "\n" not in str(found.value) and not talk.messages


def test_a_model_that_reads_text_says_so(place: Path, tiny_llama: str) -> None:
    talk = llmtune.open_chat(tiny_llama, template="chatml", **GREEDY)
    with pytest.raises(DataError, match=f"{tiny_llama} reads text only, and 1 image was given"):
        asked(talk, "what", image=[place / "red.png"])
    assert talk.ask("a mark <image> is text here")
