"""What `llmtune serve` does to logits, and what becomes of other answers where one fails, or memory is short."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import openai
import pytest
import torch

from llmtune.contract.generation import AnswerRequest
from llmtune.model.continuous import AnswerRow, RowBatch
from llmtune.model.generation import GenerateConfig
from tests.served import serving
from tests.test_serve import request
from tests.tiny import tiny_model, tiny_model_folder

ASKED = [{"role": "user", "content": "Who are you?"}]
GREEDY = GenerateConfig(do_sample=False)


def asked(at: int = 0, **keys: Any) -> AnswerRequest:
    keys = {"config": GREEDY, "room": 9, "seed": at, "stop": frozenset(), **keys}
    return AnswerRequest(model="m", prompt_ids=tuple(range(3 + at, 9 + 2 * at)), **keys)


def answers(batch: RowBatch, requests: Sequence[AnswerRequest]) -> list[Any]:
    """The tokens of each answer, or its error."""
    said: list[list[Any]] = [[] for _ in requests]
    batch.waiting.extend(AnswerRow(each, said[at].append) for at, each in enumerate(requests))
    with torch.no_grad():
        while batch.busy:
            batch.step()
    ends = [each[-1] for each in said]
    return [
        [token.id for token in each[:-1]] if end is None else end for each, end in zip(said, ends, strict=True)
    ]  # fmt: skip


@torch.no_grad()
def by_hand(model: Any, asked: AnswerRequest) -> list[int]:
    """OpenAI's formulas, token by token, on lists of numbers."""
    ids, said = list(asked.prompt_ids), []
    while len(said) < asked.room:
        logits = model(torch.tensor([ids])).logits[0, -1].float().tolist()
        for token, value in asked.logit_bias.items():
            logits[token] += value
        for token in set(ids):
            most = asked.config.repetition_penalty
            logits[token] = logits[token] * most if logits[token] < 0 else logits[token] / most
        for token in range(len(logits)):
            count = said.count(token)
            logits[token] -= count * asked.frequency_penalty + (count > 0) * asked.presence_penalty
        said.append(max(range(len(logits)), key=logits.__getitem__))
        ids.append(said[-1])
    return said


def test_penalties_and_biases_are_openais_for_each_row_of_a_batch() -> None:
    model = tiny_model(initializer_range=0.5).eval()
    (first, *_) = by_hand(model, asked())
    again = GenerateConfig(do_sample=False, repetition_penalty=1.4)
    keys: list[dict[str, Any]] = [
        {}, {"presence_penalty": 2.0, "logit_bias": {7: 16.0}}, {"frequency_penalty": 2.0, "logit_bias": {7: 16.0}},
        {"logit_bias": {7: 16.0}}, {"presence_penalty": -2.0, "frequency_penalty": -1},
        {"logit_bias": {first: -100.0}}, {"logit_bias": {7: 2.5, 9: 100.0}, "frequency_penalty": 2.0},
        {"logit_bias": {first: -2.0}, "presence_penalty": 1.0, "config": again},
    ]  # fmt: skip
    requests = [asked(room=20, **each) for each in keys]
    expected = [by_hand(model, each) for each in requests]
    assert len({tuple(each) for each in expected}) == len(keys)
    assert answers(RowBatch(model), requests) == expected


def many(count: int = 7) -> list[AnswerRequest]:
    drawn = GenerateConfig(temperature=1.3)
    return [asked(at, room=5 + at, config=drawn if at % 2 else GREEDY, presence_penalty=0.5) for at in range(count)]


class Fails(RowBatch):
    """Raises where `fails` says so of the rows that are read or answered."""

    def __init__(self, model: Any, fails: Callable[[Sequence[Any], bool], Exception | None]) -> None:
        super().__init__(model)
        self.fails = fails

    def _try(self, rows: Sequence[Any], reads: bool) -> None:
        if error := self.fails(rows, reads):
            raise error

    def _join(self, rows: Sequence[AnswerRow]) -> None:
        self.joining = rows
        super()._join(rows)

    def _read(self, *given: Any) -> Any:
        self._try(self.joining, True)
        return super()._read(*given)

    def _chosen(self, *given: Any) -> Any:
        found = super()._chosen(*given)  # random numbers have been drawn
        self._try(self.rows, False)
        return found


@pytest.mark.parametrize("reads", [True, False])
def test_where_memory_is_full_fewer_rows_are_answered_at_a_time(reads: bool) -> None:
    model = tiny_model(initializer_range=0.5)
    expected = [answers(RowBatch(model), [each])[0] for each in many()]
    sizes: list[int] = []

    def full(rows: Sequence[Any], reading: bool) -> Exception | None:
        sizes.append(len(rows))
        return torch.OutOfMemoryError() if reading == reads and len(rows) > 2 else None

    assert answers(Fails(model, full), many()) == expected
    assert max(sizes) > 2


def test_a_row_that_has_no_room_alone_is_told_and_the_others_go_on() -> None:
    model = tiny_model(initializer_range=0.5)
    expected = [answers(RowBatch(model), [each])[0] for each in many()]
    for reads in (True, False):
        for kind in (torch.OutOfMemoryError, ValueError):

            def bad(rows: Sequence[Any], reading: bool, reads: bool = reads, kind: Any = kind) -> Exception | None:
                late = any(row.request.seed == 3 and (reads or len(row.said) == 4) for row in rows)
                return kind("no") if late and reading == reads else None

            found = answers(Fails(model, bad), many())
            assert isinstance(found[3], kind)
            assert found[:3] + found[4:] == expected[:3] + expected[4:]


def test_a_cap_on_the_cache_lets_rows_wait() -> None:
    model = tiny_model(initializer_range=0.5)
    expected = [answers(RowBatch(model), [each])[0] for each in many()]
    batch, widths = RowBatch(model, max_cache_tokens=70), []
    forward = batch._forward
    batch._forward = lambda state: (widths.append(tuple(state.ids_BT.shape)), forward(state))[1]  # type: ignore
    assert answers(batch, many()) == expected
    assert max(rows for rows, _ in widths) > 1 and max(rows * tokens for rows, tokens in widths) <= 70
    assert len(answers(RowBatch(model, max_cache_tokens=1), [asked()])[0]) == 9


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tiny_model_folder(tmp_path_factory.mktemp("sampled") / "m", initializer_range=0.5, eos_token_id=None)
    with serving(
        str(folder), model_name="m", engine_config={"name": "transformers", "max_cache_tokens": 2000}
    ) as found:
        yield found


def ask(served: Any, **keys: Any) -> Any:
    return served.client.chat.completions.create(model="m", messages=ASKED, **keys)


def test_requests_carry_penalties_and_biases(served: Any) -> None:
    assert served.engine.inner._batches["m"].max_cache_tokens == 2000
    keys = {"presence_penalty": 1, "frequency_penalty": -0.5, "logit_bias": {"9": 100}}
    answer = ask(served, temperature=0, max_tokens=4, logprobs=True, **keys)
    sent = served.engine.asked[-1]
    assert (sent.presence_penalty, sent.frequency_penalty, sent.logit_bias) == (1, -0.5, {9: 100})
    tokens = [each.token for each in answer.choices[0].logprobs.content]
    assert tokens[0] == served.engine.tokenizer.decode([9])
    assert answer.choices[0].logprobs.content[0].logprob < -1  # the model's own
    text = served.client.completions.create(
        model="m", prompt="Paris", max_tokens=3, temperature=0, logit_bias={"9": 100}
    )
    assert text.choices[0].text == served.engine.tokenizer.decode([9] * 3)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"presence_penalty": 2.5}, "presence_penalty: Input should be less than or equal to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty: Input should be greater than or equal to -2"),
        ({"logit_bias": {"9": 101}}, "logit_bias.*less than or equal to 100"),
        ({"logit_bias": {"nine": 1}}, "logit_bias.*should match pattern"),
        ({"logit_bias": {"99999": 1}}, "logit_bias: 99999 is no token, there are"),
        ({"response_format": {"type": "json_object"}}, "response_format: found json_object, allowed is text: answers"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
            "response_format: found json_schema, allowed is text",
        ),
        ({"tool_choice": "required", "tools": [TOOL]}, "tool_choice: found required, allowed are auto and none"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "add"}}, "tools": [TOOL]},
            "tool_choice: found a function, allowed are auto and none",
        ),
    ],
)
def test_what_cannot_be_held_is_refused(served: Any, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        ask(served, **keys)


def test_others_are_served_while_a_long_prompt_is_read(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, served_others = threading.Event(), threading.Event()
    chat_prompt = served.server.chat_prompt

    def waits(*given: Any) -> Any:
        reading.set()
        assert served_others.wait(60)
        return chat_prompt(*given)

    monkeypatch.setattr(served.server, "chat_prompt", waits)
    found: list[Any] = []
    asking = threading.Thread(target=lambda: found.append(ask(served, max_tokens=2)))
    asking.start()
    try:
        assert reading.wait(60)
        assert request(served, "/health") == (200, {"status": "ok"}) and served.server.taken == 1
    finally:
        served_others.set()
        asking.join()
    assert found[0].usage.completion_tokens == 2 and served.server.taken == 0


def test_full_memory_is_told_and_the_server_goes_on(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(state: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as broken:
        broken.setattr(served.engine.inner._batches["m"], "_forward", full)
        with pytest.raises(openai.InternalServerError, match="memory is full; ask for less, or come again") as error:
            ask(served, n=3)
    assert error.value.status_code == 503
    assert ask(served, max_tokens=2).usage.completion_tokens == 2


def test_reading_a_prompt_that_is_refused_gives_its_places_back(served: Any) -> None:
    for _ in range(70):
        status, told = request(served, "/v1/completions", body={"model": "m", "prompt": [99999]})
        assert status == 400 and "99999 is no token" in told["error"]["message"]
    assert served.server.taken == 0
