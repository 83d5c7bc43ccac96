"""The notebooks, run by a real kernel as they stand, but on a tiny model; and what a person sees in them."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import sys
import warnings
from collections.abc import Mapping
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import pytest

nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
jupytext = pytest.importorskip("jupytext")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = ("first_fine_tune", "look_at_your_data", "teach_it_to_see", "write_a_plugin")
REPLACED = {
    '"HuggingFaceTB/SmolLM2-135M-Instruct"': "TINY",
    '"per_device_train_batch_size": 8': '"per_device_train_batch_size": 2',
    '"num_train_epochs": 3': '"max_steps": 6',
    '"num_train_epochs": 4': '"max_steps": 6',
    "pictures=1500, held_out=100": "pictures=12, held_out=8",
    '"max_steps": 20': '"max_steps": 4, "num_train_epochs": 1, "max_samples": 12',
    'output_dir="runs/second", save_steps=10': 'output_dir="runs/second", max_steps=40',
    'nproc=2, output_dir="runs/both", max_steps=6': 'nproc=2, output_dir="runs/both", max_steps=40, save_steps=None',
}
"""What a real model would take too long for, and what stands for it here."""
STOPPED = ("runs/second", "runs/both")
"""Runs whose cell is interrupted, and then run again."""
KERNEL = (
    "import os, signal, sys\n"
    "def kernel(): return dict(os.environ), [signal.getsignal(number) for number in signal.valid_signals()]\n"
    "before = kernel()"
)
AFTER = (
    "import torch\nprint(kernel() == before, torch.distributed.is_initialized(), 'matplotlib.pyplot' in sys.modules)"
)
WRONG = "llmtune.plan({**recipe, 'lerning_rate': 3})"


class Cell(NamedTuple):
    """A cell that has been run."""

    source: str
    outputs: list[Any]

    @property
    def streamed(self) -> str:
        """What was printed."""
        return "".join(output.text for output in self.outputs if output.output_type == "stream")

    def shown(self, kind: str) -> str:
        """What was displayed, of a kind such as `text/html`."""
        return "".join(output.data[kind] for output in self.outputs if kind in output.get("data", {}))


async def interrupt_at_first_line(client: Any, run: Path) -> None:
    """As the stop button does, once a step of `run` is logged."""
    file = run / "metrics.jsonl"
    while not file.exists() or not file.read_text():
        await asyncio.sleep(0.02)
    await client.km.interrupt_kernel()


async def run_cells(client: Any, folder: Path, environment: Mapping[str, str]) -> None:
    stops = [asyncio.create_task(interrupt_at_first_line(client, folder / run)) for run in STOPPED]
    await client.async_execute(env=dict(environment))
    for stop in stops:
        stop.cancel()


@pytest.fixture(scope="module")
def cells(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    """The cells of all of them, one after the other in one kernel, which imports torch once."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "site").mkdir()
    code = [f"TINY = {tiny_llama!r}\n{KERNEL}"]
    for name in NOTEBOOKS:
        for cell in jupytext.read(FOLDER / f"{name}.md").cells:
            source = cell.source
            for text, other in REPLACED.items():
                source = source.replace(text, other)
            if cell.cell_type == "code":
                again = [source.replace("nproc=2", "nproc=1")] if any(run in source for run in STOPPED) else []
                code += [source, *again]  # fewer ranks go on with what more have begun
    code += [WRONG, AFTER]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(each) for each in code])
    pip = {"PIP_TARGET": str(folder / "site"), "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1"}
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    path |= {"PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}"}
    environment = {**os.environ, **pip, **path}
    environment.pop("PYTEST_CURRENT_TEST", None)  # with it, a kernel does not show what other processes print
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about transports and clean-up of the kernel
        client = nbclient.NotebookClient(notebook, allow_errors=True, resources={"metadata": {"path": str(folder)}})
        asyncio.run(run_cells(client, folder, environment))
    return [Cell(cell.source, cell.outputs) for cell in notebook.cells]


def one(cells: list[Cell], text: str, at: int = 0) -> Cell:
    """The cell with this text."""
    return [cell for cell in cells if text in cell.source][at]


def test_every_cell_works(cells: list[Cell]) -> None:
    for cell in cells[:-2]:
        assert not [output for output in cell.outputs if output.output_type == "error"], (cell.source, cell.outputs)
    untouched = "".join((FOLDER / f"{name}.md").read_text(encoding="utf-8") for name in NOTEBOOKS)
    assert [text for text in REPLACED if text not in untouched] == []


def test_a_plot_is_a_picture_without_pyplot(cells: list[Cell]) -> None:
    for text in ("run.plot()", "stats.plot()"):
        assert base64.b64decode(one(cells, text).shown("image/png")).startswith(b"\x89PNG")
    assert cells[-1].streamed.split()[-1] == "False"


@pytest.mark.parametrize("text", ["llmtune.plan(recipe)", "llmtune.check_data", "\nstats", "\nagain", "llmtune.runs()"])
def test_columns_are_kept_in_exported_pages(cells: list[Cell], text: str) -> None:
    cell = one(cells, text, -1)
    html, plain = cell.shown("text/html"), cell.shown("text/plain")
    assert '<pre style="font-family: monospace; white-space: pre; ' in html
    assert len(plain) < 5000 and not plain.startswith(("Plan(", "DataCheck(", "DataStats("))


@pytest.mark.parametrize("text", ["run = llmtune.train(recipe)", "both = llmtune.train"])
def test_what_is_printed_fits_a_page(cells: list[Cell], text: str) -> None:
    printed = one(cells, text).streamed.splitlines()
    assert len(printed) > 20
    assert [line for line in printed if len(line) > 80 and " " in line.strip() and "/" not in line] == []


@pytest.mark.parametrize("text", ["llmtune.plan(recipe)", 'llmtune.check_data("chats.jsonl")'])
def test_sentences_that_are_shown_fit_a_page(cells: list[Cell], text: str) -> None:
    block = re.search("<pre[^>]*>(.*?)</pre>", one(cells, text).shown("text/html"), re.S)
    assert block and len(lines := block[1].splitlines()) > 8
    assert [line for line in lines if len(unescape(line)) > 80 and "/" not in line] == []


def test_an_error_is_its_message(cells: list[Cell]) -> None:
    (error,) = [output for output in one(cells, WRONG).outputs if output.output_type == "error"]
    assert error.ename == "RecipeError"
    (line,) = error.traceback
    said = 'lerning_rate: no such key. Did you mean "learning_rate"?'
    assert line.startswith("RecipeError: ") and said in line and said in one(cells, "lerning_rate").streamed


def test_libraries_are_quiet(cells: list[Cell]) -> None:
    texts = ("llmtune.plan(recipe)", "llmtune.check_data", "\nstats", "llmtune.preview(recipe, n=2)")
    said = [line for text in texts for line in one(cells, text).streamed.splitlines()]
    assert said and all(" s  " in line for line in said), said


def test_a_preview_has_what_trains_in_colour(cells: list[Cell]) -> None:
    html = one(cells, "rows=[1, 2]").shown("text/html")
    green = re.findall(r"background-color: #c9ecd0[^>]*>([^<]*)<", html)
    assert "Which number has your parcel?" in green and not [text for text in green if "Where" in text]
    (last,) = re.findall(r"background-color: #c9ecd0[^>]*>(In [^<]*)<", one(cells, "mask_history").shown("text/html"))
    assert last == "In Lyon."


@pytest.mark.parametrize("text", ["run = llmtune.train(recipe)", "both = llmtune.train"])
def test_the_curve_grows_while_training_goes_on(cells: list[Cell], text: str) -> None:
    assert base64.b64decode(one(cells, text).shown("image/png")[:40]).startswith(b"\x89PNG")


def test_an_interrupted_cell_has_saved_and_goes_on(cells: list[Cell]) -> None:
    assert one(cells, "second.status").shown("text/plain").endswith("'interrupted'")
    again = one(cells, "second.status", 1)
    assert again.shown("text/plain").endswith("'done'") and "Continuing after step " in again.streamed


def test_ranks_are_interrupted_go_on_and_leave_the_kernel_as_it_was(cells: list[Cell]) -> None:
    first, again = (one(cells, "both = llmtune.train", at) for at in (0, 1))
    assert first.shown("text/plain").endswith("'interrupted'") and "then saving" in first.streamed
    assert again.shown("text/plain").endswith("'done'") and "Continuing after step " in again.streamed
    assert cells[-1].streamed.split()[:2] == ["True", "False"]


def test_a_plugin_written_here_trains_and_is_checked(cells: list[Cell]) -> None:
    assert "lr_scheduler_config.waves: found 0" in one(cells, "lr_scheduler_config.waves").streamed
    assert "All laws are kept." in one(cells, "plugins check").streamed
