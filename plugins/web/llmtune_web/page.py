"""The page as a whole: its parts in tabs."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from llmtune_web.chat_tab import chat_tab
from llmtune_web.desk import STARTER, Desk
from llmtune_web.export_tab import export_tab
from llmtune_web.look_tabs import data_tab, plan_tab
from llmtune_web.recipe_tab import recipe_tab
from llmtune_web.runs_tab import runs_tab


def make_page(desk: Desk) -> gr.Blocks:
    """The page of a folder."""
    with gr.Blocks(title="llmtune", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(
            f'<header class="lt-header"><b>llmtune</b><span title="Files below this folder are shown">'
            f"{escape(str(desk.folder.root))}</span></header>",
            apply_default_css=False,
        )
        with gr.Tabs(elem_id="lt-tabs") as tabs:
            with gr.Tab("Recipe", id="recipe"):
                recipe = recipe_tab(desk)
            with gr.Tab("Data", id="data"):
                data_tab(desk, recipe)
            with gr.Tab("Plan", id="plan"):
                plan_tab(desk, recipe)
            with gr.Tab("Runs", id="runs") as running:
                look, looked = runs_tab(desk, recipe, tabs)
            with gr.Tab("Chat", id="chat") as talking:
                talkers = chat_tab(desk)
            with gr.Tab("Export", id="export") as exporting:
                exported = export_tab(desk)

        def opened() -> tuple[Any, ...]:
            names = desk.folder.recipes()
            name = names[0] if names else "recipe.yaml"
            text = desk.folder.read_recipe(name) if names else STARTER
            return gr.Dropdown(choices=names, value=name), text, *recipe.told(name, text)

        def talked_to(*chosen: str | None) -> Any:
            names = list(desk.runs())
            first, *rest = [gr.Dropdown(choices=names, value=value or None) for value in chosen]
            if not chosen[0] and names:
                first = gr.Dropdown(choices=names, value=names[0])
            return [first, *rest] if rest else first

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(opened, None, [recipe.name, recipe.text, recipe.form, recipe.problems], **quiet)
        running.select(look, *looked, **quiet)
        talking.select(talked_to, talkers, talkers, **quiet)
        exporting.select(talked_to, exported, exported, **quiet)
    return page
