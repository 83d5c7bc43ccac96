"""Laws: what llmtune asks of a plugin, each a function of a folder that raises a sentence."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from llmtune.contract.errors import LlmtuneError, PluginError, listed
from llmtune.contract.extension_points import EXTENSION_POINTS
from llmtune.contract.stages import RollsOut, learns_of
from llmtune.testing.running import REFERENCES, ROWS, tiny_recipe

Check = Callable[..., None]
"""`check(subject, folder)`, documented by its law, raises `Broken`."""


class LawError(AssertionError):
    """A plugin breaks a law. The message names both, what was found, and what to do."""


class NoSuchPlugin(LawError):
    """No package offers a plugin of this name: it is misspelt, or its package is not installed here."""


class Broken(Exception):
    """Raised within a law: what was found, and what to do about it."""

    def __init__(self, found: str, fix: str) -> None:
        super().__init__(f"{found}. {fix}")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A plugin under test, and what its laws are checked with. Options of `laws` and `check_plugin`."""

    point: str
    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The plugin's keys, as a recipe gives them."""
    family: str = "llama"
    """transformers' `model_type` of the tiny model."""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    """Values of the tiny model's config that differ from `tiny_config`."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Recipe keys to go with the plugin, other plugins among them."""
    mode: Literal["train", "infer"] = "train"
    """`infer` for a quantiser that refuses training: what trains is not asked of it."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the tiny model trains."""
    ranks: bool = True
    """Whether to ask the laws that start several processes, which take most of the time; on `cuda` never."""
    error: float = 0.15
    """How far a restored weight may be from its source (root of the mean square, relative)."""
    tolerance: float = 1e-4
    """How far losses, logits and gradients may be from the reference, as a share of their size."""
    rows: Sequence[Mapping[str, Any]] = ()
    """Rows that a `data_config` plugin reads, one of each shape it knows."""
    repository: str = ""
    """The name of a repository on the hub of a `hub_config` plugin that holds `files`; without it, no hub is asked."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What the repository holds, by path: two files or more."""
    reader: Callable[[Path, Path], Any] | None = None
    """`reader(saved, base)` opens what `save` wrote onto the base model's folder, as others would; returns a model.
    Of a logger, `reader(own folder, run's folder)` returns the steps at which it has a `loss`."""

    @property
    def spreads(self) -> bool:
        """Whether several ranks can be started."""
        return self.ranks and self.device == "cpu"

    @property
    def label(self) -> str:
        """`peft_config ia3`."""
        return f"{self.point} {self.name}"

    def keys(self, folder: Path, **changes: Any) -> dict[str, Any]:
        """A tiny recipe with this plugin, and references at the other extension points."""
        return self.plain_keys(folder, **{self.point: {"name": self.name, **self.parameters}, **changes})

    def plain_keys(self, folder: Path, **changes: Any) -> dict[str, Any]:
        """The same recipe without the plugin."""
        given = {**REFERENCES, "device": self.device, "bf16": False}
        if self.point == "quant_config" and self.mode == "train":
            given["peft_config"] = "reference"  # what is quantised cannot train
        if self.point == "stage_config" and isinstance(self.built(), RollsOut):
            given["reward_config"] = "reference"
        if self.point == "reward_config":
            given["stage_config"] = "reference_answers"
        given |= {**self.recipe, **changes}
        return tiny_recipe(folder, self.family, self.sizes, self.kind, **given)

    @property
    def kind(self) -> str:
        """What the rows are that the plugin is tested with: of a stage, the first kind that it learns from."""
        if self.point == "reward_config":
            return "prompt"
        if self.point != "stage_config":
            return "conversation"
        kind = learns_of(self.built())[0]
        return kind if kind in ROWS else "conversation"

    def config(self) -> Any:
        """The plugin's own config object."""
        from llmtune.testing.running import read_keys, registry

        made, problems = read_keys(registry().find(self.point, self.name).plugin.config, self.parameters)
        if problems:
            raise Broken(f"its parameters are refused: {listed(problems)}", "Correct the parameters of the test")
        return made

    def built(self) -> Any:
        """What the plugin's `build` returns."""
        from llmtune.testing.running import registry

        return registry().find(self.point, self.name).plugin.build(self.config())


@dataclass(frozen=True)
class Law:
    """One law for one plugin. Call it with an empty folder; it returns nothing or raises LawError."""

    subject: Subject
    check: Check

    @property
    def __name__(self) -> str:
        return self.check.__name__

    @property
    def sentence(self) -> str:
        """What the law asks."""
        return " ".join((inspect.getdoc(self.check) or "").partition("\n\n")[0].split())

    def __call__(self, folder: str | Path) -> None:
        """Check. Raises LawError."""
        place = Path(folder) / self.__name__
        place.mkdir(parents=True, exist_ok=True)
        try:
            self.check(self.subject, place)
        except Broken as found:
            raise LawError(self._said(str(found))) from None
        except LlmtuneError as error:
            if isinstance(error, PluginError) and f'no plugin "{self.subject.name}" is installed' in str(error):
                raise NoSuchPlugin(f"no law of {self.subject.label} can be checked: {error}") from error
            raise LawError(self._said(str(error))) from error
        except AssertionError as error:  # a rank of `in_ranks` failed, or a plugin's own assertion
            raise LawError(self._said(f"it failed. {error}")) from error
        except Exception as error:
            found = f"it raised {type(error).__name__}: {error}. Mend the plugin where the traceback points"
            raise LawError(self._said(found)) from error

    def _said(self, found: str) -> str:
        return f"{self.subject.label} breaks the law {self.__name__}: {found}\nThe law: {self.sentence}"

    def __repr__(self) -> str:
        return f"<law {self.__name__} of {self.subject.label}>"

    def __str__(self) -> str:
        """Name of a test: `bnb(quantization_bit=8) llama converts_as_declared`."""
        given = ",".join(f"{name}={value}" for name, value in self.subject.parameters.items())
        return f"{self.subject.name}({given}) {self.subject.family} {self.__name__}"


def laws(point: str, name: str, parameters: Mapping[str, Any] | None = None, **options: Any) -> list[Law]:
    """Every law that applies to a plugin, for `pytest.mark.parametrize`. Options are the fields of `Subject`.

    `laws("quant_config", "bnb", {"quantization_bit": 8}, mode="infer", error=0.01)`. Raises ValueError for an
    extension point that does not exist.
    """
    if point not in EXTENSION_POINTS:
        raise ValueError(f'no extension point "{point}"; there are {listed(EXTENSION_POINTS, 20)}')
    subject = Subject(point=point, name=name, parameters=parameters or {}, **options)
    chosen: list[Check] = []
    for module in ("every", point):
        chosen += import_module(f"llmtune.testing.points.{module}").laws(subject)
    return [Law(subject, check) for check in chosen]


def check_plugin(
    point: str, name: str, folder: str | Path, parameters: Mapping[str, Any] | None = None, **options: Any
) -> None:
    """Check every law of a plugin in `folder`, an empty one. Raises LawError with all that are broken."""
    broken = []
    checked = laws(point, name, parameters, **options)
    for law in checked:
        try:
            law(folder)
        except NoSuchPlugin:
            raise
        except LawError as error:
            broken.append(error)
    if len(broken) == 1:
        raise broken[0]
    if broken:
        raise LawError(f"{len(broken)} of {len(checked)} laws are broken\n\n" + "\n\n".join(map(str, broken)))


def names(found: Sequence[str]) -> str:
    """A short list for a sentence."""
    return listed(sorted(found), 5)
