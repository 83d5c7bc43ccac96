"""From what users bring to exactly the right tokens: rows, conversations, token samples, batches.

Names are loaded when they are first used, so that a recipe's data keys can be read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {
    name: module
    for module, names in {
        "llmtune.data.config": ("DataConfig", "Source", "sources"),
        "llmtune.data.reading": ("Chunk", "Dataset", "Row", "chunks", "content_key", "find"),
        "llmtune.data.formats": ("Chosen", "Formats", "read_row"),
        "llmtune.data.template": ("choose_template", "template_names"),
        "llmtune.data.render": ("Renderer",),
        "llmtune.data.tokens": ("TokenSamples",),
        "llmtune.data.pipeline": ("Prepared", "prepare"),
        "llmtune.data.report": ("DataReport", "SourceReport"),
        "llmtune.data.order": ("Order", "split"),
        "llmtune.data.units": ("Units", "concatenate", "pack"),
        "llmtune.data.batches": ("collate",),
    }.items()
    for name in names
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'llmtune.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
