"""The page's first part: a recipe as a form and as YAML, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from typing import Any, NamedTuple

import gradio as gr
import yaml

from llmtune import LlmtuneError
from llmtune_web.desk import STARTER, Desk, error_html


class RecipeParts(NamedTuple):
    """What other parts of the page read."""

    name: Any
    text: Any
    start: Any
    fresh: Any
    form: Any
    problems: Any
    told: Callable[[str, str], tuple[str, str]]
    """The form and the problems of a recipe."""


def check_box(label: str, elem_id: str, width: int) -> gr.Checkbox:
    """A box to tick, in a bar of fields and buttons."""
    return gr.Checkbox(
        False, label=label, container=False, min_width=width, scale=0, elem_id=elem_id, elem_classes="lt-check"
    )


def recipe_tab(desk: Desk) -> RecipeParts:
    """Draw the part."""
    with gr.Row(equal_height=True, elem_classes="lt-bar"):
        name = gr.Dropdown(
            [], value="recipe.yaml", label="Recipe", allow_custom_value=True, scale=5, min_width=220, elem_id="lt-name",
            interactive=True,
        )  # fmt: skip
        save = gr.Button("Save", scale=1, min_width=90, elem_id="lt-save")
        start = gr.Button("Start run", variant="primary", scale=1, min_width=110, elem_id="lt-start")
        fresh = check_box("Start over", "lt-fresh", 110)
    problems = gr.HTML("", elem_id="lt-problems")
    with gr.Row(elem_classes="lt-panes"):
        with gr.Column(scale=6, min_width=340):
            form = gr.HTML(
                "", js_on_load=resources.files("llmtune_web").joinpath("form.js").read_text("utf-8"), elem_id="lt-form",
                apply_default_css=False,
            )  # fmt: skip
        with gr.Column(scale=5, min_width=320, elem_classes="lt-sticky"):
            text = gr.Code(STARTER, language="yaml", label="YAML", lines=18, max_lines=34, elem_id="lt-yaml")

    def told(file: str, written: str) -> tuple[str, str]:
        found = desk.problems(file, written)
        return desk.form.html(written, found), problems_html(file, found)

    def changed(file: str, written: str, event: gr.EventData) -> tuple[Any, str, str]:
        try:
            written = desk.form.changed(written, str(event._data["key"]), str(event._data["value"]))
        except yaml.YAMLError:
            return gr.skip(), *told(file, written)
        return written, *told(file, written)

    def opened(file: str, written: str) -> tuple[Any, str, str]:
        try:
            written = desk.folder.read_recipe(file)
        except (LlmtuneError, OSError):
            return gr.skip(), *told(file, written)  # a new name for what is written
        return written, *told(file, written)

    def saved(file: str, written: str) -> tuple[Any, str]:
        try:
            path = desk.folder.write_recipe(file, written)
        except (LlmtuneError, OSError) as error:
            return gr.skip(), error_html(error)
        note = f'<p class="lt-ok" role="status">Saved {escape(desk.folder.shown(path))}</p>'
        return gr.Dropdown(choices=desk.folder.recipes()), note + problems_html(file, desk.problems(file, written))

    form.input(changed, [name, text], [text, form, problems], show_progress="hidden", api_name="set_key")
    text.input(
        told, [name, text], [form, problems], show_progress="hidden", trigger_mode="always_last", api_name="check"
    )
    name.input(opened, [name, text], [text, form, problems], show_progress="hidden", api_name="open")
    save.click(saved, [name, text], [name, problems], show_progress="hidden", api_name="save")
    return RecipeParts(name, text, start, fresh, form, problems, told)


def problems_html(name: str, problems: Sequence[str]) -> str:
    """What is wrong with a recipe, or that nothing is."""
    if not problems:
        return f'<p class="lt-ok" role="status">No problems in {escape(name or "this recipe")}</p>'
    return error_html("\n".join(problems))
