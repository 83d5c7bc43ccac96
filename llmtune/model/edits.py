"""Structure first: apply edits to a model without weights, and keep account of where every tensor went.

Each edit reports what it did (`ModelEdit`); the `Ledger` checks the report against what it sees. Tensors are
followed by object identity, so a plugin may wrap a module without saying so, but cannot lose a weight or invent one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmtune.contract.errors import EditError, listed
from llmtune.contract.load_rules import LoadRule, WeightRule
from llmtune.contract.records import Edit, ModelEdit, RunContext

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from llmtune.contract.optimizers import ParameterRole


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names (a tied weight has several)."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return tensors | dict(model.named_buffers(remove_duplicate=False))


def persistent_names(model: nn.Module) -> set[str]:
    """Names a state dict would hold: all parameters, and the buffers not registered as temporary."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules(remove_duplicate=False):
        temporary = module._non_persistent_buffers_set
        names |= {
            f"{prefix}.{name}" if prefix else name
            for name in module._buffers
            if name not in temporary and module._buffers[name] is not None
        }
    return names


@dataclass
class PlacedRule:
    """A load rule, and where its targets are now."""

    rule: LoadRule
    plugin: str
    where: dict[str, str]
    """The rule's name of a target to its present name."""


@dataclass
class PlacedWeightRule:
    """A weight rule, and where its targets are now."""

    rule: WeightRule
    plugin: str
    where: dict[str, str]
    """The rule's name of a target to its present name."""


@dataclass
class Ledger:
    """Where each tensor of the original model is now, and how every new one gets its value."""

    model: nn.Module
    direct: dict[str, str] = field(default_factory=dict)
    """Original name to present name, for tensors that no rule converts."""
    rules: dict[str, PlacedRule] = field(default_factory=dict)
    """Original name to the rule that converts it."""
    weight_rules: dict[str, list[PlacedWeightRule]] = field(default_factory=dict)
    """Original name to the rules that change it before that, in order."""
    fresh: dict[str, Callable[[Tensor], object]] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    files: dict[str, tuple[Path, str]] = field(default_factory=dict)
    tp_follow: dict[str, Literal["inputs", "outputs"]] = field(default_factory=dict)
    """New linear modules that are split with the layer they are in."""
    aside: set[str] = field(default_factory=set)
    """Names of tensors that train and are no part of the result."""
    upcast: set[str] = field(default_factory=set)
    """Original names of tensors that are kept in float32 for the run alone; its result has them in its own type."""
    filled: set[str] = field(default_factory=set)
    """Names of persistent buffers that already hold real values."""
    after_load: list[tuple[str, Callable[[nn.Module], None]]] = field(default_factory=list)
    trainable: Callable[[str], bool] | None = None
    trainable_by: str = ""
    roles: dict[str, ParameterRole] = field(default_factory=dict)
    """What new parameters are for, where an edit has said so."""
    lr_factors: dict[str, float] = field(default_factory=dict)
    """Multipliers of the learning rate that are not 1."""
    changes: list[tuple[str, ModelEdit]] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the original tensors as the checkpoint holds them, by original name."""
    sources: dict[str, str] = field(default_factory=dict)
    """Original name to the name under which the files' own model has what it starts from, where layers were added."""

    def __post_init__(self) -> None:
        tensors = named_tensors(self.model)
        self.shapes = {name: tuple(tensors[name].shape) for name in persistent_names(self.model)}
        self.direct = {name: name for name in sorted(persistent_names(self.model))}

    def apply(self, plugin: str, edit: Edit, context: RunContext) -> ModelEdit:
        """Run one edit and check its report. Raises EditError naming the plugin."""
        before = named_tensors(self.model)
        change = edit.apply(self.model, context)
        after = named_tensors(self.model)
        moved = _moves(before, after)
        self._check(plugin, change, before, after, moved)
        self._follow(moved)
        for rule in change.weight_rules:
            placed = PlacedWeightRule(rule, plugin, {target: target for target in rule.targets})
            self.weight_rules.setdefault(self._original(plugin, moved.get(rule.source, rule.source)), []).append(placed)
        for rule in change.rules:
            original = next(
                (old for old, now in self.direct.items() if now == moved.get(rule.source, rule.source)), None
            )
            if original is None:
                raise EditError(
                    f"plugin {plugin} gave a load rule for {rule.source}, which is not a tensor of the original model"
                )
            del self.direct[original]
            self.rules[original] = PlacedRule(rule, plugin, {target: target for target in rule.targets})
        self.fresh |= change.fresh
        self.copies |= change.copies
        self.files |= change.files
        self.tp_follow |= change.tp_follow
        self.filled |= change.buffers
        self.aside |= change.aside
        self.roles |= change.roles
        if change.lr_factor is not None:
            self.lr_factors |= {name: factor for name in after if (factor := change.lr_factor(name)) != 1.0}
        self.after_load += [(plugin, step) for step in change.after_load]
        if change.trainable is not None:
            if self.trainable is not None:
                raise EditError(
                    f"both {self.trainable_by} and {plugin} decide which parameters train; a recipe can name one"
                )
            self.trainable, self.trainable_by = change.trainable, plugin
        self.changes.append((plugin, change))
        return change

    def _original(self, plugin: str, now: str) -> str:
        """The original name of the tensor `now`, or of what a rule has made it of. Raises EditError."""
        for old, name in self.direct.items():
            if name == now:
                return old
        for old, placed in self.rules.items():
            if now in placed.where.values():
                return old
        raise EditError(f"plugin {plugin} gave a weight rule for {now}, which is not a tensor of the original model")

    def _check(
        self,
        plugin: str,
        change: ModelEdit,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        moved: Mapping[str, str],
    ) -> None:
        kept = {id(tensor) for tensor in after.values()}
        known = {id(tensor) for tensor in before.values()}
        persistent = persistent_names(self.model)
        ruled = {rule.source for rule in change.rules}
        if lost := [
            n for n, t in before.items() if id(t) not in kept and n in set(self.direct.values()) and n not in ruled
        ]:
            raise EditError(f"plugin {plugin} removed {listed(lost)} and gave no rule to load them elsewhere")
        told = (
            {t for rule in (*change.rules, *change.weight_rules) for t in rule.targets}
            | set(change.fresh)
            | set(change.copies)
        )
        told |= set(change.files) | change.buffers
        new = {name: tensor for name, tensor in after.items() if id(tensor) not in known}
        if unknown := [name for name in new if name in persistent and name not in told]:
            raise EditError(
                f"plugin {plugin} added {listed(unknown)} and said neither how to load nor how to initialise them"
            )
        if early := [
            name for name, t in new.items() if not t.is_meta and name in persistent and name not in change.buffers
        ]:
            raise EditError(f"plugin {plugin} materialised {listed(early)} before the weights are loaded")
        if untold := sorted(change.aside - told):
            raise EditError(f"plugin {plugin} sets {listed(untold)} aside and did not say how to initialise them")
        if absent := [name for name in (*told, *change.roles) if name not in after]:
            raise EditError(f"plugin {plugin} reported {listed(absent)}, which the model does not have")

    def _follow(self, moved: Mapping[str, str]) -> None:
        def now(name: str) -> str:
            return moved.get(name, name)

        self.direct = {old: now(name) for old, name in self.direct.items()}
        for placed in self.rules.values():
            placed.where = {target: now(name) for target, name in placed.where.items()}
        for early in (rule for rules in self.weight_rules.values() for rule in rules):
            early.where = {target: now(name) for target, name in early.where.items()}
        self.fresh = {now(name): how for name, how in self.fresh.items()}
        self.copies = {now(name): now(of) for name, of in self.copies.items()}
        self.files = {now(name): where for name, where in self.files.items()}
        self.filled = {now(name) for name in self.filled}
        self.aside = {now(name) for name in self.aside}
        self.roles = {now(name): role for name, role in self.roles.items()}
        self.lr_factors = {now(name): factor for name, factor in self.lr_factors.items()}

    def untrained(self) -> bool:
        """Whether the edits brought tensors that only training would give a meaning."""
        return bool(self.fresh) or any(early.rule.new for rules in self.weight_rules.values() for early in rules)

    def read_files(self) -> set[Path]:
        """All files that the edits read: with others the model is another one."""
        early = {path for rules in self.weight_rules.values() for placed in rules for path in placed.rule.files}
        return early | {path for path, _ in self.files.values()}

    def beneath(self) -> set[Path]:
        """The files that only change the base's own weights: with others, what was trained has another base."""
        early = [placed.rule for rules in self.weight_rules.values() for placed in rules]
        return {path for rule in early if not rule.targets for path in rule.files}

    def packed(self) -> set[str]:
        """Names whose stored type belongs to a plugin and is never cast."""
        return {name for placed in self.rules.values() for name in placed.where.values()}


def _moves(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, str]:
    """Old name to new name for tensors that are still there under another name."""
    places: dict[int, list[str]] = {}
    for name, tensor in after.items():
        places.setdefault(id(tensor), []).append(name)
    moved = {}
    for name, tensor in before.items():
        if after.get(name) is tensor or id(tensor) not in places:
            continue
        parent = name.rpartition(".")[0]
        # A tied weight has several new names; the one inside the old place is the one that was wrapped.
        moved[name] = max(places[id(tensor)], key=lambda new: (new.startswith(parent + "."), -len(new)))
    return moved


def set_trainable(
    model: nn.Module, ledger: Ledger, dtype: torch.dtype, frozen: Collection[str] = frozenset()
) -> list[str]:
    """Mark which parameters train and store those in `dtype`. Returns their names, tied ones once. `frozen` do not,
    unless an edit names them.

    Raises EditError if nothing trains, or if a packed (quantised) parameter would.
    """
    packed = ledger.packed()
    chosen = []
    for name, parameter in model.named_parameters():
        chooses = ledger.trainable or (lambda name: name not in frozen)
        trains = name in ledger.aside or chooses(name)
        trains = trains and parameter.dtype.is_floating_point
        if trains and name in packed:
            raise EditError(
                f"{name} is stored quantised and cannot train; add a peft_config that trains an adapter, "
                "or remove quant_config"
            )
        parameter.requires_grad_(trains)
        if trains:
            parameter.data = parameter.data.to(dtype)
            chosen.append(name)
    if not chosen:
        by = "freeze_language_model and the like leave" if frozen else "the recipe's peft_config leaves"
        raise EditError(f"nothing would train: {by} no parameter trainable")
    return chosen
