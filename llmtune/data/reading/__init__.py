"""From the spelling of a data set to raw rows. Nothing here knows what a row means."""

from __future__ import annotations

from llmtune.data.reading.content import content_key
from llmtune.data.reading.dataset import Dataset, HubAccess, find
from llmtune.data.reading.read import chunks, first_rows, separated
from llmtune.data.reading.rows import Chunk, Position, Row

__all__ = [
    "Chunk", "Dataset", "HubAccess", "Position", "Row", "chunks", "content_key", "find", "first_rows", "separated",
]  # fmt: skip
