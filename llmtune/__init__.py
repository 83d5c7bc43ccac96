"""llmtune: fine-tune language models from a short recipe. Importing it loads neither torch nor transformers."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    name: module
    for module, names in {
        "llmtune.run": ("train", "plan", "build", "load", "Run"),
        "llmtune.looking": ("check_data", "preview", "stats"),
        "llmtune.hookspecs": ("hookimpl",),
        "llmtune.records": (
            "API_VERSION", "Plugin", "Situation", "Part", "LoadRule", "Change", "Edit", "Quant", "Peft", "Kernel",
            "Reopens", "TensorReader", "Init", "Distribute", "Layout",
            "OptimizerFactory", "Repacks", "Schedule", "Logger", "Event", "StepDone", "Evaluated", "Saved", "Checks",
        ),
        "llmtune.stages": ("StageLoss", "Batch", "StageContext", "Stage"),
        "llmtune.examples": (
            "BadRow", "Conversation", "DataFormat", "Example", "Labelled", "Message", "Preference", "Prompt", "Text",
            "Tokens",
        ),
        "llmtune.structure": ("transformer_layers", "linear_layers", "output_heads"),
        "llmtune.errors": (
            "LlmtuneError", "RecipeError", "PlanError", "PluginError", "DataError", "LoadError", "CheckpointError",
            "EditError", "DivergedError", "OutOfMemoryError",
        ),
        "llmtune.schema": ("Ge", "Gt", "Le", "Lt", "split_names"),
    }.items()
    for name in names
}  # fmt: skip

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'llmtune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
