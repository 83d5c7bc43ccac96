"""Answers: history, stopping, streaming, modes, limits, and the terminal loop."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from llmtune.contract.errors import DataError, RecipeError
from llmtune.contract.generation import Answer
from llmtune.contract.schema import decode
from llmtune.data.prompts import PromptWriter, files_of_user
from llmtune.inference.talk import Compared, chat_loop
from llmtune.inference.tools import OfferedTools, read_tools
from llmtune.model.generate import stop_tokens
from llmtune.model.generation import ChatSession, ContextFull, GenerateConfig, answer
from llmtune.recipe.recipe import load_recipe
from tests.tiny import CHATML, CHATML_MARKED, always, tiny_model, tiny_tokenizer

GREEDY = GenerateConfig(do_sample=False, max_new_tokens=8)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model(tokenizer):
    # Weights large enough for earlier tokens to decide the answer.
    return tiny_model(vocab_size=len(tokenizer), initializer_range=0.5)


def reference(model, tokenizer, messages, tokens):
    """Greedy decoding by hand, without a cache."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    start = len(ids)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_answers_equal_greedy_decoding_by_hand_and_see_earlier_turns(model, tokenizer):
    model.eval()
    talk = ChatSession(model, tokenizer, config=GREEDY)
    first = talk.ask("Who are you?")
    history = [{"role": "user", "content": "Who are you?"}]
    assert first == reference(model, tokenizer, history, 8)
    second = talk.ask("How are you?")
    history += [{"role": "assistant", "content": first}, {"role": "user", "content": "How are you?"}]
    assert second == reference(model, tokenizer, history, 8)
    assert second != answer(model, tokenizer, "How are you?", GREEDY)
    assert talk.messages == [*history, {"role": "assistant", "content": second}]


def test_streamed_pieces_join_to_the_whole_answer(model, tokenizer):
    pieces = list(ChatSession(model, tokenizer, config=GREEDY).stream("Who are you?"))
    assert "".join(pieces).strip() == answer(model, tokenizer, "Who are you?", GREEDY)


def test_beams_give_one_piece(model, tokenizer):
    config = GenerateConfig(do_sample=False, num_beams=2, max_new_tokens=4)
    talk = ChatSession(model, tokenizer, config=config)
    assert len(list(talk.stream("Who are you?"))) == 1
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


def test_sampling_is_drawn_from_torchs_seed(model, tokenizer):
    def drawn(seed):
        torch.manual_seed(seed)
        return answer(model, tokenizer, "Who are you?", GenerateConfig(max_new_tokens=16, top_p=1.0, temperature=2.0))

    assert drawn(0) == drawn(0)
    assert len({drawn(seed) for seed in range(3)}) > 1


def test_stops_at_the_templates_end_of_turn_even_if_eos_is_another(model, tokenizer):
    other = tiny_tokenizer()
    other.eos_token = "<|endoftext|>"
    end_of_turn = other.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = model.config.eos_token_id = 0
    assert stop_tokens(model, other) == [0, end_of_turn]
    talk = ChatSession(
        always(model, end_of_turn), other, config=GenerateConfig(skip_special_tokens=False, max_new_tokens=5)
    )
    assert talk.ask("hi") == "<|im_end|>"


def test_stop_tokens_follow_the_recipes_template(model):
    plain = tiny_tokenizer(chat_template=None)
    plain.eos_token = None
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    assert stop_tokens(model, plain) == []
    assert stop_tokens(model, plain, {"chat_template": CHATML}) == [plain.convert_tokens_to_ids("<|im_end|>")]


def test_every_module_gets_its_own_mode_back(model, tokenizer):
    model.train()
    model.lm_head.eval()
    answer(model, tokenizer, "hi", GREEDY)
    assert model.training and model.model.training and not model.lm_head.training


def test_leaving_a_stream_stops_it_and_keeps_what_was_said(model, tokenizer):
    words = tokenizer.encode(" the")
    talk = ChatSession(always(model, words[0]), tokenizer, config=GenerateConfig(do_sample=False, max_new_tokens=400))
    model.train()
    stream = talk.stream("hi")
    first = next(stream) + next(stream)
    stream.close()
    assert model.training
    assert talk.messages[-1] == {"role": "assistant", "content": first.strip()}


def test_an_error_while_generating_reaches_the_caller(model, tokenizer):
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="shapes"):
        list(ChatSession(model, tokenizer, config=GREEDY).stream("hi"))


def test_default_system_is_used_but_not_kept(model, tokenizer):
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    config = GenerateConfig(do_sample=False, max_new_tokens=1, default_system="Be brief.")
    talk = ChatSession(model, tokenizer, config=config)
    talk.ask("hi")
    assert tokenizer.decode(seen[0][0]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi")
    assert talk.messages[0]["role"] == "user"


def test_a_full_context_is_an_error_and_leaves_the_conversation_as_it_was(model, tokenizer):
    talk = ChatSession(model, tokenizer, config=GREEDY)
    with pytest.raises(ContextFull, match=r"\d+ tokens, the limit .* is 512; .*max_length"):
        talk.ask("Paris " * 600)
    assert talk.messages == []
    short = ChatSession(model, tokenizer, config=GenerateConfig(max_length=3))
    with pytest.raises(ContextFull, match="is 3"):
        short.ask("hi")


def test_the_most_new_tokens_go_before_the_most_of_all(model, tokenizer):
    always(model, tokenizer.encode(" the")[0])
    prompt = len(tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    ))  # fmt: skip

    def tokens(**limits):
        said = answer(model, tokenizer, "hi", GenerateConfig(do_sample=False, **limits))
        return len(tokenizer.encode(said))

    assert tokens(max_length=prompt + 7) == pytest.approx(7, abs=1)
    assert tokens(max_length=prompt + 7, max_new_tokens=30) == pytest.approx(30, abs=1)
    assert tokens(max_new_tokens=9999) == pytest.approx(512 - prompt, abs=1)


def test_every_key_of_generation_has_its_line_in_the_docs():
    text = (Path(__file__).parent.parent / "docs" / "chat.md").read_text(encoding="utf-8")
    for field in fields(GenerateConfig):
        assert f"| `{field.name}` | {json.dumps(field.default)} |" in text, field.name


def test_answers_end_at_the_models_length(tokenizer):
    model = always(tiny_model(vocab_size=len(tokenizer), max_position_embeddings=40), tokenizer.encode(" the")[0])
    talk = ChatSession(model, tokenizer, config=GenerateConfig(do_sample=False))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    assert len(tokenizer.encode(talk.ask("hi"))) == pytest.approx(40 - len(prompt), abs=1)


def test_a_tokenizer_without_template_cannot_chat(model):
    with pytest.raises(DataError, match="no chat template"):
        answer(model, tiny_tokenizer(chat_template=None), "hi")


def test_terminal_loop(model, tokenizer):
    talk = ChatSession(model, tokenizer, config=GREEDY)
    lines, written = iter(["Who are you?", "", "/help", "/clear", "How are you?", "/exit", "never read"]), []
    chat_loop(talk, lambda prompt: next(lines), written.append)
    assert next(lines) == "never read"
    assert [message["content"] for message in talk.messages[:1]] == ["How are you?"]
    assert answer(model, tokenizer, "Who are you?", GREEDY) in "".join(written)
    assert sum("/reset forgets" in text for text in written) == 2


def test_terminal_loop_leaves_at_ctrl_d_and_survives_ctrl_c(model, tokenizer):
    class Interrupted(ChatSession):
        def stream(self, text):
            yield "half"
            raise KeyboardInterrupt

    events, written = iter([KeyboardInterrupt, "hi", EOFError]), []

    def read(prompt):
        event = next(events)
        if isinstance(event, str):
            return event
        raise event

    chat_loop(Interrupted(model, tokenizer), read, written.append)
    assert "half [stopped]" in "".join(written)


def talked(talk, lines, **options):
    written, rest = [], iter(lines)

    def read(prompt):
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    chat_loop(talk, read, written.append, **options)
    return "".join(written)


def test_a_system_message_is_set_shown_and_saved_with_the_conversation(model, tokenizer, tmp_path):
    talk, file = ChatSession(model, tokenizer, config=GREEDY), tmp_path / "kept.jsonl"
    shown = talked(
        talk, ["/system", "/system Be brief.", "/system", "hi", f"/save {file}", f"/save {file}", "/save", "/saev x"]
    )
    assert "There is no system message." in shown and shown.count("Be brief.") == 2
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[0] == rows[1] and [each["role"] for each in rows[0]["messages"]] == ["system", "user", "assistant"]
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert rows[0]["messages"][-1]["content"] == reference(model.eval(), tokenizer, asked, 8)
    assert "/save needs a file" in shown and 'Did you mean "/save"?' in shown
    assert "cannot be written" in talked(talk, [f"/save {tmp_path}"])
    talked(talk, ["/reset"])
    assert talk.messages == [] and talk.config.default_system == "Be brief."


def test_several_lines_are_one_question(model, tokenizer):
    talk = ChatSession(model, tokenizer, config=GREEDY)
    talked(talk, ["one\\", "two", '"""three', "", 'four"""', '"""five"""'], guides=False)
    asked = [each["content"] for each in talk.messages if each["role"] == "user"]
    assert asked == ["one\ntwo", "three\n\nfour", "five"]


def test_the_adapter_is_switched_off_and_on_again(model, tokenizer):
    entered = []

    @contextmanager
    def base():
        entered.append(True)
        yield

    talk = ChatSession(model, tokenizer, config=GREEDY)
    assert "no adapter to switch off" in talked(talk, ["/base"])
    talk.base = base
    shown = talked(talk, ["one", "/base", "two", "/base", "three"])
    assert len(entered) == 1
    assert "The adapter is off" in shown and "The adapter is on" in shown


def test_answers_of_two_models_stand_beside_each_other(model, tokenizer, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    other = tiny_model(vocab_size=len(tokenizer), initializer_range=0.5, seed=1)
    first, second = (ChatSession(each, tokenizer, config=GREEDY) for each in (model, other))
    shown = talked(first, ["hi"], beside=Compared({"tuned": first, "plain": second}))
    (head,) = [line for line in shown.splitlines() if "tuned" in line]
    assert head.index("plain") > 40
    assert len(first.messages) == len(second.messages) == 2
    assert first.messages[-1] != second.messages[-1]
    shown = talked(first, ["hi"], beside=Compared({"tuned": first, "plain": second}), guides=False)
    assert f"tuned: {first.messages[-1]['content']}" in shown and f"plain: {second.messages[-1]['content']}" in shown
    talked(first, ["/reset"], beside=Compared({"tuned": first, "plain": second}))
    assert first.messages == second.messages == []


def test_thoughts_are_dimmed(model, tokenizer):
    class Thinks(ChatSession):
        def stream(self, text):
            yield from ["<thi", "nk>so", " so</think>\n\nYes."]

    assert "\x1b[2mso so\x1b[0m\nYes." in talked(Thinks(model, tokenizer), ["hi"], dims=True)
    assert "<think>so so</think>\n\nYes." in talked(Thinks(model, tokenizer), ["hi"])


ADD = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}


def scripted(tokenizer, *answers):
    """An engine that gives these answers, and the prompts that it was asked."""
    prompts, rest = [], iter(answers)

    def generate(model, tokenizer, asked, config, *, seeds=None, stop=None, watch=None):
        prompts.append(asked[0])
        ids = [*tokenizer(next(rest), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for token in ids:
            _ = watch is not None and watch([token])
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return [Answer(prompt_ids=tuple(asked[0]), ids=tuple(ids), cut=False, text=text)]

    return generate, prompts


def with_tools(model, tokenizer, generate, **keys):
    recipe = load_recipe({"model": "m", "dataset": "d", **keys})
    talk = ChatSession(model, tokenizer, config=GREEDY, generate=generate)
    data = recipe.data
    writer = PromptWriter(
        name="m", config=data, base_dir=recipe.base_dir, tokenizer=tokenizer, media=None, files=files_of_user(data)
    )
    talk.tools = OfferedTools.of(writer, [ADD])
    return talk


def test_tools_are_offered_and_their_calls_answered_as_in_training(model, tokenizer, tmp_path):
    one, two = ({"name": "add", "arguments": {"a": 1, "b": b}} for b in (2, "é"))
    said = f"Let me see. <tool_call>{json.dumps(one)}</tool_call><tool_call>{json.dumps(two)}</tool_call>"
    generate, prompts = scripted(tokenizer, said, "It is 3.")
    talk, file = with_tools(model, tokenizer, generate), tmp_path / "kept.jsonl"
    shown = talked(talk, ["How much?", "3", "four", f"/save {file}"])
    assert 'Let me see.\nCalls add {"a": 1, "b": 2}\nCalls add {"a": 1, "b": "é"}\nIt is 3.\n' in shown
    assert "tool_call" not in shown and talk.open_calls == []
    row = json.loads(file.read_text())
    assert [each["role"] for each in row["messages"]] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [each["function"] for each in row["messages"][1]["tool_calls"]] == [one, two]
    # What it was asked is what a row of these messages trains on.
    *before, _ = row["messages"]
    for asked, messages in zip(prompts, (before[:1], before), strict=True):
        text = tokenizer.apply_chat_template(messages, row["tools"], add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(asked) == text


def test_who_is_to_speak_is_told_and_calls_stand_alone_in_a_pipe(model, tokenizer):
    call = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    asks, lines = [], iter(["How much?", "3", "/exit"])
    talk = with_tools(model, tokenizer, scripted(tokenizer, call, "It is 3.")[0])
    chat_loop(talk, lambda prompt: asks.append(prompt.strip()) or next(lines), lambda text: None)
    assert asks == ["You:", "Result of add:", "You:"]
    talk = with_tools(model, tokenizer, scripted(tokenizer, f"<think>so</think>\n\n{call}", "It is 3.")[0])
    assert talked(talk, ["How much?", "3"], guides=False) == "<think>so</think>\nCalls add {}\nIt is 3.\n"
    assert talk.messages[1]["reasoning_content"] == "so"


def test_a_tool_format_writes_tools_where_the_template_has_none(model, tmp_path):
    plain = tiny_tokenizer(chat_template=CHATML_MARKED)
    with pytest.raises(RecipeError, match=r"tools: .*the tool add is not in the rendering.*tool_format: hermes"):
        with_tools(model, plain, None)
    generate, prompts = scripted(plain, 'Action: add\nAction Input: {"a": 1}', "Two.")
    talk = with_tools(model, plain, generate, tool_format="default")
    assert talk.ask("How much?") == 'Action: add\nAction Input: {"a": 1}'
    assert talk.open_calls[0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert talk.ask("2") == "Two." and "Adds." in plain.decode(prompts[0])
    (tmp_path / "tools.json").write_text(json.dumps({"type": "function", "function": ADD}))
    assert read_tools(tmp_path / "tools.json")[0]["function"] == ADD
    (tmp_path / "odd.json").write_text("[{}]")
    for name, said in (("odd.json", "tool 1 has no function name"), ("no.json", "cannot be read")):
        with pytest.raises(RecipeError, match=said):
            read_tools(tmp_path / name)


def test_the_mark_of_a_call_may_be_a_control_token(model):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>"]})
    generate, _ = scripted(tokenizer, '<tool_call>{"name": "add", "arguments": {}}</tool_call>')
    talk = with_tools(model, tokenizer, generate)
    assert "".join(talk.stream("How much?")).startswith("<tool_call>") and talk.open_calls


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("temperature", 0, "> 0"),
        ("top_p", 1.5, "<= 1"),
        ("num_beams", 0, ">= 1"),
        ("max_new_tokens", "5", "whole number"),
    ],
)
def test_settings_out_of_range_are_refused(key, value, allowed):
    _, problems = decode(GenerateConfig, {key: value})
    assert [problem.key for problem in problems] == [key]
    assert allowed in problems[0].message
