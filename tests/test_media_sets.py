"""Rows that show something as other libraries have them: columns of the hub, LLaVA's JSON, TRL's columns."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies

import llmtune
from llmtune.contract.examples import BadRow, Preference, Text
from llmtune.data.formats import Chosen, read_row
from llmtune.data.formats.chats import Alpaca, OpenAi, PromptCompletion, ShareGpt
from llmtune.data.formats.pairs import KtoRows, PreferencePairs
from llmtune.data.formats.plain import PlainText, PromptOnly
from llmtune.data.reading import Dataset
from llmtune.data.reading.hub import hub_rows
from llmtune.media.files import MediaFiles
from llmtune.media.loading import load_processor
from llmtune.media.marks import BOUNDARY, MARKS, as_parts
from tests.tiny_media import MODELS, draw

Image = pytest.importorskip("PIL.Image")
datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sets")
    for number, color in enumerate(("red", "blue")):
        draw(made / f"{number}.png", color, "circle", (32, 24 + 8 * number))
    return made


@pytest.fixture(scope="module")
def llava(place: Path) -> Path:
    return MODELS["llava"](place / "llava")


def from_the_hub(table: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr("llmtune.data.reading.hub._loaded", lambda *args, **more: table)
    return [row.data for row in hub_rows(Dataset(spelling="hub:some/set", name="set", hub="some/set"), 0)]


def test_columns_of_the_hub_are_read_as_their_files_are(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures opened and written anew would take ten times the room; sounds need torchcodec to be opened."""
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(3200))
    written = [(place / f"{number}.png").read_bytes() for number in (0, 1)]
    paths = [str(place / "1.png"), str(place / "none.png"), "https://a.b/c.png", "1.png"]
    held = {
        "images": [[{"bytes": written[0], "path": None}, *({"bytes": None, "path": path} for path in paths)]],
        "audio": [{"bytes": sound.getvalue(), "path": "a.wav"}],
        "text": ["what"],
    }
    kinds = {"images": datasets.List(datasets.Image()), "audio": datasets.Audio()}
    table = datasets.Dataset.from_dict(held)
    for name, kind in kinds.items():
        table = table.cast_column(name, kind)
    (row,) = from_the_hub(table, monkeypatch)
    assert [each.get("bytes") for each in row["images"]] == [*written, None, None, None]
    assert [each["path"] for each in row["images"][1:]] == paths  # which who reads the row may open, or may not
    assert row["audio"]["bytes"] == sound.getvalue()


def test_a_picture_that_would_become_white_is_refused(place: Path) -> None:
    with pytest.raises(BadRow, match="more than 8 bits"):
        MediaFiles(folder=place).find("image", Image.new("I;16", (4, 4), 30000))


def parts(*said: str | Path) -> list[dict[str, Any]]:
    """A content as transformers wants it."""
    return [
        {"type": "image", "image": Image.open(each)} if isinstance(each, Path) else {"type": "text", "text": each}
        for each in said
    ]


SETS: dict[str, tuple[dict[str, Any], list[str | int]]] = {
    "llava": (
        {"id": "7", "image": "0.png", "conversations": [{"from": "human", "value": "<image>\nwhat is red"},
                                                        {"from": "gpt", "value": "circle"}]},
        [0, "\nwhat is red"],
    ),
    "llava, at the end": (
        {"image": "1.png", "conversations": [{"from": "human", "value": "what is red\n<image>"},
                                             {"from": "gpt", "value": "circle"}]},
        ["what is red\n", 1],
    ),
    "trl": (
        {"images": ["0.png", "1.png"], "prompt": [{"role": "user", "content": "what is red"}],
         "completion": [{"role": "assistant", "content": "circle"}]},
        [0, 1, "what is red"],
    ),
    "trl, parts": (
        {"images": ["0.png"], "messages": [
            {"role": "user", "content": [{"type": "text", "text": "what"}, {"type": "image", "text": None}]},
            {"role": "assistant", "content": [{"type": "text", "text": "circle"}]}]},
        ["what", 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_tokens_are_those_of_the_processor(name: str, place: Path, llava: Path) -> None:
    row, said = SETS[name]
    (place / "set.json").write_text(json.dumps([row]))
    found = llmtune.plan(
        {"model": str(llava), "dataset": str(place / "set.json"), "output_dir": str(place / "run"), "bf16": False}
    ).data.prepared.train
    turns = [
        {
            "role": "user",
            "content": parts(*(place / f"{each}.png" if isinstance(each, int) else each for each in said)),
        },
        {"role": "assistant", "content": parts("circle")},
    ]
    expected = load_processor(llava).apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"][0]
    assert found.ids.tolist() == list(expected)


def read(form: Any, row: dict[str, Any], place: Path) -> Any:
    return read_row(Chosen(format=form, name="rows", why="", media=MediaFiles(folder=place)), row)


PAIR = {"chosen": "red", "rejected": "blue"}
OTHER_PICTURES: dict[str, dict[str, Any]] = {
    "rejected_images shows what the other answer does not see": {
        "prompt": "<image>what", **PAIR, "images": ["0.png"], "rejected_images": ["1.png"],
    },
    "chosen and rejected begin with questions that show other": {
        side: [{"role": "user", "content": [{"type": "image", "image": file}, {"type": "text", "text": "what"}]},
               {"role": "assistant", "content": PAIR[side]}]
        for side, file in (("chosen", "0.png"), ("rejected", "1.png"))
    },
}  # fmt: skip


@pytest.mark.parametrize("said", OTHER_PICTURES)
def test_answers_are_compared_before_the_same_pictures(said: str, place: Path) -> None:
    with pytest.raises(BadRow, match=said) as caught:
        read(PreferencePairs(), OTHER_PICTURES[said], place)
    assert caught.value.reason == "media of one answer"
    same = {"prompt": "<image>what", **PAIR, "images": ["0.png"], "rejected_images": ["0.png"]}
    assert len(read(PreferencePairs(), same, place).media) == 1


def asked(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "value": text}]}, {"role": "assistant", "content": text}]


WRITTEN: list[tuple[Any, Callable[[str], dict[str, Any]], int]] = [
    (Alpaca(), lambda text: {"instruction": text, "input": text, "output": text, "history": [[text, text]],
                             "system": text}, 6),
    (ShareGpt(), lambda text: {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]}, 2),
    (OpenAi(), lambda text: {"messages": asked(text), "system": text}, 3),
    (PromptCompletion(), lambda text: {"prompt": text, "completion": text}, 2),
    (PreferencePairs(), lambda text: {"prompt": text, "chosen": f"1{text}", "rejected": f"2{text}"}, 3),
    (KtoRows(), lambda text: {"prompt": text, "completion": text, "label": True}, 2),
    (PromptOnly(), lambda text: {"prompt": text}, 1),
    (PlainText(), lambda text: {"text": text}, 1),
]  # fmt: skip
"""Rows of each format that say one text so many times."""


def contents(example: Any) -> str:
    if isinstance(example, Text):
        return example.text
    told = [example.prompt, example.chosen, example.rejected] if isinstance(example, Preference) else [example.messages]
    return "\n".join(part.get("text", "") for some in told for each in some for part in as_parts(each)["content"])


@pytest.mark.parametrize("shows", [False, True])
@pytest.mark.parametrize(("form", "written", "times"), WRITTEN, ids=lambda value: type(value).__name__)
@given(text=strategies.text("ab \ue010\ue011\ue012\ue013\ufdd4", min_size=1).map("x{}x".format))
def test_what_a_text_says_is_neither_lost_nor_taken_for_a_mark(
    form: Any, written: Callable[[str], dict[str, Any]], times: int, shows: bool, text: str, place: Path
) -> None:
    found = read(form, {**written(text), **({"images": ["0.png"]} if shows else {})}, place)
    assert contents(found).count(text) == times
    assert [medium.kind for medium in found.media] == ["image"] * shows


@pytest.mark.parametrize(("form", "written", "times"), WRITTEN, ids=lambda value: type(value).__name__)
def test_a_text_that_holds_a_mark_is_refused(
    form: Any, written: Callable[[str], dict[str, Any]], times: int, place: Path
) -> None:
    for mark in (*MARKS.values(), BOUNDARY):
        for more in ({"images": ["0.png"]}, {}):
            if more or not isinstance(form, PlainText):
                with pytest.raises(BadRow, match=r"holds U\+FDD0 to U\+FDD3, which stand for media"):
                    read(form, {**written(f"x{mark}x"), **more}, place)
