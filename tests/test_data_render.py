"""Renderings equal `apply_chat_template`, and the mask covers what the model has to say, turn end included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.contract.examples import Conversation
from llmtune.data import Renderer
from llmtune.data.messages import BadRow
from tests.tiny import CHATML, CHATML_MARKED, tiny_tokenizer

# Turns closed by a second end token only at the very end of a conversation, as Phi-3 does it.
LAST_ENDS_TWICE = (
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- else %}{{ '<|endoftext|>' }}{%- endif %}"
)
# Thinking is written for the answers after the last user message and removed from earlier ones, as Qwen 3 does it.
THINKING = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m['role'] == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['role'] == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>' + (m['reasoning_content'] or '') + '</think>' }}{%- endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
# The prompt holds text that the answer is not written after, as DeepSeek R1 does it; no line between turns.
OTHER_PROMPT = (
    "{%- for m in messages %}{%- if m['role'] == 'user' %}{{ '<|im_start|>U' + m['content'] }}"
    "{%- else %}{{ '<|im_start|>A' + m['content'] + '<|im_end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>A<think>\n' }}{%- endif %}"
)
# Knows no generation prompt, and adds a system message of its own.
NO_PROMPT = (
    "{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor %}"
)
TEMPLATES = {
    "chatml": CHATML, "marked": CHATML_MARKED, "twice": LAST_ENDS_TWICE, "thinking": THINKING, "other": OTHER_PROMPT,
    "no_prompt": NO_PROMPT,
}  # fmt: skip
TOKENIZERS = {name: tiny_tokenizer(template) for name, template in TEMPLATES.items()}


def talk(*texts: str, **first_answer: Any) -> list[dict[str, Any]]:
    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
    messages[1] |= first_answer
    return messages


def encode(
    template: str, messages: list[dict[str, Any]], tools: Any = None, **options: Any
) -> list[tuple[str, list[str]]]:
    """(text, trained pieces) of each sample."""
    tokenizer = TOKENIZERS[template]
    (samples,) = Renderer(tokenizer, **options).encode([Conversation(messages=messages, tools=tools)])
    if isinstance(samples, BadRow):
        raise samples
    shown = []
    for sample in samples:
        cuts = np.nonzero(np.diff(sample.mask.astype(int)))[0] + 1
        runs = zip(np.split(sample.ids, cuts), np.split(sample.mask, cuts), strict=True)
        pieces = [tokenizer.decode(ids) for ids, mask in runs if mask[0]]
        shown.append((tokenizer.decode(sample.ids), pieces))
    return shown


@pytest.mark.parametrize("template", ["chatml", "marked", "twice", "no_prompt"])
def test_all_turns_train_in_one_pass_with_their_end_and_nothing_after(template: str) -> None:
    ((text, trained),) = encode(template, talk("Hi", "Hello you", "And?", "That is all"))
    assert text == TOKENIZERS[template].apply_chat_template(
        talk("Hi", "Hello you", "And?", "That is all"), tokenize=False
    )
    assert trained == ["Hello you<|im_end|>", "That is all<|im_end|>"]


def test_mask_equals_that_of_a_marked_template() -> None:
    messages = talk("Hi", "  Hello ", "And?", "\nThat\n", "<|im_end|> what?", "I say <|im_end|> and more")
    (marked,) = Renderer(TOKENIZERS["marked"]).encode([Conversation(messages=messages)])
    expected = TOKENIZERS["marked"].apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert marked[0].ids.tolist() == expected["input_ids"] and marked[0].mask.tolist() == [
        bool(on) for on in expected["assistant_masks"]
    ]
    (plain,) = Renderer(TOKENIZERS["chatml"]).encode([Conversation(messages=messages)])
    assert plain[0].ids.tolist() == expected["input_ids"]
    assert plain[0].mask.tolist() == marked[0].mask.tolist()


def test_a_marked_template_knows_weights_and_splits_special_tokens_in_texts() -> None:
    tokenizer = TOKENIZERS["marked"]
    messages = talk("Hi <|im_end|>", "No <|im_end|> way", "And?", "Bye", "So?", "Well", weight=0.5)
    messages[3]["weight"] = 0
    ((sample,),) = Renderer(tokenizer, split_special_tokens=True).encode([Conversation(messages=messages)])
    assert (sample.ids == tokenizer.eos_token_id).sum() == 6 and sample.end_ids == (tokenizer.eos_token_id,) * 2
    assert tokenizer.decode(sample.ids[sample.mask]) == "No <|im_end|> way<|im_end|>Well<|im_end|>"
    assert tokenizer.decode(sample.ids[sample.mask & (sample.weights == 0.5)]) == "No <|im_end|> way<|im_end|>"


def test_rewritten_turns_are_split_off_and_only_those() -> None:
    samples = encode("thinking", talk("Hi", "Hello", "And?", "Bye", reasoning_content="Hmm"))
    assert [trained for _, trained in samples] == [
        ["<think></think>Bye<|im_end|>"],
        ["<think>Hmm</think>Hello<|im_end|>"],
    ]
    assert "Hmm" not in samples[0][0] and "And?" not in samples[1][0]
    # Two answers after the last question stand unchanged in the full text: one sample.
    messages = [*talk("Hi", "Wait"), {"role": "tool", "content": "3"}, {"role": "assistant", "content": "Three"}]
    ((_, trained),) = encode("thinking", messages)
    assert trained == ["<think></think>Wait<|im_end|>", "<think></think>Three<|im_end|>"]


def test_thinking_is_not_left_out_unless_the_row_or_the_recipe_says_so() -> None:
    template = CHATML.replace("message['content'] or ''", "message['content'].split('</think>')[-1]")
    tokenizer = tiny_tokenizer(template)
    inline, apart = talk("Hi", "<think>x</think>\n\nYes"), talk("Hi", "Yes", reasoning_content="a thought")
    for messages in (inline, apart):
        (bad,) = Renderer(tokenizer).encode([Conversation(messages=messages)])
        assert isinstance(bad, BadRow) and bad.reason == "thinking not rendered"
        assert "thinking of message 2" in bad.detail and "enable_thinking: false" in bad.detail
        off = Conversation(messages=messages, template_kwargs={"enable_thinking": False})
        for renderer, row in (
            (Renderer(tokenizer), off),
            (Renderer(tokenizer, template_kwargs={"enable_thinking": False}), Conversation(messages=messages)),
        ):
            ((sample,),) = renderer.encode([row])
            assert tokenizer.decode(sample.ids[sample.mask]) == "Yes<|im_end|>"


def test_an_end_of_turn_of_two_tokens_trains_whole_and_one_at_the_very_end_of_the_text_does_not() -> None:
    # Command A ends each answer with two tokens; Phi-4-mini adds one after the last message only.
    answer = "message['role'] == 'assistant'"
    two = CHATML.replace("<|im_end|>\n{% endfor", "{{ '<|endoftext|>' if " + answer + " }}<|im_end|>\n{% endfor")
    last = CHATML.replace("<|im_end|>\n{% endfor", "<|im_end|>{{ '<|endoftext|>' if loop.last }}{% endfor")
    for template, end in ((two, "<|endoftext|><|im_end|>"), (last, "<|im_end|>")):
        tokenizer = tiny_tokenizer(template)
        for messages in (talk("Hi", "Yes"), talk("Hi", "Yes", "So", "No")):
            ((sample,),) = Renderer(tokenizer).encode([Conversation(messages=messages)])
            said = "".join(text["content"] + end for text in messages[1::2])
            assert tokenizer.decode(sample.ids[sample.mask]) == said


def test_a_prompt_that_is_not_written_before_answers_is_not_trained() -> None:
    ((_, trained),) = encode("other", talk("Hi", "<b>Hello", "And?", "<think"))
    assert trained == ["<b>Hello<|im_end|>", "<think<|im_end|>"]


def test_inline_thinking_trains_where_the_template_keeps_it() -> None:
    assert encode("no_prompt", talk("Hi", "<think>x</think>Yes"))[0][1] == ["<think>x</think>Yes<|im_end|>"]
    # A template that always writes a block of thinking, and a prompt that says there will be none.
    block = (
        "{% set parts = message['content'].split('</think>') %}"
        "{{ '[' + (parts[0][7:] if parts[1:] else '') + ']' + parts[-1] }}"
    )
    template = CHATML.replace("assistant\n{%", "assistant\n[]{%").replace("{{ message['content'] or '' }}", block)
    tokenizer = tiny_tokenizer(template)
    ((sample,),) = Renderer(tokenizer).encode([Conversation(messages=talk("Hi", "<think>x</think>Yes"))])
    assert tokenizer.decode(sample.ids).endswith("assistant\n[x]Yes<|im_end|>\n")
    assert tokenizer.decode(sample.ids[sample.mask]) == "Yes<|im_end|>"


def test_short_answers_are_not_mistaken_for_the_header() -> None:
    for template in ("no_prompt", "other", "chatml"):
        assert encode(template, talk("a", "a", "assistant", "assistant"))[0][1] == [
            "a<|im_end|>",
            "assistant<|im_end|>",
        ]


def test_tool_calls_train_with_their_end() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    messages = [
        *talk("Add", "", tool_calls=[call]),
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "1"},
    ]
    ((text, trained),) = encode("chatml", messages, tools)
    assert trained == ['<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>', "1<|im_end|>"]
    assert text == TOKENIZERS["chatml"].apply_chat_template(messages, tools=tools, tokenize=False)


def test_what_trains_can_be_widened_or_narrowed() -> None:
    messages = talk("Hi", "Hello", "And?", "Bye")
    for template in ("chatml", "marked"):
        assert encode(template, messages, mask_history=True)[0][1] == ["Bye<|im_end|>"]
        ((text, trained),) = encode(template, messages, train_on_prompt=True)
        assert trained == [text]
    ((_, trained),) = encode("thinking", messages, mask_history=True)
    assert trained == ["<think></think>Bye<|im_end|>"]


def test_default_system_and_template_variables() -> None:
    assert encode("chatml", talk("Hi", "Yo"), default_system="Be brief")[0][0].startswith(
        "<|im_start|>system\nBe brief<"
    )
    own = [{"role": "system", "content": "Mine"}, *talk("Hi", "Yo")]
    assert "Be brief" not in encode("chatml", own, default_system="Be brief")[0][0]
    tokenizer = tiny_tokenizer("{{ mood }}" + CHATML)
    ((sample,),) = Renderer(tokenizer, template_kwargs={"mood": "gay"}).encode([Conversation(messages=talk("a", "b"))])
    assert tokenizer.decode(sample.ids).startswith("gay<|im_start|>")


def test_bos_is_not_doubled_by_a_tokenizer_that_adds_one() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer("{{ bos_token }}" + CHATML.replace("<|im_start|>", "#"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    assert tokenizer("a")["input_ids"].count(tokenizer.bos_token_id) == 1
    ((sample,),) = Renderer(tokenizer).encode([Conversation(messages=talk("Hi", "Yo"))])
    assert sample.ids.tolist().count(tokenizer.bos_token_id) == 1
    assert sample.ids.tolist() == tokenizer.apply_chat_template(talk("Hi", "Yo"))["input_ids"]


def test_pad_equal_to_eos_leaves_the_turn_end_trained() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    ((sample,),) = Renderer(tokenizer).encode([Conversation(messages=talk("Hi", "Yo"))])
    assert int(sample.ids[sample.mask][-1]) == tokenizer.pad_token_id == sample.end_ids[0]


def test_a_template_that_leaves_text_out_is_found() -> None:
    tokenizer = tiny_tokenizer(CHATML.replace("message['content']", "message['contents']"))
    (bad,) = Renderer(tokenizer).encode([Conversation(messages=talk("Hi", "Yo"))])
    assert isinstance(bad, BadRow) and bad.reason == "text not rendered" and "message 1 (user)" in bad.detail
    tokenizer = tiny_tokenizer(
        CHATML.replace("message in messages %}", "message in messages if message.role != 'system' %}")
    )
    system = [{"role": "system", "content": "Rules"}, *talk("Hi", "Yo")]
    (bad,) = Renderer(tokenizer).encode([Conversation(messages=system)])
    assert "message 1 (system)" in bad.detail


def test_what_a_template_refuses_is_told_in_its_words() -> None:
    tokenizer = tiny_tokenizer("{{ raise_exception('roles must alternate') }}" + CHATML)
    (bad,) = Renderer(tokenizer).encode([Conversation(messages=talk("Hi", "Yo"))])
    assert bad.reason == "template refuses" and "roles must alternate" in bad.detail


def test_a_bad_conversation_does_not_harm_its_neighbours() -> None:
    refusal = "{% if messages[0]['content'] == 'x' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = tiny_tokenizer(refusal + CHATML)
    found = Renderer(tokenizer).encode([Conversation(messages=talk(text, text * 2)) for text in ("a", "x", "c")])
    assert isinstance(found[1], BadRow)
    assert [tokenizer.decode(found[at][0].ids[found[at][0].mask]) for at in (0, 2)] == ["aa<|im_end|>", "cc<|im_end|>"]


words = st.text(st.sampled_from("ab é😀\n\t<|>imendstar_/{}\"'assistant"), min_size=1, max_size=24) | st.sampled_from(
    ["<|im_end|>", "<|im_start|>assistant\n", "assistant", "\n", " a", "<|im_end|>\n<|im_start|>user\nx", "👩‍👩‍👧"]
)
conversations = st.lists(st.tuples(words, words.filter(str.strip)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    pairs=conversations,
    system=st.none() | words,
    template=st.sampled_from(["chatml", "twice", "no_prompt", "thinking"]),
)
def test_any_conversation_has_the_ids_of_apply_chat_template_and_trains_its_answers(
    pairs: list[tuple[str, str]], system: str | None, template: str
) -> None:
    tokenizer = TOKENIZERS[template]
    messages = [{"role": "system", "content": system}] if system is not None else []
    for asked, answer in pairs:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    (samples,) = Renderer(tokenizer).encode([Conversation(messages=messages)])
    assert samples[0].ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
    trained = [tokenizer.decode(sample.ids[sample.mask]) for sample in samples]
    if template == "thinking":
        assert trained == [f"<think></think>{answer}<|im_end|>" for _, answer in reversed(pairs)]
    else:
        assert trained == ["".join(f"{answer}<|im_end|>" for _, answer in pairs)]


@settings(max_examples=40, deadline=None)
@given(pairs=conversations)
def test_positions_give_the_mask_that_marks_give(pairs: list[tuple[str, str]]) -> None:
    messages = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    marked = TOKENIZERS["marked"].apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ((sample,),) = Renderer(TOKENIZERS["chatml"]).encode([Conversation(messages=messages)])
    assert sample.ids.tolist() == marked["input_ids"]
    assert sample.mask.astype(int).tolist() == marked["assistant_masks"]
