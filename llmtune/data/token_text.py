"""What each token of a sample spells, to the byte: the ids themselves are read back, nothing is rendered again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import numpy as np

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
"""Characters that would move a terminal's cursor, turn text round, or not be seen."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Consecutive tokens that are treated alike."""

    text: str
    """What they spell. Bytes of a character that another span completes are written `\\xe2`."""
    tokens: int
    trained: bool
    weight: float = 1.0
    """What each of them counts in the loss, where they are trained."""
    special: bool = False


class TokenText:
    """What a tokenizer's tokens spell, as bytes and as text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._added = {token: str(text) for token, text in added.items()}
        self._special = {token for token, text in added.items() if text.special} | set(tokenizer.all_special_ids)

    def spans(self, ids: np.ndarray, mask: np.ndarray, weights: np.ndarray | None = None) -> list[Span]:
        """A sequence (tokens,) as runs of tokens that are alike. Each special token is a span of its own."""
        spelt = self.spell(ids.tolist())
        special = np.isin(ids, list(self._special))
        counts = np.where(mask, 1.0 if weights is None else weights, 0.0)
        alike = (np.diff(mask) == 0) & (np.diff(counts) == 0) & ~special[1:] & ~special[:-1]
        bounds = [0, *(np.flatnonzero(~alike) + 1).tolist(), len(ids)]
        return [
            Span(
                text=b"".join(spelt[start:stop]).decode("utf-8", "backslashreplace"),
                tokens=stop - start,
                trained=bool(mask[start]),
                weight=float(counts[start]) if mask[start] else 1.0,
                special=bool(special[start]),
            )
            for start, stop in pairwise(bounds)
            if stop > start
        ]

    def spell(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token; together they are the text that was tokenised."""
        if self._kind == "other":
            return list(self._by_decoding(ids))
        texts = self.tokenizer.convert_ids_to_tokens(list(ids))
        read = _byte_level if self._kind == "bytes" else _pieces
        return [
            self._added[token].encode() if token in self._added else read(text or "")
            for token, text in zip(ids, texts, strict=True)
        ]

    @cached_property
    def _kind(self) -> str:
        """`bytes`: every byte is a character of its own. `pieces`: spaces are written as U+2581. Else `other`."""
        decoder = self.tokenizer.backend_tokenizer.decoder
        names = {each["type"] for each in _decoders(json.loads(decoder.__getstate__()))} if decoder else set()
        if "ByteLevel" in names:
            return "bytes"
        return "pieces" if names & {"ByteFallback", "Metaspace"} else "other"

    def _by_decoding(self, ids: Sequence[int]) -> Iterator[bytes]:
        """What decoding says that each token adds; where several spell one character, the last of them has it."""
        start = shown = 0
        for stop in range(1, len(ids) + 1):
            before, now = (self.tokenizer.decode(ids[start:end]) for end in (shown, stop))
            if now.endswith("\ufffd"):
                yield b""
                continue
            yield now[len(before) :].encode()
            start, shown = shown, stop


def _decoders(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield decoder
    for each in decoder.get("decoders", ()):
        yield from _decoders(each)


def _byte_level(text: str) -> bytes:
    return b"".join(bytes([_bytes()[sign]]) if sign in _bytes() else sign.encode() for sign in text)


def _pieces(text: str) -> bytes:
    found = _BYTE.fullmatch(text)
    return bytes([int(found[1], 16)]) if found else text.replace("\u2581", " ").encode()


@cache
def _bytes() -> dict[str, int]:
    """The byte that each character of byte-level BPE stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {sign: byte for byte, sign in bytes_to_unicode().items()}


def visible(text: str) -> str:
    """The text with signs at line ends and tabs, and with what cannot be seen, or would do harm, spelt out."""
    spelt = _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return spelt.replace("\n", "\u21b5\n").replace("\t", "\u21e5\t")
