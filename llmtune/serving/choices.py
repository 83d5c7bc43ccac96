"""One answer of a request on its way from tokens to the pieces that a client gets."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmtune.contract.generation import NewToken
from llmtune.inference.said import Channels, SaidPiece, Stops
from llmtune.model.text_decoder import TextDecoder
from llmtune.serving.models import ModelOffer


@dataclass
class Choice:
    """An answer as it comes."""

    index: int
    offer: ModelOffer
    room: int
    """Most tokens of it."""
    stops: Stops
    decoder: TextDecoder
    channels: Channels | None
    """None where text is continued, which is told as it is."""
    tokens: int = 0
    ended: bool = False
    cut: bool = False
    """Whether the limit of tokens came first."""
    pending: list[NewToken] = field(default_factory=list)
    """Tokens whose probabilities have not been told."""

    @classmethod
    def of(cls, index: int, offer: ModelOffer, room: int, stops: Sequence[str], channels: Channels | None) -> Choice:
        """A new one."""
        kept = channels.format.tokens(offer.tokenizer) if channels and channels.format else frozenset()
        decoder = TextDecoder(offer.tokenizer, offer.config.skip_special_tokens, kept)
        return cls(index, offer, room, Stops(stops), decoder, channels)

    def push(self, token: NewToken) -> Iterator[SaidPiece]:
        """What is told with a token. Where the answer ends with it for its text, `ended` is set."""
        self.tokens += 1
        ends = token.id in self.offer.stop
        self.cut = not ends and self.tokens >= self.room
        if not ends:
            self.pending.append(token)
        yield from self._told(self.stops.push(self.decoder.push(token.id)))
        if self.stops.hit:
            self.cut = False
            yield from self.finish()

    def finish(self) -> Iterator[SaidPiece]:
        """What is left to tell at the end."""
        if not self.ended:
            self.ended = True
            yield from self._told(self.stops.push(self.decoder.rest(), last=True), last=True)

    def _told(self, text: str, last: bool = False) -> Iterator[SaidPiece]:
        if self.channels is not None:
            yield from self.channels.push(text, last)
        elif text:
            yield SaidPiece("text", text)

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The calls of the answer in OpenAI's shape, once it has ended."""
        found = self.channels.calls if self.channels is not None else []
        return [
            {
                "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
                "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)},
            }
            for call in found
        ]  # fmt: skip

    @property
    def reason(self) -> str:
        """Why the answer ended."""
        if self.channels is not None and self.channels.calls:
            return "tool_calls"
        return "length" if self.cut else "stop"

    def chat_logprobs(self) -> dict[str, Any]:
        """The probabilities of the tokens since the last time, as conversations tell them."""
        content = [
            {
                **self._token(token.id, token.logprob),
                "top_logprobs": [self._token(other, logprob) for other, logprob in token.top],
            }
            for token in self._taken()
        ]
        return {"content": content, "refusal": None}

    def text_logprobs(self, offset: int) -> dict[str, Any]:
        """The same as continued texts tell them; `offset` is where their text begins."""
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in self._taken():
            text = self._text(token.id)
            top = {self._text(other): logprob for other, logprob in reversed(token.top)}  # the likeliest wins
            for key, value in zip(found, (text, token.logprob, top, offset), strict=True):
                found[key].append(value)
            offset += len(text)
        return found

    def _taken(self) -> list[NewToken]:
        taken, self.pending = self.pending, []
        return taken

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    def _text(self, token: int) -> str:
        return str(self.offer.tokenizer.decode([token]))
