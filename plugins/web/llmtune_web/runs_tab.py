"""Runs: a list, the curve and the log of one, others beside it; starting, continuing and stopping."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

import llmtune
from llmtune import LlmtuneError
from llmtune_web.desk import Desk, error_html, shown, word
from llmtune_web.jobs import Job
from llmtune_web.look_tabs import GIB, cards_html, duration
from llmtune_web.recipe_tab import RecipeParts
from llmtune_web.yaml_text import Values, quoted

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
_CONTINUES = ("interrupted", "failed", "killed")
NONE = "–"
"""In the place of a figure that a run does not have."""
_NO_CURVE = ("epoch", "tokens")
"""Metrics that only count."""
VIEW = 11
"""Parts of the page that a look fills."""
_LOOKS_S = 2.0
"""Between two looks at the runs."""


@dataclass(frozen=True)
class ShownRun:
    """A run as the page shows it."""

    name: str
    summary: Any
    """What its folder tells, as `llmtune.runs` reads it; None as long as there is none."""
    job: Job | None
    """The process that writes or wrote it, if the page has started that."""
    alive: bool
    """Whether that process runs."""
    refused: Job | None = None
    """The process that was started last, where it has ended without making the folder its own."""

    @property
    def status(self) -> str:
        """As `llmtune runs list` has it, and `starting` until the process has made the folder its own."""
        if self.alive and self.job is not None and not _began(self.summary, self.job):
            return "starting"
        return self.summary.status if self.summary else "failed"


def shown_runs(desk: Desk) -> dict[str, ShownRun]:
    """All runs of the folder by their names, those that are starting first, then the newest.

    Of those without a folder that have ended, which failed at once or were deleted, the last one that was started.
    """
    jobs: dict[str, list[Job]] = {}
    for job in desk.jobs.all():
        if job.words[0] == "train":
            jobs.setdefault(job.output, []).append(job)
    alive = {name for name, own in jobs.items() if desk.jobs.runs(own[0])}  # before their folders are read: it may end
    known = desk.runs()
    fresh = [name for at, name in enumerate(jobs) if name not in known and (at == 0 or name in alive)]
    names = [*fresh, *known]
    return {name: _shown_run(name, known.get(name), jobs.get(name, []), name in alive) for name in names}


def _shown_run(name: str, summary: Any, jobs: Sequence[Job], alive: bool) -> ShownRun:
    """A run of a folder that `jobs` were to write, the newest first."""
    if summary is None or alive or not jobs or _began(summary, jobs[0]):
        return ShownRun(name, summary, jobs[0] if jobs else None, alive)
    wrote = next((job for job in jobs if _began(summary, job)), None)
    return ShownRun(name, summary, wrote, alive, refused=jobs[0])


def _began(summary: Any, job: Job) -> bool:
    """Whether the run in a folder is one that `job`, or what came after it, has begun."""
    began = summary.started if summary else None  # in whole seconds
    return began is not None and datetime.fromisoformat(began).timestamp() >= int(job.started)


class RunsView:
    """What the part does, for the runs of a desk."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def look(self, name: str, metric: str, beside: list[str]) -> tuple[Any, ...]:
        """The runs, and the one that is chosen; the newest where none is."""
        runs = shown_runs(self.desk)
        run = runs.get(name) or next(iter(runs.values()), None)
        name = run.name if run else ""
        named = {each.removeprefix("runs/"): each for each in runs}  # as they are listed
        named |= {each: each for each in runs}
        strange = [
            f'Compare with: found "{each}", allowed are the runs in the list' for each in beside if each not in named
        ]
        names = [name, *(named[each] for each in beside if each in named)]
        seen = {each: runs[each].summary for each in names if each in runs and runs[each].summary}
        return (
            name, listing_html(runs.values(), name), about_html(run) + refused_html(self.desk, run),
            gr.Button(visible=run is not None and run.alive),
            gr.Button(visible=run is not None and run.job is not None and not run.alive and run.status in _CONTINUES),
            gr.Dropdown(choices=logged(seen.values())),
            gr.Dropdown(choices=[each for each in runs if each != name]),
            shown(curves_html)(seen, metric), error_html("\n".join(strange)) + compared_html(seen),
            log_html(self.desk, run), details_html(run),
        )  # fmt: skip

    def begin(self, file: str, text: str, fresh: bool, metric: str, beside: list[str]) -> tuple[Any, ...]:
        """Save the recipe and start its run."""
        try:
            if problems := self.desk.problems(file, text):
                raise llmtune.PlanError("\n".join(problems))
            path = self.desk.folder.shown(self.desk.folder.write_recipe(file, text))
            output = self.desk.output_dir(file, text)
            if not fresh and self._is_finished(output, text):
                raise llmtune.PlanError(
                    f"output_dir: {output} holds a finished run; tick “Start over” to replace it, or name another"
                )
            words = ["train", word(path), f"output_dir={quoted(output)}", *(["--fresh"] if fresh else [])]
            self.desk.jobs.start(words, output)
        except (LlmtuneError, OSError) as error:
            return gr.skip(), error_html(error), *[gr.skip()] * (VIEW + 1)
        beside = [each for each in beside if each != output]
        return gr.Tabs(selected="runs"), gr.skip(), output, *self.look(output, metric, beside)

    def _is_finished(self, output: str, text: str) -> bool:
        """Whether a folder has a finished run that the recipe does not replace."""
        run = shown_runs(self.desk).get(output)
        replaces = Values(text).at("overwrite_output_dir") or "null"
        return run is not None and run.status == "done" and replaces.lower() in ("null", "false")

    def select(self, event: gr.EventData, metric: str, beside: list[str]) -> tuple[Any, ...]:
        """Another run is chosen."""
        name = str(event._data["run"])
        return name, *self.look(name, metric, [each for each in beside if each != name])

    def end(self, name: str) -> str:
        """Ask a run's process to save and end."""
        job = self._job(name)
        asked = job is not None and self.desk.jobs.stop(job)
        said = "Asked to save and stop; it ends after the step that it is at." if asked else "It has ended already."
        return f'<p class="lt-ok" role="status">{said}</p>'

    def go_on(self, name: str) -> str:
        """Start the command of a run again, which continues it."""
        job = self._job(name)
        if job is None:
            return error_html(f"{name}: was not started here; run the same command again")
        try:
            self.desk.jobs.start([each for each in job.words if each != "--fresh"], job.output)
        except (LlmtuneError, OSError) as error:
            return error_html(error)
        return '<p class="lt-ok" role="status">Continues from its last checkpoint.</p>'

    def _job(self, name: str) -> Job | None:
        run = shown_runs(self.desk).get(name)
        return run.job if run else None


def runs_tab(desk: Desk, recipe: RecipeParts, tabs: Any) -> tuple[Any, tuple[list[Any], list[Any]]]:
    """Draw the part; what looks at the runs, with what it reads and what it shows."""
    # What is shown follows what is chosen: a look that began before a choice must not take it back.
    chosen, seen = (gr.Textbox("", visible=False, label=label) for label in ("Chosen", "Run"))
    with gr.Row(elem_classes="lt-panes"):
        with gr.Column(scale=4, min_width=300):
            listing = gr.HTML("", js_on_load=_SELECT, elem_id="lt-runs", apply_default_css=False)
        with gr.Column(scale=7, min_width=380):
            about = gr.HTML("", elem_id="lt-about")
            with gr.Row(elem_classes="lt-bar"):
                stop = gr.Button("Save and stop", variant="stop", visible=False, min_width=130, elem_id="lt-stop")
                again = gr.Button("Continue", visible=False, min_width=130, elem_id="lt-again")
            note = gr.HTML("", elem_id="lt-run-note")
            with gr.Row(elem_classes="lt-bar", equal_height=True):
                metric = gr.Dropdown(
                    ["loss"], value="loss", label="Curve", min_width=150, scale=1, elem_id="lt-metric",
                    interactive=True, allow_custom_value=True,
                )  # fmt: skip
                others = gr.Dropdown(
                    [], value=[], label="Compare with", multiselect=True, min_width=200, scale=3, elem_id="lt-compare",
                    interactive=True, allow_custom_value=True,
                )  # fmt: skip
            curve = gr.HTML("", elem_id="lt-curve")
            compared = gr.HTML("", elem_id="lt-compared")
            log = gr.HTML("", elem_id="lt-log", autoscroll=True)
            with gr.Accordion("About this run", open=False):
                details = gr.HTML("", elem_id="lt-details")
    timer = gr.Timer(_LOOKS_S)

    does = RunsView(desk)
    view = [seen, listing, about, stop, again, metric, others, curve, compared, log, details]
    inputs = [chosen, metric, others]
    quiet: dict[str, Any] = {"show_progress": "hidden"}
    private: dict[str, Any] = {**quiet, "api_visibility": "private"}
    timer.tick(does.look, inputs, view, **quiet, api_name="runs")
    gr.on([metric.input, others.input], does.look, inputs, view, **private)
    listing.select(does.select, [metric, others], [chosen, *view], **private)
    listing.select(lambda: "", None, note, **private)
    stop.click(does.end, seen, note, **quiet, api_name="stop")
    again.click(does.go_on, seen, note, **quiet, api_name="continue")
    recipe.start.click(
        does.begin, [recipe.name, recipe.text, recipe.fresh, metric, others],
        [tabs, recipe.problems, chosen, *view], **quiet, api_name="start",
    )  # fmt: skip
    return does.look, (inputs, view)


def listing_html(runs: Iterable[ShownRun], chosen: str) -> str:
    """Runs as a table to choose from."""
    rows = "".join(
        f'<tr data-run="{escape(run.name)}" tabindex="0"{" class=lt-chosen" if run.name == chosen else ""}>'
        f'<td title="{escape(run.name)}">{escape(run.name.removeprefix("runs/"))}</td><td>{pill(run.status)}</td>'
        f"<td>{_step(run.summary)}</td><td>{_loss(run.summary, 'loss')}</td></tr>"
        for run in runs
    )
    if not rows:
        return '<p class="lt-note">No runs yet. A recipe is started with “Start run”.</p>'
    return (
        f"<table class=lt-table><thead><tr><th>Run<th>Status<th>Step<th>Loss</tr></thead><tbody>{rows}</tbody></table>"
    )


def pill(status: str) -> str:
    """A status in its colour."""
    return f'<span class="lt-pill lt-{escape(status)}">{escape(status)}</span>'


def about_html(run: ShownRun | None) -> str:
    """A run's title, with its figures."""
    if run is None:
        return '<p class="lt-note">Choose a run to see its curve and its log.</p>'
    title, found = f'<h3 class="lt-title">{escape(run.name)} {pill(run.status)}</h3>', run.summary
    if found is None:
        return title
    facts = {
        "Step": _step(found), "Loss": _loss(found, "loss"), "Evaluated": _loss(found, "eval_loss"),
        "Tokens/s": f"{found.tokens_per_second:,.0f}" if found.tokens_per_second else NONE,
        "Memory": f"{found.peak_memory_bytes / GIB:.2f} GiB" if found.peak_memory_bytes else NONE,
        "In steps": duration(found.training_seconds) if found.training_seconds else NONE,
    }  # fmt: skip
    said = "".join(error_html(each) for each in [found.error, *found.problems] if each and not run.alive)
    return title + cards_html({name: (value, "") for name, value in facts.items()}) + said


def refused_html(desk: Desk, run: ShownRun | None) -> str:
    """Why the last start of a run did not begin."""
    if run is None or run.refused is None:
        return ""
    return error_html(f"The last start ended early, and the run is as it was:\n{desk.jobs.log(run.refused)}")


def logged(runs: Iterable[Any]) -> list[str]:
    """The metrics that runs have logged, without those of evaluations, which stand beside their own."""
    names = dict.fromkeys(["loss", *(name for run in runs for name in run.metrics)])
    return [name for name in names if not name.startswith("eval_") and name not in _NO_CURVE]


def compared_html(runs: Mapping[str, Any]) -> str:
    """The settings in which runs differ, and their results."""
    if len(runs) < 2:
        return ""
    found = llmtune.runs(*(run.folder for run in runs.values()))
    return f'<pre class="lt-pre lt-wide">{escape(str(found.compare()))}</pre>'


def details_html(run: ShownRun | None) -> str:
    """What `llmtune runs show` says."""
    return "" if run is None or run.summary is None else f'<pre class="lt-pre lt-wide">{escape(str(run.summary))}</pre>'


def log_html(desk: Desk, run: ShownRun | None) -> str:
    """What the run's process has printed."""
    if run is None:
        return ""
    if run.job is None:
        return '<p class="lt-note">Started elsewhere: its log is where it was started.</p>'
    return f'<pre class="lt-pre lt-log">{escape(desk.jobs.log(run.job)) or "…"}</pre>'


def curves_html(runs: Mapping[str, Any], metric: str) -> str:
    """One metric of runs and of their evaluations, drawn as `llmtune runs plot` does; nothing where none has it yet."""
    if not any({metric, f"eval_{metric}"} & set(run.metrics) for run in runs.values()):
        return ""
    return _drawn(tuple((run.folder, len(run.files.metrics)) for run in runs.values()), metric)


@lru_cache(maxsize=64)
def _drawn(runs: tuple[tuple[Path, int], ...], metric: str) -> str:
    """The picture of runs that have logged so many lines."""
    from matplotlib import rc_context

    figure, file = llmtune.runs(*(folder for folder, _ in runs)).plot(metrics=[metric]), io.StringIO()
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):  # text stays text
        figure.savefig(file, format="svg", transparent=True)
    return f'<div class="lt-curve">{file.getvalue()[file.getvalue().index("<svg") :]}</div>'


def _step(summary: Any) -> str:
    if summary is None or not summary.step:
        return NONE
    return f"{summary.step}/{summary.steps}" if summary.steps else str(summary.step)


def _loss(summary: Any, name: str) -> str:
    loss = getattr(summary, name, None)
    return NONE if loss is None else f"{loss:.4f}"
