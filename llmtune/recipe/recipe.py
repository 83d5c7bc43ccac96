"""A recipe: from a file or a mapping, with overrides, to typed values. All mistakes are found at once, with lines."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmtune.contract.errors import KEYWORDS, ErrorList, LlmtuneError, RecipeError, did_you_mean, raise_all
from llmtune.contract.extension_points import EXTENSION_POINTS, default_plugins
from llmtune.contract.generation import GenerationKeys
from llmtune.contract.schema import decode, defaults, field_types, split_names
from llmtune.data.config import DataConfig
from llmtune.model.config import ModelConfig
from llmtune.recipe import text as recipe_text
from llmtune.recipe.blocks import Blocks, as_block, read_blocks, wrong_blocks
from llmtune.recipe.export_config import ExportConfig
from llmtune.recipe.free_keys import environment
from llmtune.recipe.keys import CONFIGS, about_unknown, top_level_keys
from llmtune.recipe.places import Places
from llmtune.recipe.registry import Registry
from llmtune.recipe.secrets import blank, blank_text, escaped
from llmtune.recipe.text import RecipeText, leaves, show, split
from llmtune.recipe.train_config import TrainConfig
from llmtune.recipe.use_keys import own_keys

PATHS = (
    "output_dir",
    "export_dir",
    "tokenized_path",
    "dataset_dir",
    "cache_dir",
    "resume_from_checkpoint",
    "template",
)
"""Keys whose `~` is the home folder."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Typed keys, and the blocks of the extension points, which their plugins' dataclasses decode later."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    generation: GenerationKeys
    export: ExportConfig
    blocks: Blocks = field(repr=False)
    """Extension point to its (plugin name, parameters), as far as the recipe names any. A point that is missing here
    has its default; one with an empty list has none, though it has a default."""
    resolved: Mapping[str, Any]
    """Every top-level key with its value, defaults included; local models and adapters by full paths. Secrets are
    null; where anything is read from the environment, `${...}` is kept as written. `load_recipe` reads it back."""
    tree: Mapping[str, Any] = field(repr=False)
    """The keys that were given, before `${...}` is resolved, secrets included: never write this to a run's folder."""
    name: str
    """Of the file without its ending, else of the model."""
    text: str = field(repr=False)
    """As given, secrets blanked out."""
    places: Places = field(repr=False)
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Hashes of the values of those keys that read the environment and decide what is learnt; secrets left out."""
    fresh: bool = False
    """Whether the command that starts the run asks to start over, whatever is in `output_dir`."""

    @property
    def base_dir(self) -> Path:
        """Where relative paths count from: the folder llmtune was started in, for every key alike."""
        return Path.cwd()

    def to_yaml(self) -> str:
        """`resolved` as YAML."""
        return recipe_text.dump(self.resolved)


def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] | None = None,
    *,
    for_use: bool = False,
) -> Recipe:
    """Read a recipe from a YAML or JSON file or a mapping. Overrides are `key=value` texts or a mapping of dotted keys.

    A recipe `for_use` says which model is used, and how; it may do so in the words of other trainers.
    Raises RecipeError, or ErrorList with all mistakes.
    """
    origin, found = _read(source)
    if isinstance(overrides, Mapping):
        changes, where = dict(overrides), KEYWORDS.get()
    else:
        changes, where = parse_overrides(overrides or ()), "command line"
    places = Places(origin, found.places, {split(key): where for key in changes})
    _check_mapping(found, origin)
    tree = {key: as_block(key, copy.deepcopy(value)) for key, value in found.tree.items()}
    if for_use:
        tree, changes, places = own_keys(tree, changes, places)
    tree = _override(tree, changes, where, places)
    resolved = _resolve(tree, places)
    for key in PATHS:
        if isinstance(path := resolved.get(key), str) and path.startswith("~"):
            resolved[key] = os.path.expanduser(path)
    if "eval_strategy" in changes and resolved.get("eval_strategy") != "steps" and "eval_steps" not in changes:
        resolved.pop("eval_steps", None)  # the file's interval belongs to what the override replaced
    known = top_level_keys()
    problems: list[LlmtuneError] = [*found.problems]
    strange = {key: about_unknown(key) for key in resolved if key not in known}
    problems += [places.error(key, said) for key, said in strange.items()]
    for path in [path for path, value in leaves(resolved) if isinstance(value, float) and not math.isfinite(value)]:
        problems.append(places.error(show(path), "found a number that is not finite"))
        resolved.pop(str(path[0]), None)
    configs = []
    for config in CONFIGS:
        made, wrong = decode(config, {key: resolved[key] for key in field_types(config) if key in resolved})
        # What is given under a name that is nearly right is not missing, too.
        wrong = [each for each in wrong if not (each.message.startswith("required") and _given(each.key, strange))]
        problems += [error for problem in wrong for error in places.errors(problem.key, problem.message)]
        configs.append(made)
    blocks, wrong_shapes = read_blocks(resolved, places)
    problems += wrong_shapes
    if resolved.get("trust_remote_code") and not _says_so_now(source, changes):
        problems.append(places.error("trust_remote_code", _TRUST))
    if None not in configs:
        problems += _nothing_to_evaluate(configs[1], configs[2], places)
    if problems:
        raise_all([*problems, *wrong_blocks(blocks, places, Registry())])
    model, data, train, generation, export = configs
    model = _from_other_keys(model, data, train)
    name = _name(source, model)
    train = dataclasses.replace(train, output_dir=train.output_dir or f"runs/{name}")
    if "eval_strategy" not in tree and (data.val_size or data.eval_dataset is not None):
        train = dataclasses.replace(train, eval_strategy="epoch")
    shown = _shown((model, data, train, generation, export), blocks, tree)
    text = blank_text(found) if isinstance(source, (str, os.PathLike)) else recipe_text.dump(blank(tree))
    return Recipe(
        model=model, data=data, train=train, generation=generation, export=export, blocks=blocks, resolved=shown,
        tree=tree, name=name, text=text, places=places, environment=environment(tree, resolved),
    )  # fmt: skip


def recipe_errors(source: str | os.PathLike[str] | Mapping[str, Any], **overrides: Any) -> list[LlmtuneError]:
    """Everything that is wrong with a recipe's text, keys and blocks, as `llmtune train` would say it first; none where
    it can be planned. Nothing is read but the recipe, and no torch is imported."""
    return errors_of(source, overrides, Registry())


def errors_of(source: Any, overrides: Mapping[str, Any], registry: Registry) -> list[LlmtuneError]:
    """What `recipe_errors` gives, with plugins of this registry."""
    try:
        recipe = load_recipe(source, overrides)
    except ErrorList as several:
        return several.errors
    except LlmtuneError as error:
        return [error]
    return [*wrong_blocks(recipe.blocks, recipe.places, registry)]


def _given(key: str, strange: Mapping[str, str]) -> bool:
    """Whether one of the sentences about strange keys says that `key` is meant."""
    return any(f'"{key}"' in said or said.endswith(f" is {key}") for said in strange.values())


_TRUST = (
    "found true in a recipe that is no local file of yours (a mapping, or what a run wrote down); a model's code runs "
    "only at your word: read that code, then say trust_remote_code=true on the command line, in Python "
    "trust_remote_code=True as an argument"
)


def _says_so_now(source: Any, changes: Mapping[str, Any]) -> bool:
    """Whether the user says `trust_remote_code` with this call, or in a file that they wrote rather than a run."""
    if "trust_remote_code" in changes:
        return True
    return isinstance(source, (str, os.PathLike)) and not (Path(source).expanduser().parent / "run.json").exists()


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["peft_config.r=32"]` as `{"peft_config.r": 32}`; values are read as in a file, the last of a key counts."""
    made: dict[str, Any] = {}
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not split(key):
            raise RecipeError(f'command line: found "{override}", allowed is key=value, for example learning_rate=1e-4')
        try:
            made[key.strip()] = recipe_text.parse_value(value, "value")
        except RecipeError as error:
            raise RecipeError(f"command line {key}: {error}; put the value in quotes if it is meant as text") from error
    return made


def _read(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[str, RecipeText]:
    if not isinstance(source, (str, os.PathLike)):
        if OmegaConf.is_config(source):
            source = OmegaConf.to_container(source, resolve=False)  # type: ignore[assignment]
        return "recipe", RecipeText(recipe_text.plain(source, "recipe"))
    path = Path(source).expanduser()
    origin = os.fspath(source)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise RecipeError(f"{origin}: found {found}, allowed is a recipe file.{did_you_mean(path.name, names)}")
    try:
        if path.stat().st_size > recipe_text.MOST_BYTES:
            size = path.stat().st_size
            raise RecipeError(
                f"{origin}: has {size:,} bytes, a recipe at most {recipe_text.MOST_BYTES:,}; is this another file?"
            )
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{origin}: not UTF-8 text (byte {error.start}); is this a recipe?") from error
    except OSError as error:
        raise RecipeError(f"{origin}: cannot be read: {error.strerror}") from error
    return origin, recipe_text.parse(text, origin, as_json=path.suffix.lower() == ".json")


def _check_mapping(found: RecipeText, origin: str) -> None:
    tree = found.tree
    if not tree:
        raise_all(found.problems)
        raise RecipeError(f"{origin}: the recipe is empty; it needs at least `model: NAME`")
    if not isinstance(tree, dict):
        kind = {list: "a list", str: "text"}.get(type(tree), "a single value")
        raise RecipeError(f"{origin}: found {kind}, allowed are lines such as `model: NAME`")


def _override(tree: dict[str, Any], changes: Mapping[str, Any], where: str, places: Places) -> dict[str, Any]:
    config = _omega(tree, places)
    for key, value in changes.items():
        path = split(key)
        if not path:
            raise RecipeError(f'{where}: "{key}" is no key')
        value = recipe_text.plain(value, where, path)
        value = as_block(key, value)
        try:
            OmegaConf.update(config, ".".join(map(str, path)), value, merge=False)
        except (OmegaConfBaseException, ValueError, IndexError, TypeError) as error:
            raise RecipeError(f"{where}  {key}: cannot be set in this recipe: {_first_line(error)}") from error
    return OmegaConf.to_container(config, resolve=False)  # type: ignore[return-value]


def _omega(tree: dict[str, Any], places: Places) -> Any:
    try:
        return OmegaConf.create(tree)
    except OmegaConfBaseException as error:
        raise _unresolved(getattr(error, "full_key", None) or "", error, places) from error


def _unresolved(key: str, error: Exception, places: Places) -> RecipeError:
    cause = _first_line(error).removeprefix("KeyError raised while resolving interpolation: ").strip('"')
    if "Environment variable" in cause:
        return places.error(key, f"{cause}; set it, or write the value itself")
    if "Missing mandatory value" in cause:
        return places.error(key, "found ???, which stands for a value still to be filled in")
    return places.error(key, rf"cannot be resolved: {cause}; write \${{ for these two signs themselves")


def _resolve(tree: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """`${key}` and `${oc.env:NAME}` replaced by what they stand for; keys that were not given have their defaults."""
    config = _omega({**_defaults(), **tree}, places)
    resolved = {}
    problems = []
    for key in tree:
        try:
            value = config[key]
            resolved[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException as error:
            problems.append(_unresolved(getattr(error, "full_key", None) or key, error, places))
    raise_all(problems)
    return resolved


@cache
def _defaults() -> Mapping[str, Any]:
    return {name: recipe_text.plain(value, "default") for config in CONFIGS for name, value in defaults(config).items()}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _nothing_to_evaluate(data: DataConfig, train: TrainConfig, places: Places) -> list[RecipeError]:
    if data.eval_dataset is not None or data.val_size:
        return []
    idle = {"eval_strategy": train.eval_strategy != "no", "do_predict": train.do_predict}
    said = "there is nothing to evaluate on; set val_size or eval_dataset"
    return [places.error(key, said) for key, wanted in idle.items() if wanted]


def _from_other_keys(model: ModelConfig, data: DataConfig, train: TrainConfig) -> ModelConfig:
    """The keys of the model with what they take from other keys of a recipe: so they mean the same wherever it goes."""
    if isinstance(model.rope_scaling, str) and (data.dataset is not None or data.tokenized_path is not None):
        model = dataclasses.replace(model, rope_scaling={"rope_type": model.rope_scaling, "length": data.cutoff_len})
    if model.train_from_scratch is True:
        model = dataclasses.replace(model, train_from_scratch=train.seed)
    return model


def _name(source: Any, model: ModelConfig) -> str:
    stem = Path(source).stem if isinstance(source, (str, os.PathLike)) else Path(model.model.rstrip("/")).name
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "recipe"


def _absolute(model: str) -> str:
    """A model on this machine by its full path, so that a run can be opened from any folder."""
    path = os.path.expanduser(model)
    return os.path.abspath(path) if os.path.exists(path) else model


def _with_full_paths(block: Mapping[str, Any]) -> dict[str, Any]:
    """A plugin's keys with the adapters on this machine by their full paths, for the same reason."""
    places = block.get("adapter_name_or_path")
    texts = [places] if isinstance(places, str) else places if isinstance(places, (list, tuple)) else []
    if not texts or not all(isinstance(text, str) and "${" not in text for text in texts):
        return dict(block)
    full = [_absolute(place) for place in split_names(places)]
    return {**block, "adapter_name_or_path": ",".join(full) if isinstance(places, str) else full}


def _shown(configs: Sequence[Any], blocks: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Every key with its value, safe to write down and to read back."""
    made = {
        item.name: escaped(recipe_text.plain(vars(config)[item.name], "recipe"))
        for config in configs
        for item in dataclasses.fields(config)
    }
    absent = {point: [(name, {})] for point, name in default_plugins().items()}
    for point in EXTENSION_POINTS:
        found = blocks.get(point, absent.get(point, []))
        several = [{"name": name, **escaped(_with_full_paths(more))} for name, more in found]
        made[point] = several if len(several) > 1 else several[0] if several else None
    made["model"] = escaped(_absolute(configs[0].model))
    if "${oc.env:" in str(tree):  # what stands in the environment stays there
        made |= {key: value for key, value in tree.items() if "${" in str(value)}
    return blank(made)
