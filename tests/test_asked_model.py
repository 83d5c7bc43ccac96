"""Texts that end the answers of a batch are found as they come."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from llmtune.training.asked_model import _StopTexts, _until
from tests.tiny import tiny_tokenizer


def sentencepiece_like() -> Any:
    """A tokenizer that writes spaces as Llama's does, with bytes for what it has no word for."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{at:02X}>" for at in range(256)), "▁", "▁a", "b", "▁END", "E", "ND", "."]
    tokenizer = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"bytes": tiny_tokenizer(), "pieces": sentencepiece_like()}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_answers_end_where_looking_at_all_of_each_would_end_them(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    some = st.sampled_from([*range(len(tokenizer))][:: max(1, len(tokenizer) // 40)] + [*range(len(tokenizer))][-7:])
    ids = data.draw(st.lists(some, min_size=1, max_size=300))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    at = data.draw(st.integers(0, len(text)))
    stop = ["", "END", text[at : at + data.draw(st.integers(0, 5))]]
    watch = _StopTexts(tokenizer, stop, 2)
    expected = False
    for number, token in enumerate(ids, start=1):
        said = tokenizer.decode(ids[:number], skip_special_tokens=True)
        expected = expected or _until(said, stop) != said
        assert watch([token, None]) == expected
        if expected:
            break


def test_only_the_end_of_a_long_answer_is_looked_at() -> None:
    tokenizer, sizes = TOKENIZERS["bytes"], []

    class Counts:
        def decode(self, ids: list[int], **options: Any) -> str:
            sizes.append(len(ids))
            return tokenizer.decode(ids, **options)

    watch = _StopTexts(Counts(), ["never said"], 1)
    ids = tokenizer.encode("Paris is the capital of France. " * 80)
    assert len(ids) > 500 and not any([watch([token]) for token in ids])
    assert max(sizes) < 150 and sum(sizes) < 150 * len(ids)
