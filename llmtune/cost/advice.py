"""What to change where a plan does not fit: changed recipes, planned and estimated like the first one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import LlmtuneError, raise_all
from llmtune.contract.extension_points import POINTS
from llmtune.contract.records import HoldsGathered
from llmtune.distributed.mesh import arrange
from llmtune.distributed.ranks import Ranks
from llmtune.planning.edit import STRUCTURE_POINTS
from llmtune.planning.make import make_model_plan
from llmtune.planning.micro_batch import MicroBatch, largest
from llmtune.recipe.parts import find_parts
from llmtune.recipe.registry import Registry

if TYPE_CHECKING:
    from llmtune.cost.figures import Figures
    from llmtune.planning.plan import Plan
    from llmtune.recipe.recipe import Recipe

LEVELS = ("none", "selective", "full")
MOST_RANKS = 1024
WORTH = 0.95
"""A change has to bring the peak below this share of what it was, by the formulas, or it is not named."""


@dataclass(frozen=True, kw_only=True)
class KeyChange:
    """Recipe keys to set, or another number of ranks."""

    keys: Mapping[str, Any] = field(default_factory=dict)
    ranks: int | None = None
    same: bool = True
    """Whether the trained model stays what it would have been."""

    def __str__(self) -> str:
        words = [f"{key}: {_shown(value)}" for key, value in self.keys.items()]
        return ", ".join([*words, *([f"--ranks {self.ranks}"] if self.ranks else [])])

    def __or__(self, other: KeyChange) -> KeyChange:
        keys = {**self.keys, **other.keys}
        return KeyChange(keys=keys, ranks=other.ranks or self.ranks, same=self.same and other.same)


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A change and what it gives."""

    change: KeyChange
    peak: int
    """Bytes on each rank."""
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Changes one by one, in the order in which to try them, and the first ones together that fit."""

    single: tuple[Suggestion, ...]
    together: Suggestion | None
    """Where none is enough alone: several at once; None if one is, or if nothing is known that fits."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""

        def plain(found: Suggestion) -> dict[str, Any]:
            result = {"change": str(found.change), "same_result": found.change.same}
            return result | {"peak": found.peak, "fits": found.fits}

        together = plain(self.together) if self.together else None
        return {"single": [plain(found) for found in self.single], "together": together}


def advise(cost: Figures) -> Advice:
    """Estimate each change that applies; then, if none is enough, add them up in order until they are.

    The formulas, which are instant, say when a trace is worth its time.
    """
    registry = Registry()
    single = list(suggestions(cost, registry))
    joined, peak, together = KeyChange(), cost.quick.at_peak.total, None
    for found in single if not any(found.fits for found in single) else ():
        changed = _changed(cost, joined | found.change, registry)
        if changed is None or changed.quick.at_peak.total > WORTH * peak:
            continue
        joined, peak = joined | found.change, changed.quick.at_peak.total
        if peak <= 1.1 * cost.device.usable and changed.fits:
            together = Suggestion(change=joined, peak=changed.memory.at_peak.total, fits=True)
            break
    return Advice(single=tuple(single), together=together)


def suggestions(cost: Figures, registry: Registry) -> Iterator[Suggestion]:
    """Each change that applies and helps, in the order in which to try them; estimated when it is asked for."""
    told: list[Suggestion] = []
    for change in candidates(cost, registry):
        changed = _changed(cost, change, registry)
        if changed is None or changed.quick.at_peak.total > WORTH * cost.quick.at_peak.total:
            continue
        found = Suggestion(change=change, peak=changed.memory.at_peak.total, fits=changed.fits)
        # Two names of one thing have one figure.
        if not any(found.peak == other.peak and change.keys.keys() == other.change.keys.keys() for other in told):
            told.append(found)
            yield found


def _changed(cost: Figures, change: KeyChange, registry: Registry) -> Figures | None:
    """The figures of a changed plan; None where it is impossible."""
    try:
        plan = replan(cost.plan, change, registry)
    except (LlmtuneError, ValueError):  # ValueError: keys that TrainConfig finds to contradict each other
        return None
    return type(cost)(plan=plan, shape=_shape(cost, plan), device=cost.device)


def replan(plan: Plan, change: KeyChange, registry: Registry) -> Plan:
    """The plan of the changed recipe, on the same data. Raises what an impossible recipe raises."""
    recipe, problems = changed_recipe(plan.recipe, change.keys), list[LlmtuneError]()
    parts = find_parts(recipe, registry, problems)
    raise_all(problems)
    ranks = arrange(Ranks(size=change.ranks or plan.ranks.size), parts.one("dist_config").built, "dist_config")
    model = plan.model
    if any(POINTS[key].edits for key in POINTS if key in change.keys):  # the structure has to be edited anew
        made = make_model_plan(recipe, registry, ranks, plan.device, mode="build", target=plan.target)
        model = replace(made, mode="train", compiled=model.compiled, checkpointing=model.checkpointing)
    context = replace(model.context, ranks=ranks.size, dims=ranks.dims)
    level = change.keys.get("activation_checkpointing", model.checkpointing)
    model = replace(
        model, parts=parts.of(STRUCTURE_POINTS), ranks=ranks, context=context, checkpointing=level,
        offloads=recipe.train.offload_activations,
    )  # fmt: skip
    return replace(plan, recipe=recipe, parts=parts, model=model)


def changed_recipe(recipe: Recipe, keys: Mapping[str, Any]) -> Recipe:
    """The recipe with other values of training keys, data keys and blocks."""
    blocks = dict(recipe.blocks)
    for point in POINTS.keys() & keys.keys():
        block = {"name": keys[point]} if isinstance(keys[point], str) else keys[point]
        blocks[point] = [(block["name"], {key: value for key, value in block.items() if key != "name"})]

    def of(config: Any) -> Any:
        return replace(config, **{item.name: keys[item.name] for item in fields(config) if item.name in keys})

    return replace(recipe, train=of(recipe.train), data=of(recipe.data), blocks=blocks)


def _shape(cost: Figures, plan: Plan) -> MicroBatch:
    """The largest micro-batch of the changed plan; rows are cut where `cutoff_len` became shorter."""
    shape, before, now = largest(plan), cost.plan.recipe.data.cutoff_len, plan.recipe.data.cutoff_len
    if now >= before:
        return shape
    rows = plan.recipe.train.per_device_train_batch_size if shape.flat else 1
    length = min(shape.length, rows * now)
    share = length / shape.length
    return replace(shape, length=length, targets=int(shape.targets * share), attended=shape.attended * share)


def candidates(cost: Figures, registry: Registry) -> Iterator[KeyChange]:
    """In order: first what leaves the result as it is, then what trains something else."""
    plan, train = cost.plan, cost.plan.recipe.train
    part = plan.parts.one("dist_config")
    savings = part.built.savings() if isinstance(part.built, HoldsGathered) else {}
    given = {name: parameters for name, parameters in plan.recipe.blocks.get("dist_config", ())}
    dist = {"name": part.plugin.name, **given.get(part.plugin.name, {})}
    # More micro-batches would otherwise mean whole gradients between them.
    whole = "gradients" in savings and plan.ranks.size > 1
    sharded = {"dist_config": {**dist, **savings["gradients"]}} if whole else {}
    for name in _offered("kernel_config", registry) if not plan.parts.at("kernel_config") else ():
        yield KeyChange(keys={"kernel_config": name})
    for level in LEVELS[LEVELS.index(plan.model.checkpointing) + 1 :]:
        yield KeyChange(keys={"activation_checkpointing": level, "disable_gradient_checkpointing": False})
    if not plan.model.offloads and cost.device.kind == "cuda":
        keys = {"activation_checkpointing": "full", "disable_gradient_checkpointing": False}
        yield KeyChange(keys={**keys, "offload_activations": True})
    rows, micros = train.per_device_train_batch_size, train.gradient_accumulation_steps
    for smaller in sorted({max(1, rows // 2), 1} - {rows}, reverse=True):
        if rows % smaller == 0:
            keys = {"per_device_train_batch_size": smaller, "gradient_accumulation_steps": micros * rows // smaller}
            yield KeyChange(keys={**keys, **sharded})
    if micros > 1 and sharded:
        yield KeyChange(keys=sharded)
    if cost.device.kind == "cuda":
        yield from _more_ranks(cost, registry)
    if "host" in savings:
        yield KeyChange(keys={"dist_config": {**dist, **savings["host"]}})
    yield from _other_training(plan, registry)


def _more_ranks(cost: Figures, registry: Registry) -> Iterator[KeyChange]:
    """The smallest doubling that the formulas find enough; where none is, the one after which little is gained."""
    peak, ranks = cost.quick.at_peak.total, cost.plan.ranks.size
    best = None
    while ranks < MOST_RANKS:
        ranks *= 2
        changed = _changed(cost, KeyChange(ranks=ranks), registry)
        if changed is None or (best and changed.quick.at_peak.total > 0.9 * peak):
            break
        best, peak = KeyChange(ranks=ranks), changed.quick.at_peak.total
        if peak <= 0.95 * cost.device.usable:
            break
    if best:
        yield best


def _other_training(plan: Plan, registry: Registry) -> Iterator[KeyChange]:
    """Changes after which something else is trained, or more coarsely."""
    optimizer = plan.parts.one("optim_config").plugin
    for name in _offered("optim_config", registry):
        # Another one that needs another learning rate is no help by itself; which take the same they say in a word.
        if name != optimizer.name and optimizer.gives & registry.find("optim_config", name).plugin.gives:
            yield KeyChange(keys={"optim_config": name}, same=False)
    adapters = [{"peft_config": name} for name in _offered("peft_config", registry)]
    adapters = [{}] if plan.parts.at("peft_config") else adapters
    yield from (KeyChange(keys=keys, same=False) for keys in adapters if keys)
    for name in _offered("quant_config", registry) if not plan.parts.at("quant_config") else ():
        yield from (KeyChange(keys={**keys, "quant_config": name}, same=False) for keys in adapters)
    for part in (2, 4):
        if (length := plan.recipe.data.cutoff_len // part) >= 256:
            yield KeyChange(keys={"cutoff_len": length}, same=False)


def _offered(point: str, registry: Registry) -> list[str]:
    """Names of installed plugins that can be used."""
    found = [row for row in registry.listing() if row.point == point and row.state == "ok"]
    return [row.name for row in found if all(met for _, met in row.requires)]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)
