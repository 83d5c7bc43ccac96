"""What a person sees on a terminal of 80 columns, in a notebook, and in a pipe."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llmtune.terminal import fit
from llmtune.training.console import fit_figures
from tests.runs import recipe

pytest.importorskip("pyte")

from tests.terminal import Screen, on_terminal
from tests.tiny import always, tiny_model, tiny_tokenizer

BAR = re.compile(r"step +\d+/30 [━╸╺ ]+ +\d+% eta( +[\d:]+)?")


@pytest.fixture(scope="module")
def screen(tiny_llama: str, chats: str, tmp_path_factory: pytest.TempPathFactory) -> Screen:
    folder = tmp_path_factory.mktemp("t")
    keys = recipe(
        tiny_llama, chats, folder / "my run", max_steps=30, val_size=4, eval_strategy="steps", eval_steps=10,
        logging_steps=3, sample_prompts=["Who are you, and how much is 3 and 3?"], kernel_config="auto",
    )  # fmt: skip
    (folder / "small.json").write_text(json.dumps(keys))
    screen = on_terminal(["-m", "llmtune", "train", "small.json"], folder=folder)
    assert screen.code == 0, screen.text
    return screen


def test_nothing_is_broken_by_the_terminal(screen: Screen) -> None:
    assert screen.lines == screen.unbroken


def test_lines_with_losses_stay_to_scroll_back_to(screen: Screen) -> None:
    logged = [int(step) for step in re.findall(r"^step +(\d+)/30  loss \d", screen.text, re.M)]
    assert logged == [1, *range(3, 31, 3)]
    assert re.findall(r"^step +(\d+)/30  eval_loss \d", screen.text, re.M) == ["10", "20", "30"]


def test_the_bar_keeps_its_place_and_its_counter(screen: Screen) -> None:
    bars = [bottom for bottom in screen.bottoms if "━" in bottom]
    assert len(bars) > 3 and all(BAR.fullmatch(bar) for bar in bars)
    assert {bar.index("%") for bar in bars} == {bars[0].index("%")}


def test_it_says_what_is_being_done_until_the_first_step(screen: Screen) -> None:
    said = re.findall(r"^ *\d+\.\d s  (.+)$", screen.text, re.M)
    assert [line.split()[0] for line in said] == [
        "Importing", "Reading", "Reading", "Building", "Loading", "Answering", "Answering", "Writing"
    ]  # fmt: skip


def test_it_ends_with_the_time_and_the_memory_measured_and_planned(screen: Screen) -> None:
    said = re.search(
        r"^Took \d+:\d\d in all, and at most (\d+\.\d\d) GiB with .* \((\d+\.\d\d) GiB planned",
        " ".join(screen.text[screen.text.index("Took ") :].split()),
    )
    assert said and float(said[1]) > float(said[2])


def test_the_commands_to_try_next_work_here(screen: Screen) -> None:
    assert "  llmtune chat 'my run'\n  llmtune export 'my run' export_dir='my run/merged'" in screen.text


def test_a_plan_fits_and_says_the_same_in_a_pipe(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text(json.dumps(recipe(tiny_llama, chats, Path("run"), kernel_config="auto")))
    screen = on_terminal(["-m", "llmtune", "plan", "small.json"], folder=tmp_path)
    assert screen.code == 0 and screen.lines == screen.unbroken
    assert "Fits: " in screen.text


def test_what_is_said_of_data_fits(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text(json.dumps(recipe(tiny_llama, chats, Path("run"))))
    for arguments in (["stats", "small.json"], ["check", chats]):
        screen = on_terminal(["-m", "llmtune", "data", *arguments], folder=tmp_path)
        assert screen.code == 0 and screen.lines == screen.unbroken, screen.text


def test_a_model_is_talked_to_and_its_answer_stopped(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=100_000)  # it never stops by itself
    always(model, tokenizer.encode(" the")[0]).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    tools = [{"name": "add", "parameters": {"type": "object", "properties": {}}}]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    screen = on_terminal(
        ["-m", "llmtune", "chat", "tiny", "tools=tools.json", "max_new_tokens=9000", "do_sample=false"],
        folder=tmp_path,
        typed=[("^You:$", "Who are you?\n"), ("^ ?the the", "\x03"), ("^You:$", "/sav\n"), ("^You:$", "\x04")],
    )
    assert screen.code == 0, screen.text
    help_text = screen.lines[: screen.lines.index("You: Who are you?")]
    assert help_text == screen.unbroken[: len(help_text)] and "type the result" in help_text[-2]
    # The terminal itself writes ^C.
    assert re.search(r"^You: Who are you\?\n the[ the^C\n]+ \[stopped\]\n\nYou: /sav\n", screen.text, re.M)
    assert '/sav is no command. Did you mean "/save"?' in screen.text


def test_an_error_fits(tmp_path: Path) -> None:
    screen = on_terminal(["-m", "llmtune", "train", "absent.yaml"], columns=60, folder=tmp_path)
    assert screen.code == 2 and screen.lines == screen.unbroken and len(screen.lines) > 1


def test_continuation_stands_below_its_column() -> None:
    assert fit("  peft    lora: a word and another", 24) == "  peft    lora: a word\n          and another"
    assert fit("no column, but words enough to break", 20) == "no column, but words\nenough to break"
    assert fit("      indented words stay so", 20) == "      indented words\n      stay so"
    long = "/a/very/long/path/that-is-longer-than-the-line"
    assert fit(f"Saved in {long} now", 20) == f"Saved in\n{long}\nnow"
    assert fit("any width " * 30, None) == "any width " * 30


def test_figures_stay_with_their_names() -> None:
    text = fit_figures("step 1/9", "loss 1.2345  grad 0.531  1,412 tok/s  rewards/margins 0.25", 44)
    assert text.splitlines() == ["step 1/9  loss 1.2345  grad 0.531", "          1,412 tok/s  rewards/margins 0.25"]
