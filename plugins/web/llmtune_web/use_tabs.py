"""What was trained, in use: a conversation with one model or two side by side, and export."""

from __future__ import annotations

import time
from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr

from llmtune import LlmtuneError
from llmtune_web.desk import Desk, error_html, word
from llmtune_web.talk import Talkers
from llmtune_web.yaml_text import quoted

Messages = list[dict[str, Any]]


def chat_tab(desk: Desk) -> list[Any]:
    """Draw the conversation's part; its dropdowns of runs."""
    talkers = Talkers()
    names, boxes = [], []
    with gr.Row(elem_classes="lt-panes"):
        for side, label in (("left", "Model"), ("right", "Beside it (optional)")):
            with gr.Column(min_width=320):
                names.append(
                    gr.Dropdown(
                        [], value="", label=label, allow_custom_value=True, elem_id=f"lt-{side}", interactive=True,
                        info="A run, a folder, or a name on the hub",
                    )
                )  # fmt: skip
                boxes.append(
                    gr.Chatbot(
                        [], height=380, show_label=False, elem_id=f"lt-talk-{side}", placeholder="Nothing said yet"
                    )
                )
    with gr.Row(equal_height=True, elem_classes="lt-bar"):
        question = gr.Textbox(
            label="Message", placeholder="Enter sends, Shift+Enter begins a line", lines=1, max_lines=8, scale=6,
            min_width=260, elem_id="lt-question",
        )  # fmt: skip
        send = gr.Button("Send", variant="primary", scale=1, min_width=90, elem_id="lt-send")
        halt = gr.Button("Stop", scale=1, min_width=80, elem_id="lt-halt")
        clear = gr.Button("Clear", scale=1, min_width=80, elem_id="lt-clear")
    with gr.Accordion("How answers are drawn", open=False):
        with gr.Row():
            system = gr.Textbox(label="System message", placeholder="the recipe's", lines=2, scale=3, min_width=260)
            sample = gr.Checkbox(True, label="Draw at random", min_width=140)
            warmth = gr.Slider(0.05, 2, 0.95, step=0.05, label="Temperature", min_width=150)
            top_p = gr.Slider(0.05, 1, 0.7, step=0.05, label="Top p", min_width=150)
            most = gr.Number(256, label="Most new tokens", minimum=1, precision=0, min_width=130)
        release = gr.Button("Let the models go", size="sm", min_width=150)
    note = gr.HTML("", elem_id="lt-chat-note")

    def replies(*told: Any) -> Iterator[tuple[Any, ...]]:
        yield from answer(desk, talkers, *told)

    settings = [system, sample, warmth, top_p, most]
    outputs = [question, *boxes, note]
    started = gr.on(
        [send.click, question.submit], replies, [question, *names, *boxes, *settings], outputs, show_progress="hidden",
        api_name="chat", concurrency_id="libraries",
    )  # fmt: skip
    halt.click(lambda: "", None, note, cancels=started, show_progress="hidden", api_visibility="private")
    clear.click(lambda: ([], [], ""), None, [*boxes, note], show_progress="hidden", api_visibility="private")
    release.click(talkers.let_go, None, None, show_progress="hidden", api_visibility="private")
    return names


def answer(
    desk: Desk, talkers: Talkers, text: str, left: str, right: str, first: Messages, second: Messages,
    about: str | None, drawn: bool, heat: float, share: float, tokens: float | None,
) -> Iterator[tuple[Any, ...]]:  # fmt: skip
    """What the part shows while both models answer, one after the other."""
    if not text.strip():
        yield gr.skip(), gr.skip(), gr.skip(), error_html("message: not given; type one")
        return
    config: dict[str, Any] = {
        "do_sample": drawn,
        "temperature": heat,
        "top_p": share,
        "max_new_tokens": int(tokens or 256),
    }
    config |= {"default_system": about.strip()} if about and about.strip() else {}
    before, after = [first or [], second or []], [first or [], second or []]
    for side, name in enumerate((left, right)):
        if side == 1 and not (name or "").strip():
            continue
        asked = [*before[side], {"role": "user", "content": text}]
        after[side] = asked
        yield "", *after, f'<p class="lt-note">{escape(name or "")} is opened and asked …</p>'
        try:
            for said in talkers.stream(desk.model(name or ""), before[side], text, config):
                after[side] = [*asked, {"role": "assistant", "content": said}]
                yield "", *after, ""
        except Exception as error:  # a model's own errors, too, are for the user to read
            after[side] = before[side]
            yield text, *after, error_html(error)
            return
    yield "", *after, ""


def export_tab(desk: Desk) -> list[Any]:
    """Draw the export's part; its dropdown of runs."""
    with gr.Row(equal_height=True, elem_classes="lt-bar"):
        run = gr.Dropdown(
            [],
            value=None,
            label="Run",
            scale=3,
            min_width=220,
            elem_id="lt-export-run",
            interactive=True,
            allow_custom_value=True,
        )
        into = gr.Textbox(
            label="Into the folder", placeholder="exports/NAME", scale=3, min_width=220, elem_id="lt-into"
        )
        go = gr.Button("Export", variant="primary", scale=1, min_width=120, elem_id="lt-export")
    with gr.Row(elem_classes="lt-bar"):
        dtype = gr.Dropdown(["auto", "float16", "bfloat16", "float32"], value="auto", label="Type", min_width=130)
        size = gr.Number(5, label="Largest file (GB)", minimum=1, precision=0, min_width=130)
        hub = gr.Textbox(label="Upload to the hub as", placeholder="owner/name; empty uploads nothing", min_width=220)
    result = gr.HTML(
        '<p class="lt-note">Merges an adapter into its base and writes a plain model that other programs read.</p>',
        elem_id="lt-exported",
    )  # fmt: skip

    def export(name: str, target: str, kind: str, gigabytes: float | None, uploaded: str) -> Iterator[str]:
        try:
            source = desk.folder.shown(desk.folder.run_path(name or ""))
            output = desk.folder.shown(desk.folder.path(target.strip() or f"exports/{source.rpartition('/')[2]}"))
            words = ["export", word(source), f"export_dir={quoted(output)}", f"infer_dtype={kind}"]
            words += [f"export_size={int(gigabytes or 5)}"]
            words += [f"export_hub_model_id={quoted(uploaded.strip())}"] if uploaded.strip() else []
            job = desk.jobs.start(words, output)
        except (LlmtuneError, OSError) as error:
            yield error_html(error)
            return
        while desk.jobs.runs(job):  # it goes on, whether or not anybody looks
            yield f'<pre class="lt-pre">{escape(desk.jobs.log(job)) or "…"}</pre>'
            time.sleep(0.5)
        yield f'<pre class="lt-pre">{escape(desk.jobs.log(job))}</pre>'

    go.click(export, [run, into, dtype, size, hub], result, show_progress="hidden", api_name="export")
    return [run]
