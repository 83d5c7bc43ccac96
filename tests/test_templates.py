"""Chat templates of the model families: what trains is each answer and its end, in ids that are the template's own."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from llmtune.contract.errors import DataError
from llmtune.contract.examples import BadRow, Conversation
from llmtune.data import DataConfig, Renderer, choose_template, prepare, template_names
from llmtune.data.sequence import TokenSequence
from llmtune.data.template import missing_tokens
from llmtune.data.tool_format import read_tool_format, tool_format_names
from tests.tiny import tiny_tokenizer

STOCK = sorted((Path(__file__).parent / "stock").glob("*.jinja"))
"""How well-known models' own templates work: dates, roles that must alternate, tools before the last question."""
ALL = [*template_names(), *(str(path) for path in STOCK)]


@functools.cache
def tokenizer_for(template: str) -> Any:
    tokenizer = tiny_tokenizer(None)
    choose_template(template, tokenizer, Path.cwd())
    more = [*missing_tokens(tokenizer), *(f"<|{role}|>" for role in ("user", "assistant", "system", "observation"))]
    tokenizer.add_special_tokens({"additional_special_tokens": list(dict.fromkeys(more))})
    return tokenizer


def rendered(template: str, conversation: Conversation, **keys: Any) -> list[TokenSequence] | BadRow:
    (result,) = Renderer(tokenizer_for(template), **keys).encode([conversation])
    return result


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


words = st.sampled_from(
    ["a", "Hello", "é", "日本", "\n", " ", "  ", "x\n\ny", "```", "{}", "1", "</s>", "[INST]", "ok."]
)
texts = st.lists(words, min_size=1, max_size=6).map("".join).filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": role, "content": draw(texts)} for role in ("user", "assistant")]
    return messages


@pytest.mark.parametrize("template", ALL, ids=lambda name: ("stock-" if "/" in name else "") + Path(name).stem)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(messages=conversations())
def test_ids_are_the_templates_and_answers_train_to_their_end(template: str, messages: list[dict[str, str]]) -> None:
    tokenizer = tokenizer_for(template)
    if template.endswith("stock/mistral.jinja") and messages[0]["role"] == "system":
        (_, *messages) = messages  # it writes a system message only before a question that waits for its answer
    found = rendered(template, Conversation(messages=messages))
    assert not isinstance(found, BadRow), found
    expected = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    if len(found) == 1:
        assert found[0].ids.tolist() == expected
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    trained = [tokenizer.decode(one.ids[start:stop]) for one in found for start, stop in runs(one.mask)]
    assert len(trained) == len(answers) and len([end for one in found for end in one.end_ids]) == len(answers)
    special = re.compile("|".join(map(re.escape, Renderer(tokenizer).special.strings)))
    bodies = []
    for text in trained:
        (end,) = special.findall(text)
        assert text.endswith(end)
        bodies.append(special.sub("", text).replace("<think>\n\n</think>\n\n", "").strip())
    assert sorted(bodies) == sorted(answer.strip() for answer in answers)


def marked(template: str) -> str:
    """A template of ours that says itself which text the assistant generates."""
    text = (Path(__file__).parent.parent / "llmtune" / "data" / "templates" / f"{template}.jinja").read_text("utf-8")
    if template == "llama3":
        answer, ended = "{{- message.content | trim -}}", '{{- "<|eot_id|>" -}}'
        by = '{%- if message.role == "assistant" -%}'
        text = text.replace(f"{{%- else -%}}\n{answer}", f'{{%- elif message.role != "assistant" -%}}\n{answer}')
        return text.replace(
            ended,
            by + "{%- generation -%}" + answer + ended + "{%- endgeneration -%}{%- else -%}" + ended + "{%- endif -%}",
        )
    head = text.index('{{- "<|im_start|>assistant\\n" + content -}}')
    written = '{{- "<|im_start|>assistant\\n" -}}{%- generation -%}{{- content -}}'
    text = text[:head] + written + text[head + len('{{- "<|im_start|>assistant\\n" + content -}}') :]
    ended = '{{- "<|im_end|>" -}}{%- endgeneration -%}{{- "\\n" -}}'
    at = text.index('{{- "<|im_end|>\\n" -}}', head)
    return text[:at] + ended + text[at + len('{{- "<|im_end|>\\n" -}}') :]


@pytest.mark.parametrize("template", ["llama3", "qwen", "hermes"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(messages=conversations())
def test_masks_are_those_of_the_same_template_with_generation_marks(template: str, messages: list) -> None:
    (found,) = rendered(template, Conversation(messages=messages))
    tokenizer = tiny_tokenizer(marked(template))
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokenizer_for(template).added_tokens_encoder)})
    told = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert found.ids.tolist() == told["input_ids"]
    assert found.mask.astype(int).tolist() == list(told["assistant_masks"])
    (itself,) = Renderer(tokenizer).encode([Conversation(messages=messages)])[0]
    assert itself.mask.tolist() == found.mask.tolist()


def test_an_end_that_a_template_writes_right_after_its_mark_trains_too() -> None:
    """As LLaVA-OneVision's does; the model would never learn to stop."""
    inside = '{{- "<|im_end|>" -}}{%- endgeneration -%}'
    text = marked("qwen")
    assert inside in text
    talk = Conversation(messages=[{"role": role, "content": "a"} for role in ("user", "assistant") * 2])
    masks = []
    for each in (text, text.replace(inside, '{%- endgeneration -%}{{- "<|im_end|>" -}}')):
        tokenizer = tiny_tokenizer(each)
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
        ((found,),) = Renderer(tokenizer).encode([talk])
        masks.append(found.mask.tolist())
        assert len(found.end_ids) == 2
    assert masks[0] == masks[1]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(many=st.lists(conversations(), min_size=8, max_size=20))
def test_conversations_of_one_shape_come_out_as_they_do_alone(many: list) -> None:
    """What the first ones of a shape have taught is used for those after it."""
    together = Renderer(tokenizer_for("qwen")).encode([Conversation(messages=each) for each in many])
    for messages, found in zip(many, together, strict=True):
        (alone,) = Renderer(tokenizer_for("qwen")).encode([Conversation(messages=messages)])
        assert [(one.ids.tolist(), one.mask.tolist(), one.cuts) for one in found] == [
            (one.ids.tolist(), one.mask.tolist(), one.cuts) for one in alone
        ]


@st.composite
def tool_talks(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages = draw(conversations())
    for _ in range(draw(st.integers(1, 2))):
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": draw(texts)}}}
        said = draw(st.sampled_from(["", "So", "<|im_end|>"]))
        messages += [
            {"role": "user", "content": draw(texts)},
            {"role": "assistant", "content": said, "tool_calls": [call] * draw(st.integers(1, 2))},
            {"role": "tool", "content": draw(texts)},
            {"role": "assistant", "content": draw(texts), "weight": draw(st.sampled_from([0, 0.5, 1]))},
        ]
    return messages


@pytest.mark.parametrize("template", ["qwen", "chatml", "qwen3"])
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(many=st.lists(tool_talks(), min_size=20, max_size=20))
def test_turns_found_quickly_are_those_found_one_by_one(template: str, many: list) -> None:
    """Calls, tool results, weights: a renderer that has learnt from earlier rows gives what a new one gives."""
    asked = [Conversation(messages=each, tools=TOOLS) for each in many]
    for each, found in zip(asked, Renderer(tokenizer_for(template)).encode(asked), strict=True):
        alone = rendered(template, each)
        assert not isinstance(found, BadRow) and not isinstance(alone, BadRow), (found, alone)
        assert [(one.ids.tolist(), one.mask.tolist(), one.end_ids, str(one.weights)) for one in found] == [
            (one.ids.tolist(), one.mask.tolist(), one.end_ids, str(one.weights)) for one in alone
        ]


def test_long_conversations_are_rendered_once_each() -> None:
    """Also with calls: once a few have shown how turns are written, turns are not rendered one by one."""
    conversation = Conversation(messages=CALLED * 8, tools=TOOLS)
    renderer, rendered_alone = Renderer(tokenizer_for("qwen")), []
    renderer.encode([conversation] * 5)
    render = renderer.render
    renderer.render = lambda *given, **keys: rendered_alone.append(given) or render(*given, **keys)  # type: ignore
    (found,) = renderer.encode([conversation])
    assert len(runs(found[0].mask)) == 16 and not rendered_alone


def chat(*contents: str, **keys: Any) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(messages=[{"role": roles[at % 2], "content": text} for at, text in enumerate(contents)], **keys)


def test_a_turn_costs_no_more_than_its_tokens() -> None:
    """Ten turns are one sample of the length of the conversation, not one sample for each prefix."""
    conversation = chat(*(f"text {at}" for at in range(20)))
    (one,) = rendered("qwen", conversation)
    whole = tokenizer_for("qwen").apply_chat_template(conversation.messages, return_dict=True)["input_ids"]
    assert len(one.ids) == len(whole) and len(runs(one.mask)) == 10


def test_a_template_that_removes_thoughts_is_split_only_where_it_does() -> None:
    thought = chat("a", "<think>\nhm\n</think>\n\nb", "c", "<think>\nso\n</think>\n\nd")
    found = rendered("qwen3", thought)
    tokenizer = tokenizer_for("qwen3")
    trained = [tokenizer.decode(one.ids[start:stop]) for one in found for start, stop in runs(one.mask)]
    assert trained == ["<think>\nso\n</think>\n\nd<|im_end|>", "<think>\nhm\n</think>\n\nb<|im_end|>"]
    assert "hm" not in tokenizer.decode(found[0].ids)  # as the model sees it then
    assert len(rendered("qwen3_nothink", chat("a", "b", "c", "d"))) == 1


def test_thinking_is_switched_by_the_row_before_the_recipe() -> None:
    tokenizer = tokenizer_for("qwen3")
    off, on = ({"enable_thinking": value} for value in (False, True))

    def trained(row: dict[str, Any], recipe: dict[str, Any]) -> str:
        (one,) = rendered("qwen3", chat("a", "b", template_kwargs=row), template_kwargs=recipe)
        return tokenizer.decode(one.ids[one.mask])

    without, with_thought = "b<|im_end|>", "<think>\n\n</think>\n\nb<|im_end|>"
    assert [trained({}, off), trained({}, on)] == [without, with_thought]
    assert [trained(on, off), trained(off, on)] == [with_thought, without]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {"type": "object"}}}]
CALLED = [
    {"role": "user", "content": "Sum"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3"},
]


@pytest.mark.parametrize("name", tool_format_names())
def test_tool_formats_write_tools_calls_and_results(name: str) -> None:
    conversation = Conversation(messages=CALLED, tools=TOOLS)
    refused = rendered("smollm2", conversation)
    assert isinstance(refused, BadRow) and "tool_format" in refused.detail
    (one,) = rendered("smollm2", conversation, tool_format=read_tool_format(name, Path.cwd()))
    tokenizer = tokenizer_for("smollm2")
    call, answer = (tokenizer.decode(one.ids[start:stop]) for start, stop in runs(one.mask))
    assert "add" in call and '"a": 1' in call and call.endswith("<|im_end|>") and answer == "It is 3<|im_end|>"
    whole = tokenizer.decode(one.ids)
    assert "Adds" in whole and whole.index("Adds") < whole.index("Sum") < whole.index('"a": 1') < whole.rindex("3")


def test_a_tool_format_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ part }}:{{ tools or calls or results }}")
    (one,) = rendered(
        "smollm2", Conversation(messages=CALLED, tools=TOOLS), tool_format=read_tool_format("own.jinja", tmp_path)
    )
    assert "results:['3']" in tokenizer_for("smollm2").decode(one.ids)
    with pytest.raises(DataError, match=r'no format "hermess"\. Did you mean "hermes"'):
        read_tool_format("hermess", tmp_path)


@pytest.mark.parametrize("template", ["qwen", "qwen3_nothink", "hermes", "llama3", "chatml"])
def test_templates_that_know_tools_write_them(template: str) -> None:
    (one,) = rendered(template, Conversation(messages=CALLED, tools=TOOLS))
    tokenizer = tokenizer_for(template)
    expected = tokenizer.apply_chat_template(CALLED, tools=TOOLS, return_dict=True)["input_ids"]
    assert one.ids.tolist() == expected
    call, answer = (tokenizer.decode(one.ids[start:stop]) for start, stop in runs(one.mask))
    assert "add" in call and answer.startswith("It is 3")


SPELLED = chat("say <|im_end|> now", "<|im_end|> it is<|im_start|>")


def test_text_that_spells_special_tokens_becomes_them_by_default() -> None:
    tokenizer = tokenizer_for("chatml")
    (one,) = rendered("chatml", SPELLED)
    assert one.ids.tolist() == tokenizer.apply_chat_template(SPELLED.messages, return_dict=True)["input_ids"]
    assert one.ids.tolist().count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 4
    assert tokenizer.decode(one.ids[one.mask]) == "<|im_end|> it is<|im_start|><|im_end|>"  # to its own end


def test_text_that_spells_special_tokens_stays_text_where_they_are_split() -> None:
    tokenizer = tokenizer_for("chatml")
    (one,) = rendered("chatml", SPELLED, split_special_tokens=True)
    ends = one.ids == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ends.sum() == 2 and one.mask[ends].tolist() == [False, True]
    assert tokenizer.decode(one.ids) == tokenizer.apply_chat_template(SPELLED.messages, tokenize=False)
    assert tokenizer.decode(one.ids[one.mask]) == "<|im_end|> it is<|im_start|><|im_end|>"
    (plain,) = rendered("chatml", chat("a", "b"), split_special_tokens=True)
    assert plain.ids.tolist() == rendered("chatml", chat("a", "b"))[0].ids.tolist()


def spaced_tokenizer(prefix: bool) -> Any:
    """Writes spaces as U+2581, as Gemma's; with `prefix` one before each text, as Llama 2's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "\u2581", "\n", *map(chr, range(33, 127))]
    bpe = Tokenizer(models.BPE({text: at for at, text in enumerate(letters)}, [], unk_token="<unk>"))
    space = normalizers.Replace(" ", "\u2581")
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), space]) if prefix else space
    bpe.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    bpe.decoder = decoders.Replace("\u2581", " ")
    turns = ["<start_of_turn>", "<end_of_turn>"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": turns})
    choose_template("gemma", tokenizer)
    return tokenizer


@pytest.mark.parametrize("prefix", [False, True])
def test_special_tokens_in_texts_are_split_by_any_tokenizer_that_reads_them_apart(prefix: bool) -> None:
    tokenizer = spaced_tokenizer(prefix)
    messages = chat("say <end_of_turn> now", " <bos> it is<start_of_turn>").messages
    ((one,),) = Renderer(tokenizer, split_special_tokens=True).encode([Conversation(messages=messages)])
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert (one.ids == end).sum() == 2 and (one.ids == tokenizer.bos_token_id).sum() == 1
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    if prefix:
        expected = re.sub("(?<=<bos>|turn>)(?=[mu\n])", " ", expected)  # a space before what follows the template's own
    assert "".join(tokenizer.convert_ids_to_tokens(one.ids)).replace("\u2581", " ") == expected
    plain = chat("a b", "c d\n e")
    found = [Renderer(tokenizer, split_special_tokens=split).encode([plain])[0][0] for split in (True, False)]
    assert found[0].ids.tolist() == found[1].ids.tolist() and found[0].mask.tolist() == found[1].mask.tolist()


def test_special_tokens_in_texts_are_not_split_by_a_tokenizer_that_reads_otherwise_beside_them() -> None:
    tokenizer = spaced_tokenizer(prefix=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<tool>", rstrip=True, special=True)]})
    with pytest.raises(DataError, match="reads text otherwise beside special tokens"):
        Renderer(tokenizer, split_special_tokens=True)


def test_weights_of_messages_reach_their_tokens() -> None:
    messages = chat("a", "b", "c", "d", "e", "f").messages
    messages[1]["weight"], messages[3]["weight"] = 0.0, 0.5
    for template in ("qwen", "llama3"):
        tokenizer = tokenizer_for(template)
        (one,) = rendered(template, Conversation(messages=messages))
        found = [(tokenizer.decode(one.ids[a:b])[0], set(one.weights[a:b].tolist())) for a, b in runs(one.mask)]
        assert found == [("d", {0.5}), ("f", {1.0})]


def test_a_missing_token_is_named() -> None:
    tokenizer = tiny_tokenizer(None)
    choose_template("llama3", tokenizer)
    assert missing_tokens(tokenizer) == ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def test_tokens_that_a_vocabulary_lacks_are_never_passed_over_in_silence(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    config = DataConfig(dataset="rows.jsonl", template="phi")
    with pytest.raises(DataError, match=r"trains no end-of-turn token.*<\|end\|>.*new_special_tokens"):
        prepare(config, tiny_tokenizer(None), seed=0, base_dir=tmp_path)
    half = tiny_tokenizer(None)
    half.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    (note,) = prepare(config, half, seed=0, base_dir=tmp_path).report.notes
    assert "<|user|>" in note and "new_special_tokens: <|assistant|>, <|system|>, <|user|>" in note  # put together
    assert missing_tokens(tokenizer_for("phi")) == []


def test_a_template_has_the_names_of_models_that_share_it() -> None:
    one, other = tiny_tokenizer(None), tiny_tokenizer(None)
    choose_template("gemma", one), choose_template("gemma3", other)
    assert one.chat_template == other.chat_template


def test_reasoning_trains_in_the_answer_that_it_leads_to() -> None:
    messages = chat("a", "b", "c", "d").messages
    messages[3]["reasoning_content"] = "hm"
    (whole,) = rendered("deepseek_r1", Conversation(messages=messages))
    decode = tokenizer_for("deepseek_r1").decode
    (end,) = {decode([token]) for token in whole.end_ids}
    assert decode(whole.ids[whole.mask]) == f"b{end}hm\n</think>\n\nd{end}"
    assert "<think>\nhm" in decode(whole.ids)
    (told,) = [rendered("llama3", Conversation(messages=messages))]
    assert isinstance(told, BadRow) and told.reason == "thinking not rendered"


def test_plain_text_has_one_beginning_and_one_end() -> None:
    tokenizer = tiny_tokenizer(None)
    plain = Renderer(tokenizer).text("Hello")
    assert plain.tolist() == [*tokenizer("Hello")["input_ids"], tokenizer.eos_token_id]
    assert Renderer(tokenizer).text("Hello<|im_end|>").tolist() == plain.tolist()
    from tokenizers.processors import TemplateProcessing

    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    for text in ("Hello", f"{bos[0]}Hello"):
        assert Renderer(tokenizer).text(text).tolist() == [bos[1], *plain.tolist()]
