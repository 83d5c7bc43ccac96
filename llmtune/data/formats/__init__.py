"""Rows become examples: conversations, preferences, labelled answers, prompts, texts, tokens.

Every format says how it is recognised, so that what was detected can be explained, and checks its own fields, so that
a row which does not fit is named with the reason instead of being guessed at.
"""

from __future__ import annotations

from llmtune.data.formats.choose import LOOKED_AT, Formats, answers_prompts, check_kind, kind_for
from llmtune.data.formats.row import Chosen, read_row

__all__ = ["LOOKED_AT", "Chosen", "Formats", "answers_prompts", "check_kind", "kind_for", "read_row"]
