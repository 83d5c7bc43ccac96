"""Rewards that a server gives, asked over HTTP as LLaMA-Factory's reward servers are."""

from __future__ import annotations

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmtune import Completion, PluginError, StageContext

from .rows import require_columns

if TYPE_CHECKING:
    from . import EndpointConfig

AGAIN = (408, 425, 429)
"""HTTP states that pass, besides those of the server (5xx)."""
UNREACHABLE = (urllib.error.URLError, http.client.HTTPException, OSError)
LONGEST_WAIT_S = 60.0
SHOWN = 200


class EndpointReward:
    """Posts `{"model": ..., "messages": [text, ...]}` and reads `{"scores": [number, ...]}`. A text is prompt and
    answer as the template writes them, control tokens included."""

    def __init__(self, config: EndpointConfig) -> None:
        self.config = config
        key = {} if config.api_key is None else {"Authorization": f"Bearer {config.api_key}"}
        self.headers = {"Content-Type": "application/json", "Accept": "application/json", **key, **config.headers}

    def row_objection(self, columns: Mapping[str, Any]) -> str | None:
        """A column to send along that a row does not have; None where it has all."""
        lacking = [name for name in self.config.columns if name not in columns]
        return f"has no column {lacking[0]!r}, which is to be sent along; correct columns" if lacking else None

    def score(self, completions: Sequence[Completion], context: StageContext) -> list[float | None]:
        """What the server says of each answer. Raises PluginError where it says nothing that can be used."""
        require_columns(self, "endpoint", completions)
        found: list[float | None] = []
        for start in range(0, len(completions), self.config.batch_size):
            found += self._asked(completions[start : start + self.config.batch_size], context)
        return found

    def _asked(self, completions: Sequence[Completion], context: StageContext) -> list[float | None]:
        texts = [each.prompt + context.tokenizer.decode(each.ids) for each in completions]
        body: dict[str, Any] = {"model": self.config.model, "messages": texts}
        if self.config.columns:
            body["columns"] = [{name: each.columns[name] for name in self.config.columns} for each in completions]
        sent, wait, tries = json.dumps(body).encode(), self.config.backoff, 0
        while True:
            tries += 1
            try:
                return self._scores(self._posted(sent), len(completions), tries)
            except urllib.error.HTTPError as error:
                came, cause = f"HTTP {error.code} {error.reason}: {shown(error.read())}", error
                if error.code < 500 and error.code not in AGAIN:
                    raise self._end(came, tries, "see what the server wants of url, headers and api_key") from error
            except UNREACHABLE as error:
                reason = getattr(error, "reason", None) or error
                came, cause = f"{type(reason).__name__}: {reason}", error
            if tries > self.config.retries:
                raise self._end(came, tries, "start the server, or raise retries or timeout") from cause
            time.sleep(min(wait, LONGEST_WAIT_S))
            wait *= 2

    def _posted(self, sent: bytes) -> bytes:
        request = urllib.request.Request(self.config.url, data=sent, headers=self.headers, method="POST")
        with urllib.request.urlopen(request, timeout=self.config.timeout) as response:
            return response.read()

    def _scores(self, said: bytes, count: int, tries: int) -> list[float | None]:
        wanted = f'allowed is {{"scores": [...]}} with {count} finite numbers, null where there is nothing to say'
        try:
            scores = json.loads(said)["scores"]
        except (ValueError, TypeError, KeyError):
            raise self._end(shown(said), tries, wanted) from None
        if not isinstance(scores, list) or len(scores) != count:
            number = f"{len(scores)} scores for {count} answers" if isinstance(scores, list) else "no list of scores"
            raise self._end(f"{number}: {shown(said)}", tries, wanted)
        for score in scores:
            number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
            if score is not None and not number:
                raise self._end(f"the score {json.dumps(score):.{SHOWN}}", tries, wanted)
        return scores

    def _end(self, came: str, tries: int, fix: str) -> PluginError:
        times = "1 try" if tries == 1 else f"{tries} tries"
        return PluginError(
            f"reward_config endpoint: {self.config.url} gave {came} (after {times}); {fix}. Nothing was learnt from "
            "this step"
        )


def shown(said: bytes) -> str:
    """The beginning of what a server said, on one line."""
    text = " ".join(said[: 4 * SHOWN].decode("utf-8", "replace").split())
    return repr(text[:SHOWN]) if text else "nothing"
