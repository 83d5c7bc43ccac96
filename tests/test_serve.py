"""`llmtune serve` under the official client: answers, streams, limits, keys, tools, and its own OpenAPI document."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from llmtune.contract.errors import PlanError
from llmtune.contract.generation import NewToken
from llmtune.model.generation import ChatSession, GenerateConfig
from llmtune.serving import run
from llmtune.serving.models import offers
from tests.served import KEY, serving
from tests.tiny import tiny_model_folder, tiny_tokenizer

ASKED = [{"role": "user", "content": "Who are you?"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("base"), initializer_range=0.5, eos_token_id=None)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, rank in (("first", 4), ("second", 2)):
        torch.manual_seed(rank)
        config = LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        found[name] = tmp_path_factory.mktemp("adapters") / name
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def served(adapters: dict[str, Path]) -> Iterator[Any]:
    with serving(str(adapters["first"]), adapters={"second": str(adapters["second"])}) as found:
        yield found


def greedy(model: Any, tokens: int) -> str:
    """The answer of transformers itself."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**ids, do_sample=False, max_new_tokens=tokens, eos_token_id=2, pad_token_id=0)
    return tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def ask(served: Any, model: str = "first", **keys: Any) -> Any:
    return served.client.chat.completions.create(model=model, messages=keys.pop("messages", ASKED), **keys)


def request(served: Any, path: str, key: str | None = KEY, body: Any = None) -> tuple[int, Any]:
    """Status and JSON of a plain request."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(served.url + path, data, headers), timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_greedy_answers_of_each_model_are_those_of_transformers(
    served: Any, base: Path, adapters: dict[str, Path]
) -> None:
    assert [each.id for each in served.client.models.list()] == ["first", "base", "second", "scripted"]
    assert served.client.models.retrieve("base").id == "base"
    assert served.client.models.retrieve("base").max_model_len == 512
    models = {name: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[name])
              for name in adapters} | {"base": AutoModelForCausalLM.from_pretrained(base)}  # fmt: skip
    expected = {name: greedy(model.eval(), 12) for name, model in models.items()}
    assert len(set(expected.values())) == 3
    for name, text in expected.items():
        answer = ask(served, name, temperature=0, max_tokens=12)
        assert answer.choices[0].message.content == text
        assert answer.model == name and answer.usage.completion_tokens <= 12
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_the_weights_of_the_base_are_there_once(served: Any) -> None:
    batches = served.engine.inner._batches
    shared = [dict(batches[name].model.named_parameters()) for name in ("first", "second")]
    name = "model.layers.0.mlp.down_proj.weight"
    assert shared[0][name] is shared[1][name] and batches["base"].model is batches["first"].model


def test_an_answer_is_that_of_chat_with_the_same_seed_whole_and_streamed(served: Any) -> None:
    batch = served.engine.inner._batches["first"]
    config = GenerateConfig(max_new_tokens=20, temperature=1.3, top_p=0.9)
    tokenizer = tiny_tokenizer()

    def said(seed: int) -> str:
        return ChatSession(batch.model, tokenizer, config=config, seed=seed).ask(ASKED[0]["content"])

    keys = {"seed": 7, "temperature": 1.3, "top_p": 0.9, "max_tokens": 20}
    both = ask(served, n=2, **keys)
    assert [choice.message.content.strip() for choice in both.choices] == [said(7), said(8)]
    chunks = list(ask(served, stream=True, stream_options={"include_usage": True}, **keys))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == both.choices[0].message.content and len(pieces) > 5
    assert chunks[-1].usage.completion_tokens <= 20 and not chunks[-1].choices
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] in ("length", "stop") and not any(reasons[:-1])


def test_fifty_streams_at_once_are_what_each_is_alone(served: Any) -> None:
    asked = [
        {
            "model": ("first", "base", "second")[at % 3], "seed": at, "max_tokens": 3 + at % 9,
            "temperature": at % 4 / 2, "messages": [{"role": "user", "content": "How are you? " * (1 + at % 7)}],
        }
        for at in range(50)
    ]  # fmt: skip

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as client:

            async def one(keys: dict[str, Any]) -> str:
                stream = await client.chat.completions.create(stream=True, **keys)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return list(await asyncio.gather(*(one(keys) for keys in asked)))

    widths: list[int] = []
    batch = served.engine.inner._batches["first"]
    step = batch.step
    batch.step = lambda: (widths.append(len(batch.rows)), step())
    try:
        together = asyncio.run(all_at_once())
    finally:
        del batch.step
    assert max(widths) > 4  # they were in one batch
    alone = [served.client.chat.completions.create(**keys).choices[0].message.content for keys in asked[::7]]
    assert together[::7] == alone
    assert served.server.taken == 0


def test_logprobs_are_those_of_the_model(served: Any) -> None:
    answer = ask(served, "base", temperature=1.5, seed=1, max_tokens=4, logprobs=True, top_logprobs=3)
    told = answer.choices[0].logprobs.content
    tokenizer, batch = tiny_tokenizer(), served.engine.inner._batches["base"]
    ids = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    asked = served.engine.asked[-1]
    said: list[NewToken] = []
    done = threading.Event()
    served.engine.inner.submit(asked, lambda item: said.append(item) if item else done.set())
    assert done.wait(60)
    for at, (one, token) in enumerate(zip(told, said, strict=True)):
        with torch.no_grad(), batch.around():
            logs = batch.model(torch.tensor([[*ids, *(each.id for each in said[:at])]])).logits[0, -1].log_softmax(-1)
        assert one.token == texts[token.id] and one.logprob == pytest.approx(float(logs[token.id]), abs=1e-4)
        assert [each.logprob for each in one.top_logprobs] == pytest.approx(logs.topk(3).values.tolist(), abs=1e-4)
    text = served.client.completions.create(model="base", prompt=[ids, ids], logprobs=1, max_tokens=3, temperature=0)
    assert [choice.index for choice in text.choices] == [0, 1] and text.choices[0].text == text.choices[1].text
    assert len(text.choices[0].logprobs.token_logprobs) == 3


def test_a_text_that_stops_is_not_told_and_ends_the_answer(served: Any) -> None:
    whole = ask(served, "base", temperature=0, max_tokens=30).choices[0].message.content
    stop = whole[5:8]
    for stream in (False, True):
        found = ask(served, "base", temperature=0, max_tokens=30, stop=["never said", stop], stream=stream)
        choices = [chunk.choices[0] for chunk in found] if stream else []
        text = "".join(each.delta.content or "" for each in choices) or found.choices[0].message.content
        assert text == whole[: whole.index(stop)]
        assert (choices[-1] if stream else found.choices[0]).finish_reason == "stop"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_stops_its_row(served: Any, stream: bool) -> None:
    body = json.dumps({"model": "base", "prompt": "the", "max_tokens": 500, "seed": 1, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    batch = served.engine.inner._batches["base"]
    step = batch.step
    steps: list[int] = []
    batch.step = lambda: (steps.append(len(batch.rows)), time.sleep(0.02), step())
    try:
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            client.sendall(
                f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
            )
            while sum(map(bool, steps)) < 3:
                time.sleep(0.01)
        while batch.rows or served.server.taken:
            time.sleep(0.01)
    finally:
        del batch.step
    assert sum(map(bool, steps)) < 400


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_100_mb_is_not_read(served: Any, chunked: bool) -> None:
    size = 100_000_000
    how = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    sent = 0
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as client:
        client.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n{how}\r\n\r\n".encode()
        )
        piece = b"x" * 1_000_000
        try:
            while sent < size:
                client.sendall((b"f4240\r\n" + piece + b"\r\n") if chunked else piece)
                sent += len(piece)
        except OSError:  # the server has closed the connection
            pass
        try:
            answer = client.recv(4096)
        except ConnectionResetError:
            answer = b""
    assert sent < size
    assert not answer or b" 413 " in answer
    assert request(served, "/health")[0] == 200


def test_the_size_of_a_body_is_told(served: Any) -> None:
    status, told = request(served, "/v1/completions", body={"model": "base", "prompt": "x" * 9_000_000})
    assert status == 413 and "max_body_mb" in told["error"]["message"]


@pytest.mark.parametrize("key", [None, "", "wrong", KEY + "x", KEY[:-1]])
def test_wrong_keys_are_refused(served: Any, key: str | None) -> None:
    for path, body in (("/v1/models", None), ("/metrics", None), ("/v1/completions", {"model": "base", "prompt": "a"})):
        status, told = request(served, path, key, body)
        assert status == 401 and told["error"]["code"] == "invalid_api_key"
    assert request(served, "/health", key) == (200, {"status": "ok"})


def test_more_than_the_server_takes_is_told_to_come_again(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.server, "taken", 63)
    with pytest.raises(openai.RateLimitError, match="63 of 64 answers are being made") as error:
        ask(served, n=2)
    assert error.value.response.headers["Retry-After"] == "1"
    monkeypatch.setattr(served.server, "config", replace(served.server.config, timeout=1e-4, max_answer_tokens=5))
    with pytest.raises(openai.APIStatusError, match="took more than 0.0001 s"):
        ask(served, max_tokens=5)
    with pytest.raises(openai.BadRequestError, match="answers with 5 at most"):
        ask(served, max_tokens=6)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model": "gpt-5"}, 'there is no "gpt-5" here; there are: first, base, second'),
        ({"temperature": 3.0}, "temperature: Input should be less than or equal to 2"),
        ({"top_logprobs": 2}, "needs logprobs: true"),
        ({"extra_body": {"best": 1}}, "best: Extra inputs are not permitted"),
        ({"messages": [{"role": "usr", "content": "a"}]}, 'has the role "usr".* Did you mean'),
        ({"messages": [{"role": "system", "content": "a"}]}, "nothing is asked"),
        (
            {"messages": [{"role": "user", "content": "Paris " * 600}]},
            "the limit for prompt and answer together is 512; start a new conversation, ask",
        ),
        ({"max_tokens": 512}, r"max_tokens: found 512, the prompt has (\d+) tokens and leaves room for \d+"),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls: found false, allowed is true"),
        ({"extra_body": {"chat_template_kwargs": {"depth": 1}}}, "the chat template of first reads no depth"),
    ],
)
def test_what_cannot_be_done_is_said_in_openais_form(served: Any, keys: dict[str, Any], said: str) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError), match=said):
        ask(served, **keys)


def test_a_body_that_is_no_json_is_told(served: Any) -> None:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(urllib.request.Request(served.url + "/v1/completions", b"{bad", headers), timeout=60)
    told = json.loads(error.value.read())["error"]
    assert told["message"].startswith("body: is no JSON: ") and told["param"] is None


def test_calls_of_tools_and_thoughts_are_told_apart(served: Any) -> None:
    served.engine.says = (
        '<think>They want a sum.</think>\n\nI add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    )
    (choice,) = ask(served, "scripted", tools=[TOOL]).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I add."
    assert choice.message.reasoning_content == "They want a sum."
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1})
    chunks = [chunk.choices[0] for chunk in ask(served, "scripted", tools=[TOOL], stream=True)]
    calls = [each for chunk in chunks for each in chunk.delta.tool_calls or ()]
    assert [each.function.name for each in calls] == ["add"] and chunks[-1].finish_reason == "tool_calls"
    assert "".join(chunk.delta.content or "" for chunk in chunks).strip() == "I add."
    history = [
        *ASKED,
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "2"},
    ]
    assert ask(served, "scripted", messages=history, tools=[TOOL]).choices[0].message.tool_calls
    prompt = tiny_tokenizer().decode(served.engine.asked[-1].prompt_ids)
    assert '"name": "add"' in prompt and "tool\n2" in prompt
    plain = ask(served, "scripted").choices[0]
    assert "<tool_call>" in plain.message.content and plain.message.tool_calls is None  # none were offered


def test_an_error_of_the_engine_reaches_its_client_alone(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.engine, "error", PlanError("the engine broke"))
    with pytest.raises(openai.InternalServerError, match="the engine broke"):
        ask(served, "scripted")
    with pytest.raises(openai.APIError, match="the engine broke"):
        list(ask(served, "scripted", stream=True))
    batch = served.engine.inner._batches["base"]
    with monkeypatch.context() as broken:
        broken.setattr(batch, "_forward", lambda state: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
            ask(served, "base")
    assert ask(served, "base", max_tokens=2).choices and served.server.taken == 0


def test_metrics_are_counted(served: Any) -> None:
    ask(served, max_tokens=3)
    asked = urllib.request.Request(f"{served.url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    text = urllib.request.urlopen(asked).read().decode()
    assert 'llmtune_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert 'llmtune_answer_tokens_total{model="first"}' in text and "llmtune_answers_running 0.0" in text


def test_the_server_keeps_to_its_own_openapi_document(served: Any) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase, settings

    checks = schemathesis.checks.load_all_checks() or schemathesis.checks.CHECKS
    wanted = [
        each for each in checks.get_all()
        if each.__name__ not in ("positive_data_acceptance", "ignored_auth", "missing_required_header")
    ]  # fmt: skip
    document = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    quick = settings(
        max_examples=4, derandomize=True, deadline=None, database=None, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    tried = 0
    for operation in document.get_all_operations():

        @quick
        @schemathesis_cases(operation.ok())
        def holds(case: Any) -> None:
            nonlocal tried
            tried += 1
            case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, checks=wanted)

        holds()
    assert tried >= 12


def schemathesis_cases(operation: Any) -> Any:
    from hypothesis import given

    return given(case=operation.as_strategy())


def test_a_port_that_is_taken_and_other_bases_are_told(base: Path, tmp_path: Path, adapters: dict[str, Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PlanError, match=r"cannot be listened on .*port=0"):
            run.serve(str(base), {"port": taken.getsockname()[1]})
    other = tiny_model_folder(tmp_path, seed=1)
    _, found = offers(str(other), None, {"first": str(adapters["first"])}, {}, {})
    with pytest.raises(PlanError, match="does not stand on the weights"):
        found[-1].served.load()
    with pytest.raises(PlanError, match="num_beams"):
        offers(str(base), None, {}, {}, {"num_beams": 2})
    with pytest.raises(PlanError, match="would name several models"):
        offers(str(base), "first", {"first": str(adapters["first"])}, {}, {})
