"""Tokenising renderings, and finding which tokens belong to a stretch of the text.

Special tokens split a text before anything else looks at it, so that what stands between two of them has the same ids
whatever surrounds it. Where that holds (byte-level tokenizers without special tokens that swallow spaces, checked on
the first texts), pieces that come again, such as a system message, are tokenised once, and offsets are not needed: that
is a third of the work. Elsewhere whole texts are tokenised with their offsets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from llmtune.contract.errors import DataError
from llmtune.data.literal import Literal
from llmtune.data.turns import Special

_PROVED = 8
"""Texts that are tokenised both ways before pieces are trusted."""
_SHORT, _KEPT = 256, 4096
"""Characters of a piece, and pieces, that are remembered."""

_OTHERWISE = (
    "split_special_tokens: found true, but {} of this model reads text otherwise beside special tokens; set "
    "split_special_tokens: false"
)
_PROBES = ("a", " a", "a ", "\n", "\n\n a", "Hello there.", "  b\n", "\t", "é 日本", "<b> 1,2")

Spans = Sequence[tuple[int, int]]
"""(start, stop) characters of a text."""
Found = tuple[np.ndarray, list[tuple[int, int]]]
"""(tokens,) int32 of a text, and for each of its spans the tokens (first, stop) that share a character with it."""


class Segments:
    """Ids of texts, and the tokens that given spans of characters take."""

    def __init__(self, tokenizer: Any, special: Special, literal: Literal | None = None) -> None:
        """With `literal`, the stand-ins in texts become the plain text they stand for.

        Raises:
            DataError: it is asked for, and this tokenizer's ids depend on what stands beyond special tokens.
        """
        self.tokenizer, self.special, self.literal = tokenizer, special, literal
        self.ids_of = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
        self._proved, self._sound = 0, _splits_cleanly(tokenizer)
        self._known: dict[str, list[int]] = {}
        if literal is not None and not self._sound:
            self._sound = _reads_apart(tokenizer, special)
        if literal is not None and not self._sound:
            raise DataError(_OTHERWISE.format(type(tokenizer).__name__))

    def encode(self, texts: Sequence[str], spans: Sequence[Spans]) -> list[Found]:
        """Tokenise `texts`, and find the tokens of the `spans` of each."""
        results: list[Found | None] = [None] * len(texts)
        if self._sound:
            results = self._by_pieces(texts, spans)
        trial = [
            at for at, text in enumerate(texts[: max(0, _PROVED - self._proved)]) if self._sound and self._plain(text)
        ]
        whole = sorted({*trial, *(at for at, result in enumerate(results) if result is None)})
        for at, found in zip(
            whole, self._by_offsets([texts[at] for at in whole], [spans[at] for at in whole]), strict=True
        ):
            piecewise = results[at]
            if piecewise is not None and not (np.array_equal(piecewise[0], found[0]) and piecewise[1] == found[1]):
                if self.literal is not None:
                    raise DataError(_OTHERWISE.format(type(self.tokenizer).__name__))
                self._sound = False
                return self.encode(texts, spans)
            results[at] = found
        self._proved += len(trial)
        return [result for result in results if result is not None]

    def _plain(self, text: str) -> bool:
        return self.literal is None or self.literal.restored(text) == text

    def _by_pieces(self, texts: Sequence[str], spans: Sequence[Spans]) -> list[Found | None]:
        split = [[(match.start(), match.end()) for match in self.special.pattern.finditer(text)] for text in texts]
        pieces = [self._pieces(text, marks) for text, marks in zip(texts, split, strict=True)]
        heads = [self._heads(text, marks, wanted) for text, marks, wanted in zip(texts, split, spans, strict=True)]
        missing = list(dict.fromkeys(
            piece for group in (*pieces, *(found.values() for found in heads if found)) for piece in group
            if piece not in self._known and piece not in self.ids_of
        ))  # fmt: skip
        ids_of = dict(zip(missing, self._ids(missing), strict=True))
        if len(self._known) < _KEPT:
            self._known |= {piece: ids for piece, ids in ids_of.items() if len(piece) <= _SHORT}
        return [
            None if found is None else self._joined(text, group, found, wanted, ids_of)
            for text, group, found, wanted in zip(texts, pieces, heads, spans, strict=True)
        ]

    def _ids(self, pieces: Sequence[str]) -> list[list[int]]:
        backend = self.tokenizer.backend_tokenizer
        if self.literal is None:
            return [each.ids for each in backend.encode_batch_fast(pieces, add_special_tokens=False)]
        before, backend.encode_special_tokens = backend.encode_special_tokens, True
        try:
            texts = [self.literal.restored(piece) for piece in pieces]
            return [each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=False)]
        finally:
            backend.encode_special_tokens = before

    def _pieces(self, text: str, marks: list[tuple[int, int]]) -> list[str]:
        """The text, cut before and after each special token."""
        bounds = [0, *(bound for mark in marks for bound in mark), len(text)]
        return [text[start:stop] for start, stop in pairwise(bounds) if stop > start]

    def _heads(self, text: str, marks: list[tuple[int, int]], spans: Spans) -> dict[int, str] | None:
        """For each bound of a span inside a piece, the part of the piece before it."""
        edges = {0, len(text), *(bound for mark in marks for bound in mark)}
        found = {}
        for bound in (bound for span in spans for bound in span):
            if bound not in edges:
                begin = max(edge for edge in edges if edge < bound)
                found[bound] = text[begin:bound]
        return found

    def _joined(
        self, text: str, pieces: list[str], heads: dict[int, str], spans: Spans, new: dict[str, list[int]]
    ) -> Found | None:
        """All ids, and the tokens of the spans; None where a bound falls inside a token."""
        ids: list[int] = []
        at_bound = {0: 0}
        place, waiting = 0, sorted(heads)
        for piece in pieces:
            own = [self.ids_of[piece]] if piece in self.ids_of else new.get(piece) or self._known.get(piece) or []
            while waiting and waiting[0] < place + len(piece):
                bound = waiting.pop(0)
                head = heads[bound]
                part = new.get(head) or self._known.get(head) or []
                if own[: len(part)] != part:
                    if self.literal is None:
                        return None
                    own = part + self._ids([text[bound : place + len(piece)]])[0]  # a turn begins with a token
                at_bound[bound] = len(ids) + len(part)
            ids += own
            place += len(piece)
            at_bound[place] = len(ids)
        return np.array(ids, np.int32), [(at_bound[start], at_bound[stop]) for start, stop in spans]

    def _by_offsets(
        self, texts: Sequence[str], spans: Sequence[Spans]
    ) -> list[tuple[np.ndarray, list[tuple[int, int]]]]:
        if not texts:
            return []
        # The template writes BOS itself where there is one, so none is added here.
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        results = []
        for ids, pairs, wanted in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True):
            offsets = np.array(pairs, np.int64).reshape(-1, 2)
            found = [
                (int(np.searchsorted(offsets[:, 1], start, "right")), int(np.searchsorted(offsets[:, 0], stop, "left")))
                for start, stop in wanted
            ]
            results.append((np.array(ids, np.int32), found))
        return results


def _splits_cleanly(tokenizer: Any) -> bool:
    """Whether ids between special tokens depend on nothing outside, as far as the tokenizer's parts tell."""
    backend = tokenizer.backend_tokenizer
    spelt = json.loads(backend.to_str())
    whole = all(
        str(token).strip() and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        for token in tokenizer.added_tokens_decoder.values()
    )
    pre = spelt["pre_tokenizer"] or {}
    names = {pre.get("type"), *(each["type"] for each in pre.get("pretokenizers", ()))}
    plain = spelt["normalizer"] is None or spelt["normalizer"]["type"] in ("NFC", "NFKC")
    return whole and plain and "ByteLevel" in names and names <= {"ByteLevel", "Split", "Digits", "Sequence"}


def _reads_apart(tokenizer: Any, special: Special) -> bool:
    """Whether some texts have the ids between special tokens that they have alone, whatever the tokenizer's parts are.

    So it is with Gemma's, and not with those that put a space before a text, as Llama 2's does.
    """
    marks = {str(text): token for token, text in tokenizer.added_tokens_decoder.items() if text.special}
    if any(text.lstrip or text.rstrip or text.single_word for text in tokenizer.added_tokens_decoder.values()):
        return False

    def alone(text: str) -> list[int]:
        return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    if alone("\na") != [*alone("\n"), *alone("a")]:
        return False  # something is put before each text
    for mark in [text for text in special.strings if text in marks][:2]:
        for probe in _PROBES:
            whole = tokenizer(mark + probe + mark, add_special_tokens=False, verbose=False)["input_ids"]
            if whole != [marks[mark], *alone(probe), marks[mark]]:
                return False
    return bool(marks)
