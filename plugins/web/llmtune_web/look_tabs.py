"""Looking before training: samples as they train, and what a run would do and take."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import gradio as gr

import llmtune
from llmtune import PlanError
from llmtune_web.desk import LIBRARIES, Desk, shown
from llmtune_web.recipe_tab import RecipeParts, check_box

GIB = 2**30


def data_tab(desk: Desk, recipe: RecipeParts) -> None:
    """Draw the samples' part."""
    with gr.Row(equal_height=True, elem_classes="lt-bar"):
        count = gr.Number(
            3, label="Samples", minimum=1, maximum=100, precision=0, min_width=110, scale=1, elem_id="lt-n"
        )
        rows = gr.Textbox(
            label="Rows", placeholder="first ones; or 5, 17, chats.jsonl:5", scale=4, min_width=200, elem_id="lt-rows"
        )
        packs = check_box("Packed rows", "lt-packs", 130)
        look = gr.Button("Show samples", variant="primary", scale=1, min_width=150, elem_id="lt-look")
    samples = gr.HTML(
        '<p class="lt-note">Samples as the model sees them, with the tokens that are trained on in colour.</p>',
        elem_id="lt-samples", min_height=120,
    )  # fmt: skip

    def preview(name: str, text: str, n: float | None, wanted: str, packed: bool) -> str:
        chosen = [part.strip() for part in wanted.split(",") if part.strip()]
        with desk.recipe_file(name, text) as path:
            return f'<div class="lt-samples">{llmtune.preview(path, int(n or 3), chosen, packed)._repr_html_()}</div>'

    inputs = [recipe.name, recipe.text, count, rows, packs]
    look.click(shown(preview), inputs, samples, api_name="preview", **LIBRARIES)


def plan_tab(desk: Desk, recipe: RecipeParts) -> None:
    """Draw the plan's part."""
    with gr.Row(equal_height=True, elem_classes="lt-bar"):
        device = gr.Textbox(
            label="Device",
            placeholder="this machine; or h100, rtx4090, 24GB",
            scale=4,
            min_width=200,
            elem_id="lt-device",
        )
        count = gr.Textbox(label="Ranks", placeholder="as here", min_width=110, scale=1, elem_id="lt-ranks")
        make = gr.Button("Plan", variant="primary", scale=1, min_width=140, elem_id="lt-make-plan")
    planned = gr.HTML(
        '<p class="lt-note">What a run would do, whether it fits and how long it takes. No weights are read.</p>',
        elem_id="lt-plan", min_height=120,
    )  # fmt: skip

    def plan(name: str, text: str, described: str, number: str) -> str:
        number = number.strip()
        if number and not (number.isdecimal() and int(number)):
            raise PlanError(f'ranks: found "{number}", allowed is a whole number >= 1')
        ranks = int(number) if number else None
        with desk.recipe_file(name, text) as path:
            # output_dir as a run of this recipe has it, as the file of the moment has another name
            keys: dict[str, Any] = {"output_dir": desk.output_dir(name, text)}
            return plan_html(llmtune.plan(path, device=described.strip() or None, ranks=ranks, **keys))

    inputs = [recipe.name, recipe.text, device, count]
    make.click(shown(plan), inputs, planned, api_name="plan", **LIBRARIES)


def plan_html(plan: Any) -> str:
    """A plan's figures, then all that it says."""
    cost = plan.cost
    facts = cost.as_dict()
    seconds = facts["step_seconds"]
    usable = facts["device"]["usable"]
    cards = {
        "Memory": (f"{facts['memory']['peak'] / GIB:.2f} GiB", f"of {usable / GIB:.1f} GiB"),
        "Fits": ("yes" if facts["fits"] else "no", str(facts["device"]["name"])),
        "Steps": (f"{plan.steps:,}", f"into {plan.output_dir}"),
        "Time": (duration(seconds * plan.steps), f"{seconds:.3g} s a step") if seconds
        else ("not known", "for this kind of device"),
    }  # fmt: skip
    text = escape(f"{plan}\n\n{cost.quick_text}\n{cost.detail_text}")
    return f'{cards_html(cards)}<pre class="lt-pre">{text}</pre>'


def cards_html(cards: Mapping[str, tuple[str, str]]) -> str:
    """Figures by their titles, each with a word on it."""
    shown_cards = "".join(
        f'<div class="lt-card{" lt-bad" if value == "no" else ""}"><span>{title}</span><b>{escape(value)}</b>'
        f"<small>{escape(more)}</small></div>"
        for title, (value, more) in cards.items()
    )
    return f'<div class="lt-cards">{shown_cards}</div>'


def duration(seconds: float) -> str:
    """`90` as `1 min 30 s`, without seconds from ten minutes on."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    if hours or minutes >= 10:
        return f"{hours} h {minutes} min" if hours else f"{minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
