"""Tokenising renderings, and finding which tokens belong to a stretch of the text.

Special tokens split a text before anything else looks at it, so that what stands between two of them mostly has the
same ids whatever surrounds it. Where that holds, which is tried with each tokenizer, texts are tokenised in the pieces
between special tokens: one that comes again, such as a system message, is tokenised once, offsets hardly needed.
Elsewhere a text is one piece.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, pairwise
from operator import itemgetter
from typing import Any

import numpy as np

from llmtune.contract.errors import DataError
from llmtune.data.literal import Literal
from llmtune.data.turns import Special

_PROVED = 8
"""Texts that are tokenised whole, too, before pieces are trusted."""
_PROBES = ("a", " a", "a ", "\n", "\n\n a", "Hello there.", "  b\n", "\t", "é 日本", "<b> 1,2")

Spans = Sequence[tuple[int, int]]
"""(start, stop) characters of a text."""
Found = tuple[np.ndarray, list[tuple[int, int]]]
"""(tokens,) int32 of a text, and for each of its spans the tokens (first, stop) that share a character with it."""
Bound = tuple[int, str]
"""Where a span starts or stops: the number of a piece, and what of the piece stands before."""


class Segments:
    """Ids of texts, and the tokens that given spans of characters take."""

    def __init__(self, tokenizer: Any, special: Special, literal: Literal | None = None) -> None:
        """With `literal`, the stand-ins in texts become the plain text they stand for.

        Raises:
            DataError: it is asked for, and this tokenizer's ids depend on what stands beyond special tokens.
        """
        self.tokenizer, self.special, self.literal = tokenizer, special, literal
        self._marks = dict(zip(special.strings, self._tokens(special.strings), strict=True))
        self._unproved = _PROVED
        self._apart = self._reads_apart()
        self._check()

    def encode(self, texts: Sequence[str], spans: Sequence[Spans]) -> list[Found]:
        """Tokenise `texts`, and find the tokens of the `spans` of each."""
        cut = [self._pieces(text) for text in texts]
        bounds = [_bounds(pieces, wanted) for pieces, wanted in zip(cut, spans, strict=True)]
        new = {piece: None for pieces in cut for piece in pieces}
        if self._apart:
            new |= {head: None for found in bounds for _, head in found}
        asked = [piece for piece in new if piece not in self._marks]
        tokens = self._marks | dict(zip(asked, self._tokens(asked, literal=True, offsets=not self._apart), strict=True))
        results = [self._joined(pieces, found, tokens) for pieces, found in zip(cut, bounds, strict=True)]
        if self._apart and self._unproved:
            trial = [at for at, text in enumerate(texts) if self._restored(text) == text][: self._unproved]
            self._unproved -= len(trial)
            whole = self._tokens([texts[at] for at in trial])
            self._apart = all(results[at][0].tolist() == one.ids for at, one in zip(trial, whole, strict=True))
            self._check()
            return results if self._apart else self.encode(texts, spans)
        return results

    def _check(self) -> None:
        if self.literal is not None and not self._apart:
            raise DataError(
                f"split_special_tokens: found true, but {type(self.tokenizer).__name__} of this model reads text "
                "otherwise beside special tokens; set split_special_tokens: false"
            )

    def _tokens(self, pieces: Sequence[str], *, literal: bool = False, offsets: bool = False) -> Sequence[Any]:
        """The `tokenizers.Encoding` of each, with `offsets` or without, which is quicker.

        With `literal`, special tokens in them are plain text where that is asked for. The template writes BOS itself
        where there is one, so none is added here.
        """
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding(), backend.no_truncation()  # whoever used the tokenizer last may have left them on
        backend.encode_special_tokens = literal and self.literal is not None
        try:
            encode = backend.encode_batch if offsets else backend.encode_batch_fast
            return encode([self._restored(piece) for piece in pieces], add_special_tokens=False)
        finally:
            backend.encode_special_tokens = False

    def _restored(self, text: str) -> str:
        return text if self.literal is None else self.literal.restored(text)

    def _pieces(self, text: str) -> list[str]:
        """The text, cut before and after each special token where they keep its parts apart."""
        if not self._apart:
            return [text]
        marks = (bound for mark in self.special.pattern.finditer(text) for bound in mark.span())
        return [text[start:stop] for start, stop in pairwise((0, *marks, len(text))) if stop > start] or [text]

    def _joined(self, pieces: Sequence[str], bounds: Sequence[Bound], tokens: Mapping[str, Any]) -> Found:
        """All ids of a text, and the tokens between each two of the bounds."""
        own = [tokens[piece].ids for piece in pieces]
        counts = list(accumulate(map(len, own), initial=0))
        edges, offsets = [], {}
        for number, (at, head) in enumerate(bounds):
            before = tokens[head].ids if self._apart else None
            if before is not None and own[at][: len(before)] == before and self.tokenizer.unk_token_id not in before:
                edges.append(counts[at] + len(before))
                continue
            if at not in offsets:  # a bound may fall inside a token, which is then the span's
                piece = pieces[at]
                (whole,) = self._tokens([piece], literal=True, offsets=True) if self._apart else [tokens[piece]]
                offsets[at] = whole.offsets
            bisect, side = (bisect_left, 0) if number % 2 else (bisect_right, 1)
            edges.append(counts[at] + bisect(offsets[at], len(self._restored(head)), key=itemgetter(side)))
        ids = np.fromiter(chain.from_iterable(own), np.int32, counts[-1])
        return ids, list(zip(edges[::2], edges[1::2], strict=True))

    def _reads_apart(self) -> bool:
        """Whether some texts have the ids between special tokens that they have alone.

        So it is with most, and not where special tokens swallow spaces, or where only the very beginning of a text has
        a space put before it.
        """
        added = self.tokenizer.added_tokens_decoder.values()
        if any(text.lstrip or text.rstrip or text.single_word or text.normalized for text in added):
            return False
        marks = self.special.strings[:2]
        alone = self._tokens(_PROBES)
        return bool(marks) and all(
            self._tokens([mark + probe + mark])[0].ids == [*self._marks[mark].ids, *one.ids, *self._marks[mark].ids]
            for mark in marks
            for probe, one in zip(_PROBES, alone, strict=True)
        )


def _bounds(pieces: Sequence[str], spans: Spans) -> list[Bound]:
    """The start and the stop of each span, in turn."""
    places = list(accumulate(map(len, pieces), initial=0))
    found = []
    for start, stop in spans:
        for bound, at in ((start, bisect_right(places, start) - 1), (stop, bisect_left(places, stop) - 1)):
            at = min(max(at, 0), len(pieces) - 1)
            found.append((at, pieces[at][: bound - places[at]]))
    return found
