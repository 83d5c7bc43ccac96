"""A conversation with one model, or with two side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from html import escape
from typing import Any

import gradio as gr

from llmtune import PlanError
from llmtune_web.desk import LIBRARIES, Desk, error_html
from llmtune_web.talk import Talkers

Messages = list[dict[str, Any]]
_DRAWS_S = 0.15
"""Between two drawings of an answer that comes: a browser that draws each token takes no clicks."""


def chat_tab(desk: Desk) -> list[Any]:
    """Draw the part; its dropdowns of runs."""
    talkers = Talkers()
    names, boxes, told = [], [], []
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
                        [], height=380, show_label=False, elem_id=f"lt-talk-{side}", placeholder="Nothing said yet",
                        buttons=["copy"], reasoning_tags=[("<think>", "</think>")],
                    )
                )  # fmt: skip
                told.append(gr.State([]))  # messages as the model has them
    with gr.Row(equal_height=True, elem_classes="lt-bar"):
        question = gr.Textbox(
            label="Message", placeholder="Enter sends, Shift+Enter begins a line", lines=1, max_lines=8, scale=6,
            min_width=260, elem_id="lt-question",
        )  # fmt: skip
        send = gr.Button("Send", variant="primary", scale=1, min_width=90, elem_id="lt-send")
        halt = gr.Button("Stop", scale=1, min_width=80, elem_id="lt-halt")
        clear = gr.Button("Clear", scale=1, min_width=80, elem_id="lt-clear")
    note = gr.HTML("", elem_id="lt-chat-note")
    with gr.Accordion("How answers are drawn", open=False, elem_id="lt-drawn"):
        with gr.Row():
            system = gr.Textbox(label="System message", placeholder="the recipe's", lines=2, min_width=260)
            tools = gr.Textbox(
                label="Tools", lines=2, max_lines=8, min_width=260, elem_id="lt-tools",
                placeholder='[{"name": "add", "description": "Adds two numbers", "parameters": {...}}]',
            )  # fmt: skip
        with gr.Row():
            sample = gr.Checkbox(True, label="Draw at random", min_width=150)
            warmth = gr.Number(0.95, label="Temperature", minimum=0.01, step=0.05, min_width=120)
            top_p = gr.Number(0.7, label="Top p", minimum=0.01, maximum=1, step=0.05, min_width=120)
            most = gr.Number(256, label="Most new tokens", minimum=1, precision=0, min_width=120, elem_id="lt-most")
        release = gr.Button("Let the models go", size="sm", min_width=150)

    def replies(*said: Any) -> Iterator[tuple[Any, ...]]:
        yield from answer(desk, talkers, *said)

    settings = [system, sample, warmth, top_p, most, tools]
    outputs = [question, *boxes, *told, note]
    started = gr.on(
        [send.click, question.submit], replies, [question, *names, *told, *settings], outputs, show_progress="hidden",
        api_name="chat", **LIBRARIES,
    )  # fmt: skip
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    halt.click(lambda: "", None, note, cancels=started, **quiet)
    clear.click(lambda: ([], [], [], [], ""), None, [*boxes, *told, note], **quiet)
    for box, messages in zip(boxes, told, strict=True):
        box.clear(lambda: [], None, messages, **quiet)
    release.click(talkers.let_go, None, None, **quiet)
    return names


def answer(
    desk: Desk, talkers: Talkers, text: str, left: str | None, right: str | None, first: Messages, second: Messages,
    about: str | None, drawn: bool, heat: float, share: float, tokens: float | None, tools: str | None,
) -> Iterator[tuple[Any, ...]]:  # fmt: skip
    """What the part shows while both models answer, one after the other."""
    told = [first or [], second or []]

    def shown(note: str = "", left_over: Any = "") -> tuple[Any, ...]:
        return left_over, *map(bubbles, told), *told, note

    if not text.strip():
        yield shown(error_html("message: not given; type one"))
        return
    config: dict[str, Any] = {
        "do_sample": drawn, "temperature": heat, "top_p": share, "max_new_tokens": int(tokens or 256),
        **({"default_system": about.strip()} if about and about.strip() else {}),
    }  # fmt: skip
    sides = [side for side, name in enumerate((left, right)) if side == 0 or (name or "").strip()]
    waiting: Messages = []
    for side in sides:
        before, name = told[side], (left, right)[side] or ""
        asked = [*before, {"role": "user", "content": text}]
        told[side] = asked
        yield shown(f'<p class="lt-note">{escape(name)} is opened and asked …</p>')
        try:
            offered = read_tools(tools, len(sides))
            session, said = talkers.session(desk.model(name), before, config, offered), ""
            drawn_at = 0.0
            with closing(session.stream(text)) as pieces:
                for piece in pieces:
                    said += piece
                    told[side] = [*asked, {"role": "assistant", "content": said}]
                    if time.monotonic() - drawn_at > _DRAWS_S:
                        yield shown()
                        drawn_at = time.monotonic()
            if not session.completes:
                told[side] = session.messages
                waiting = session.open_calls
        except Exception as error:  # a model's own errors, too, are for the user to read
            told[side] = before
            yield shown(error_html(error), text)
            return
    yield shown(waiting_html(waiting))


def read_tools(text: str | None, models: int) -> Any:
    """The tools that were typed, if any. Raises PlanError where they are no JSON list, or two models are asked."""
    if not text or not text.strip():
        return None
    if models > 1:
        raise PlanError("tools: found beside two models; one may wait for a result while the other answers")
    try:
        found = json.loads(text)
        if isinstance(found, list):  # a text would be the path of a file
            return found
        problem = "it is no list"
    except ValueError as error:
        problem = str(error)
    raise PlanError(f"tools: cannot be read ({problem}); needed is a JSON list of functions")


def bubbles(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """Messages as the conversation shows them: thoughts, calls and results as text."""
    found = []
    for message in messages:
        text = str(message["content"])
        if thought := message.get("reasoning_content"):
            text = f"<think>{thought}</think>\n\n{text}"
        if message["role"] == "tool":
            text = f"Result of {message['name']}: {text}"
        calls = [f"Calls `{call_text(call)}`" for call in message.get("tool_calls", ())]
        role = "assistant" if message["role"] == "assistant" else "user"
        found.append({"role": role, "content": "\n\n".join(part for part in [text, *calls] if part)})
    return found


def call_text(call: Mapping[str, Any]) -> str:
    """A call as people read it."""
    return f"{call['function']['name']} {json.dumps(call['function']['arguments'], ensure_ascii=False)}"


def waiting_html(calls: Sequence[Mapping[str, Any]]) -> str:
    """Which result is awaited."""
    return f'<p class="lt-note">Type the result of {escape(call_text(calls[0]))}</p>' if calls else ""
