"""What to change where a plan does not fit: changed recipes, planned and estimated like the first one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import LlmtuneError, raise_all
from llmtune.cost.shape import Shape, largest
from llmtune.distributed.ranks import Ranks

if TYPE_CHECKING:
    from llmtune.cost.estimate import Cost
    from llmtune.planning.plan import Plan

STRUCTURE = ("quant_config", "peft_config", "kernel_config")
"""Keys that change the model, which then has to be edited anew."""
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
        return KeyChange(
            keys={**self.keys, **other.keys}, ranks=other.ranks or self.ranks, same=self.same and other.same
        )


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

        return {
            "single": [plain(found) for found in self.single],
            "together": plain(self.together) if self.together else None,
        }


def advise(cost: Cost) -> Advice:
    """Estimate each change that applies; then, if none is enough, add them up in order until they are."""
    single: list[Suggestion] = []
    before = cost.quick.at_peak.total
    for change in candidates(cost):
        changed = _changed(cost, change)
        if changed is None or changed.quick.at_peak.total > WORTH * before:
            continue
        found = Suggestion(change=change, peak=changed.memory.at_peak.total, fits=changed.fits)
        # Two names of one thing have one figure.
        if not any(found.peak == other.peak and change.keys.keys() == other.change.keys.keys() for other in single):
            single.append(found)
    if any(found.fits for found in single):
        return Advice(single=tuple(single), together=None)
    return Advice(single=tuple(single), together=_together(cost, single))


def _together(cost: Cost, single: list[Suggestion]) -> Suggestion | None:
    """Helpful changes joined in their order. The formulas, which are instant, say when a trace is worth its time."""
    joined, peak = KeyChange(), cost.quick.at_peak.total
    for found in single:
        wider = joined | found.change
        changed = _changed(cost, wider)
        if changed is None or changed.quick.at_peak.total > WORTH * peak:
            continue
        joined, peak = wider, changed.quick.at_peak.total
        if peak <= 1.1 * cost.device.usable and changed.fits:
            return Suggestion(change=joined, peak=changed.memory.at_peak.total, fits=True)
    return None


def _changed(cost: Cost, change: KeyChange) -> Cost | None:
    try:
        plan = replan(cost.plan, change)
    except LlmtuneError:
        return None
    return replace(cost, plan=plan, shape=_shape(cost, plan), untraced="")


def replan(plan: Plan, change: KeyChange) -> Plan:
    """The plan of the changed recipe, on the same data. Raises what an impossible recipe raises."""
    from llmtune.contract.extension_points import EXTENSION_POINTS
    from llmtune.distributed.mesh import arrange
    from llmtune.planning.edit import STRUCTURE_POINTS
    from llmtune.planning.make import make_model_plan
    from llmtune.recipe.parts import find_parts
    from llmtune.recipe.recipe import load_recipe
    from llmtune.recipe.registry import Registry

    keys = {"trust_remote_code": plan.recipe.model.trust_remote_code, **change.keys}
    recipe, registry = load_recipe(dict(plan.recipe.tree), keys), Registry()
    problems: list[LlmtuneError] = []
    parts = find_parts(recipe, registry, problems, EXTENSION_POINTS)
    raise_all(problems)
    ranks = arrange(Ranks(size=change.ranks or plan.ranks.size), parts.one("dist_config").built, "dist_config")
    train = recipe.train
    if set(STRUCTURE) & set(change.keys):
        model = make_model_plan(recipe, registry, ranks, plan.device, mode="build", target=plan.target)
        model = replace(model, mode="train", compiled=train.torch_compile)
    else:
        context = replace(plan.model.context, ranks=ranks.size, layout=ranks.layout)
        model = replace(plan.model, parts=parts.of(STRUCTURE_POINTS), ranks=ranks, context=context)
    model = replace(model, checkpointing=train.checkpointing)
    return replace(plan, recipe=recipe, parts=parts, model=model)


def _shape(cost: Cost, plan: Plan) -> Shape:
    """The largest micro-batch of the changed plan; rows are cut where `cutoff_len` became shorter."""
    shape, before, now = largest(plan), cost.plan.recipe.data.cutoff_len, plan.recipe.data.cutoff_len
    if now >= before:
        return shape
    rows = plan.recipe.train.per_device_train_batch_size if shape.flat else 1
    length = min(shape.length, rows * now)
    share = length / shape.length
    return replace(shape, length=length, targets=int(shape.targets * share), attended=shape.attended * share)


def candidates(cost: Cost) -> Iterator[KeyChange]:
    """In order: first what leaves the result as it is, then what trains something else."""
    plan, train = cost.plan, cost.plan.recipe.train
    part = plan.parts.one("dist_config")
    block = {"name": part.plugin.name, **_given(plan.recipe.tree.get("dist_config"))}
    # More micro-batches would otherwise mean whole gradients between them.
    whole = getattr(part.config, "accumulate_sharded", None) is False and plan.ranks.size > 1
    sharded = {"dist_config": {**block, "accumulate_sharded": True}} if whole else {}
    for name in _offered("kernel_config") if "kernel_config" not in plan.recipe.blocks else ():
        yield KeyChange(keys={"kernel_config": name})
    levels = ("none", "selective", "full")
    for level in levels[levels.index(train.checkpointing) + 1 :]:
        yield KeyChange(keys={"activation_checkpointing": level, "disable_gradient_checkpointing": False})
    rows, micros = train.per_device_train_batch_size, train.gradient_accumulation_steps
    for smaller in sorted({max(1, rows // 2), 1} - {rows}, reverse=True):
        if rows % smaller == 0:
            keys = {"per_device_train_batch_size": smaller, "gradient_accumulation_steps": micros * rows // smaller}
            yield KeyChange(keys={**keys, **sharded})
    if micros > 1 and sharded:
        yield KeyChange(keys=sharded)
    if cost.device.kind == "cuda":
        yield from _more_ranks(cost)
    if getattr(part.config, "offload_params", None) is False:
        yield KeyChange(keys={"dist_config": {**block, "offload_params": True}})
    yield from _other_training(cost)


def _more_ranks(cost: Cost) -> Iterator[KeyChange]:
    """The smallest doubling that the formulas find enough; where none is, the one after which little is gained."""
    peak, ranks = cost.quick.at_peak.total, cost.plan.ranks.size
    best = None
    while ranks < MOST_RANKS:
        ranks *= 2
        changed = _changed(cost, KeyChange(ranks=ranks))
        if changed is None or (best and changed.quick.at_peak.total > 0.9 * peak):
            break
        best, peak = KeyChange(ranks=ranks), changed.quick.at_peak.total
        if peak <= 0.95 * cost.device.usable:
            break
    if best:
        yield best


def _other_training(cost: Cost) -> Iterator[KeyChange]:
    """Changes after which something else is trained, or more coarsely."""
    plan = cost.plan
    for name in _offered("optim_config"):
        if name != plan.parts.one("optim_config").plugin.name:
            yield KeyChange(keys={"optim_config": name}, same=False)
    peft, quant = plan.parts.at("peft_config"), plan.parts.at("quant_config")
    for name in _offered("peft_config") if not peft else ():
        yield KeyChange(keys={"peft_config": name}, same=False)
    for name in _offered("quant_config") if not quant else ():
        if peft:
            yield KeyChange(keys={"quant_config": name}, same=False)
            continue
        for adapter in _offered("peft_config"):
            yield KeyChange(keys={"peft_config": adapter, "quant_config": name}, same=False)
    for part in (2, 4):
        if (length := plan.recipe.data.cutoff_len // part) >= 256:
            yield KeyChange(keys={"cutoff_len": length}, same=False)


def _offered(point: str) -> list[str]:
    """Names of installed plugins that can be used."""
    from llmtune.recipe.registry import Registry

    found = [row for row in Registry().listing() if row.point == point and row.state == "ok"]
    return [row.name for row in found if all(met for _, met in row.requires)]


def _given(block: Any) -> dict[str, Any]:
    return dict(block) if isinstance(block, Mapping) else {}


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)
