"""llmtune: fine-tune language models from a short recipe. Importing it loads neither torch nor transformers."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    name: module
    for module, names in {
        "llmtune.api": ("train", "plan", "build", "load", "predict", "Run"),
        "llmtune.recipe.recipe": ("recipe_errors",),
        "llmtune.recipe.reference": ("recipe_schema",),
        "llmtune.conversion.convert": ("convert", "Conversion"),
        "llmtune.inference.chat": ("open_chat",),
        "llmtune.history.listing": ("runs",),
        "llmtune.inference.inspect": ("check_data", "preview", "stats"),
        "llmtune.contract.events": ("Event", "StepDone", "Evaluated", "Saved"),
        "llmtune.contract.hookspecs": ("hookimpl",),
        "llmtune.contract.load_rules": ("TensorPart", "LoadRule", "WeightRule", "TensorReader"),
        "llmtune.contract.records": (
            "API_VERSION", "Plugin", "RunContext", "ModelEdit", "Edit", "Quant", "Peft", "Kernel",
            "Adapter", "Amends", "Amendment", "Merges", "SwitchesOff", "TrainsWhole", "Reopens",
            "Init", "ReadsOnFirst", "Distribute", "HoldsGathered", "ParallelDims",
            "Schedule", "FollowsEvaluations", "Checks",
        ),
        "llmtune.contract.loggers": (
            "Logger", "LoggerStart", "Continues", "FollowsStatus", "RunStatus", "SampleAnswer", "TakesPictures",
            "TakesSamples",
        ),
        "llmtune.contract.optimizers": (
            "OptimizerFactory", "OptimizerContext", "ParameterGroup", "ParameterRole", "ChangesWhatTrains",
            "ChecksGroups", "Remarks", "Repacks", "SpreadsState", "StepsEach", "UpdatesInBackward",
        ),
        "llmtune.contract.losses": ("StageLoss",),
        "llmtune.contract.stages": (
            "Batch", "StageContext", "Stage", "LearnsFrom", "Counts", "Measures", "ModelSpec", "Precomputes",
            "Prepares", "Remembers", "RollsOut", "UsesModels", "WithoutDropout",
        ),
        "llmtune.contract.examples": (
            "BadRow", "Conversation", "DataFormat", "Example", "Media", "Message", "Preference", "Prompt",
            "SaysWhatItNeeds", "ShownText", "Text", "Tokens", "UnpairedPreference",
        ),
        "llmtune.contract.evaluation": (
            "AskedModel", "Evaluator", "MeasuresAnswers", "MeasuresBatches", "MeasuresModel", "Prediction",
        ),
        "llmtune.contract.rewards": ("ReadsRows", "Reward"),
        "llmtune.contract.hubs": ("Hub", "HubUnreachable", "NotOnHub", "Repository", "RepositoryFiles"),
        "llmtune.contract.launching": ("Launcher", "LaunchRequest", "Machines"),
        "llmtune.distributed.launch": ("rank_environment", "LaunchError"),
        "llmtune.contract.generation": (
            "Answer", "AnswerRequest", "Asked", "Completion", "Deliver", "Engine", "GenerateConfig", "NewToken",
            "ReadsFiles", "ServedModel", "Serves", "Serving", "ShownPrompt", "TakesMedia",
        ),
        "llmtune.model.continuous": ("ContinuousServing",),
        "llmtune.model.generate": ("generate", "ContextFull", "room_of", "stop_tokens"),
        "llmtune.contract.structure": (
            "transformer_layers", "language_model", "text_layers", "linear_layers", "output_heads",
        ),
        "llmtune.model.hub": ("fetch_files",),
        "llmtune.model.adapter_files": ("peft_folder", "subfolder_of"),
        "llmtune.contract.errors": (
            "LlmtuneError", "RecipeError", "PlanError", "PluginError", "DataError", "LoadError", "CheckpointError",
            "EditError", "DivergedError", "OutOfMemoryError", "RewardError",
        ),
        "llmtune.contract.former_names": ("Situation", "Change", "Layout", "Labelled", "Part"),
        "llmtune.contract.schema": ("Ge", "Gt", "Le", "Lt", "split_names"),
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
