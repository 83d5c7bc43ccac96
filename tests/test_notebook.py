"""What a person sees in a notebook, run by a real kernel."""

from __future__ import annotations

import base64
import json
import warnings
from typing import Any

import pytest

from tests.runs import recipe

nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

CELLS = {
    "plan": "import json, llmtune\nkeys = json.load(open('small.json'))\nllmtune.plan(keys)",
    "check": "llmtune.check_data(keys['dataset'])",
    "stats": "llmtune.stats(keys)",
    "train": "run = llmtune.train(keys)\nrun",
    "plot": "run.plot()",
    "interrupt": (
        "import os, pathlib, signal, threading, time\n"
        "def stop(file):\n"
        "    while not file.exists() or not file.read_text(): time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Thread(target=stop, args=[pathlib.Path('again/metrics.jsonl')]).start()\n"
        "longer = {**keys, 'output_dir': 'again', 'max_steps': 60, 'resume_from_checkpoint': 'auto'}\n"
        "first = llmtune.train(longer); print('status', first.status)"
    ),
    "go on": (
        "second = llmtune.train(longer); steps = [row['step'] for row in second.metrics]\n"
        "print('status', second.status, steps[-1], len(steps) == len(set(steps)))"
    ),
    "wrong": "llmtune.plan({**keys, 'lerning_rate': 3})",
    "pyplot": "import sys; print('matplotlib.pyplot' in sys.modules)",
}


@pytest.fixture(scope="module")
def outputs(tiny_llama: str, chats: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The outputs of each cell."""
    folder = tmp_path_factory.mktemp("notebook")
    keys = recipe(tiny_llama, chats, folder / "run", max_steps=4, kernel_config="auto")
    (folder / "small.json").write_text(json.dumps(keys))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in CELLS.values()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about transports and clean-up of the kernel
        client = nbclient.NotebookClient(notebook, allow_errors=True, resources={"metadata": {"path": str(folder)}})
        client.execute()
    return {name: cell.outputs for name, cell in zip(CELLS, notebook.cells, strict=True)}


def shown(outputs: list[Any], kind: str) -> str:
    return "".join(output.data[kind] for output in outputs if "data" in output and kind in output.data)


def streamed(outputs: list[Any]) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_a_plot_is_a_picture_without_pyplot(outputs: dict[str, list[Any]]) -> None:
    assert base64.b64decode(shown(outputs["plot"], "image/png")).startswith(b"\x89PNG")
    assert streamed(outputs["pyplot"]) == "False\n"


@pytest.mark.parametrize("name", ["plan", "check", "stats", "train"])
def test_columns_are_kept_in_exported_pages(outputs: dict[str, list[Any]], name: str) -> None:
    html, text = shown(outputs[name], "text/html"), shown(outputs[name], "text/plain")
    assert '<pre style="white-space: pre; ' in html
    assert len(text) < 5000 and not text.startswith(("Plan(", "DataCheck(", "DataStats("))


def test_what_is_printed_fits_a_page(outputs: dict[str, list[Any]]) -> None:
    texts = [output.text for output in outputs["train"] if output.get("name") == "stdout"]
    printed = "".join(texts).splitlines()
    assert len(printed) > 20
    assert [line for line in printed if len(line) > 80 and " " in line.strip() and "/" not in line] == []


def test_an_error_is_its_message(outputs: dict[str, list[Any]]) -> None:
    (error,) = [output for output in outputs["wrong"] if output.output_type == "error"]
    assert error.ename == "RecipeError"
    (line,) = error.traceback
    assert line.startswith("RecipeError: ") and 'lerning_rate: no such key. Did you mean "learning_rate"?' in line


def test_libraries_are_quiet(outputs: dict[str, list[Any]]) -> None:
    said = [line for name in ("plan", "check", "stats") for line in streamed(outputs[name]).splitlines()]
    assert said and all(" s  " in line for line in said), said


def test_the_curve_grows_while_training_goes_on(outputs: dict[str, list[Any]]) -> None:
    assert base64.b64decode(shown(outputs["train"], "image/png")[:40]).startswith(b"\x89PNG")


def test_an_interrupted_cell_has_saved_and_goes_on(outputs: dict[str, list[Any]]) -> None:
    assert "status interrupted\n" in streamed(outputs["interrupt"])
    assert "status done 60 True\n" in streamed(outputs["go on"])
