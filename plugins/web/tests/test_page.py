"""The page itself, by one server: through its HTTP interface, and in a real browser where there is one."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import chdir, suppress
from http.cookiejar import CookieJar
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from llmtune_web.folder import Folder
from llmtune_web.jobs import Jobs

import llmtune
from llmtune.testing import tiny_recipe

sys.path.insert(0, str(Path(__file__).parent))
from page_server import Server, status, steps_of, wait_for

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None,
    reason="found no Chromium (apt install chromium); the server is tested by HTTP all the same",
)
DRAWN = ("Be brief.", False, 0.9, 0.9, 5, "")
"""System message, whether at random, temperature, top p, most tokens, tools."""
USER, PASSWORD = "ann", "correct-horse-7"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, data and two recipes, one of which never ends; data lie beside the folder, too."""
    base = tmp_path_factory.mktemp("web")
    root = base / "desk"
    keys = {**tiny_recipe(root, sizes={"max_position_embeddings": 100_000}), "model": "tiny-llama"}
    keys |= {"dataset": "chats.jsonl"}
    del keys["output_dir"]
    text = "# A tiny run.\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items())
    (root / "recipe.yaml").write_text(text + "peft_config: {name: lora, r: 2}  # small\n")
    (root / "long.yaml").write_text(re.sub("max_steps: .*", "max_steps: 100000", text))
    shutil.copy(root / "chats.jsonl", base / "private.jsonl")
    return root


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """The page of the folder, in which two runs are done: `recipe`, and `other` with another learning rate."""
    made = Server(folder)
    try:
        with chdir(folder):  # which takes as long as the server does to come up
            llmtune.train("recipe.yaml", output_dir="runs/recipe")
        shutil.copytree(folder / "runs" / "recipe", folder / "runs" / "other")
        settings = folder / "runs" / "other" / "resolved.yaml"
        settings.write_text(settings.read_text().replace("learning_rate: 0.05", "learning_rate: 0.025"))
        yield made.wait()
    finally:
        made.end()
        for job in Jobs(Folder.of(folder)).all():  # what a test that failed has left
            with suppress(ProcessLookupError):
                os.kill(job.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return server.client()


@pytest.fixture(scope="module")
def exporting(client: Any) -> Any:
    """An export that has been started, whose process works while other tests run."""
    return client.submit("runs/recipe", "", "gguf", "q8_0", "", "auto", "5", "cpu", "", api_name="/export")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="found no playwright, which drives Chromium")
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page(browser: Any, server: Server, exporting: Any) -> Iterator[Any]:
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
def test_what_is_typed_while_the_form_is_drawn_anew_is_kept(browser: Any) -> None:
    """The answer to one change draws the form while the next field is typed into."""
    drawing = """script => {
        const element = document.body, trigger = (name, told) => sent.push([told.key, told.value]);
        window.sent = [];
        window.draw = () => {
            element.innerHTML = '<i class=lt-form><i class=lt-none></i><input class=lt-search><input data-key=a>';
            window.drawn?.();
        };
        draw();
        new Function("element", "trigger", "watch", script)(element, trigger, (name, then) => { window.drawn = then; });
    }"""
    page = browser.new_page()
    page.evaluate(drawing, resources.files("llmtune_web").joinpath("form.js").read_text("utf-8"))
    page.locator("[data-key=a]").press_sequentially("20")
    page.evaluate("draw()")
    page.keyboard.type("48\n")
    assert page.evaluate("sent").pop() == ["a", "2048"]
    page.close()


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


def test_samples_and_plans(client: Any, folder: Path) -> None:
    text = (folder / "recipe.yaml").read_text()
    shown = client.predict("recipe.yaml", text, 2, "", False, api_name="/preview")
    assert "trained on" in shown and "How much is 0 and 0?" in shown and "background-color" in shown
    assert "chats.jsonl:5" in client.predict("recipe.yaml", text, 1, "5", False, api_name="/preview")
    planned = client.predict("recipe.yaml", text, "24GB", "2", api_name="/plan")
    assert "Memory" in planned and "runs/recipe" in planned and "2 ranks" in planned and "lora" in planned
    for device, ranks, wrong in (("h900", "", "h900"), ("", "none", 'ranks: found "none"')):
        said = client.predict("recipe.yaml", text, device, ranks, api_name="/plan")
        assert "lt-error" in said and wrong in html.unescape(said)


def test_nothing_outside_of_the_folder_is_shown(client: Any, folder: Path, server: Server) -> None:
    text = (folder / "recipe.yaml").read_text()
    private = str(folder.parent / "private.jsonl")
    for name in ("../private.jsonl", private, "../*.jsonl", "chats.jsonl, ../private.jsonl"):
        leading = text.replace('"chats.jsonl"', json.dumps(name))
        assert leading != text
        assert "lies outside of" in client.predict("recipe.yaml", leading, api_name="/check")[1]
    shown = client.predict("recipe.yaml", leading, 1, "", False, api_name="/preview")
    assert "lies outside of" in shown and "How much" not in shown
    assert "lies outside of" in client.predict("../private.yaml", text, api_name="/save")[1]
    assert not (folder.parent / "private.yaml").exists()
    keys = ("safetensors", "q8_0", "", "auto", "5", "cpu", "")
    for source, target in (("../x", "out"), ("runs/recipe", "../out")):
        assert "lies outside of" in client.predict(source, target, *keys, api_name="/export")
    assert "lies outside of" in client.predict("Hello", "../private.jsonl", "", *DRAWN, api_name="/chat")[-1]
    for path in ("/etc/passwd", private, str(folder / "recipe.yaml"), "../private.jsonl"):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{server.url}gradio_api/file={path}")
        assert error.value.code in (403, 404)


def test_a_foreign_name_for_the_address_is_refused(server: Server) -> None:
    asked = urllib.request.Request(server.url, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(asked)
    assert error.value.code == 400


def test_two_models_are_talked_to_and_an_answer_is_stopped(server: Server) -> None:
    client = server.client()  # with conversations of its own, as the next one
    _, left, right, note = client.predict("Hello", "runs/recipe", "tiny-llama", *DRAWN, api_name="/chat")
    assert [each["role"] for each in left] == [each["role"] for each in right] == ["user", "assistant"]
    assert left[1]["content"] != right[1]["content"] and note == ""
    client = server.client()
    endless = ("How much is 2 and 2?", "tiny-llama", "runs/recipe", "", *DRAWN[1:4], 90_000, "")
    asked = client.submit(*endless, api_name="/chat")
    wait_for(lambda: len(asked.outputs()) > 3, "it answers")
    asked.cancel()
    # The models are free again, what was said stands in the conversation, and the second one was not asked.
    _, left, right, note = client.predict("Hello", "tiny-llama", "", *DRAWN, api_name="/chat")
    assert note == "" and [each["role"] for each in left] == ["user", "assistant"] * 2 and right == []


def test_tools_are_offered_to_one_model(client: Any) -> None:
    tools = json.dumps([{"name": "add", "parameters": {"type": "object", "properties": {}}}])
    for right, given, said in (
        ("tiny-llama", tools, "beside two models"),
        ("", "[{", "cannot be read"),
        ("", tools, ""),
    ):
        note = client.predict("Hello", "runs/recipe", right, *DRAWN[:-1], given, api_name="/chat")[-1]
        assert said in note if said else note == ""


@needs_browser
def test_runs_are_watched_and_compared(page: Any) -> None:
    go(page, "Runs")
    page.locator('[data-run="runs/recipe"]').click()
    page.wait_for_selector("#lt-about >> text=runs/recipe")
    assert "done" in page.locator('[data-run="runs/recipe"]').inner_text()
    assert "4/4" in page.locator("#lt-about").inner_text() and "0.00 GiB" not in page.locator("#lt-about").inner_text()
    page.wait_for_selector("#lt-curve canvas, #lt-curve svg")
    assert "Started elsewhere" in page.locator("#lt-log").inner_text()
    assert page.locator("#lt-stop:visible").count() == 0
    page.locator("#lt-compare input").click()
    page.get_by_role("option", name="runs/other").click()
    page.wait_for_selector('#lt-compared:has-text("learning_rate")')
    assert re.search(r"learning_rate +0.0(25|5) +0.0(25|5)", page.locator("#lt-compared").inner_text())
    page.wait_for_selector('#lt-curve:has-text("other")')
    page.get_by_text("About this run").click()
    page.wait_for_selector('#lt-details:has-text("Stage")')


@needs_browser
def test_a_model_answers_in_the_page_and_is_stopped(page: Any) -> None:
    go(page, "Chat")
    for side, name in (("left", "tiny-llama"), ("right", "runs/recipe")):
        page.locator(f"#lt-{side} input").fill(name)
        page.locator(f"#lt-{side} input").press("Enter")
    page.get_by_text("How answers are drawn").click()
    page.get_by_label("Draw at random").uncheck()
    page.locator("#lt-most input").fill("90000")
    page.locator("#lt-question textarea").fill("How much is 2 and 2?")
    page.locator("#lt-send").click()
    left, right = page.locator("#lt-talk-left .bot"), page.locator("#lt-talk-right .bot")
    left.wait_for()
    assert page.locator("#lt-question textarea").input_value() == ""
    page.locator("#lt-halt").click()
    page.locator("#lt-most input").fill("5")
    page.locator("#lt-question textarea").fill("And 3 and 3?")
    wait_for(lambda: sent(page), "the answer has stopped, and the next question is taken")
    right.wait_for()
    assert left.count() == 2 and right.count() == 1  # of the model beside, whose turn did not come before


def sent(page: Any) -> bool:
    """Whether a click on Send takes the question, as it does where no answer is being given."""
    page.locator("#lt-send").click()
    page.wait_for_timeout(500)
    return page.locator("#lt-question textarea").input_value() == ""


@needs_browser
@pytest.mark.parametrize("width", [1280, 800])
def test_nothing_is_cut_off(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    for tab in ("Recipe", "Data", "Plan", "Runs", "Chat", "Export"):
        go(page, tab)
        page.wait_for_timeout(150)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        cut = page.evaluate(
            "[...document.querySelectorAll("
            "'button:not(.label-wrap, .icon-button), label > span, .lt-card, .lt-card b, .lt-pill, th')]"
            ".filter((each) => each.offsetParent && each.scrollWidth > each.clientWidth + 1 "
            "&& getComputedStyle(each).display !== 'inline').map((each) => each.outerHTML.slice(0, 200))"
        )
        assert cut == [], tab
        # A box to tick stands in the row of its button.
        below = page.evaluate(
            "[...document.querySelectorAll('.lt-check')].filter((each) => each.offsetParent && each.offsetTop > "
            "each.parentElement.querySelector('button').getBoundingClientRect().bottom).map((each) => each.id)"
        )
        assert below == [], tab


def test_a_run_is_exported(exporting: Any, folder: Path) -> None:
    assert "Wrote" in exporting.result(timeout=90)
    assert (folder / "exports" / "recipe" / "model-q8_0.gguf").exists()


def begin(client: Any, folder: Path, name: str) -> None:
    client.predict(name, (folder / name).read_text(), False, "loss", [], api_name="/start")


@pytest.fixture(scope="module")
def guarded(client: Any, server: Server, folder: Path) -> Iterator[Server]:
    """A second server, that asks for a password, after the first one has started a run and ended."""
    begin(client, folder, "long.yaml")
    server.end()
    made = Server(folder, LLMTUNE_WEB_USER=USER, LLMTUNE_WEB_PASSWORD=PASSWORD).wait()
    yield made
    made.end()


def test_without_the_password_nothing_is_shown(guarded: Server, folder: Path) -> None:
    def ask(path: str, opener: Any = None, **form: str) -> tuple[int, str]:
        data = urllib.parse.urlencode(form).encode() if form else None
        try:
            with (opener or urllib.request.build_opener()).open(guarded.url + path, data) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    _, front = ask("")
    assert str(folder) not in front and "lt-form" not in front
    for path in ("config", "gradio_api/info", "gradio_api/queue/data?session_hash=x", f"gradio_api/file={folder}/x"):
        assert ask(path)[0] == 401, path
    assert ask("gradio_api/call/runs", data="[]")[0] == 401
    for user, password in ((USER, "wrong"), (USER, ""), ("", PASSWORD), (PASSWORD, USER)):
        assert ask("login", username=user, password=password)[0] in (400, 422)
    known = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
    assert ask("login", known, username=USER, password=PASSWORD)[0] == 200
    status, config = ask("config", known)
    assert status == 200 and str(folder) in config
    assert PASSWORD not in config + ask("", known)[1] + ask("gradio_api/info", known)[1]
    (job,) = (job for job in Jobs(Folder.of(folder)).all() if job.output == "runs/long")
    if sys.platform.startswith("linux"):
        assert PASSWORD not in Path(f"/proc/{job.pid}/environ").read_text()


def test_a_run_outlives_its_server_is_stopped_by_the_next_and_continues(guarded: Server, folder: Path) -> None:
    client = guarded.client(auth=(USER, PASSWORD))
    wait_for(lambda: len(steps_of(folder, "runs/long")) > 2, "the long run trains on")

    def listing() -> str:
        return client.predict("runs/long", "loss", [], api_name="/runs")[1]

    assert "lt-running" in listing() and "runs/recipe" in listing()
    client.predict("runs/long", api_name="/stop")
    wait_for(lambda: status(folder, "runs/long") == "interrupted", "it saves and stops")
    (saved,) = (folder / "runs/long/checkpoints").glob("step-*")
    wait_for(lambda: "ended already" in client.predict("runs/long", api_name="/stop"), "its process ends")
    assert "lt-interrupted" in listing()

    assert "Continues" in client.predict("runs/long", api_name="/continue")
    assert "is being written" in client.predict("runs/long", api_name="/continue")
    assert "lt-starting" in listing()
    before = steps_of(folder, "runs/long")
    wait_for(lambda: len(steps_of(folder, "runs/long")) > len(before), "it goes on")
    after = steps_of(folder, "runs/long")[len(before) :]
    assert before[-1] == int(saved.name.removeprefix("step-")) and after[0] == before[-1] + 1
    job = Jobs(Folder.of(folder)).of("runs/long")
    assert job is not None
    os.kill(job.pid, signal.SIGKILL)
    wait_for(lambda: "lt-killed" in listing(), "it is gone without a word")
