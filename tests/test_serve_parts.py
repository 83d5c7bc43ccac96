"""What `llmtune serve` is made of: rows that join a batch, calls and thoughts told apart, and keys of the command."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

import llmtune
from llmtune.cli import main
from llmtune.contract.errors import PlanError, RecipeError
from llmtune.contract.examples import Media, ShownText
from llmtune.contract.generation import AnswerRequest
from llmtune.data.render import Renderer
from llmtune.data.tool_calls import CALL_FORMATS, call_format
from llmtune.data.tool_format import _write, read_tool_format, tool_format_names
from llmtune.inference.said import Channels, Stops
from llmtune.media.read import ReadMedia
from llmtune.model import continuous
from llmtune.model.continuous import AnswerRow, RowBatch, require_joinable
from llmtune.model.generation import GenerateConfig
from llmtune.model.text_decoder import TextDecoder
from llmtune.serving import answering
from llmtune.serving.ahead import ReadAhead
from llmtune.serving.answering import Server
from llmtune.serving.bodies import TextRequest
from llmtune.serving.config import ServeConfig, serve_config
from llmtune.serving.errors import Refused
from llmtune.serving.guard import Guard
from llmtune.serving.models import offers
from tests.tiny import tiny_model, tiny_model_folder, tiny_tokenizer


@pytest.mark.parametrize("name", tool_format_names())
def test_calls_are_read_as_each_tool_format_writes_them(name: str) -> None:
    calls = [{"name": "add", "arguments": {"a": 1, "b": 'x; y\n"{'}}, {"name": "get_it", "arguments": {}}]
    written = _write(str(read_tool_format(name, Path())), part="calls", calls=calls)
    format = CALL_FORMATS[name]
    assert format.parse(written) == ("", calls)
    for text in ("What is 1 + 1?", '{"x": 1}', written[:20]):
        assert format.parse(text) == (text, [])
    channels = Channels(format)
    pieces = [piece for character in written for piece in channels.push(character)]
    assert not pieces and not list(channels.push("", last=True)) and channels.calls == calls


def test_how_a_template_writes_calls_is_found_by_asking_it() -> None:
    assert call_format(Renderer(tiny_tokenizer()), None) is CALL_FORMATS["hermes"]
    silent = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert call_format(Renderer(tiny_tokenizer(chat_template=silent)), None) is None
    assert call_format(Renderer(tiny_tokenizer()), "glm4") is CALL_FORMATS["glm4"]


def test_pieces_of_text_join_to_the_whole_and_stops_are_found_across_them() -> None:
    tokenizer = tiny_tokenizer()
    text = "Ünïcode 世界 🎉 and\nlines. " * 12
    decoder = TextDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + decoder.rest() == text and not any("\ufffd" in piece for piece in pieces)
    stops = Stops(["ene", "END"])
    assert "".join([*map(stops.push, "seventeen, E, EN"), stops.push("", last=True)]) == "seventeen, E, EN"
    assert "".join(map(stops.push, "then END it")) == "then " and stops.hit
    channels = Channels(thinking=True)
    found = [piece for text in ("a <", "/thin", "k>\n\nb", " <think>") for piece in channels.push(text)]
    assert "".join(each.text for each in found if each.kind == "thinking") == "a "
    assert "".join(each.text for each in found if each.kind == "text") == "b <think>"


def test_another_address_needs_a_key_and_the_environment_is_honoured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for host in ("0.0.0.0", '"::"', "192.168.1.2", "example.org"):
        assert main(["serve", "nowhere", f"host={host}"]) == 2
        assert "needs a key that clients send" in capsys.readouterr().err
    assert main(["serve", "nowhere", "prot=1"]) == 2
    assert 'Did you mean "port"?' in capsys.readouterr().err
    named = {"API_HOST": "0.0.0.0", "API_PORT": "81", "API_KEY": "k", "API_MODEL_NAME": "m", "MAX_CONCURRENT": "3",
             "FASTAPI_ROOT_PATH": "/llm"}  # fmt: skip
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    found = serve_config({"max_concurrent": 4})
    assert (found.host, found.port, found.api_key, found.model_name) == ("0.0.0.0", 81, "k", "m")
    assert (found.max_concurrent, found.root_path) == (4, "/llm") and "'k'" not in repr(found)
    monkeypatch.setenv("API_PORT", "http")
    with pytest.raises(RecipeError, match="API_PORT: found http"):
        serve_config({})


def test_a_model_without_template_continues_texts_only(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    _, found = offers(str(folder), None, {}, {}, {})
    assert found[0].renderer is None and found[0].stop == {2}


def test_models_that_keep_more_than_keys_and_values_are_refused() -> None:
    require_joinable(tiny_model("gemma2", sliding_window=4))
    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4))
    with pytest.raises(PlanError, match="cannot be batched as they come"):
        require_joinable(model)


@pytest.mark.parametrize("family", ["gemma2", "mistral", "qwen3"])
def test_rows_that_join_and_leave_are_answered_as_alone(family: str) -> None:
    model = tiny_model(family, initializer_range=0.5, **({"sliding_window": 4} if family != "qwen3" else {}))
    batch, said = RowBatch(model), {}

    def row(at: int) -> AnswerRow:
        config = GenerateConfig(do_sample=at % 2 == 0, temperature=1.2, repetition_penalty=1 + at % 3 / 5)
        prompt = tuple(range(3 + at, 4 + at + 5 * (at % 3)))
        ask = AnswerRequest(model="m", prompt_ids=prompt, config=config, room=4 + at, seed=at, stop=frozenset({2}))
        said[at] = []
        return AnswerRow(ask, lambda item, at=at: said[at].append(item))

    rows = [row(at) for at in range(6)]
    with torch.no_grad():
        batch.waiting.extend(rows[:1])
        for more in rows[1:], [], []:
            batch.step()
            batch.waiting.extend(more)
        while batch.busy:
            batch.step()
    for at, each in enumerate(rows):
        request = each.request
        (alone,) = llmtune.generate(
            model.eval(), tiny_tokenizer(), [request.prompt_ids], replace(request.config, max_new_tokens=request.room),
            seeds=[at], stop=[2],
        )  # fmt: skip
        assert tuple(token.id for token in said[at][:-1]) == alone.ids and said[at][-1] is None


def test_many_prompts_are_read_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous, "READ_TOKENS", 10)
    batch = RowBatch(tiny_model())
    config = GenerateConfig()
    for size in (4, 4, 3, 20, 1):
        ask = AnswerRequest(model="m", prompt_ids=(5,) * size, config=config, room=1, seed=0, stop=frozenset())
        batch.waiting.append(AnswerRow(ask, print))
    found = iter(batch._portion, [])
    assert [[len(row.ids) for row in portion] for portion in found] == [[4, 4], [3], [20], [1]]


def test_a_client_that_leaves_ends_the_work() -> None:
    async def tried() -> tuple[Any, bool]:
        ended = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()

        async def receive() -> dict[str, str]:
            return {"type": "http.disconnect"}

        found = await answering.while_there(SimpleNamespace(receive=receive), work())  # type: ignore[arg-type]
        return found, ended.is_set()

    assert asyncio.run(tried()) == (None, True)


@pytest.mark.parametrize(
    ("key", "host", "status"),
    [(None, b"localhost:8000", 200), (None, b"[::1]:8000", 200), (None, b"evil.example:8000", 403),
     (None, b"[broken", 403), ("k", b"evil.example", 401)],
)  # fmt: skip
def test_a_server_without_a_key_answers_to_this_machines_names(key: str | None, host: bytes, status: int) -> None:
    said: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        said.append(message.get("status", 0))

    scope = {"type": "http", "path": "/v1/models", "headers": [(b"host", host)]}
    asyncio.run(Guard(app, key, 1000)(scope, receive, send))
    assert said[0] == status


def test_far_too_many_prompts_are_refused_before_they_are_read() -> None:
    server = Server([], SimpleNamespace(), ServeConfig(max_concurrent=2))  # type: ignore[arg-type]
    body = TextRequest(model="m", prompt=["a"] * 3)
    with pytest.raises(Refused, match="asks for 3 answers, the server gives 2 at a time"):
        server.places(body.answers).__enter__()


def test_what_is_read_ahead_of_one_prompt_many_times_takes_room_once() -> None:
    """As where requests name the same file of the server. What is larger than all room is not kept."""

    def of(path: str) -> ShownText:
        return ShownText("", (Media("image", path),))

    ahead: Any = ReadAhead(SimpleNamespace(prompt_tensors=lambda *given: given[-1]), most_bytes=100)
    small, large = (ReadMedia({"pixel_values": torch.zeros(count, dtype=torch.uint8)}) for count in (60, 101))
    for _ in range(9):
        ahead.keep(of("a"), small)
    ahead.keep(of("b"), large)
    ahead.keep(of("c"), small)
    assert [ahead.prompt_tensors([of(path)], [[1]], 1) for path in "abc"] == [None, None, small]
    ahead.keep(of("d"), small)
    assert [ahead.prompt_tensors([of(path)], [[1]], 1) for path in "cd"] == [None, small]
