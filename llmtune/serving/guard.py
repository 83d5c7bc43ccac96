"""What stands before every route: the key, the size of a body, and the time that it may take to arrive."""

from __future__ import annotations

import asyncio
import hmac
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llmtune.serving.config import is_loopback
from llmtune.serving.errors import Refused

if TYPE_CHECKING:
    from prometheus_client import Counter
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = frozenset({"/health", "/openapi.json"})
"""Routes that need no key: they tell nothing of anybody's requests."""
ARRIVES_S = 60.0
"""Most seconds that a body takes to arrive."""

DRAINED_BYTES = 16_000_000
"""Of a body that is too large, what is read and dropped: most clients hear an answer only after they have sent all."""


class Guard:
    """Lets requests through that have the key, with a body that has arrived whole and is not too large."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int) -> None:
        self.app, self.api_key, self.most = app, api_key, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            self._check_host(headers.get(b"host", b""))
            self._check_key(scope["path"].removeprefix(scope.get("root_path", "")), headers.get(b"authorization", b""))
            body = await asyncio.wait_for(self._body(headers.get(b"content-length", b""), receive), ARRIVES_S)
        except TimeoutError:
            await Refused(408, f"the body did not arrive within {ARRIVES_S:.0f} s").response()(scope, receive, send)
            return
        except Refused as refused:
            await refused.response()(scope, receive, send)
            return
        if body is None:  # the client has gone
            return
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)

    def _check_host(self, sent: bytes) -> None:
        """Without a key the server answers to this machine's own names: a page of another name, pointed at this
        address, may not ask it in a browser's name."""
        if self.api_key is not None or not sent:
            return
        try:
            host = urlsplit(f"//{sent.decode('latin-1')}").hostname or ""
        except ValueError:
            host = ""
        if not is_loopback(host):
            raise Refused(403, "a server without a key answers to this machine's own names alone; set API_KEY")

    def _check_key(self, path: str, sent: bytes) -> None:
        if self.api_key is None or path in OPEN:
            return
        kind, _, key = sent.partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.api_key.encode()):
            told = "no key was sent" if not sent else "the key is wrong"
            raise Refused(
                401, f"{told}; send the server's key as Authorization: Bearer KEY", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    async def _body(self, length: bytes, receive: Receive) -> bytes | None:
        """The body; None where the client left before it was whole."""
        parts, size = [], 0
        if length.isdigit() and int(length) > self.most + DRAINED_BYTES:
            raise self._too_large()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            size += len(message.get("body", b""))
            if size <= self.most:
                parts.append(message.get("body", b""))
            elif size > self.most + DRAINED_BYTES or not message.get("more_body", False):
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> Refused:
        # The rest of the body is not read: the connection cannot be used again.
        return Refused(
            413, f"the body has more than {self.most} bytes, the most that is read; raise max_body_mb",
            code="body_too_large", headers={"Connection": "close"},
        )  # fmt: skip


class Counted:
    """Counts answers to requests by route and status."""

    def __init__(self, app: ASGIApp, requests: Counter) -> None:
        self.app, self.requests = app, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope["route"].path if "route" in scope else "other"
                self.requests.labels(route, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counting if scope["type"] == "http" else send)
