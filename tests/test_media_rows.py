"""Rows that show media: which files they mean, where marks and files do not match, what cannot be opened; and ids and
tensors that are the processor's own."""

from __future__ import annotations

import base64
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from llmtune.contract.errors import DataError
from llmtune.contract.examples import BadRow, Conversation, ShownText
from llmtune.data.config import DataConfig
from llmtune.data.formats import Chosen, read_row
from llmtune.data.formats.chats import Alpaca, OpenAi, ShareGpt
from llmtune.data.formats.pairs import PreferencePairs
from llmtune.data.formats.plain import PlainText
from llmtune.data.reading import Row
from llmtune.data.render import Renderer
from llmtune.data.tokenise import Tokeniser
from llmtune.media.files import MediaFiles
from llmtune.media.marks import texts_between
from llmtune.media.processor import MediaProcessor
from tests.tiny_media import MODELS, draw

pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("media") / "inside"
    made.mkdir()
    for number, (color, shape) in enumerate((("red", "circle"), ("blue", "square"))):
        draw(made / f"{number}.png", color, shape, (32, 24))
    (made.parent / "outside.png").write_bytes((made / "0.png").read_bytes())
    (made / "link.png").symlink_to(made.parent / "outside.png")
    (made / "broken.png").write_bytes((made / "0.png").read_bytes()[:60])
    return made


def read(folder: Path, row: dict[str, Any], form: Any = None, **files: Any) -> Any:
    chosen = Chosen(format=form or OpenAi(), name="openai", why="", media=MediaFiles(folder=folder, **files))
    return read_row(chosen, row)


def asks(content: Any, answer: str = "A circle.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def names(example: Conversation) -> list[str]:
    return [Path(str(medium.path)).name for medium in example.media]


def test_marks_in_texts_take_the_files_of_the_columns_in_their_order(folder: Path) -> None:
    row = asks("<image>What is <image>this?") | {"images": ["1.png", "0.png"]}
    found = read(folder, row)
    assert names(found) == ["1.png", "0.png"]
    assert texts_between(found.messages[0]["content"]) == ["What is ", "this?"]
    sharegpt = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A"}]}
    assert names(read(folder, {**sharegpt, "image": "0.png"}, ShareGpt())) == ["0.png"]
    alpaca = {"instruction": "<image>What?", "input": "", "output": "A", "images": ["0.png"]}
    assert names(read(folder, alpaca, Alpaca())) == ["0.png"]
    pair = {"prompt": "<image>What?", "chosen": "A", "rejected": "B", "images": ["1.png"]}
    assert names(read(folder, pair, PreferencePairs())) == ["1.png"]


def test_parts_of_a_content_name_their_files(folder: Path) -> None:
    data = "data:image/png;base64," + base64.b64encode((folder / "0.png").read_bytes()).decode()
    parts = [
        {"type": "text", "text": "See"}, {"type": "image", "image": "0.png"},
        {"type": "image_url", "image_url": {"url": data}}, {"type": "image", "path": str(folder / "1.png")},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data.partition(",")[2]}},
        {"type": "image", "source": {"type": "url", "url": data}},
    ]  # fmt: skip
    found = read(folder, asks(parts))
    assert [Path(str(medium.path)).read_bytes() for medium in found.media] == [
        (folder / name).read_bytes() for name in ("0.png", "0.png", "1.png", "0.png", "0.png")
    ]
    bare = asks([{"type": "image"}, {"type": "text", "text": "What?"}]) | {"images": [{"bytes": None, "path": "1.png"}]}
    assert names(read(folder, bare)) == ["1.png"]


def test_addresses_are_fetched_once_and_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path))
    files, handler = MediaFiles(folder=folder, fetches=True), partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        found = files.find("image", f"{address}/0.png")
        with pytest.raises(BadRow, match="404"):
            files.find("image", f"{address}/nothing.png")
        (folder / "a é.png").write_bytes((folder / "0.png").read_bytes())
        assert Path(str(files.find("image", f"{address}/a é.png").path)).read_bytes()
        server.shutdown()
    assert Path(str(found.path)).read_bytes() == (folder / "0.png").read_bytes()
    assert files.find("image", f"{address}/0.png") == found
    with pytest.raises(BadRow, match="cannot be fetched|refused"):
        files.find("image", f"{address}/1.png")
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2


def test_a_server_that_is_busy_is_asked_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy(SimpleHTTPRequestHandler):
        codes = iter([503, 429, 200, 500, 502, 503])

        def do_GET(self) -> None:
            self.send_response(next(self.codes))
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr("llmtune.media.fetching._WAITS", (0.0, 0.0))
    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address, files = f"http://127.0.0.1:{server.server_port}/", MediaFiles(folder=folder, fetches=True)
        assert Path(str(files.find("image", address + "a").path)).read_bytes() == b"ok"
        with pytest.raises(BadRow, match="503"):
            files.find("image", address + "b")
        server.shutdown()


def test_a_download_that_ends_early_or_never_is_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Short(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"0" * 60)

    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), Short) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address, files = f"http://127.0.0.1:{server.server_port}/a.png", MediaFiles(folder=folder, fetches=True)
        with pytest.raises(BadRow, match="ended 40 bytes before the file's end"):
            files.find("image", address)
        monkeypatch.setattr("llmtune.media.fetching._MOST_SECONDS", -1.0)
        with pytest.raises(BadRow, match="60 bytes took longer than"):
            files.find("image", address)
        server.shutdown()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_content_that_a_row_holds_is_whole_in_the_cache_or_the_cache_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    content, files = (folder / "0.png").read_bytes(), MediaFiles(folder=folder)
    kept = Path(str(files.find("image", {"bytes": content}).path))
    kept.write_bytes(content[:7])  # as where the machine lost power
    assert files.find("image", {"bytes": content}).path == str(kept)
    assert kept.read_bytes() == content
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot be written.*LLMTUNE_CACHE"):
        files.find("image", {"bytes": content})


def test_files_without_marks_lead_the_first_question(folder: Path) -> None:
    found = read(folder, asks("What?") | {"images": ["0.png"]})
    assert names(found) == ["0.png"]
    assert found.messages[0]["content"].endswith("What?")
    assert len(found.messages[0]["content"]) == len("What?") + 1


@pytest.mark.parametrize(
    ("row", "reason", "said"),
    [
        (asks("<image><image>") | {"images": ["0.png"]}, "marks and files differ", "2 marks <image> for 1 image;"),
        (asks("<image>") | {"images": ["0.png", "1.png"]}, "marks and files differ", "1 mark <image> for 2 images"),
        (asks("<image>") | {"images": ["none.png"]}, "missing media", "no file .*none.png; paths count from media_dir"),
        (asks("<image>") | {"images": ["../outside.png"]}, "media outside of media_dir", "outside of .*inside"),
        (asks("<image>") | {"images": ["link.png"]}, "media outside of media_dir", "outside of .*inside"),
        (asks("<image>") | {"images": ["https://a.b/c.png"]}, "media on the network", "media_from_network: true"),
        (asks("<image>") | {"images": ["data:image/png;base64,%%"]}, "bad data URL", "data:TYPE;base64,CONTENT"),
        (asks("<image>") | {"images": [7]}, "bad media", "an image is int"),
        (asks("<image>") | {"images": [None]}, "bad media", "images holds null"),
        (asks("<video>") | {"images": ["0.png"]}, "marks and files differ", "1 mark <video> and no video .*`videos`"),
        (
            asks([{"type": "image", "image": "0.png", "max_pixels": 9}]), "unknown key of a part",
            "part 1 of .* asks for max_pixels, .*image_max_pixels",
        ),
        (asks("<image>") | {"images": ["iVBORw0K" * 99]}, "bad media", "File name too long.*data:TYPE;base64,CONTENT"),
        (asks("<image>") | {"images": ["a\0b"]}, "bad media", "null byte"),
        (asks("<image>") | {"images": ["~nobody-here/0.png"]}, "bad media", "home directory"),
        (asks("What?", "<image>") | {"images": ["0.png"]}, "media in an answer", "message 2 .* shows 1 image"),
        (asks("<image>") | {"images": ["0.png"], "image": "1.png"}, "two columns of media", "images and image"),
        (asks("a \ufdd0 b"), "noncharacters", "U\\+FDD0"),
        (
            asks([{"type": "image", "source": {"type": "file", "file_id": "a"}}]), "unknown source",
            "part 1 of .* has a source of type file, allowed are base64 and url; or write .*image_url",
        ),
        (
            asks([{"type": "text", "text": "<image> or"}, {"type": "image", "image": "1.png"}]) | {"images": ["0.png"]},
            "marks beside parts", "parts name, and others by marks in its text",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(folder: Path, row: dict[str, Any], reason: str, said: str) -> None:
    with pytest.raises(BadRow, match=said) as caught:
        read(folder, row)
    assert caught.value.reason == reason


def test_an_answer_of_a_pair_shows_nothing_in_any_of_its_turns(folder: Path) -> None:
    """Its pictures would be places in the text that nothing fills."""
    shows = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "And here?"}]
    turns = [("assistant", "A"), ("user", shows), ("assistant", "B")]
    chosen = [{"role": role, "content": content} for role, content in turns]
    pair = {"prompt": [{"role": "user", "content": "What?"}], "chosen": chosen, "rejected": chosen[:1]}
    with pytest.raises(BadRow, match="message 3 .user. shows 1 image, .* is in its prompt"):
        read(folder, pair, PreferencePairs())
    with pytest.raises(BadRow, match="the row holds 1 image, and .* reads text only"):
        read_row(Chosen(format=PreferencePairs(), name="pairs", why=""), pair)
    with pytest.raises(BadRow, match="1 mark <image> and no image"):
        read(folder, {"prompt": "What?", "chosen": "See <image>.", "rejected": "A"}, PreferencePairs())


def test_a_text_that_spells_a_place_of_media_is_told_where_the_row_shows_none(folder: Path, tmp_path: Path) -> None:
    """The model would look for a picture there, in the middle of a run."""
    from transformers import AutoTokenizer

    model = MODELS["qwen2_5_vl"](tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model)
    media = MediaProcessor(folder=model, tokenizer=tokenizer)
    row = read(folder, asks("What is <|image_pad|>?"))
    for write in (lambda each: each.encode([row])[0], lambda each: _caught(each.prompt, row)):
        found = write(Renderer(tokenizer, media=media))
        assert isinstance(found, BadRow) and "a text says <|image_pad|>, which stands for media" in str(found)
        assert not isinstance(write(Renderer(tokenizer, media=media, split_special_tokens=True)), BadRow)
        assert not isinstance(write(Renderer(tokenizer)), BadRow)
    piece = Tokeniser(DataConfig(dataset="a"), tokenizer, media=media).encode(
        Chosen(format=PlainText(), name="text", why="", media=MediaFiles(folder=folder)),
        [Row({"text": "See <|image_pad|>."}, 1), Row({"text": "See <|im_start|>."}, 2)], "texts:",
    )  # fmt: skip
    assert [bad.reason for bad in piece.bad] == ["place without media"]
    assert piece.numbers == [2]


def _caught(write: Any, row: Any) -> Any:
    try:
        return write(row)
    except BadRow as bad:
        return bad


def test_a_model_that_reads_text_only_is_told_so(folder: Path) -> None:
    with pytest.raises(BadRow, match="the row holds 1 image, and .* reads text only"):
        read_row(Chosen(format=OpenAi(), name="openai", why=""), asks("<image>") | {"images": ["0.png"]})


def test_special_tokens_that_are_to_be_text_are_refused_beside_pictures(folder: Path, tmp_path: Path) -> None:
    """The processor reads the whole text at once; rows that spell none train."""
    from transformers import AutoTokenizer

    model = MODELS["qwen2_vl"](tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    media = MediaProcessor(folder=model, tokenizer=tokenizer)
    renderer = Renderer(tokenizer, media=media, split_special_tokens=True)
    spelt, plain = (read(folder, asks(f"<image>{said}") | {"images": ["0.png"]}) for said in ("<|im_end|>", "what"))
    (refused, (found,)) = renderer.encode([spelt, plain])
    assert isinstance(refused, BadRow)
    assert "allowed without split_special_tokens" in str(refused)
    with pytest.raises(BadRow, match="its text spells special tokens"):
        renderer.prompt(spelt)
    (expected,) = Renderer(tokenizer, media=media).encode([plain])[0]
    assert found.ids.tolist() == expected.ids.tolist()


def test_a_picture_that_changed_is_found(folder: Path, tmp_path: Path) -> None:
    model = MODELS["llava_next"](tmp_path / "model")
    from transformers import AutoTokenizer

    media = MediaProcessor(folder=model, tokenizer=AutoTokenizer.from_pretrained(model))
    changing = draw(tmp_path / "changing.png", "red", "circle", (32, 16))
    shown = ShownText("<image>\nwhat", tuple(read(tmp_path, asks("<image>") | {"images": ["changing.png"]}).media))
    ids, _ = media.encode(shown, [])
    draw(changing, "red", "circle", (16, 64))
    with pytest.raises(
        Exception, match=r"changing.png has changed since the data were tokenised.*overwrite_cache: true"
    ):
        media.tensors([shown], [ids], "padded")


def test_the_keys_of_sizes_fit_each_other() -> None:
    with pytest.raises(ValueError, match="image_min_pixels: found 100, allowed is at most image_max_pixels 10"):
        DataConfig(dataset="a", image_min_pixels=100, image_max_pixels=10)
