"""A server of rewards, functions to name, and answers to score."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llmtune import Completion
from llmtune.testing import tiny_tokenizer


@dataclass
class Said:
    """What the server says next."""

    body: Any = None
    """Text or what becomes JSON; None is the scores: the number of characters of each message, in hundreds."""
    status: int = 200
    after_s: float = 0.0


@dataclass
class Served:
    """A server in a thread of this process."""

    url: str = ""
    script: list[Said] = field(default_factory=list)
    """What it says to the next requests; then it says scores."""
    asked: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)
    """(headers, body) of each request."""


@pytest.fixture
def server() -> Iterator[Served]:
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.asked.append((dict(self.headers), body))
            said = served.script.pop(0) if served.script else Said()
            time.sleep(said.after_s)
            scores = {"model": body["model"], "scores": [len(text) / 100 for text in body["messages"]]}
            found = scores if said.body is None else said.body
            raw = (found if isinstance(found, str) else json.dumps(found)).encode()
            self.send_response(said.status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        served.url = f"http://127.0.0.1:{http.server_address[1]}/v1/score/evaluation"
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield served
        http.shutdown()


FUNCTIONS = """
import torch
from llmtune import Completion

def words(completions):
    return [float(len(text.split())) for text in completions]

def near(completions, answer, scale=1.0, **kwargs):
    assert kwargs["prompts"] and kwargs["cut"] is not None and "answer" not in kwargs
    return [-abs(len(text) - len(right)) / scale for text, right in zip(completions, answer)]

def tokens(completion_ids, prompt_ids, cut):
    assert all(isinstance(ids, list) for ids in [*completion_ids, *prompt_ids])
    return torch.tensor([len(ids) - 100.0 * was for ids, was in zip(completion_ids, cut)])

def some(completions):
    return [None if not text else 1 for text in completions]

def lost(completions):
    return [1.0]

def text(completions):
    return ["good"] * len(completions)

def nan_for_four(completions, prompts):
    return [float("nan") if "is 4" in prompt or "and 4" in prompt else 1.0 for prompt in prompts]

def fails(completions):
    raise RuntimeError("no such answer,\\n  sorry")

async def later(completions):
    return [1.0] * len(completions)

def unasked(question, number=3):
    return []

def by_position(completions, /):
    return []

NUMBER = 3
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of reward functions, which is on the path of this process and of those it starts."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "acme_rewards.py").write_text(FUNCTIONS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(site))
    return "acme_rewards"


@pytest.fixture(scope="session")
def completion() -> Callable[..., Completion]:
    """`completion("text", cut=False, **columns)`: an answer to a question."""
    tokenizer = tiny_tokenizer()

    def made(text: str, cut: bool = False, **columns: Any) -> Completion:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "How much?"}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return Completion(
            prompt=prompt, answer=text, prompt_ids=tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"]),
            ids=tuple(ids) if cut else (*ids, tokenizer.eos_token_id), cut=cut, columns=columns,
        )  # fmt: skip

    return made
