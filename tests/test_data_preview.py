"""What a preview shows is what trains: the same ids, to the byte, marked as the mask has them."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmtune
from llmtune.contract.errors import DataError, RecipeError
from llmtune.data.preview import Preview, make_pack_preview, make_preview
from llmtune.data.token_text import Span, TokenText, visible
from llmtune.data.tokens import TokenSamples
from llmtune.data.units import concatenate, pack
from tests.runs import recipe
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
HARD = "H\u00e9 \U0001f642 \u65e5\u672c\u8a9e <|im_end|> x"


def pieces_tokenizer() -> Any:
    """Spaces as U+2581 and single bytes as <0x..>, as Llama 2 and Gemma have them."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "</s>": 1, "\u2581": 2, "H": 3, "i": 4, "\u2581H": 5}
    vocabulary |= {f"<0x{byte:02X}>": 10 + byte for byte in range(256)}
    made = Tokenizer(models.BPE(vocabulary, [("\u2581", "H")], byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


def word_tokenizer() -> Any:
    """Whole words, decoded with spaces between."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordPiece({"[UNK]": 0, "hel": 1, "##lo": 2, "you": 3}, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_byte_level_tokens_spell_their_text(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    assert b"".join(TokenText(TOKENIZER).spell(ids)).decode() == text


def test_pieces_and_words_are_spelt() -> None:
    tokenizer = pieces_tokenizer()
    ids = tokenizer("Hi \u00e9</s>").input_ids
    assert TokenText(tokenizer).spell(ids) == [b" H", b"i", b" ", b"\xc3", b"\xa9", b"</s>"]
    tokenizer = word_tokenizer()
    ids = tokenizer("hello you").input_ids
    assert b"".join(TokenText(tokenizer).spell(ids)) == b"hello you"


def test_a_character_that_only_half_trains_is_shown_in_bytes() -> None:
    ids = np.array(TOKENIZER("\u00e9", add_special_tokens=False).input_ids)
    assert len(ids) == 2
    spans = TokenText(TOKENIZER).spans(ids, np.array([False, True]))
    assert [(span.text, span.trained) for span in spans] == [("\\xc3", False), ("\\xa9", True)]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_spans_keep_every_token_its_mask_and_its_weight(data: Any) -> None:
    ids = np.array(TOKENIZER(HARD, add_special_tokens=False).input_ids)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
    weights = np.array(
        data.draw(st.lists(st.sampled_from([0.5, 1.0]), min_size=len(ids), max_size=len(ids))), np.float32
    )
    spans = TokenText(TOKENIZER).spans(ids, mask, weights)
    assert np.repeat([span.trained for span in spans], [span.tokens for span in spans]).tolist() == mask.tolist()
    found = np.repeat([span.weight for span in spans], [span.tokens for span in spans])
    assert found[mask].tolist() == weights[mask].tolist()
    assert [span.text for span in spans if span.special] == ["<|im_end|>"]


def test_control_characters_are_spelt_out() -> None:
    assert visible("a\x1b[31m\u202eb\n\tc") == "a\\x1b[31m\\u202eb\u21b5\n\u21e5\tc"


@pytest.fixture
def keys(tiny_llama: str, chats: str, tmp_path: Path) -> dict[str, Any]:
    return recipe(tiny_llama, chats, tmp_path / "run")


def test_it_shows_the_ids_of_training_and_marks_what_trains(keys: dict[str, Any]) -> None:
    shown, train = llmtune.preview(keys, n=24), llmtune.plan(keys).data.prepared.train
    assert len(shown.samples) == len(train) == 24
    for number, sample in enumerate(shown.samples):
        (sequence,) = sample.sequences
        ids, mask = train.sample(number)
        assert sequence.ids.tolist() == ids.tolist() and sequence.mask.tolist() == mask.tolist()
        assert "".join(span.text for span in sequence.spans) == TOKENIZER.decode(ids)
    assert "assistant\u21b5\n[[It is 0.<|im_end|>]]" in str(shown)
    assert "chats.jsonl:1, " in shown.samples[0].title


def test_rows_are_chosen_by_number_or_place_wherever_they_went(keys: dict[str, Any]) -> None:
    shown = llmtune.preview(keys, rows=[5, "chats.jsonl:17"], val_size=0.5)
    assert [re.search(r"chats\.jsonl:(\d+)", sample.title)[1] for sample in shown.samples] == ["5", "17"]  # type: ignore[index]
    with pytest.raises(DataError, match=r"rows: no sample comes from 99; .* named like .*chats\.jsonl:1"):
        llmtune.preview(keys, rows=[5, 99])


def test_packed_rows_show_their_bounds(keys: dict[str, Any]) -> None:
    shown = llmtune.preview(keys, n=1, packs=True, packing=True)
    assert re.match(r"pack 1 of \d+, \d+ of 128 tokens, sample 1 of \d at 0 to \d+, ", shown.samples[0].title)
    assert "do not see each other" in str(shown)
    with pytest.raises(RecipeError, match="packing: found false"):
        llmtune.preview(keys, packs=True)


def test_a_stream_is_looked_at_by_its_first_rows(keys: dict[str, Any]) -> None:
    streamed = llmtune.preview(keys, n=2, streaming=True)
    assert "streaming: the first 1,000 rows of each data set were looked at" in str(streamed)
    whole = llmtune.preview(keys, n=2)
    for one, other in zip(streamed.samples, whole.samples, strict=True):
        assert one.sequences[0].ids.tolist() == other.sequences[0].ids.tolist()


def two(kind: str, width: int, **more: Any) -> TokenSamples:
    ids = np.array(TOKENIZER("user says assistant answers", add_special_tokens=False).input_ids)
    mask = np.arange(len(ids)) > 3
    return TokenSamples.from_lists([(ids, mask)] * 2, range(2 // width), ["a:1", "a:2"], kind=kind, width=width, **more)


def test_both_sides_of_a_pair_are_shown() -> None:
    shown = make_preview([("", two("preference", 2))], TOKENIZER)
    assert [each.name for each in shown.samples[0].sequences] == ["chosen", "rejected"]
    assert "- chosen" in str(shown) and "- rejected" in shown._repr_html_()


def test_labels_weights_and_set_names_are_told() -> None:
    samples = two("labelled", 1, labels=np.array([True, False]), set_names=("one", "other"), sets=np.array([0, 1]))
    samples = replace(samples, weights=np.full(len(samples.ids), 0.5, np.float32))
    shown = make_preview([("", samples)], TOKENIZER)
    assert shown.samples[0].title.startswith("a:1, one, ") and shown.samples[0].title.endswith("wanted")
    assert shown.samples[1].title.startswith("a:2, other, ") and shown.samples[1].title.endswith("not wanted")
    assert "[[0.5: " in str(shown) and "(0.5\u00d7)" in shown._repr_html_()


def test_concatenated_rows_show_each_token_once_and_train_all_but_the_first() -> None:
    ids = np.array(TOKENIZER("one two three four five", add_special_tokens=False).input_ids)
    mask = np.arange(len(ids)) > 0
    samples = TokenSamples.from_lists([(ids, mask)] * 3, [0, 1, 2], ["a:1", "a:2", "a:3"], kind="text")
    room = len(ids) + 2
    shown = make_pack_preview(samples, concatenate(samples, room, None), TOKENIZER, count=9)
    parts = [sample.sequences[0] for sample in shown.samples]
    assert np.concatenate([part.ids for part in parts]).tolist() == np.tile(ids, 3).tolist()
    trained = np.concatenate([part.mask for part in parts])
    assert np.flatnonzero(~trained).tolist() == list(range(0, len(trained), room))
    assert (
        make_pack_preview(samples, pack(samples.lengths, room), TOKENIZER, count=9)
        .samples[1]
        .title.startswith("pack 2")
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown_on(file: io.StringIO, monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    make_preview([("", two("conversation", 1))], TOKENIZER).show(file)
    return file.getvalue()


def test_colour_on_a_terminal_marks_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    coloured = shown_on(Terminal(), monkeypatch, TERM="xterm-256color")
    assert "\x1b[38;5;22;48;5;194m" in coloured and "[[" not in coloured  # dark on light, on any terminal
    for file, environment in ((Terminal(), {"NO_COLOR": "1", "TERM": "xterm-256color"}), (io.StringIO(), {})):
        plain = shown_on(file, monkeypatch, **environment)
        assert "\x1b" not in plain and "[[" in plain


def test_html_is_escaped() -> None:
    ids = np.array(TOKENIZER("<script>alert(1)</script>&", add_special_tokens=False).input_ids)
    samples = TokenSamples.from_lists([(ids, np.arange(len(ids)) > 2)], [0], ["<b>:1"])
    page = make_preview([("", samples)], TOKENIZER).html()
    assert "<script" not in page and "<b>:1" not in page
    styles = re.findall(r'<span style="([^"]*)"', page)  # readable on a light and on a dark page
    assert styles and all(("background-color: " in style) == ("color: #" in style) for style in styles)
    text = unescape(re.sub(r"<[^>]+>", "", page))
    assert "<script>alert(1)</script>&" in text and "<b>:1" in text


def test_long_samples_are_cut_in_the_picture_only() -> None:
    ids = np.full(150_000, TOKENIZER.convert_tokens_to_ids("x"))
    samples = TokenSamples.from_lists([(ids, np.arange(len(ids)) > 0)], [0])
    shown = make_preview([("", samples)], TOKENIZER)
    assert len(shown.samples[0].sequences[0].ids) == 150_000
    assert len(str(shown)) < 110_000 and "tokens more)" in str(shown)


def test_an_empty_preview_prints() -> None:
    assert "is trained on" in str(Preview(samples=[]))
    assert Span(text="a", tokens=1, trained=True).weight == 1


def test_preferences_are_shown_whatever_the_stage(tiny_llama: str, tmp_path: Path) -> None:
    """Both sides, though `sft` would refuse to train on them, also from the cache."""
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "How?", "chosen": "So.", "rejected": "No."}\n')
    keys = {"model": tiny_llama, "dataset": str(tmp_path / "pairs.jsonl"), "output_dir": str(tmp_path / "run")}
    shown = str(llmtune.preview(keys))
    assert "So.<|im_end|>" in shown and "No.<|im_end|>" in shown
    assert "1 samples" in str(llmtune.stats(keys))
    with pytest.raises(
        llmtune.LlmtuneError, match="holds preferences, and sft .*; choose stage_config dpo or rm for these rows"
    ):
        llmtune.plan(keys)
