"""What was trained, written in a format that others read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr

from llmtune import LlmtuneError
from llmtune_web.desk import Desk, error_html, word
from llmtune_web.form import FormField
from llmtune_web.yaml_text import quoted

EXPORT_KEYS = {
    "export_format": (), "export_gguf_type": ("gguf",), "export_quantization_bit": ("safetensors",),
    "infer_dtype": ("safetensors",), "export_size": ("safetensors",), "export_device": ("safetensors", "gguf"),
    "export_hub_model_id": (),
}  # fmt: skip
"""Keys of the recipe, each with the formats that it is for; with none, for all."""


def export_tab(desk: Desk) -> list[Any]:
    """Draw the part; its dropdown of runs."""
    with gr.Row(equal_height=True, elem_classes="lt-bar"):
        run = gr.Dropdown(
            [], value=None, label="Run or model", scale=3, min_width=220, elem_id="lt-export-run", interactive=True,
            allow_custom_value=True,
        )  # fmt: skip
        into = gr.Textbox(
            label="Into the folder", placeholder="exports/NAME", scale=3, min_width=220, elem_id="lt-into"
        )
        go = gr.Button("Export", variant="primary", scale=1, min_width=120, elem_id="lt-export")
    with gr.Row(elem_classes="lt-bar lt-keys"):
        keys = [FormField((key,), desk.form.properties[key]) for key in EXPORT_KEYS]
        fields = [export_field(key) for key in keys]
    result = gr.HTML(
        '<p class="lt-note">Merges an adapter into its base, or writes it alone, in a format that other programs read, '
        "with a model card.</p>",
        elem_id="lt-exported",
    )  # fmt: skip

    def export(name: str | None, target: str, *values: Any) -> Iterator[str]:
        try:
            source = desk.model(name or "")
            output = desk.folder.shown(desk.folder.path(target.strip() or f"exports/{source.rpartition('/')[2]}"))
            words = [
                f"{field.key}={field.yaml(str(value))}" for field, value in zip(keys, values, strict=True)
                if str(value or "").strip() and for_format(field.key, values[0])
            ]  # fmt: skip
            job = desk.jobs.start(["export", word(source), f"export_dir={quoted(output)}", *words], output)
        except (LlmtuneError, OSError) as error:
            yield error_html(error)
            return
        while desk.jobs.runs(job):  # it goes on, whether or not anybody looks
            yield f'<pre class="lt-pre">{escape(desk.jobs.log(job)) or "…"}</pre>'
            time.sleep(0.5)
        yield f'<pre class="lt-pre">{escape(desk.jobs.log(job))}</pre>'

    def fit(chosen: str) -> list[Any]:
        return [gr.update(visible=for_format(key, chosen)) for key in EXPORT_KEYS]

    fields[0].input(fit, fields[0], fields, show_progress="hidden", api_visibility="private")
    go.click(export, [run, into, *fields], result, show_progress="hidden", api_name="export")
    return [run]


def for_format(key: str, chosen: str) -> bool:
    """Whether a key has a meaning for a format."""
    return not EXPORT_KEYS[key] or chosen in EXPORT_KEYS[key]


def export_field(field: FormField) -> Any:
    """What one key of the export is chosen or typed in."""
    label, about = field.key, field.schema.get("description", "").replace("`", "")
    default = field.schema.get("default")
    common: dict[str, Any] = {
        "label": label, "info": about, "min_width": 300, "elem_id": f"lt-{label}", "interactive": True,
        "visible": for_format(label, "safetensors"),
    }  # fmt: skip
    if choices := field.choices():
        return gr.Dropdown(choices if default else [("no", ""), *choices], value=default or "", **common)
    return gr.Textbox("" if default is None else str(default), **common)
