"""Where this was before `llmtune.testing` had it."""

from llmtune.testing.ranks import in_ranks

__all__ = ["in_ranks"]
