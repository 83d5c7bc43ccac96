"""Laws of every plugin: it is found, its module is light, its keys are documented, building it acts on nothing."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmtune.contract.errors import PluginError
from llmtune.contract.extension_points import POINTS
from llmtune.contract.schema import convert, describe, document, field_types, json_schema
from llmtune.recipe.packages import CORE, installed
from llmtune.testing.contract import Broken, Check, Subject, names
from llmtune.testing.running import registry

if TYPE_CHECKING:
    from llmtune.recipe.registry import Offer

HEAVY = (
    "torch", "transformers", "numpy", "safetensors", "datasets", "pyarrow", "pandas", "matplotlib", "peft",
    "bitsandbytes", "tensorflow", "jax",
)  # fmt: skip
"""Packages that take a noticeable part of a second to import."""


def laws(subject: Subject) -> list[Check]:
    """All of them."""
    return [
        is_discovered, has_a_light_module, documents_its_keys, reads_its_keys, builds_without_side_effects,
        keeps_its_protocol,
    ]  # fmt: skip


def is_discovered(subject: Subject, folder: Path) -> None:
    """A recipe finds the plugin through an entry point of its own name, with its hook keeping to the specification."""
    offer = _offer(subject)
    entries = {name for source in installed() if source.module == offer.source.module for name in source.names}
    if offer.source.module != CORE.module and subject.name not in entries:
        raise Broken(f"no entry point is called {subject.name}", _entry_point(subject, offer.source.module))


def has_a_light_module(subject: Subject, folder: Path) -> None:
    """Importing the module that the entry point names loads nothing heavy: `llmtune plugins` imports all of them."""
    module = _offer(subject).source.module
    code = (
        "import sys, importlib\n"
        f"sys.path[:] = {sys.path!r}\n"
        f"module = importlib.import_module({module.partition(':')[0]!r})\n"
        f"for hook in [getattr(module, {subject.point!r}, None)]:\n"
        "    hook and hook()\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise Broken(f"{module} cannot be imported alone: {''.join(last)}", "Mend its imports")
    found = done.stdout.strip().splitlines()[-1]
    if found != "[]":
        raise Broken(f"importing {module} loads {found}", "Move these imports into `build` or a module it imports")


def documents_its_keys(subject: Subject, folder: Path) -> None:
    """Every key has a docstring and a type that recipes know, and the plugin a summary of one line."""
    plugin = _offer(subject).plugin
    config, texts = plugin.config, document(plugin.config)
    if bare := [field.name for field in dataclasses.fields(config) if not texts.get(field.name)]:
        raise Broken(
            f"{config.__name__} says nothing of {names(bare)}", "Write a docstring on the line below each field"
        )
    if not plugin.summary.strip():
        raise Broken("`summary` is empty", "Give Plugin(summary=...) the line that `llmtune plugins` shows")
    if "\n" in plugin.summary:
        raise Broken("`summary` has several lines", "Make it one line")
    try:
        schema = json_schema(config)
        json.dumps(schema, default=str)
    except (TypeError, ValueError) as error:
        raise Broken(
            f"no JSON Schema can be made of {config.__name__}: {error}", "Use types that recipes know"
        ) from None
    if lost := set(field_types(config)) - set(schema["properties"]):
        raise Broken(f"the JSON Schema lacks {names(list(lost))}", "Make them fields of the dataclass")


def reads_its_keys(subject: Subject, folder: Path) -> None:
    """Defaults keep to their own types and bounds, the parameters are taken as given, and the config is frozen."""
    config, kinds = _offer(subject).plugin.config, {}
    for field in dataclasses.fields(config):
        kind = kinds[field.name] = field_types(config)[field.name]
        made = field.default_factory is not dataclasses.MISSING
        if field.default is dataclasses.MISSING and not made:
            continue
        default = field.default_factory() if made else field.default  # type: ignore[misc]
        try:
            convert(kind, default)
        except ValueError:
            raise Broken(
                f"the default of {field.name} is {default!r}, allowed is {describe(kind)}",
                "Change the default or the type",
            ) from None
        except TypeError as error:
            raise Broken(f"{field.name}: {error}", "Use a type that recipes know") from None
    found = subject.config()
    if not config.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise Broken(
            f"{config.__name__} can be changed after it was read", "Write @dataclass(frozen=True, kw_only=True)"
        )
    for name, given in subject.parameters.items():
        if isinstance(given, (bool, int, float)) and getattr(found, name) != given:
            raise Broken(f"{name} was given as {given!r} and read as {getattr(found, name)!r}", "Keep what was given")


def builds_without_side_effects(subject: Subject, folder: Path) -> None:
    """`build` draws no random numbers, changes no default of torch, and can be called twice."""
    before = _global_state()
    plugin, config = _offer(subject).plugin, subject.config()
    first, second = plugin.build(config), plugin.build(config)
    after = _global_state()
    if first is None or second is None:
        raise Broken("`build` returned None", "Return the object that does the work")
    changed = [
        what for what, old in before.items()
        if not (torch.equal(old, after[what]) if isinstance(old, torch.Tensor) else old == after[what])
    ]  # fmt: skip
    if changed:
        raise Broken(f"`build` changed {names(changed)}", "Leave global settings alone; a run has one seed")


def keeps_its_protocol(subject: Subject, folder: Path) -> None:
    """The object that `build` returns has every attribute and method that the protocol of its extension point has."""
    built, point = subject.built(), POINTS[subject.point]
    if objection := point.objection(built):
        raise Broken(f"{type(built).__name__} {objection}", f"See llmtune.{point.protocol.__name__}")


def _global_state() -> dict[str, Any]:
    return {
        "torch's random state": torch.get_rng_state(),
        "Python's random state": random.getstate(),
        "torch's default type": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "whether gradients are recorded": torch.is_grad_enabled(),
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
    }


def _offer(subject: Subject) -> Offer:
    found = registry()
    try:
        return found.find(subject.point, subject.name)
    except PluginError as error:
        for row in found.listing():
            if row.name == subject.name and row.plugin and row.state == "broken" and row.point == subject.point:
                raise Broken(row.reason, _entry_point(subject, "your_module")) from error
        raise


def _entry_point(subject: Subject, module: str) -> str:
    return f'Write {subject.name} = "{module}" under [project.entry-points.llmtune] and install the package again'
