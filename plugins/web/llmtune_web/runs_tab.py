"""Runs: a list, the curve and the log of one, others beside it; starting, continuing and stopping."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import pandas

import llmtune
from llmtune import LlmtuneError
from llmtune_web.desk import Desk, error_html, word
from llmtune_web.folder import read_json
from llmtune_web.jobs import Job
from llmtune_web.look_tabs import duration
from llmtune_web.recipe_tab import RecipeParts

_SELECT = """
element.addEventListener("click", (event) => {
  const row = event.target.closest("[data-run]");
  if (row) trigger("select", {run: row.dataset.run});
});
element.addEventListener("keydown", (event) => {
  const row = event.target.closest("[data-run]");
  if (!row || !["Enter", " "].includes(event.key)) return;
  event.preventDefault();
  trigger("select", {run: row.dataset.run});
});
"""
_METRICS = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens a second",
}
_CONTINUES = ("interrupted", "failed")
_LOOKS_S = 2.0
"""Between two looks at the runs."""


@dataclass(frozen=True)
class ShownRun:
    """A run as the page shows it."""

    name: str
    status: str
    """`starting`, `running`, `stopping`, `done`, `interrupted` or `failed`."""
    metrics: Sequence[dict[str, Any]]
    job: Job | None
    record: dict[str, Any]
    progress: str = ""
    """`12/60`, as the log has it."""

    @property
    def loss(self) -> float | None:
        """The last one that was logged."""
        return next((row["loss"] for row in reversed(self.metrics) if isinstance(row.get("loss"), float)), None)

    @property
    def ends(self) -> bool:
        """Whether no process of the page writes it."""
        return self.status not in ("starting", "running")


def state_of(desk: Desk, name: str) -> ShownRun:
    """What is known of a run: by its folder, and by the process if the page has started one."""
    folder = desk.folder.path(name)
    record = read_json(folder / "run.json")
    jobs = [job for job in desk.jobs.all() if job.output == name and job.words[0] == "train"]
    job = jobs[0] if jobs else None
    try:
        metrics = llmtune.load(folder).metrics if record else []
    except LlmtuneError:
        metrics = []
    status = str(record.get("status", "failed"))
    steps = re.findall(r"step (\d+/\d+)", desk.jobs.log(job)) if job else []
    if job is not None and desk.jobs.runs(job):
        status = "running" if record.get("status") == "running" and metrics else "starting"
    elif job is not None and status == "running":
        status = "failed"  # it was killed before it could say so
    return ShownRun(name, status, metrics, job, record, steps[-1] if steps else "")


def run_names(desk: Desk) -> list[str]:
    """All runs of the folder, those that are starting included; the newest first."""
    started = [job.output for job in desk.jobs.all() if job.words[0] == "train"]
    known = desk.folder.runs()
    return list(dict.fromkeys([*(name for name in started if name not in known), *known]))


class RunsView:
    """What the part does, for the runs of a desk."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def look(self, name: str, shown: str, beside: list[str]) -> tuple[Any, ...]:
        """The runs, and the one that is chosen; the newest where none is."""
        names = run_names(self.desk)
        name = name if name in names else names[0] if names else ""
        state = state_of(self.desk, name) if name else None
        frame = curves([state_of(self.desk, each) for each in [name, *beside] if each in names], shown)
        return (
            name, listing_html([state_of(self.desk, each) for each in names], name), about_html(state),
            gr.Button(visible=state is not None and not state.ends),
            gr.Button(visible=state is not None and state.job is not None and state.status in _CONTINUES),
            gr.Dropdown(choices=[each for each in names if each != name]),
            gr.LinePlot(frame, y_title=_METRICS[shown], visible=not frame.empty), log_html(self.desk, state),
        )  # fmt: skip

    def begin(self, file: str, text: str, fresh: bool, shown: str, beside: list[str]) -> tuple[Any, ...]:
        """Save the recipe and start its run."""
        try:
            if problems := self.desk.problems(file, text):
                raise llmtune.PlanError("\n".join(problems))
            path = self.desk.folder.shown(self.desk.folder.write_recipe(file, text))
            output = self.desk.output_dir(file, text)
            words = ["train", word(path), f"output_dir={output}", *(["--fresh"] if fresh else [])]
            self.desk.jobs.start(words, output)
        except (LlmtuneError, OSError) as error:
            return gr.skip(), error_html(error), *[gr.skip()] * 8
        return (
            gr.Tabs(selected="runs"),
            gr.skip(),
            *self.look(output, shown, [each for each in beside if each != output]),
        )

    def select(self, event: gr.EventData, shown: str, beside: list[str]) -> tuple[Any, ...]:
        """Another run is chosen."""
        name = str(event._data["run"])
        return self.look(name, shown, [each for each in beside if each != name])

    def end(self, name: str) -> str:
        """Ask a run's process to save and end."""
        job = state_of(self.desk, name).job
        asked = job is not None and self.desk.jobs.stop(job)
        said = "Asked to save and stop; it ends after the step that it is at." if asked else "It has ended already."
        return f'<p class="lt-ok" role="status">{said}</p>'

    def go_on(self, name: str) -> str:
        """Start the command of a run again, which continues it."""
        job = state_of(self.desk, name).job
        if job is None:
            return error_html(f"{name}: was not started here; run the same command again")
        try:
            self.desk.jobs.start([each for each in job.words if each != "--fresh"], job.output)
        except (LlmtuneError, OSError) as error:
            return error_html(error)
        return '<p class="lt-ok" role="status">Continues from its last checkpoint.</p>'


def runs_tab(desk: Desk, recipe: RecipeParts, tabs: Any) -> tuple[Any, tuple[list[Any], list[Any]]]:
    """Draw the part; what looks at the runs, with what it reads and what it shows."""
    chosen = gr.Textbox("", visible=False, label="Run")
    with gr.Row(elem_classes="lt-panes"):
        with gr.Column(scale=4, min_width=300):
            listing = gr.HTML("", js_on_load=_SELECT, elem_id="lt-runs", apply_default_css=False)
        with gr.Column(scale=7, min_width=380):
            about = gr.HTML("", elem_id="lt-about")
            with gr.Row(elem_classes="lt-bar"):
                stop = gr.Button("Save and stop", variant="stop", visible=False, min_width=130, elem_id="lt-stop")
                again = gr.Button("Continue", visible=False, min_width=130, elem_id="lt-again")
            with gr.Row(elem_classes="lt-bar", equal_height=True):
                metric = gr.Dropdown(
                    [(title, key) for key, title in _METRICS.items()],
                    value="loss",
                    label="Curve",
                    min_width=150,
                    scale=1,
                )
                others = gr.Dropdown(
                    [],
                    value=[],
                    label="Compare with",
                    multiselect=True,
                    min_width=200,
                    scale=3,
                    elem_id="lt-compare",
                    allow_custom_value=True,
                )
            curve = gr.LinePlot(
                None, x="step", y="value", color="curve", height=270, show_label=False, elem_id="lt-curve",
                x_title="Step", y_title="Loss", color_title=" ",
            )  # fmt: skip
            log = gr.HTML("", elem_id="lt-log", autoscroll=True)
    note = gr.HTML("", elem_id="lt-run-note")
    timer = gr.Timer(_LOOKS_S)

    does = RunsView(desk)
    view = [chosen, listing, about, stop, again, others, curve, log]
    quiet: dict[str, Any] = {"show_progress": "hidden"}
    timer.tick(does.look, [chosen, metric, others], view, **quiet, api_name="runs")
    metric.input(does.look, [chosen, metric, others], view, **quiet, api_visibility="private")
    others.input(does.look, [chosen, metric, others], view, **quiet, api_visibility="private")
    listing.select(does.select, [metric, others], view, **quiet, api_visibility="private")
    stop.click(does.end, chosen, note, **quiet, api_name="stop")
    again.click(does.go_on, chosen, note, **quiet, api_name="continue")
    recipe.start.click(
        does.begin, [recipe.name, recipe.text, recipe.fresh, metric, others], [tabs, recipe.problems, *view], **quiet,
        api_name="start",
    )  # fmt: skip
    return does.look, ([chosen, metric, others], view)


def listing_html(states: Sequence[ShownRun], chosen: str) -> str:
    """Runs as a table to choose from."""
    if not states:
        return '<p class="lt-note">No runs yet. A recipe is started with “Start run”.</p>'
    rows = "".join(
        f'<tr data-run="{escape(state.name)}" tabindex="0"{" class=lt-chosen" if state.name == chosen else ""}>'
        f'<td title="{escape(state.name)}">{escape(state.name.removeprefix("runs/"))}</td><td>{pill(state.status)}</td>'
        f"<td>{_step(state)}</td><td>{_number(state.loss)}</td></tr>"
        for state in states
    )
    return (
        f"<table class=lt-table><thead><tr><th>Run<th>Status<th>Step<th>Loss</tr></thead><tbody>{rows}</tbody></table>"
    )


def pill(status: str) -> str:
    """A status in its colour."""
    return f'<span class="lt-pill lt-{escape(status)}">{escape(status)}</span>'


def about_html(state: ShownRun | None) -> str:
    """A run's title, with its figures."""
    if state is None:
        return '<p class="lt-note">Choose a run to see its curve and its log.</p>'
    memory = _last(state, "peak_memory_bytes")  # evaluations have none
    facts = {
        "Step": _step(state), "Loss": _number(state.loss), "Evaluated": _number(_last(state, "eval_loss")),
        "Tokens/s": f"{_last(state, 'tokens_per_second') or 0:,.0f}",
        "Memory": f"{memory / 2**30:.2f} GiB" if memory else "–",
        "Took": duration(state.record["seconds"]) if "seconds" in state.record else "–",
    }  # fmt: skip
    cards = "".join(f'<div class="lt-card"><span>{name}</span><b>{value}</b></div>' for name, value in facts.items())
    error = state.record.get("error")
    said = error_html(str(error.get("message", error) if isinstance(error, dict) else error)) if error else ""
    return (
        f'<h3 class="lt-title">{escape(state.name)} {pill(state.status)}</h3><div class="lt-cards">{cards}</div>{said}'
    )


def log_html(desk: Desk, state: ShownRun | None) -> str:
    """What the run's process has printed."""
    if state is None:
        return ""
    if state.job is None:
        return '<p class="lt-note">Started elsewhere: its log is where it was started.</p>'
    return f'<pre class="lt-pre lt-log">{escape(desk.jobs.log(state.job)) or "…"}</pre>'


def curves(states: Sequence[ShownRun], metric: str) -> pandas.DataFrame:
    """One metric of runs, evaluations of it as curves of their own."""
    rows = []
    for state in states:
        label = Path(state.name).name if len(states) > 1 else "training"
        for key, name in (
            (metric, label),
            (f"eval_{metric}", f"{label} (evaluation)" if len(states) > 1 else "evaluation"),
        ):
            found = [(row["step"], row[key]) for row in state.metrics if isinstance(row.get(key), (int, float))]
            rows += [{"step": step, "value": value, "curve": name} for step, value in found if math.isfinite(value)]
    return pandas.DataFrame(rows, columns=["step", "value", "curve"])


def _step(state: ShownRun) -> str:
    return state.progress or (str(state.metrics[-1]["step"]) if state.metrics else "–")


def _last(state: ShownRun, key: str) -> float | None:
    return next((row[key] for row in reversed(state.metrics) if isinstance(row.get(key), (int, float))), None)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
