"""What requests show is read before their turn, by threads beside the engine's, so that a large picture of one holds up
nobody else."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmtune.contract.examples import ShownText
from llmtune.media.processor import MediaProcessor
from llmtune.media.read import ReadMedia

if TYPE_CHECKING:
    from torch import Tensor

_KEPT_BYTES = 2**30
"""Most bytes of tensors that wait for the engine: of 150 pictures of 768 x 768. What finds no room is read again."""


class ReadAhead:
    """The `MediaReader` of an engine that finds there what others have read; what it does not find, it reads."""

    def __init__(self, own: MediaProcessor, most_bytes: int = _KEPT_BYTES) -> None:
        self.own, self._room = own, most_bytes
        self._held: OrderedDict[ShownText, ReadMedia] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def placeholders(self) -> Sequence[int]:
        """The tokens that stand for what is shown."""
        return self.own.placeholders

    def fillers(self, kinds: Sequence[str], rows: Sequence[ShownText]) -> Sequence[tuple[Any, ShownText, Any]]:
        """Prompts that show something blank."""
        return self.own.fillers(kinds, rows)

    def prompt_tensors(
        self, rows: Sequence[ShownText], ids: Sequence[Sequence[int]], width: int, given: Sequence[int] | None = None
    ) -> Mapping[str, Tensor]:  # fmt: skip
        """What a model is given of prompts besides their tokens."""
        with self._lock:
            found = self._held.get(rows[0]) if len(rows) == 1 else None
        return self.own.prompt_tensors(rows, ids, width, given, found)

    def keep(self, shown: ShownText, read: ReadMedia) -> None:
        """Have what was made of one prompt for the engine; of more than there is room for, the latest."""
        with self._lock:
            if shown in self._held:  # asked twice at a time, about a file that stays where it is
                self._drop(shown)
            self._held[shown] = read
            self._room -= _bytes(read)
            while self._room < 0:
                self._drop(next(iter(self._held)))

    def forget(self, folder: Path) -> None:
        """Drop what shows files of this folder, which are gone."""
        with self._lock:
            for shown in [each for each in self._held if Path(each.media[0].paths[0]).parent == folder]:
                self._drop(shown)

    def _drop(self, shown: ShownText) -> None:
        self._room += _bytes(self._held.pop(shown))


@dataclass(frozen=True, kw_only=True)
class AheadProcessor(MediaProcessor):
    """A processor of a thread of its own that reads prompts whole, which an engine then need not."""

    ahead: ReadAhead

    @classmethod
    def of(cls, media: MediaProcessor, ahead: ReadAhead, most_decoded: int) -> AheadProcessor:
        """A copy of `media` for one thread, as tokenizers have settings. It decodes so many pixels of a video at
        most."""
        found = cls(
            folder=media.folder, tokenizer=deepcopy(media.tokenizer), config=media.config,
            trust_remote_code=media.trust_remote_code, most_decoded=most_decoded, ahead=ahead,
        )  # fmt: skip
        # Made from files in several threads at once, transformers' imports would meet each other half done.
        vars(found)["processor"] = deepcopy(media.processor, {id(media.tokenizer): found.tokenizer})
        return found

    def encode(self, shown: ShownText, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """The tokens of a prompt. BadRow where what it shows cannot be read."""
        if spans:
            return super().encode(shown, spans)
        read = self.made([shown])
        self.ahead.keep(shown, read)
        return read.made["input_ids"][0].numpy().astype(np.int32), []


def _bytes(read: ReadMedia) -> int:
    return sum(value.nbytes for value in read.made.values() if isinstance(value, torch.Tensor))
