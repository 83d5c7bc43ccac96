"""Answers of a vLLM server as they come: many requests at a time, in a thread of their own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from llmtune import AnswerRequest, Deliver, NewToken, PlanError

from .server import VllmLost, VllmServer

AT_A_TIME = 512
"""Requests that are open at a time; vLLM itself answers 256 together, unless it is told otherwise."""
PATH = "/v1/completions"


def require_known(request: AnswerRequest) -> None:
    """PlanError for what vLLM's API has no counterpart of."""
    if request.config.num_beams > 1:
        raise PlanError(
            f"num_beams: found {request.config.num_beams}, but engine_config vllm draws token by token; set 1, or "
            "engine_config: transformers"
        )


def body_of(request: AnswerRequest, model: str, stream: bool) -> dict[str, Any]:
    """The request as vLLM's API has it, with tokens for text."""
    config, top = request.config, request.top_logprobs
    drawn = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    greedy = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
    return {
        "model": model, "prompt": list(request.prompt_ids), "max_tokens": request.room,
        **(drawn if config.do_sample else greedy), "repetition_penalty": config.repetition_penalty,
        "presence_penalty": request.presence_penalty, "frequency_penalty": request.frequency_penalty,
        "logit_bias": {str(token): value for token, value in request.logit_bias.items()} or None,
        "seed": request.seed % 2**63,  # what ends an answer is llmtune's to say
        "stop_token_ids": sorted(request.stop), "ignore_eos": True, "skip_special_tokens": False,
        "return_token_ids": True, "stream": stream,
        **({} if top is None else {"logprobs": top, "return_tokens_as_token_ids": True}),
    }  # fmt: skip


def tokens_of(choice: dict[str, Any], top: int | None) -> Iterator[NewToken]:
    """The tokens of an answer, or of a piece of it."""
    if (ids := choice.get("token_ids")) is None:
        raise VllmLost("engine_config: vLLM told no token_ids; a version of 0.10.2 or newer does")
    if top is None:
        yield from map(NewToken, ids)
        return
    told = choice["logprobs"]
    for token, logprob, beside in zip(ids, told["token_logprobs"], told["top_logprobs"], strict=True):
        found = sorted(((int(name.rpartition(":")[2]), log) for name, log in beside.items()), key=lambda one: -one[1])
        yield NewToken(token, logprob, tuple(found[:top]))


class Client:
    """Sends requests to a server, and delivers what comes back."""

    def __init__(self, server: VllmServer) -> None:
        self.server = server
        self._loop = asyncio.new_event_loop()
        limits = httpx.Limits(max_connections=AT_A_TIME, max_keepalive_connections=AT_A_TIME)
        self._http = httpx.AsyncClient(
            base_url=server.url, headers=server.headers, timeout=None, limits=limits, trust_env=server.process is None,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="llmtune-vllm")
        self._thread.start()

    def submit(
        self, request: AnswerRequest, model: str, deliver: Deliver, *, stream: bool = True
    ) -> Callable[[], object]:
        """Begin an answer; calling the result ends it early. Without `stream` its tokens come at its end."""
        return asyncio.run_coroutine_threadsafe(self._answer(request, model, deliver, stream), self._loop).cancel

    async def _answer(self, request: AnswerRequest, model: str, deliver: Deliver, stream: bool) -> None:
        try:
            await self._ask(request, body_of(request, model, stream), deliver)
        except asyncio.CancelledError:
            raise
        except httpx.HTTPError as error:
            deliver(await asyncio.to_thread(self.server.lost, error))
        except Exception as error:
            deliver(error)
        else:
            deliver(None)

    async def _ask(self, request: AnswerRequest, body: dict[str, Any], deliver: Deliver) -> None:
        reason, last = None, None
        async with self._http.stream("POST", PATH, json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise self.server.refused(PATH, response.status_code, text)
            async for piece in _pieces(response, body["stream"]):
                if "error" in piece:
                    raise self.server.refused(PATH, response.status_code, json.dumps(piece))
                for choice in piece["choices"]:
                    for token in tokens_of(choice, request.top_logprobs):
                        last = token.id
                        deliver(token)
                    reason = choice.get("finish_reason") or reason
        if reason not in ("stop", "length"):
            raise VllmLost(f"engine_config: vLLM at {self.server.url} broke an answer off ({reason})")
        if reason == "stop" and last not in request.stop:
            raise VllmLost(f"engine_config: vLLM ended an answer with token {last}, which was not to end it")

    def close(self) -> None:
        """End what is being asked."""

        async def end() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._http.aclose()
            self._loop.stop()

        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(end(), self._loop)
            self._thread.join(10)


async def _pieces(response: httpx.Response, stream: bool) -> Any:
    """What the server says: at once, or piece by piece, as server-sent events."""
    if not stream:
        yield json.loads(await response.aread())
        return
    async for line in response.aiter_lines():
        word, _, data = line.partition(":")
        if word == "data" and (data := data.strip()) != "[DONE]":
            yield json.loads(data)
