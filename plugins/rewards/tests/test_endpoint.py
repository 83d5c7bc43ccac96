"""A real server in a thread: what is asked of it, and every way in which it can fail."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune import Completion, DataError, PluginError
from llmtune.testing import in_ranks, tiny_recipe, tiny_tokenizer

from .conftest import Said, Served

Made = Callable[..., Completion]


class Context:
    tokenizer = tiny_tokenizer()


def score(server: Served, completions: list[Completion], **keys: Any) -> list[float | None]:
    from llmtune_rewards import EndpointConfig, build_endpoint

    keys = {"url": server.url, "backoff": 0.01, **keys}
    return build_endpoint(EndpointConfig(**keys)).score(completions, Context())


def test_the_server_is_asked_as_reward_servers_of_llama_factory_are(server: Served, completion: Made) -> None:
    said = [completion("four", answer="4", more=1), completion("five", cut=True, answer="5"), completion("", answer="")]
    whole = [each.prompt + text for each, text in zip(said, ("four<|im_end|>", "five", "<|im_end|>"), strict=True)]
    assert "<|im_start|>user\nHow much?<|im_end|>\n<|im_start|>assistant\n" in whole[0]
    assert score(server, said, batch_size=2) == [len(text) / 100 for text in whole]
    assert [body for _, body in server.asked] == [
        {"model": "model", "messages": whole[:2]}, {"model": "model", "messages": whole[2:]},
    ]  # fmt: skip
    score(server, said[:1], columns=("answer",), model="judge", api_key="k", headers={"X-Team": "a"}, batch_size=1)
    headers, body = server.asked[-1]
    assert body == {"model": "judge", "messages": whole[:1], "columns": [{"answer": "4"}]}
    assert headers["Authorization"] == "Bearer k" and headers["X-Team"] == "a"
    assert headers["Content-Type"] == "application/json"
    assert score(server, []) == [] and len(server.asked) == 3
    with pytest.raises(DataError, match="reward_config endpoint: the row of the prompt .* has no column 'more'"):
        score(server, said, columns=("more",))


def test_a_server_that_fails_first_is_asked_again(server: Served, completion: Made) -> None:
    server.script = [Said("busy", 503), Said("slow down", 429), Said({"scores": [0.5, None]})]
    assert score(server, [completion("a"), completion("b")]) == [0.5, None]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("script", "keys", "words"),
    [
        ([Said("broken\n pipe", 500)] * 3, {}, "gave HTTP 500 Internal Server Error: 'broken pipe' (after 3 tries)"),
        (
            [Said("no such key", 401)],
            {},
            "gave HTTP 401 Unauthorized: 'no such key' (after 1 try); see what the server",
        ),
        ([Said(after_s=1.0)], {"timeout": 0.1, "retries": 0}, "gave TimeoutError: timed out (after 1 try)"),
        ([Said("<html>")], {}, "gave '<html>' (after 1 try); allowed is {\"scores\": [...]} with 2 finite numbers"),
        ([Said("")], {}, "gave nothing (after 1 try)"),
        ([Said([1, 2])], {}, "gave '[1, 2]' (after 1 try)"),
        ([Said({"scores": [1.0]})], {}, "gave 1 scores for 2 answers: '{\"scores\": [1.0]}' (after 1 try)"),
        ([Said({"scores": 3})], {}, "gave no list of scores"),
        ([Said({"scores": [1.0, float("nan")]})], {}, "gave the score NaN (after 1 try)"),
        ([Said({"scores": [1.0, "good"]})], {}, 'gave the score "good" (after 1 try)'),
        ([Said("again", 500), Said({"scores": [True, 1]})], {}, "gave the score true (after 2 tries)"),
    ],
)
def test_what_cannot_be_used_is_told(
    script: list[Said], keys: dict[str, Any], words: str, server: Served, completion: Made
) -> None:
    server.script = list(script)
    with pytest.raises(PluginError) as error:
        score(server, [completion("a"), completion("b")], **{"retries": 2, **keys})
    said = str(error.value)
    assert said.startswith(f"reward_config endpoint: {server.url} {words}")
    assert said.endswith("Nothing was learnt from this step") and "\n" not in said


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_a_server_that_is_not_there_is_told(completion: Made) -> None:
    server = Served(url=f"http://127.0.0.1:{free_port()}/score")
    with pytest.raises(PluginError, match=r"gave ConnectionRefusedError: .*\(after 2 tries\); start the server"):
        score(server, [completion("a")], retries=1)


def recipe(folder: Path, **keys: Any) -> dict[str, Any]:
    stage = {"name": "grpo", "max_new_tokens": 4, "num_generations": 2}
    return tiny_recipe(
        folder, kind="prompt", stage_config=stage, reward_config={"name": "endpoint", "backoff": 0.01, **keys},
        max_steps=2, per_device_train_batch_size=2,
    )  # fmt: skip


def ended(keys: dict[str, Any]) -> str:
    try:
        llmtune.train(keys)
    except llmtune.LlmtuneError as error:
        return str(error)
    return "nothing"


def test_a_run_ends_on_all_ranks_and_goes_on_where_it_was(server: Served, tmp_path: Path) -> None:
    keys = recipe(tmp_path, url=server.url, retries=0)
    server.script = [Said(), Said(), Said("down", 500)]  # each of 2 ranks asks once a step
    for said in in_ranks(2, tmp_path / "ranks", ended, keys):
        assert f"{server.url} gave HTTP 500 Internal Server Error: 'down' (after 1 try)" in said
    assert [row["step"] for row in llmtune.load(tmp_path / "run").metrics] == [1]
    assert in_ranks(2, tmp_path / "again", ended, keys) == ["nothing", "nothing"]
    assert [row["step"] for row in llmtune.load(tmp_path / "run").metrics] == [1, 2]


def test_keys_are_written_down_nowhere(server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_REWARD_KEY", "sesame-1")
    headers = {"Authorization": "Basic sesame-2", "X-API-Key": "sesame-3", "X-Team": "open"}
    for key in ("${oc.env:ACME_REWARD_KEY}", "sesame-4"):
        run = llmtune.train(
            {**recipe(tmp_path, url=server.url, api_key=key, headers=headers), "output_dir": str(tmp_path / key[-4:])}
        )
        written = [path for path in run.output_dir.rglob("*") if path.is_file() and path.suffix in (".yaml", ".json")]
        text = "".join(path.read_text(encoding="utf-8") for path in [*written, run.output_dir / "metrics.jsonl"])
        assert "sesame" not in text and "X-Team: open" in text
    assert {headers["Authorization"] for headers, _ in server.asked} == {"Basic sesame-2"}


def test_an_address_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(llmtune.LlmtuneError, match="url: found 'localhost:8000', allowed is an address"):
        llmtune.plan(recipe(tmp_path, url="localhost:8000"))
