"""Conversations in which pictures and sounds are shown are answered as transformers answers them: its processor's own
`apply_chat_template`, then its `generate`."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune.cli import main
from llmtune.contract.errors import DataError
from llmtune.inference.chat import asked
from llmtune.inference.talk import chat_loop
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


def lines(talk: Any, said: list[str]) -> str:
    """What the terminal shows of a conversation of these lines."""
    written, rest = [], iter(said)

    def read(prompt: str) -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    chat_loop(talk, read, written.append, guides=False)
    return "".join(written)


def test_the_terminal_shows_files_and_a_conversation_that_is_kept_is_a_row_to_train_on(
    models: Any, place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(place)
    theirs, kept = AnswersByHand(models("llava"), place), tmp_path / "kept.jsonl"
    red, blue = ({"type": "image", "image": str(place / f"{color}.png")} for color in ("red", "blue"))
    first = theirs.answer([{"role": "user", "content": [red, {"type": "text", "text": "what is it"}]}])
    shown = lines(llmtune.open_chat(models("llava"), **GREEDY), [
        "/image", "/image gone.png", "/image red.png", "what is it", "/image blue.png", "<image> and <image>",
        "and <image> here", f"/save {kept}", "/image red.png", "/image",
    ])  # fmt: skip
    told = ["/image needs a file: /image FILE", "There is no file gone.png.", "red.png goes with what you ask next."]
    assert shown.startswith("\n".join([*told, first, ""]))
    assert "found 2 marks <image> for 1 image" in shown
    waits = place / "blue.png"
    assert f"What you ask next shows {waits}; /image alone takes that back.\n" in shown
    assert shown.endswith(f"Taken back: {place / 'red.png'}.\n")
    row = json.loads(kept.read_text())
    assert row["messages"][0]["content"] == [red, {"type": "text", "text": "what is it"}]
    assert row["messages"][2]["content"][1] == blue and len(row["messages"]) == 4
    keys = {"model": str(models("llava")), "dataset": str(kept), "media_dir": str(place), "max_steps": 1}
    assert llmtune.plan({**keys, "output_dir": str(tmp_path / "run")}).data.prepared.train.media_kinds == ("image",)


def test_the_command_shows_files(models: Any, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    red = {"type": "image", "image": str(place / "red.png")}
    words = [f"{key}={json.dumps(value)}" for key, value in GREEDY.items() if key != "device"]
    command = ["chat", str(models("llava")), *words, "device=cpu", "--prompt", "what is <image>"]
    assert main([*command, "--image", str(place / "red.png")]) == 0
    asked = [{"role": "user", "content": [{"type": "text", "text": "what is "}, red]}]
    expected = AnswersByHand(models("llava"), place).answer(asked)
    assert capsys.readouterr().out.endswith(f"{expected}\n")
    assert main(command) == DataError.exit_code
    assert "found 1 mark <image> and no image beside the text; name its file" in capsys.readouterr().err


def test_a_model_that_reads_text_says_so(place: Path, tiny_llama: str) -> None:
    talk = llmtune.open_chat(tiny_llama, template="chatml", **GREEDY)
    with pytest.raises(DataError, match=f"{tiny_llama} reads text only, and 1 image was given"):
        asked(talk, "what", image=[place / "red.png"])
    with pytest.raises(DataError, match="reads text only, and 2 images were given"):
        asked(talk, "what", image=[place / "red.png"] * 2)
    assert talk.ask("a mark <image> is text here")
