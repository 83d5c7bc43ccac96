"""Answers: history, stopping, streaming, modes, limits, and the terminal loop."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from llmtune.contract.errors import DataError
from llmtune.contract.schema import decode
from llmtune.inference.talk import Compared, chat_loop
from llmtune.model.generate import stop_tokens
from llmtune.model.generation import ChatSession, ContextFull, GenerateConfig, answer
from tests.tiny import CHATML, tiny_model, tiny_tokenizer

GREEDY = GenerateConfig(do_sample=False, max_new_tokens=8)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model(tokenizer):
    # Weights large enough for earlier tokens to decide the answer.
    return tiny_model(vocab_size=len(tokenizer), initializer_range=0.5)


def always(model, token):
    """Make the model say `token` for ever: the head looks at a direction that a constant embedding fills."""
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = model.model.norm(torch.ones(1, model.config.hidden_size)).sign()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


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
