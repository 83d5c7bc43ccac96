"""What a step costs on a device: memory by category, FLOPs, time. Nothing here touches weights or a GPU."""

from __future__ import annotations

from llmtune.cost.estimate import Cost, estimate

__all__ = ["Cost", "estimate"]
