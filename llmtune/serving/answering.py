"""A request on its way through the engine: its prompts become answers, whose tokens come over from another thread."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from starlette.requests import Request

from llmtune.contract.errors import DataError, LlmtuneError, listed
from llmtune.contract.examples import BadRow, Conversation, ShownText
from llmtune.contract.generation import AnswerRequest, GenerateConfig, NewToken, Serving
from llmtune.data.formats.chats import OpenAi
from llmtune.inference.said import THINK, Channels, SaidPiece
from llmtune.media.files import MediaFiles
from llmtune.media.rows import shown
from llmtune.model.generate import ContextFull, alike_up_to, require_prompt, room_of
from llmtune.model.generation import plain_ids
from llmtune.model.prompts import ends_in_media
from llmtune.serving.ahead import ReadAhead
from llmtune.serving.bodies import ChatRequest, TextRequest
from llmtune.serving.choices import Choice
from llmtune.serving.config import ServeConfig
from llmtune.serving.errors import Refused
from llmtune.serving.media import RequestMedia
from llmtune.serving.metrics import Metrics
from llmtune.serving.models import ModelOffer, named

VIEWERS = 4
"""Threads that read what requests show, each with a tokenizer and a processor of its own: some 100 MB."""


@dataclass(frozen=True)
class AskedPrompt:
    """What is asked once, or several times."""

    ids: tuple[int, ...]
    channels: Callable[[], Channels] | None = None
    """How an answer is told apart; None where it is text that goes on."""
    shown: ShownText | None = None
    """The text with what it shows, where it shows anything."""


class Server:
    """Models, the engine that answers for them, and how much of it is taken."""

    def __init__(self, offers: Sequence[ModelOffer], serving: Serving, config: ServeConfig) -> None:
        self.offers, self.serving, self.config = offers, serving, config
        self.metrics, self.started, self.taken = Metrics(), int(time.time()), 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="llmtune-read")  # tokenizers have settings
        self._viewers, self._own = ThreadPoolExecutor(VIEWERS, thread_name_prefix="llmtune-view"), threading.local()

    def offer(self, name: str) -> ModelOffer:
        """The model of a name."""
        if (found := named(self.offers, name)) is None:
            known = ", ".join(each.name for each in self.offers)
            raise Refused(
                404, f'model: there is no "{name}" here; there are: {known}', param="model", code="model_not_found"
            )
        return found

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Room for so many answers, or 429."""
        most = self.config.max_concurrent
        if count > most:
            raise Refused(400, f"the request asks for {count} answers, the server gives {most} at a time", param="n")
        if self.taken + count > most:
            raise Refused(
                429, f"{self.taken} of {most} answers are being made; come again", code="too_many_requests",
                headers={"Retry-After": "1"},
            )  # fmt: skip
        self._take(count)
        try:
            yield
        finally:
            self._take(-count)

    def _take(self, count: int) -> None:
        self.taken += count
        self.metrics.running.set(self.taken)

    async def read(self, body: ChatRequest | TextRequest, held: ExitStack) -> Answering:
        """All answers to a request, not yet begun. Its prompts are read in a thread, as long ones take seconds; those
        that show something in other threads, as these take longer. `held` keeps what they show."""
        loop = asyncio.get_running_loop()
        if isinstance(body, ChatRequest) and any(isinstance(each.get("content"), list) for each in body.messages):
            made = TemporaryDirectory(prefix="llmtune-serve-", ignore_cleanup_errors=True)
            folder = Path(held.enter_context(made))
            body, ahead = await asyncio.to_thread(self._with_files, body, folder)
            if ahead is not None:
                held.callback(ahead.forget, folder)
                return await loop.run_in_executor(self._viewers, self.answering, body, folder)
        return await loop.run_in_executor(self._reader, self.answering, body)

    def _with_files(self, body: ChatRequest, folder: Path) -> tuple[ChatRequest, ReadAhead | None]:
        """The request with files in place of what it shows, and where what becomes of them is kept, if it shows
        anything."""
        offer, media = self.offer(body.model), RequestMedia(self.config, folder)
        reads = () if offer.media is None else offer.media.reads
        taken = media.taken(body.messages, offer.reader, reads)
        return body.model_copy(update={"messages": taken}), offer.ahead if media.kinds else None

    def _viewing(self, offer: ModelOffer) -> ModelOffer:
        """The model with a renderer of this thread's own."""
        own = vars(self._own)
        if offer.name not in own:
            own[offer.name] = offer.own_renderer(self.config.max_decoded_pixels)
        return replace(offer, renderer=own[offer.name])

    def chat_prompt(self, offer: ModelOffer, body: ChatRequest, folder: Path | None) -> AskedPrompt:
        """The prompt of a conversation, as rows of a data set are read and rendered; what it shows is in `folder`."""
        if offer.renderer is None:
            raise Refused(
                400, f"{offer.name} has no chat template, so that it continues text only: use /v1/completions, or "
                "serve it with template=NAME", param="messages",
            )  # fmt: skip
        _check_form(body)
        tools = [each.model_dump(exclude_none=True) for each in body.tools or ()] if body.tool_choice != "none" else []
        variables = body.chat_template_kwargs or {}
        own = offer.renderer.template_kwargs.get("chat_template")
        template = offer.tokenizer.get_chat_template(own, tools or None)
        if unread := [name for name in variables if not re.search(rf"\b{re.escape(name)}\b", template)]:
            said = f"chat_template_kwargs: the chat template of {offer.name} reads no {listed(unread)}; leave it out"
            raise Refused(400, said, param="chat_template_kwargs")
        row = {"messages": body.messages, "tools": tools, "chat_template_kwargs": variables}
        try:
            asked = shown(OpenAi().convert(row), {}, MediaFiles(folder=folder) if folder else None)
            assert isinstance(asked, Conversation)
            if all(message["role"] == "system" for message in asked.messages):
                raise BadRow("no question", "nothing is asked: there are system messages only")
            made = offer.renderer.prompt(asked)
        except BadRow as bad:
            detail = bad.detail.replace(f"{folder}/", "")
            raise Refused(400, f"messages: {bad.reason}: {detail}", param="messages") from None
        ids = made.ids.tolist()
        if made.shown is not None and ends_in_media(ids, offer.media):
            raise Refused(400, "messages: the chat template says nothing after the last picture", param="messages")
        begun = str(offer.tokenizer.decode(ids[-8:])).rstrip().endswith(THINK)
        return AskedPrompt(tuple(ids), partial(Channels, offer.calls if tools else None, begun), made.shown)

    def text_prompts(self, offer: ModelOffer, body: TextRequest) -> list[AskedPrompt]:
        """The prompts of texts, or of lists of tokens."""
        given = body.prompt
        many: Sequence[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        try:
            found = [plain_ids(offer.tokenizer, each)[0].tolist() if isinstance(each, str) else each for each in many]
            for ids in found:
                require_prompt(ids, offer.words)
        except DataError as error:
            raise Refused(400, f"prompt: {error}", param="prompt") from None
        return [AskedPrompt(tuple(ids)) for ids in found]

    def answering(self, body: ChatRequest | TextRequest, folder: Path | None = None) -> Answering:
        """All answers to a request, not yet begun; what it shows is in `folder`."""
        offer, most = self.offer(body.model), body.max_tokens
        offer = self._viewing(offer) if folder else offer
        top = body.logprobs if isinstance(body, TextRequest) else None
        if isinstance(body, ChatRequest):
            most = body.max_completion_tokens or most
            top = (body.top_logprobs or 0) if body.logprobs else None
            if body.top_logprobs is not None and not body.logprobs:
                raise Refused(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
            prompts = [self.chat_prompt(offer, body, folder)]
        else:
            prompts = self.text_prompts(offer, body)
        limit = self.config.max_answer_tokens
        if limit is not None and most is not None and most > limit:
            raise Refused(
                400, f"max_tokens: found {most}, this server answers with {limit} at most", param="max_tokens"
            )
        config = _drawn(offer.config, body)
        if most is not None:
            config = replace(config, max_new_tokens=most)
        seed = random.getrandbits(62) if body.seed is None else body.seed
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        if odd := [token for token in bias if token >= offer.words]:
            raise Refused(400, f"logit_bias: {odd[0]} is no token, there are {offer.words}", param="logit_bias")
        found = []
        for prompt in prompts:
            try:
                room = room_of(offer.model_config, len(prompt.ids), config)
            except ContextFull as error:
                raise Refused(400, f"{error}", param="messages", code="context_length_exceeded") from None
            room = min([room, *_beside(offer, len(prompt.ids))])
            if most is not None and most > room:
                said = f"max_tokens: found {most}, the prompt has {len(prompt.ids)} tokens and leaves room for {room}"
                raise Refused(400, said, param="max_tokens", code="context_length_exceeded")
            room = min(room, limit or room)
            for number in range(body.n or 1):
                channels = None if prompt.channels is None else prompt.channels()
                request = AnswerRequest(
                    model=offer.name, prompt_ids=prompt.ids, config=config, room=room, seed=seed + number,
                    stop=offer.stop, shown=prompt.shown, top_logprobs=top, logit_bias=bias,
                    presence_penalty=body.presence_penalty or 0.0, frequency_penalty=body.frequency_penalty or 0.0,
                )  # fmt: skip
                found.append((request, Choice.of(len(found), offer, room, body.stops, channels)))
        return Answering(self, found)


def _check_form(body: ChatRequest) -> None:
    """Refuse what would need an answer that is held to a form."""
    free = "answers are said freely here and held to no form; "
    if body.response_format is not None and (form := body.response_format.type) != "text":
        fix = "ask for JSON in a message, and check what comes"
        raise Refused(400, f"response_format: found {form}, allowed is text: {free}{fix}", param="response_format")
    if body.tool_choice not in (None, "auto", "none"):
        found = "required" if body.tool_choice == "required" else "a function"
        fix = "name one tool alone in tools, and ask for its call in a message"
        raise Refused(400, f"tool_choice: found {found}, allowed are auto and none: {free}{fix}", param="tool_choice")
    if body.tools and body.parallel_tool_calls is False:
        fix = "ask for one call at a time in a message"
        raise Refused(
            400, f"parallel_tool_calls: found false, allowed is true: {free}{fix}", param="parallel_tool_calls"
        )


def _beside(offer: ModelOffer, prompt_tokens: int) -> list[int]:
    """The tokens that are left where an answer beyond some length would depend on others beside it. Raises Refused."""
    if (most := alike_up_to(offer.model_config)) is None:
        return []
    if prompt_tokens >= most:
        said = f"the prompt has {prompt_tokens} tokens, and {offer.name} is served up to {most}"
        raise Refused(400, said, param="messages", code="context_length_exceeded")
    return [most - prompt_tokens]


def _drawn(config: GenerateConfig, body: ChatRequest | TextRequest) -> GenerateConfig:
    """How answers are drawn: as the request says, else as the server does."""
    keys: Mapping[str, Any] = {
        key: value for key in ("top_p", "top_k", "repetition_penalty") if (value := vars(body)[key]) is not None
    }
    config = replace(config, **keys)
    if body.temperature is None:
        return config
    return replace(config, do_sample=True, temperature=body.temperature) if body.temperature else replace(
        config, do_sample=False
    )  # fmt: skip


class Answering:
    """The answers to one request."""

    def __init__(self, server: Server, rows: Sequence[tuple[AnswerRequest, Choice]]) -> None:
        self.server, self.rows = server, rows
        self.choices = [choice for _, choice in rows]

    @property
    def usage(self) -> dict[str, int]:
        """The tokens so far."""
        prompts = {id(request.prompt_ids): len(request.prompt_ids) for request, _ in self.rows}
        asked, said = sum(prompts.values()), sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}

    async def pieces(self) -> AsyncGenerator[tuple[Choice, Sequence[SaidPiece]]]:
        """Each answer's pieces as they come; its last ones once it has `ended`. Leaving early ends all answers.

        Raises Refused where an answer cannot be made, or takes too long.
        """
        begin, metrics = time.monotonic(), self.server.metrics
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(index: int, item: NewToken | Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(queue.put_nowait, (index, item))

        submit = self.server.serving.submit
        cancels = [submit(request, partial(deliver, at)) for at, (request, _) in enumerate(self.rows)]
        try:
            left = len(self.rows)
            while left:
                wait = self.server.config.timeout - (time.monotonic() - begin)
                try:
                    index, item = await asyncio.wait_for(queue.get(), max(wait, 0))
                except TimeoutError:
                    most = self.server.config.timeout
                    raise Refused(504, f"the request took more than {most:g} s", code="timeout") from None
                choice = self.choices[index]
                if choice.ended:  # by a text that stops it
                    continue
                if isinstance(item, Exception):
                    raise _failed(item)
                if not any(each.tokens for each in self.choices):
                    metrics.first_token.observe(time.monotonic() - begin)
                found = list(choice.push(item)) if item is not None else list(choice.finish())
                if choice.ended:
                    cancels[index]()
                    left -= 1
                yield choice, found
        finally:
            for cancel in cancels:
                cancel()
            name, usage = self.rows[0][0].model, self.usage
            metrics.prompt_tokens.labels(name).inc(usage["prompt_tokens"])
            metrics.answer_tokens.labels(name).inc(usage["completion_tokens"])
            metrics.seconds.observe(time.monotonic() - begin)


def _failed(error: Exception) -> Refused:
    """What a client is told of an error of the engine."""
    if isinstance(error, torch.OutOfMemoryError):
        return Refused(503, "the device's memory is full; ask for less, or come again", code="out_of_memory")
    if isinstance(error, DataError):
        return Refused(400, f"{error}")
    told = str(error) if isinstance(error, LlmtuneError | ConnectionError) else f"{type(error).__name__}: {error}"
    return Refused(500, f"no answer could be made: {told}")


async def while_there(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`; None where the client leaves before, which ends the work."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
