"""A reward that a Python function gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from inspect import Parameter
from math import isfinite
from traceback import extract_tb
from typing import TYPE_CHECKING, Any

from llmtune import Completion, PlanError, PluginError, StageContext

from .rows import require_columns

if TYPE_CHECKING:
    from . import FunctionConfig

OURS: Mapping[str, Callable[[Completion], Any]] = {
    "completions": lambda each: each.answer,
    "prompts": lambda each: each.prompt,
    "completion_ids": lambda each: list(each.ids),
    "prompt_ids": lambda each: list(each.prompt_ids),
    "cut": lambda each: each.cut,
}
"""The parameters of a function that are no columns, and what they hold of each answer."""
SAID = ("completions", "completion_ids")


class FunctionReward:
    """Calls a function with the lists that its parameters name, all of the same length, as TRL's trainers do."""

    def __init__(self, config: FunctionConfig) -> None:
        self.name, self.arguments = config.function, dict(config.arguments)
        self.function = found(config.function)
        self.columns, self.takes_all = parameters(self.function, config)

    def row_objection(self, columns: Mapping[str, Any]) -> str | None:
        """The columns that the function asks for and a row does not have; None where it has all."""
        lacking = [name for name in self.columns if name not in OURS and name not in columns]
        if not lacking:
            return None
        return f"has no column {lacking[0]!r}, which {self.name} takes; a setting of it belongs into arguments"

    def score(self, completions: Sequence[Completion], context: StageContext) -> list[float | None]:
        """What the function says of each answer; it is not called for none. Raises PluginError where it fails."""
        if not completions:
            return []
        require_columns(self, "function", completions)
        names = list(self.columns)
        if self.takes_all:
            held = dict.fromkeys(name for each in completions for name in each.columns)
            names = list(dict.fromkeys([*OURS, *names, *(name for name in held if name not in self.arguments)]))
        lists = {name: [value(name, each) for each in completions] for name in names}
        try:
            scores = self.function(**lists, **self.arguments)
        except Exception as error:
            said, place = " ".join(str(error).split()), extract_tb(error.__traceback__)[-1]
            raise PluginError(
                f"reward_config function: {self.name} failed at {place.filename}:{place.lineno}: "
                f"{type(error).__name__}: {said}; nothing was learnt from this step"
            ) from error
        return numbers(scores, self.name, completions)


def value(name: str, completion: Completion) -> Any:
    """What a parameter of this name holds of an answer."""
    return OURS[name](completion) if name in OURS else completion.columns.get(name)


def found(place: str) -> Callable[..., Any]:
    """The function `module:function`. Raises PlanError where there is none."""
    key = f'reward_config function: function: found "{place}"'
    module, colon, name = place.partition(":")
    if not colon or not module or not name:
        raise PlanError(f"{key}, allowed is module:function of a package that is installed")
    try:
        held = import_module(module)
    except Exception as error:
        raise PlanError(
            f"{key}, but {module} cannot be imported ({type(error).__name__}: {error}); install the package that has "
            "it here, on every machine"
        ) from error
    function = getattr(held, name, None)
    if not callable(function):
        what = "nothing of that name" if function is None else f"a {type(function).__name__}, no function"
        raise PlanError(f"{key}, but {module} has {what}; name a function of it")
    if inspect.iscoroutinefunction(function):
        raise PlanError(f"{key}, which is an async function; name a plain one")
    return function


def parameters(function: Callable[..., Any], config: FunctionConfig) -> tuple[tuple[str, ...], bool]:
    """The lists that a function asks for by name (its parameters without a default), and whether it takes all others,
    too. Raises PlanError where it cannot be called by name, asks for no answers, or does not know an argument."""
    key = f'reward_config function: function: found "{config.function}"'
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise PlanError(f"{key}, whose parameters Python does not know; wrap it in a function of yours") from None
    kinds = {each.kind for each in known.values()}
    if odd := [name for name, each in known.items() if each.kind is Parameter.POSITIONAL_ONLY]:
        raise PlanError(f"{key}, which takes {odd[0]} by position only; it is called by name, such as f(completions)")
    named = {n: p for n, p in known.items() if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}
    takes_all = Parameter.VAR_KEYWORD in kinds
    if odd := [name for name in config.arguments if name in OURS or (name not in named and not takes_all)]:
        raise PlanError(
            f"reward_config function: arguments: {config.function} takes no setting {odd[0]!r}; its parameters are "
            f"{', '.join(known)}"
        )
    asked = tuple(
        name
        for name, each in named.items()
        if name not in config.arguments and (name in OURS or each.default is Parameter.empty)
    )
    if not takes_all and not set(SAID) & set(asked):
        raise PlanError(
            f"{key}, which takes no answers: it has the parameters {', '.join(known) or 'none'}, and one has to be "
            "completions (their texts) or completion_ids"
        )
    return asked, takes_all


def numbers(scores: Any, name: str, completions: Sequence[Completion]) -> list[float | None]:
    """The scores as a list of numbers, None where the function says nothing. Raises PluginError for anything else."""
    count = len(completions)
    values = scores.tolist() if hasattr(scores, "tolist") else scores
    told = isinstance(values, list | tuple) and len(values) == count
    if not told or not all(each is None or hasattr(each, "__float__") for each in values):
        raise PluginError(
            f"reward_config function: {name} returned {scores!r:.200} for {count} answers, allowed is a list of as "
            "many numbers, None where there is nothing to say; nothing was learnt from this step"
        )
    found = [None if each is None else float(each) for each in values]
    for each, completion in zip(found, completions, strict=True):
        if each is not None and not isfinite(each):
            raise PluginError(
                f"reward_config function: {name} gave {each} for the answer {completion.answer[:200]!r} to the prompt "
                f"that ends in {completion.prompt[-100:]!r}, allowed is a finite number, or None where there is "
                "nothing to say; nothing was learnt from this step"
            )
    return found
