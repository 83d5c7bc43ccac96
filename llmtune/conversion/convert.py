"""`llmtune.convert`: a file or a command of another trainer as a recipe, or as the command to type."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.contract.errors import ErrorList, LlmtuneError, RecipeError
from llmtune.conversion import axolotl, llama_factory, llama_factory_v1, torchtune, trl
from llmtune.conversion.detect import trainer_of
from llmtune.conversion.draft import Draft
from llmtune.conversion.source import ForeignSource, read
from llmtune.conversion.trainer_arguments import launched
from llmtune.conversion.writer import recipe_yaml
from llmtune.data.plot import plotting_problem
from llmtune.recipe import text as recipe_text
from llmtune.recipe.keys import top_level_keys
from llmtune.recipe.recipe import errors_of, recipe_errors

_HEAD = "Converted by `llmtune convert` from"
_CONVERTERS: dict[str, tuple[Callable[[Draft, str], None], Callable[[ForeignSource], str]]] = {
    "LLaMA-Factory": (llama_factory.convert, llama_factory.verb_of),
    "LLaMA-Factory v1": (llama_factory_v1.convert, llama_factory_v1.verb_of),
    "Axolotl": (axolotl.convert, axolotl.verb_of),
    "torchtune": (torchtune.convert, torchtune.verb_of),
    "TRL": (trl.convert, trl.verb_of),
}


_ALONE = ("web", "doctor")
"""Commands that no recipe belongs to."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a file of another trainer is here."""

    trainer: str
    """Whose file it is."""
    verb: str
    """What it is for: `train`, or the command that uses a model: `chat`, `export`, `predict`, `eval`."""
    recipe: Mapping[str, Any]
    """The keys of llmtune; `text` is these with comments."""
    text: str
    """The recipe as YAML, with a comment for each decision."""
    command: str
    """What to type."""
    lost: Mapping[str, str]
    """Keys without a counterpart: the reason, and what to use instead."""
    idle: Mapping[str, str]
    """Keys that ask for nothing that has to be asked for here, and why."""
    came: Mapping[str, str]
    """Every other key of the file, and the dotted key that it is here."""
    check: tuple[str, ...]
    """What to look at before the recipe is used."""

    def __str__(self) -> str:
        return self.text


def convert(
    source: str | os.PathLike[str], output: str | os.PathLike[str] | None = None, *, strict: bool = False
) -> Conversion:
    """Read a file of LLaMA-Factory, Axolotl, torchtune or TRL, or a command of theirs, as a recipe; `output` keeps it.

    Raises RecipeError where it is none of them or the output exists, and with `strict` ErrorList where a key has no
    counterpart; then nothing is written.
    """
    given = read(source)
    trainer = trainer_of(given)
    if trainer == "accelerate":
        raise RecipeError(
            f"{given.origin}: is a configuration of accelerate, which starts processes; here "
            "it is dist_config: fsdp2 and `llmtune train --nproc N` (docs/distribution.md)"
        )
    if trainer is None:
        own = not recipe_errors(given.tree)
        said = "is a recipe of llmtune already" if own else "is no file of LLaMA-Factory, Axolotl, torchtune or TRL"
        raise RecipeError(f"{given.origin}: {said}, by its keys")
    fill, verb_of = _CONVERTERS[trainer]
    verb = verb_of(given)
    keys = torchtune.flat(given.tree) if trainer == "torchtune" else given.tree
    draft = Draft(keys, trainer, script=given.verb)
    fill(draft, verb)
    launched(draft, given.launcher)
    if given.machines > 1:
        draft.check.append(
            f"{given.machines} machines: start the command on each, with `torchrun --nnodes {given.machines} "
            f"--nproc-per-node {given.ranks or 1} ... -m llmtune train` (docs/distribution.md)"
        )
    draft.follow_references()
    draft.check += [] if verb in _ALONE else _objections(draft)
    if strict and draft.lost:
        raise ErrorList([RecipeError(f"{given.origin}  {key}: {why}") for key, why in draft.lost.items()])
    target = Path(output).expanduser() if output is not None else None
    command = _command(draft.recipe, verb, given, os.fspath(output) if output is not None else None)
    head = f"{_HEAD} {os.path.basename(given.origin)}, a file of {trainer}. {_use(verb, command, output)}"
    text = recipe_yaml(draft, given, head)
    if target is not None:
        _write(target, text)
    return Conversion(
        trainer=trainer,
        verb=verb,
        recipe=draft.recipe,
        text=text,
        command=command,
        lost=draft.lost,
        idle=draft.idle,
        came=draft.came,
        check=tuple(draft.check),
    )


def asked_by(source: str | os.PathLike[str]) -> Conversion | None:
    """The conversion of another trainer's file that asks a benchmark; None where it is no such file."""
    if Path(source).suffix.lower() not in (".yaml", ".yml", ".json") or not Path(source).is_file():
        return None
    given = read(source)
    if trainer_of(given) != "LLaMA-Factory" or llama_factory.verb_of(given) != "eval":
        return None
    return convert(source)


def offer(source: str | os.PathLike[str], *, for_use: bool = False) -> str | None:
    """The sentence for somebody who gives another trainer's file to a command; None where it is no such file, or with
    `for_use` one that names a model to use, as commands take those of LLaMA-Factory."""
    try:
        given = read(source)
    except LlmtuneError:
        return None
    trainer = trainer_of(given)
    if trainer not in _CONVERTERS:
        return None
    if for_use and _CONVERTERS[trainer][1](given) in ("chat", "export", "predict"):
        return None
    name = shlex.quote(os.fspath(source))
    return f"{name} is a file of {trainer}; `llmtune convert {name} -o recipe.yaml` writes it as a recipe"


def _objections(draft: Draft) -> list[str]:
    """What `llmtune train` would say of the recipe; the environment may be another then."""
    plain = {key: value for key, value in draft.recipe.items() if key != "trust_remote_code"}
    errors = [str(error) for error in errors_of(plain, {}, draft.registry)]
    if draft.recipe.get("plot_loss") and (problem := plotting_problem()):
        errors.append(f"plot_loss: {problem}")
    return [error for error in errors if "Environment variable" not in error]


def _command(recipe: Mapping[str, Any], verb: str, given: ForeignSource, output: str | None) -> str:
    """What to type: with the file where one is written or training asks for one, else with the keys in the command; the
    command alone where it takes no model."""
    if verb in _ALONE:
        return f"llmtune {verb}"
    if verb == "train":
        ranks = f" --nproc {given.ranks}" if given.ranks and given.ranks > 1 else ""
        return f"llmtune train {shlex.quote(output or 'recipe.yaml')}{ranks}"
    if output is not None:
        return f"llmtune {verb} {shlex.quote(output)}"
    words = [f"{key}={_word(value)}" for key, value in typed_keys(recipe).items()]
    return shlex.join(["llmtune", verb, str(recipe.get("model", "MODEL")), *words])


def typed_keys(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a command takes with the model: those of a benchmark stand by themselves, as far as they can."""
    known, asked = top_level_keys(), {}
    evaluator = recipe.get("eval_config", {})
    if evaluator.get("name") != "benchmark":
        return {key: value for key, value in recipe.items() if key != "model"}
    for key, value in evaluator.items():
        asked |= {} if key == "name" else {f"eval_config.{key}" if key in known else key: value}
    return {**asked, **{key: value for key, value in recipe.items() if key not in ("model", "eval_config")}}


def _word(value: Any, inside: bool = False) -> str:
    """A value as it is written after `key=`, or `inside` of brackets there: text in quotes where it would be read as
    something else."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_word(item, True)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_word(item, True) for item in value) + "]"
    if isinstance(value, str) and not (inside and re.search(r"[,\[\]{}]", value)) and _is_read_as(value, value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _is_read_as(text: str, value: Any) -> bool:
    try:
        return bool(recipe_text.parse_value(text, "value") == value)
    except RecipeError:
        return False


def _use(verb: str, command: str, output: str | os.PathLike[str] | None) -> str:
    """How a recipe is used, for its head; the long form of a command stands for one without a file."""
    short = command if verb == "train" or output is not None else f"llmtune {verb} recipe.yaml"
    return f"Use it with: {short}"


def _write(target: Path, text: str) -> None:
    """Write the recipe, never over a file that somebody wrote."""
    if target.exists() and _HEAD not in target.read_text(encoding="utf-8", errors="replace")[:200]:
        raise RecipeError(f"{target}: is there already, and no recipe that this command wrote; name another file")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
