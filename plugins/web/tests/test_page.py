"""The page itself, by one server: through its HTTP interface, and in a real browser where there is one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from llmtune_web.folder import Folder
from llmtune_web.jobs import Jobs

from llmtune.testing import tiny_recipe

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed; the same paths are tried by HTTP")


class Server:
    """`llmtune web` in a folder."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmtune", "web", "port=0"], cwd=folder, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip
        assert self.process.stdout is not None
        said = ""
        for line in self.process.stdout:
            said += line
            if found := re.search(r"at (http://\S+/), for files below", line):
                self.url = found[1]
                return
        raise AssertionError(said)

    def client(self) -> Any:
        from gradio_client import Client

        return Client(self.url, verbose=False, analytics_enabled=False)

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(20)


def wait_for(done: Callable[[], Any], what: str, seconds: float = 90) -> Any:
    end = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < end, what
        time.sleep(0.2)
    return found


def status(folder: Path, run: str) -> str:
    record = folder / run / "run.json"
    return json.loads(record.read_text())["status"] if record.exists() else ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, data and two recipes, one of which never ends; data lie beside the folder, too."""
    base = tmp_path_factory.mktemp("web")
    root = base / "desk"
    keys = {**tiny_recipe(root), "model": "tiny-llama", "dataset": "chats.jsonl"}
    del keys["output_dir"]
    text = "# A tiny run.\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items())
    (root / "recipe.yaml").write_text(text + "peft_config: {name: lora, r: 2}  # small\n")
    (root / "long.yaml").write_text(re.sub("max_steps: .*", "max_steps: 100000", text))
    shutil.copy(root / "chats.jsonl", base / "private.jsonl")
    return root


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    made = Server(folder)
    yield made
    made.end()
    for job in Jobs(Folder.of(folder)).all():  # what a test that failed has left
        with suppress(ProcessLookupError):
            os.kill(job.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return server.client()


def begin(client: Any, folder: Path, name: str) -> None:
    client.predict(name, (folder / name).read_text(), False, "loss", [], api_name="/start")


@pytest.fixture(scope="module")
def started(client: Any, folder: Path) -> Path:
    """The folder, in which the short run has been started."""
    begin(client, folder, "recipe.yaml")
    return folder


@pytest.fixture(scope="module")
def trained(started: Path) -> Path:
    """The folder once its short run is done."""
    wait_for(lambda: status(started, "runs/recipe") == "done", "the short run ends")
    return started


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page(browser: Any, server: Server, started: Path) -> Iterator[Any]:
    """The page in a browser, which notes what it asks of other machines, and errors."""
    made = browser.new_page(viewport={"width": 1280, "height": 900})
    made.set_default_timeout(60_000)
    made.strange: list[str] = []
    made.on("pageerror", lambda error: made.strange.append(str(error)))
    made.on(
        "request", lambda asked: asked.url.startswith((server.url, "data:", "blob:")) or made.strange.append(asked.url)
    )
    made.goto(server.url)
    made.wait_for_selector('[data-key="learning_rate"]')
    yield made
    assert made.strange == []


def yaml_of(page: Any) -> str:
    return "\n".join(page.locator("#lt-yaml .cm-line").all_inner_texts())


def go(page: Any, tab: str) -> None:
    page.get_by_role("tab", name=tab, exact=True).click()


def fill(page: Any, key: str, value: str) -> None:
    field = page.locator(f'input[data-key="{key}"]')
    field.fill(value)
    field.press("Enter")


@needs_browser
def test_form_and_yaml_stay_in_step(page: Any, folder: Path) -> None:
    page.locator("#lt-name input").fill("recipe.yaml")
    page.locator("#lt-name input").press("Enter")
    page.wait_for_function("document.querySelector('#lt-yaml').innerText.includes('# small')")
    fill(page, "learning_rate", "3e-4")
    wait_for(lambda: "learning_rate: 3e-4" in yaml_of(page), "the form's value is in the text")
    assert "# A tiny run." in yaml_of(page) and "# small" in yaml_of(page)
    page.locator('[data-open="peft_config"] > summary').click()
    fill(page, "peft_config.r", "4")
    wait_for(lambda: "peft_config: {name: lora, r: 4}  # small" in yaml_of(page), "a plugin's key, in its block")
    page.locator('select[data-key="peft_config"]').select_option("oft")
    page.wait_for_selector('[data-key="peft_config.oft_block_size"]', state="attached")
    assert "peft_config: oft" in yaml_of(page)
    page.locator('[data-unset="peft_config"]').click()
    wait_for(lambda: "peft_config" not in yaml_of(page), "a key that is unset leaves the text")

    editor = page.locator("#lt-yaml .cm-content")
    editor.press("ControlOrMeta+End")
    editor.type("\nseed: 7\nwarmup_steps: -1\nlearning_rte: 1")
    page.wait_for_selector('.lt-error:has-text("learning_rte")')
    said = page.locator("#lt-problems").inner_text()
    assert 'learning_rte: no such key. Did you mean "learning_rate"?' in said
    assert re.search(r"recipe.yaml:\d+:1\s+warmup_steps: found -1, allowed is a whole number >= 0", said)
    assert page.locator('input[data-key="seed"]').input_value() == "7"
    assert "lt-wrong" in page.locator('[data-name="warmup_steps"]').get_attribute("class")

    page.locator(".lt-search").fill("warmup_ratio")
    assert page.locator('[data-name="warmup_ratio"]').is_visible()
    assert not page.locator('[data-name="learning_rate"]').is_visible()
    page.locator(".lt-search").fill("")


@needs_browser
def test_values_are_shown_as_text_and_never_run(page: Any) -> None:
    page.locator("#lt-name input").fill("recipe.yaml")
    page.locator("#lt-name input").press("Enter")
    page.wait_for_function("document.querySelector('#lt-yaml').innerText.includes('# small')")
    odd = "<img src=x onerror=alert(1)>${1+1}{{value}}\"'"
    page.locator('[data-open="Data"] > summary').click()
    fill(page, "default_system", odd)
    wait_for(lambda: "onerror" in yaml_of(page), "the text has it")
    page.wait_for_timeout(300)
    assert page.locator('input[data-key="default_system"]').input_value() == odd
    assert page.locator("img[src=x]").count() == 0


def test_samples_and_plans(client: Any, trained: Path) -> None:
    text = (trained / "recipe.yaml").read_text()
    shown = client.predict("recipe.yaml", text, 2, "", False, api_name="/preview")
    assert "trained on" in shown and "How much is 0 and 0?" in shown and "background-color" in shown
    assert "chats.jsonl:5" in client.predict("recipe.yaml", text, 1, "5", False, api_name="/preview")
    planned = client.predict("recipe.yaml", text, "24GB", 2, api_name="/plan")
    assert "Memory" in planned and "runs/recipe" in planned and "2 ranks" in planned and "lora" in planned
    wrong = client.predict("recipe.yaml", text, "h900", None, api_name="/plan")
    assert "lt-error" in wrong and "h900" in wrong


def test_nothing_outside_of_the_folder_is_shown(client: Any, trained: Path, server: Server) -> None:
    text = (trained / "recipe.yaml").read_text()
    for name in (
        "../private.jsonl",
        str(trained.parent / "private.jsonl"),
        "../*.jsonl",
        "chats.jsonl, ../private.jsonl",
    ):
        leading = text.replace('"chats.jsonl"', json.dumps(name))
        assert leading != text
        shown = client.predict("recipe.yaml", leading, 1, "", False, api_name="/preview")
        assert "lies outside of" in shown and "How much" not in shown
        assert "lies outside of" in client.predict("recipe.yaml", leading, api_name="/check")[1]
    client.predict("../private.yaml", text, api_name="/save")
    assert not (trained.parent / "private.yaml").exists()
    assert "lies outside of" in client.predict("../private.yaml", text, api_name="/save")[1]
    assert "lies outside of" in client.predict("../x", "out", "auto", 5, "", api_name="/export")
    for path in (
        "/etc/passwd",
        str(trained.parent / "private.jsonl"),
        str(trained / "recipe.yaml"),
        "../private.jsonl",
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{server.url}gradio_api/file={path}")
        assert error.value.code in (403, 404)


def test_a_foreign_name_for_the_address_is_refused(server: Server) -> None:
    asked = urllib.request.Request(server.url, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(asked)
    assert error.value.code == 400


def test_two_models_are_talked_to(client: Any, trained: Path) -> None:
    settings = ("Be brief.", False, 0.9, 0.9, 5)
    _, left, right, note = client.predict("Hello", "runs/recipe", "tiny-llama", [], [], *settings, api_name="/chat")
    assert [each["role"] for each in left] == [each["role"] for each in right] == ["user", "assistant"]
    assert left[1]["content"] != right[1]["content"] and note == ""
    _, left, right, note = client.predict("Hello", "../private.jsonl", "", [], [], *settings, api_name="/chat")
    assert "lies outside of" in note and left == []


def test_a_run_is_exported(client: Any, trained: Path) -> None:
    said = client.predict("runs/recipe", "", "auto", 5, "", api_name="/export")
    assert "Wrote" in said and (trained / "exports" / "recipe" / "config.json").exists()


@needs_browser
def test_runs_are_watched(page: Any, trained: Path) -> None:
    go(page, "Runs")
    page.locator('[data-run="runs/recipe"]').click()
    page.wait_for_selector("#lt-about >> text=runs/recipe")
    assert "done" in page.locator('[data-run="runs/recipe"]').inner_text()
    assert "0.00 GiB" not in page.locator("#lt-about").inner_text()
    page.wait_for_selector("#lt-curve canvas, #lt-curve svg")
    assert "Saved the adapter" in page.locator("#lt-log").inner_text()
    assert page.locator("#lt-stop").count() == 0 or not page.locator("#lt-stop").is_visible()


@needs_browser
def test_a_model_answers_in_the_page(page: Any, trained: Path) -> None:
    go(page, "Chat")
    page.locator("#lt-right input").fill("tiny-llama")
    page.locator("#lt-right input").press("Enter")
    page.locator("#lt-question textarea").fill("How much is 2 and 2?")
    page.locator("#lt-send").click()
    for side in ("left", "right"):
        page.wait_for_selector(f"#lt-talk-{side} .bot")
    assert page.locator("#lt-question textarea").input_value() == ""


@needs_browser
@pytest.mark.parametrize("width", [1280, 800])
def test_nothing_is_cut_off(page: Any, trained: Path, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    for tab in ("Recipe", "Data", "Plan", "Runs", "Chat", "Export"):
        go(page, tab)
        page.wait_for_timeout(150)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        cut = page.evaluate(
            "[...document.querySelectorAll("
            "'button:not(.label-wrap, .icon-button), label > span, .lt-card, .lt-pill, th')]"
            ".filter((each) => each.offsetParent && each.scrollWidth > each.clientWidth + 1 "
            "&& getComputedStyle(each).display !== 'inline').map((each) => each.outerHTML.slice(0, 200))"
        )
        assert cut == [], tab


def test_a_run_outlives_its_server_and_is_stopped_by_the_next(trained: Path, server: Server) -> None:
    begin(server.client(), trained, "long.yaml")
    wait_for(lambda: (trained / "runs/long/metrics.jsonl").exists(), "the long run trains")
    server.end()
    steps = (trained / "runs/long/metrics.jsonl").read_text()
    wait_for(lambda: len((trained / "runs/long/metrics.jsonl").read_text()) > len(steps), "it goes on")
    second = Server(trained)
    try:
        client = second.client()
        listing = client.predict("", "loss", [], api_name="/runs")[1]
        assert "running" in listing and "runs/recipe" in listing
        client.predict("runs/long", api_name="/stop")
        wait_for(lambda: status(trained, "runs/long") == "interrupted", "it saves and stops")
        assert list((trained / "runs/long/checkpoints").iterdir())
        wait_for(lambda: "ended already" in client.predict("runs/long", api_name="/stop"), "its process ends")
    finally:
        second.end()
