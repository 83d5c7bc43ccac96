"""Dataclasses as the schema of recipes: strict decoding, JSON Schema, documentation.

A small reader of our own, because the messages are the interface (key, found, allowed, fix, all at once) and
because it must import in a millisecond. It knows the types that recipes use: bool, int, float, str, Path,
Literal, unions, tuples and lists, string-keyed dicts, and the bounds of `annotated_types`.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import os
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

from llmtune.contract.errors import RecipeError, did_you_mean, listed, raise_all

P = typing.ParamSpec("P")
R = typing.TypeVar("R")

__all__ = [
    "Commas",
    "Ge",
    "Gt",
    "Le",
    "Lt",
    "NullIs",
    "Problem",
    "checks_arguments",
    "decode",
    "defaults",
    "document",
    "field_types",
    "json_schema",
    "split_names",
]


@dataclasses.dataclass(frozen=True)
class NullIs:
    """In `Annotated[bool, NullIs(False)]`: a recipe may write null, which other trainers do, and means this value."""

    value: Any
    words: typing.ClassVar[str] = "or null"
    json_type: typing.ClassVar[str] = "null"


@dataclasses.dataclass(frozen=True)
class Commas:
    """In `Annotated[tuple[float, ...], Commas()]`: a recipe may write the list as text, separated by commas."""

    words: typing.ClassVar[str] = "or the same separated by commas"
    json_type: typing.ClassVar[str] = "string"


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: the dotted key and a sentence without the place."""

    key: str
    message: str


def split_names(names: str | typing.Iterable[str] | None) -> tuple[str, ...]:
    """`"a, b"`, `["a", "b"]` and None all mean a tuple of names."""
    if names is None:
        return ()
    if isinstance(names, str):
        names = names.split(",")
    return tuple(name.strip() for name in names if name.strip())


@functools.cache
def field_types(config: type) -> dict[str, Any]:
    """Field names with resolved annotations."""
    hints = typing.get_type_hints(config, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}


def defaults(config: type) -> dict[str, Any]:
    """Field names with their default values, for those fields that have one."""
    made = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(config)
    }
    return {name: value for name, value in made.items() if value is not dataclasses.MISSING}


@functools.cache
def document(config: type) -> dict[str, str]:
    """The docstring under each field, inherited fields included; empty where the source cannot be read."""
    texts: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        except (OSError, TypeError, SyntaxError):
            continue
        assert isinstance(body, ast.ClassDef)
        for line, following in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(line, ast.AnnAssign)
                and isinstance(line.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                texts[line.target.id] = " ".join(inspect.cleandoc(following.value.value).split())
    return texts


def about_unknown_key(key: str, known: Collection[str]) -> str:
    """The sentence about a key that a dataclass with the keys `known` does not have."""
    return f"no such key.{did_you_mean(key, known)} Known: {listed(sorted(known), 40)}"


def decode(
    config: type,
    tree: Mapping[str, Any],
    at: str = "",
    unknown: Callable[[str, Collection[str]], str] = about_unknown_key,
) -> tuple[Any, list[Problem]]:
    """Make `config` from a plain mapping. Returns the object, or None with every problem found. `unknown` gives the
    sentence about a key that is none of the known ones."""
    known = field_types(config)
    prefix = f"{at}." if at else ""
    problems: list[Problem] = []
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in known:
            problems.append(Problem(f"{prefix}{key}", unknown(str(key), known)))
            continue
        try:
            values[key] = convert(known[key], value)
        except ValueError as error:
            problems.append(Problem(f"{prefix}{key}", str(error)))
    problems += [
        Problem(f"{prefix}{name}", f"required, but not given. It is {describe(known[name])}")
        for name in known
        if name not in tree and name not in defaults(config)
    ]
    if problems:
        return None, problems
    try:
        return config(**values), []
    except ValueError as error:  # a check in __post_init__
        return None, [Problem(at, str(error))]


def convert(annotation: Any, value: Any) -> Any:
    """`value` as `annotation` asks for it; ValueError with found and allowed otherwise."""
    fits, result = _fit(annotation, value)
    if not fits:
        raise ValueError(f"found {_show(value)}, allowed is {describe(annotation)}{_hint(annotation, value)}")
    return result


def checks_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function that people call: RecipeError for arguments that are not what its annotations say."""
    signature = inspect.signature(function)
    # One by one, as what it returns may be named for type checkers only.
    kinds = {
        name: eval(each.annotation, function.__globals__)
        for name, each in signature.parameters.items()
        if each.annotation is not each.empty and each.kind is not each.VAR_KEYWORD
    }

    @functools.wraps(function)
    def checked(*args: P.args, **keys: P.kwargs) -> R:
        given = signature.bind(*args, **keys).arguments
        wrong = [name for name, kind in kinds.items() if name in given and not _fit(kind, given[name])[0]]
        said = [f"{name}: found {_show(given[name])}, allowed is {describe(kinds[name])}" for name in wrong]
        raise_all([RecipeError(each) for each in said])
        return function(*args, **keys)

    return checked


def _fit(annotation: Any, value: Any) -> tuple[bool, Any]:
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return True, value
    if origin is typing.Annotated:
        for mark in args[1:]:
            if isinstance(mark, NullIs) and value is None:
                return True, mark.value
            if isinstance(mark, Commas) and isinstance(value, str):
                value = [next(_unquoted(word), word) for word in split_names(value)]
        fits, result = _fit(args[0], value)
        return fits and all(_within(bound, result) for bound in args[1:]), result
    if origin in (Union, types.UnionType):
        # An exact match goes first: a bool must not become the int of `int | bool`, nor null a string.
        for option in sorted(args, key=lambda option: option is not type(value)):
            fits, result = _fit(option, value)
            if fits:
                return True, result
        return False, None
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in args), value
    if origin in (tuple, list, Sequence):
        if not isinstance(value, (list, tuple)):
            return False, None
        item = args[0] if args else Any
        pairs = (
            [_fit(kind, element) for kind, element in zip(args, value, strict=True)]
            if origin is tuple and len(args) == len(value) and Ellipsis not in args
            else [_fit(item, element) for element in value]
        )
        if origin is tuple and Ellipsis not in args and len(args) != len(value):
            return False, None
        kept = tuple if origin is tuple else list
        return all(fits for fits, _ in pairs), kept(result for _, result in pairs)
    if origin in (dict, Mapping) or annotation is dict:
        if not isinstance(value, Mapping):
            return False, None
        found = {key: _fit(args[1] if args else Any, one) for key, one in value.items()}
        return all(fits for fits, _ in found.values()), {key: one for key, (_, one) in found.items()}
    if annotation is type(None) or annotation is None:
        return value is None, None
    if annotation is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number, float(value) if number else None
    if annotation is Path:
        path = isinstance(value, (str, os.PathLike))
        return path, Path(value) if path else None
    if isinstance(annotation, type):
        return isinstance(value, annotation) and not (annotation is not bool and isinstance(value, bool)), value
    raise TypeError(f"llmtune's recipes do not know the type {annotation!r}")


def _within(bound: Any, value: Any) -> bool:
    match bound:
        case Ge(ge):
            return value >= ge
        case Gt(gt):
            return value > gt
        case Le(le):
            return value <= le
        case Lt(lt):
            return value < lt
    return True


def describe(annotation: Any) -> str:
    """The allowed values in words: `one of "nf4", "fp4"`, `a whole number >= 1`."""
    origin, args = get_origin(annotation), get_args(annotation)
    names = {
        bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null",
        dict: "a mapping", Path: "a path", Any: "anything",
    }  # fmt: skip
    if annotation in names:
        return names[annotation]
    if origin is typing.Annotated:
        signs = {Ge: ">= {}", Gt: "> {}", Le: "<= {}", Lt: "< {}"}
        bounds = [signs[type(b)].format(dataclasses.astuple(b)[0]) for b in args[1:] if type(b) in signs]
        marks = [mark.words for mark in args[1:] if isinstance(mark, (NullIs, Commas))]
        return " ".join(word for word in (describe(args[0]), " and ".join(bounds), *marks) if word)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in args)
    if origin is Literal:
        shown = ", ".join(_show(choice) for choice in args)
        return shown if len(args) == 1 else f"one of {shown}"
    if origin in (tuple, list, Sequence):
        items = [describe(item) for item in args if item not in (Ellipsis, Any)]
        if len(items) > 1:
            return f"a list of {len(items)}: {', '.join(items)}"
        return f"a list of {items[0]}" if items else "a list"
    if origin in (dict, Mapping):
        return "a mapping" if args[1] is Any else f"a mapping of names to {describe(args[1])}"
    return getattr(annotation, "__name__", str(annotation))


def _show(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return f'"{value}"' if len(value) <= 80 else f'"{value[:77]}..."'
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _hint(annotation: Any, value: Any) -> str:
    """What to do about a value, as the end of a sentence that says what was found and what is allowed."""
    options = set(_flatten(annotation))
    choices = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
    if value is None:
        return "; leave the key out for its default"
    if str in options and isinstance(value, (bool, int, float)):
        return "; put it in quotes if it is meant as text (YAML reads no, on and 1.10 as something else)"
    if isinstance(value, float) and value.is_integer() and _fit(annotation, int(value))[0]:
        return f"; write {int(value)}"
    if not isinstance(value, str):
        return ""
    if any(_fit(annotation, meant)[0] for meant in _unquoted(value)):
        return "; write it without quotes"
    if type(None) in options and value.lower() in ("none", "nil"):
        return "; write null"
    lists = [option for option in options if get_origin(option) in (tuple, list)]
    if any(_fit(option, [value])[0] for option in lists) and str not in options:
        return f"; write a list, as in [{value}]"
    if value.lower() == "gpu" and "cuda" in choices:  # to the eye it is nearer to cpu
        value = "cuda"
    return did_you_mean(value, [choice for choice in choices if isinstance(choice, str)]).replace(" Did", ". Did", 1)


def _unquoted(text: str) -> typing.Iterator[Any]:
    """What YAML would read a text as, were it not in quotes."""
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "null": None, "~": None}
    if text.lower() in words:
        yield words[text.lower()]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            yield number(text)


def _flatten(annotation: Any) -> typing.Iterator[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from _flatten(option)
    elif get_origin(annotation) is typing.Annotated:
        yield from _flatten(get_args(annotation)[0])
    else:
        yield annotation


def json_schema(config: type) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of one dataclass, closed against unknown keys."""
    properties, known = {}, defaults(config)
    for name, annotation in field_types(config).items():
        part = _schema_of(annotation)
        if text := document(config).get(name):
            part["description"] = text
        if name in known:
            part["default"] = list(known[name]) if isinstance(known[name], tuple) else known[name]
        properties[name] = part
    required = [name for name in properties if name not in known]
    schema: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": required} if required else {})


def _schema_of(annotation: Any) -> dict[str, Any]:
    origin, args = get_origin(annotation), get_args(annotation)
    simple = {
        bool: "boolean", int: "integer", float: "number", str: "string", Path: "string", type(None): "null",
        dict: "object",
    }  # fmt: skip
    if annotation is Any:
        return {}
    if annotation in simple:
        return {"type": simple[annotation]}
    if origin is typing.Annotated:
        words = {Ge: "minimum", Gt: "exclusiveMinimum", Le: "maximum", Lt: "exclusiveMaximum"}
        bounds = {words[type(b)]: dataclasses.astuple(b)[0] for b in args[1:] if type(b) in words}
        more = [{"type": mark.json_type} for mark in args[1:] if isinstance(mark, (NullIs, Commas))]
        schema = _schema_of(args[0]) | bounds
        return {"anyOf": [schema, *more]} if more else schema
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema_of(option) for option in args]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (tuple, list):
        return {"type": "array"} | ({"items": _schema_of(args[0])} if args else {})
    if origin is dict:
        return {"type": "object"}
    return {}
