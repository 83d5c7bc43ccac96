"""`llmtune serve` answers questions about pictures and sounds as transformers does, and opens what is safe."""

from __future__ import annotations

import base64
import http.server
import io
import json
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import transformers

from llmtune.media.loading import load_processor
from llmtune.model.modalities import placeholders_of
from llmtune.serving import media
from tests import tiny_audio, tiny_media
from tests.served import serving
from tests.tiny import tiny_model_folder

pytest.importorskip("PIL")
PICTURES: dict[str, Any] = {"red": ("circle", (40, 30)), "blue": ("square", (36, 36)), "green": ("circle", (64, 48))}
TOKENS = 6


def url_of(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@cache
def png(color: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return tiny_media.draw(Path(folder) / "one.png", color, *PICTURES[color]).read_bytes()


def shows(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def asked(*parts: str) -> list[dict[str, Any]]:
    """A question of texts and of pictures, named by their colours."""
    content = [shows(url_of(png(part))) if part in PICTURES else {"type": "text", "text": part} for part in parts]
    return [{"role": "user", "content": content}]


QUESTIONS = [
    asked("what is in the picture ", "red"), asked("red", " is red and ", "blue", " is how many"),
    asked("hello world"), asked("what is in the picture ", "green"), asked("what is in the picture ", "blue"),
]  # fmt: skip


def made(folder: Path, make: Any, auto_class: Any) -> Path:
    """A tiny model with weights large enough for what is shown to decide its answer."""
    model = auto_class.from_pretrained(make(folder))
    for each in model.parameters():
        each.data.mul_(4)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def theirs(model: Any, processor: Any, messages: list[dict[str, Any]], never: list[int]) -> tuple[str, int]:
    """What transformers answers, and the tokens of its prompt."""
    from PIL import Image

    rows = []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "image_url":
                content = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                part = {"type": "image", "image": Image.open(io.BytesIO(content))}
            elif part["type"] == "input_audio":
                with tempfile.NamedTemporaryFile(suffix=".wav") as file:
                    file.write(base64.b64decode(part["input_audio"]["data"]))
                    file.flush()
                    part = {"type": "audio", "audio": tiny_audio.heard(Path(file.name))}
            parts.append(part)
        rows.append({**message, "content": parts})
    batch = processor.apply_chat_template(
        [rows], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    said = model.generate(
        **batch, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0, suppress_tokens=never or None
    )  # fmt: skip
    width = batch["input_ids"].shape[1]
    return processor.tokenizer.decode(said[0, width:], skip_special_tokens=True), width


def ask(served: Any, messages: list[dict[str, Any]], **keys: Any) -> Any:
    keys = {"model": "m", "temperature": 0, "max_tokens": TOKENS, **keys}
    return served.client.chat.completions.create(messages=messages, **keys)


def check(served: Any, folder: Path, auto_class: Any, questions: list[list[dict[str, Any]]]) -> None:
    """Answers, together and streamed, are those of transformers, and placeholders count as tokens of prompts."""
    model, processor = auto_class.from_pretrained(folder).eval(), load_processor(folder)
    never = placeholders_of(model.config)
    expected = [theirs(model, processor, messages, never) for messages in questions]
    assert len({text for text, _ in expected}) > 2
    found: dict[int, Any] = {}

    def one(at: int) -> None:
        if at % 2:
            chunks = list(ask(served, questions[at], stream=True, stream_options={"include_usage": True}))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            found[at] = text, chunks[-1].usage.prompt_tokens
        else:
            answer = ask(served, questions[at], n=2)
            first, second = (choice.message.content for choice in answer.choices)
            assert first == second
            found[at] = first, answer.usage.prompt_tokens

    threads = [threading.Thread(target=one, args=(at,)) for at in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[at] for at in range(len(questions))] == expected
    until = time.monotonic() + 10  # a stream's place is free when its last event is out, not before
    while served.server.taken and time.monotonic() < until:
        time.sleep(0.01)
    assert served.server.taken == 0


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_vl", "qwen3_vl"])
def test_questions_about_pictures_are_answered_as_by_transformers(name: str, tmp_path: Path) -> None:
    auto = transformers.AutoModelForImageTextToText
    folder = made(tmp_path / name, tiny_media.MODELS[name], auto)
    with serving(str(folder), model_name="m") as served:
        check(served, folder, auto, QUESTIONS)


def sound(path: Path, hertz: float, seconds: float) -> dict[str, Any]:
    data = base64.b64encode(tiny_audio.tone(path, hertz, seconds).read_bytes()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def test_questions_about_sounds_are_answered_as_by_transformers(tmp_path: Path) -> None:
    auto = transformers.Qwen2AudioForConditionalGeneration
    folder = made(tmp_path / "hears", tiny_audio.qwen2_audio, auto)
    questions = [
        [{"role": "user", "content": [sound(tmp_path / "s.wav", hertz, 0.3 * at), {"type": "text", "text": text}]}]
        for at, (hertz, text) in enumerate(
            [(220, "hello"), (880, "what is in the picture"), (440, "how many")], start=1
        )
    ]
    with serving(str(folder), model_name="m") as served:
        check(served, folder, auto, [*questions, asked("hello world")])


def mp3(path: Path, seconds: int = 1, bit_rate: int = 64_000) -> bytes:
    import av
    import numpy as np

    with av.open(str(path), "w", options={"write_xing": "0", "id3v2_version": "0"}) as file:
        stream = file.add_stream("mp3", rate=16000, layout="mono", bit_rate=bit_rate)
        wave = (0.4 * np.sin(np.arange(16000 * seconds) / 9)).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)
    return path.read_bytes()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tiny_media.MODELS["qwen2_vl"](tmp_path_factory.mktemp("refuses") / "m")
    with serving(str(folder), model_name="m", max_media=2, max_media_pixels=5000, max_body_mb=2) as found:
        yield found


def huge_png(width: int, height: int) -> bytes:
    """The head of a picture that claims to be huge."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + b"\0\0\0\1IDAT"


def content(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "hello"}]}]


REFUSED = [
    (shows("https://example.com/a.png"), "allowed is a data URL; .* key allowed_media_domains"),
    (shows("http://169.254.169.254/latest"), "'http://169.254.169.254/latest', allowed is a data URL"),
    (shows("file:///etc/passwd"), "'file:///etc/passwd', allowed is a data URL; .* key allowed_local_media_path"),
    (shows("/etc/passwd"), "'/etc/passwd', allowed is a data URL"),
    ({"type": "image_url"}, "image_url without url"),
    ("hello", "a part of type str, allowed are text, image_url, video_url, audio_url"),
    ({"type": ["text"]}, "a part of type .'text'., allowed are text"),
    (shows("https://[::1"), "which is none .Invalid IPv6 URL"),
    (shows("file://[::1"), "which is none .Invalid IPv6 URL"),
    (
        {"type": "image", "source": {"type": "url", "url": "file:///etc/passwd"}},
        "'file:///etc/passwd', allowed is a data",
    ),
    ({"type": "image", "source": {"type": "file"}}, "message 1 has a source of type file, .*; or write .*image_url"),
    (
        {"type": "image", "image": "/etc/passwd"},
        "a part of type image, allowed are text, image_url, video_url, audio_url",
    ),
    ({"type": "video_url", "video_url": {"url": "x"}}, "m reads text and image, and 1 video was given"),
    (shows(url_of(b"no picture")), "no picture that can be read, allowed are PNG, JPEG, WEBP, GIF"),
    (shows(url_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")), "no picture that can be read"),
    (shows("data:image/png;base64,%%%"), "no base64"),
    (shows("data:image/png,abc"), "allowed is data:image/TYPE;base64,CONTENT"),
    (shows(url_of(huge_png(100, 51))), "a picture of more than 5,000 pixels; make it smaller"),
    (shows(url_of(huge_png(60_000, 60_000))), "a picture of more than 5,000 pixels; make it smaller"),
    ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "m reads text and image, and 1 audio was"),
]


@pytest.mark.parametrize(("part", "said"), REFUSED)
def test_what_is_not_safe_is_refused(served: Any, part: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        ask(served, content(part))


def test_so_many_pictures_and_bytes_are_taken(served: Any) -> None:
    picture = shows(url_of(png("red")))
    theirs = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": url_of(png("red"))[22:]}}
    one, other = (ask(served, content(picture, each)).choices[0].message.content for each in (picture, theirs))
    assert one == other
    with pytest.raises(openai.BadRequestError, match="3 images were given, this server takes 2 at a time"):
        ask(served, content(picture, picture, picture))
    with pytest.raises(openai.APIStatusError, match="more than 2000000 bytes"):
        ask(served, content(shows(url_of(bytes(2_000_000)))))
    with pytest.raises(openai.BadRequestError, match="broken media: image-1 cannot be read"):
        ask(served, content(shows(url_of(png("red")[:60]))))
    assert not list(Path(tempfile.gettempdir()).glob("llmtune-serve-*"))


def test_a_model_of_text_says_so(tmp_path: Path) -> None:
    with serving(str(tiny_model_folder(tmp_path / "words")), model_name="words") as served:
        for messages in (content(shows("https://example.com/a.png")), asked("red")):
            with pytest.raises(openai.BadRequestError, match="words reads text only, and 1 image was given"):
                ask(served, messages, model="words")
        assert ask(served, asked("hello"), model="words").choices


class Pages(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1/elsewhere")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(png("red"))

    def log_message(self, *_: Any) -> None:
        pass


def taken(folder: Path, url: str, **keys: Any) -> bytes:
    from llmtune.serving.config import ServeConfig

    found = media.RequestMedia(ServeConfig(**keys), folder).taken(content(shows(url)), "m", ["image"])
    return Path(found[0]["content"][0]["image"]).read_bytes()


def test_keys_of_the_server_allow_domains_and_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, place = tmp_path / "request", tmp_path / "allowed"
    folder.mkdir(), place.mkdir()
    (place / "a b.png").write_bytes(png("blue"))
    (tmp_path / "secret.png").write_bytes(png("red"))
    (place / "link.png").symlink_to(tmp_path / "secret.png")
    local = {"allowed_local_media_path": str(place)}
    assert taken(folder, f"file://{place}/a%20b.png", **local) == png("blue")
    for name in ("link.png", "../secret.png", "..%2Fsecret.png", "none.png"):
        with pytest.raises(media.Refused, match="there is no such file"):
            taken(folder, f"file://{place}/{name}", **local)
    with pytest.raises(media.Refused, match="or file:// and a path in"):
        taken(folder, f"file://other{place}/a%20b.png", **local)
    domains = {"allowed_media_domains": ["127.0.0.1"]}
    for url in ("https://127.0.0.1.example.com/a", "https://127.0.0.1@example.com/a", "https://localhost/a"):
        with pytest.raises(media.Refused, match="allowed is https:// of 127.0.0.1"):
            taken(folder, url, **domains)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as pages:
        threading.Thread(target=pages.serve_forever, daemon=True).start()
        here = f"127.0.0.1:{pages.server_port}"
        # Without certificates here, https is asked as http.
        opened = media.urllib.request.HTTPSHandler.https_open
        monkeypatch.setattr(
            media.urllib.request.HTTPSHandler, "https_open",
            lambda self, req: media.urllib.request.HTTPHandler.http_open(self, req),
        )  # fmt: skip
        assert opened is not None
        assert taken(folder, f"https://{here}/a.png", **domains) == png("red")
        with pytest.raises(media.Refused, match="'http://127.0.0.1/elsewhere', allowed is https:// of 127.0.0.1"):
            taken(folder, f"https://{here}/moved", **domains)
        with pytest.raises(media.Refused, match="more than 100 bytes"):
            taken(folder, f"https://{here}/a.png", max_body_mb=1e-4, **domains)
        pages.shutdown()


def test_sounds_are_wav_or_mp3_of_some_length(tmp_path: Path) -> None:
    from llmtune.serving.config import ServeConfig

    def heard(data: bytes, seconds: float = 600) -> Any:
        given = {"data": base64.b64encode(data).decode(), "format": "mp3"}
        parts = {"type": "input_audio", "input_audio": given}, {"type": "audio_url", "audio_url": {"url": url_of(data)}}
        config = replace(ServeConfig(), max_media_seconds=seconds)
        (found,) = media.RequestMedia(config, tmp_path).taken(content(*parts), "m", ["audio"])
        return [Path(part["audio"]).read_bytes() for part in found["content"][:2]] == [data, data]

    wav = tiny_audio.tone(tmp_path / "a.wav", 440, 2.0).read_bytes()
    assert heard(wav) and heard(mp3(tmp_path / "a.mp3"))
    with pytest.raises(media.Refused, match="a sound of 2 s, allowed are 1"):
        heard(wav, 1)
    dense, sparse = (mp3(tmp_path / "a.mp3", 3, bit_rate) for bit_rate in (160_000, 8_000))
    with pytest.raises(media.Refused, match="a sound of 6 s, allowed are 5"):  # by the bytes of its beginning 3
        heard(dense + sparse, 5)
    for other in (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", b"", b"RIFF", json.dumps({}).encode()):
        with pytest.raises(media.Refused, match="no sound that can be read, allowed are wav and mp3"):
            heard(other)
