"""What a stage asks its further models before training: computed once for each sample, and kept for later starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from llmtune.contract.stages import further_models, precomputing
from llmtune.data.batch_loader import evaluation_batches
from llmtune.data.cache import key_of
from llmtune.data.hashes import file_hash
from llmtune.distributed.ranks import first_does, total
from llmtune.folders import cache_root, make_readable
from llmtune.model.fingerprint import fingerprint
from llmtune.model.source import resolve_model
from llmtune.terminal import doing

if TYPE_CHECKING:
    from llmtune.contract.stages import Precomputes
    from llmtune.data.tokens import TokenSamples
    from llmtune.planning.model_plan import ModelPlan
    from llmtune.planning.plan import Plan
    from llmtune.training.objective import Context

Numbers = Mapping[str, np.ndarray]
"""(samples * width,) float32 under each name."""


def kept_numbers(plan: Plan) -> list[Numbers] | None:
    """The numbers of the samples to train and to evaluate on, as an earlier start has kept them. Collective."""

    def read() -> list[Numbers] | None:
        places = list(_places(plan))
        if plan.recipe.data.overwrite_cache or not all(place.exists() for place in places):
            return None
        with suppress(OSError, SafetensorError):  # damaged: made again
            found: list[Numbers] = [load_file(place) for place in places]
            if all(_fits(numbers, samples) for numbers, samples in zip(found, _parts(plan), strict=True)):
                return found
        return None

    return first_does(read)


def precomputed(plan: Plan, context: Context, run: Callable[[Callable[[], Any]], Any]) -> list[Numbers]:
    """Ask the stage for the numbers of all samples, spread over the ranks, and keep them. Collective.

    `run` calls a function where the models of `context` can be used: inside the root module's forward.
    """
    stage, train = _stage(plan), plan.recipe.train
    names = ", ".join(further_models(plan.parts.one("stage_config").built))
    doing.info("Asking the %s about every sample, once before training", names)
    found: list[Numbers] = []
    for samples in _parts(plan):
        numbers: dict[str, np.ndarray] = {}
        for batch in evaluation_batches(
            samples, per_device=max(train.per_device_train_batch_size, train.per_device_eval_batch_size),
            ranks=plan.ranks, flat=plan.data.batches.flat, pad_id=plan.data.batches.pad_id, device=plan.device,
            media=plan.data.batches.media,
        ):  # fmt: skip
            with torch.no_grad():
                said = run(partial(stage.precompute, batch, context))
            spots = [sample * samples.width + part for sample in batch.sample_ids for part in range(samples.width)]
            for name, values in said.items():
                numbers.setdefault(name, np.zeros(len(samples) * samples.width, np.float32))[spots] = values.cpu()
        found.append({name: _from_all_ranks(plan, values) for name, values in numbers.items()})
    first_does(partial(_keep, plan, found))
    return found


def with_numbers(plan: Plan, numbers: list[Numbers]) -> Plan:
    """The plan whose samples have the numbers."""
    parts = [replace(samples, precomputed=each) for samples, each in zip(_parts(plan), numbers, strict=True)]
    data = replace(plan.data, batches=replace(plan.data.batches, samples=parts[0]))
    if len(parts) > 1:
        data = replace(data, prepared=replace(data.prepared, evaluation=parts[1]))
    return replace(plan, data=data)


def _stage(plan: Plan) -> Precomputes:
    stage = precomputing(plan.parts.one("stage_config").built)
    assert stage is not None
    return stage


def _parts(plan: Plan) -> list[TokenSamples]:
    """The samples to train on and, where there are any, those to evaluate on."""
    evaluation = plan.data.prepared.evaluation
    return [plan.data.batches.samples, *([] if evaluation is None else [evaluation])]


def _fits(numbers: Numbers, samples: TokenSamples) -> bool:
    return all(values.shape == (len(samples) * samples.width,) for values in numbers.values())


def _from_all_ranks(plan: Plan, values: np.ndarray) -> np.ndarray:
    """Every rank has the numbers of its own samples, and 0 for others; a tensor group has them several times."""
    return (total(torch.tensor(values, device=plan.device)) / plan.ranks.dims.tensor).cpu().numpy()


def _keep(plan: Plan, found: list[Numbers]) -> None:
    for place, numbers in zip(_places(plan), found, strict=True):
        with suppress(OSError):  # only a later start is slower for it
            place.parent.mkdir(parents=True, exist_ok=True)
            new = place.with_name(f".{place.name}.{os.getpid()}")
            save_file(dict(numbers), new)
            make_readable(new)
            new.replace(place)


def _places(plan: Plan) -> Iterator[Path]:
    """Files beside the tokenised data in the cache, named by everything that the numbers depend on."""
    stage = plan.parts.one("stage_config")
    models = {
        name: _facts(
            plan.further.get(name, plan.model), ("quant_config", *(["peft_config"] if name in plan.further else []))
        )
        for name in further_models(stage.built)
    }
    reads = plan.data.batches.media  # of whose work on pictures tokens tell nothing
    for samples in _parts(plan):
        facts = {
            "data": samples.digest or samples.hashed(), "models": models, "stage": [stage.label, stage.package],
            "keys": _stage(plan).precomputed, "media": reads.facts() if samples.media_kinds and reads else None,
        }  # fmt: skip
        yield cache_root() / "data" / f"{key_of(facts)}.precomputed.safetensors"


def _facts(plan: ModelPlan, points: tuple[str, ...]) -> dict[str, Any]:
    """What tells a frozen model from another: its files, its adapters' files, and how it is held and computed."""
    return {
        "weights": fingerprint(resolve_model(plan.keys, plan.hub, weights=True).folder),
        "adapters": sorted(file_hash(path) for path in plan.ledger.read_files()),
        "config": plan.module.config.to_json_string(),
        "parts": [[part.label, part.package, repr(part.config)] for at in points for part in plan.parts.at(at)],
        "precision": repr(plan.precision),
        "seed": plan.seed if plan.vocabulary else None,
    }
