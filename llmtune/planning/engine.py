"""What an engine is told of a model that it reads from files, and what keeps it from answering as that model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from llmtune.contract.evaluation import MeasuresAnswers, MeasuresModel
from llmtune.contract.generation import ReadsFiles, ServedModel
from llmtune.contract.records import Adapter
from llmtune.contract.stages import RollsOut
from llmtune.model.source import resolve_model

if TYPE_CHECKING:
    from llmtune.planning.model_plan import ModelPlan
    from llmtune.recipe.parts import Parts
    from llmtune.recipe.train_config import TrainConfig

Load = Callable[[], tuple[Any, Callable[[], AbstractContextManager[Any]]]]


def served_model(plan: ModelPlan, name: str, adapter: str | None, load: Load) -> ServedModel:
    """The model of a plan, with an adapter that another file than its recipe names."""
    differs = differs_from_files(plan)
    if adapter is None and plan.mode == "infer":
        read = {path.parent for path, _ in plan.ledger.files.values()}
        if len(read) == 1:
            adapter = str(read.pop())
    if adapter is None and plan.mode != "train" and plan.parts.at("peft_config"):
        differs = differs or "what peft_config has changed is in no files of an adapter"
    return ServedModel(
        name=name, folder=str(resolve_model(plan.keys, plan.hub, weights=True).folder), adapter=adapter,
        dtype=str(plan.precision.compute).removeprefix("torch."), differs=differs, load=load,
    )  # fmt: skip


def differs_from_files(plan: ModelPlan) -> str | None:
    """What of a model is in no file of its base, and in none of one adapter: half a sentence; None where all is."""
    for part in plan.parts.at("peft_config"):
        if not isinstance(part.built, Adapter):
            return f"peft_config {part.plugin.name} changes weights of the base"
    for part in plan.parts.at("quant_config"):
        return f"quant_config {part.plugin.name} stores it in fewer bits than its files; quant_config=null reads these"
    if plan.keys.rope_scaling is not None:
        return "rope_scaling stretches its positions"
    if plan.keys.train_from_scratch is not False:
        return "its weights start from random numbers (train_from_scratch)"
    if plan.vocabulary is not None:
        return "it has rows for more tokens than its files"
    return "adapters are merged into it" if plan.ledger.beneath() else None


def asks_engine(train: TrainConfig, parts: Parts) -> bool:
    """Whether a run lets its model answer anything."""
    measured = (MeasuresAnswers, MeasuresModel)
    evaluates = train.eval_strategy != "no" and any(isinstance(p.built, measured) for p in parts.at("eval_config"))
    rolls_out = isinstance(parts.one("stage_config").built, RollsOut)
    return rolls_out or evaluates or train.do_predict or bool(train.sample_prompts)


def engine_objections(train: TrainConfig, parts: Parts, model: ModelPlan) -> Iterator[str]:
    """What keeps an engine that reads files from answering as the model that trains."""
    engine = parts.one("engine_config")
    if not isinstance(engine.built, ReadsFiles) or not asks_engine(train, parts):
        return
    differs = differs_from_files(model)
    if not parts.at("peft_config"):
        differs = "all of its weights train, and files have what they were"
    if differs is not None:
        yield (
            f"engine_config: {engine.plugin.name} reads the model from files, but {differs}; train an adapter "
            "(peft_config: lora) on the model as its files have it, or leave engine_config out"
        )


def close_engine(parts: Parts) -> None:
    """Let an engine that reads files end what it has started."""
    for part in parts.at("engine_config"):
        if isinstance(part.built, ReadsFiles):
            part.built.close()
