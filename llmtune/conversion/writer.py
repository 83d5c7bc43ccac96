"""The text of a converted recipe: its keys in the order of the file they came from, each decision a comment."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from llmtune.conversion.draft import Draft
from llmtune.conversion.source import ForeignSource
from llmtune.recipe import text as recipe_text
from llmtune.recipe.text import split

WIDTH = 120


def recipe_yaml(draft: Draft, source: ForeignSource, head: str) -> str:
    """The recipe as YAML, comments of the source included."""
    placed = _comments(draft, source)
    lines = [*_wrapped(head), ""]
    heading = (
        f"# What the file leaves out, and {draft.trainer} does otherwise than llmtune, or what follows from other keys:"
    )
    tops = {here.partition(".")[0] for here in draft.came.values()}
    for key in (order := _order(draft)):
        if key not in tops and all(other not in tops for other in order[order.index(key) :]) and heading:
            lines += ["", heading]
            heading = ""
        before = placed.pop(key, [])
        lines += [""] if before and lines[-1] else []
        lines += [*before, *_block(draft, key, draft.recipe[key])]
    rest = [line for several in placed.values() for line in several]
    lines += ["", *rest] if rest else []
    lines += _listed("Not taken over, as there is no counterpart:", draft.lost)
    lines += _listed("To look at:", dict(enumerate(draft.check, 1)))
    lines += _listed("Asks for nothing that has to be asked for here:", draft.idle)
    return "\n".join(lines).rstrip() + "\n"


def _order(draft: Draft) -> list[str]:
    """The recipe's keys: the model, those of the source in its order, and defaults."""
    order = list(draft.given)
    first: dict[str, int] = {}
    for there, here in draft.came.items():
        point = here.partition(".")[0]
        first[point] = min(first.get(point, len(order)), order.index(there))
    return sorted(draft.recipe, key=lambda key: (key != "model", first.get(key, len(order))))


def _comments(draft: Draft, source: ForeignSource) -> dict[str, list[str]]:
    """The source's comments, by the key of the recipe before which they stand; those after all keys under ``""``."""
    placed: dict[str, list[str]] = {}
    waiting: list[str] = []
    paths = list(dict.fromkeys([*source.above, *source.beside]))
    paths.sort(key=lambda path: _position(source, path))
    seen: set[str] = set()
    tops = {split(there)[0]: here.partition(".")[0] for there, here in draft.came.items()}
    keys = [*source.tree, ""]
    for top in keys:
        mine = [path for path in paths if (str(path[0]) if path else "") == top]
        for path in mine:
            waiting += source.above.get(path, [])
            if path in source.beside:
                waiting.append(f"# {recipe_text.show(path)}: {source.beside[path].lstrip('# ')}")
        here = tops.get(top, "")
        if here in draft.recipe and here not in seen:
            seen.add(here)
            placed.setdefault(here, []).extend(waiting)
            waiting = []
        elif here in seen:  # its block is written already: the comment goes there, too
            placed[here].extend(waiting)
            waiting = []
    placed[""] = waiting
    return placed


def _position(source: ForeignSource, path: tuple[Any, ...]) -> tuple[int, int]:
    keys = list(source.tree)
    return (keys.index(path[0]) if path and path[0] in keys else len(keys), len(path))


def _block(draft: Draft, key: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value and (len(value) > 1 or "name" not in value):
        yield from _above(draft, key)
        yield f"{key}:"
        for inner, item in value.items():
            yield from _entry(draft, f"{key}.{inner}", inner, item, "  ")
    else:
        short = value["name"] if isinstance(value, dict) and set(value) == {"name"} else value
        yield from _entry(draft, key, key, short, "")


def _entry(draft: Draft, path: str, key: str, value: Any, indent: str) -> Iterator[str]:
    text = textwrap.indent(recipe_text.dump({key: value}).rstrip("\n"), indent).split("\n")
    said = "; ".join(_said(draft, path))
    if said and len(text) == 1 and len(text[0]) + len(said) + 4 <= WIDTH:
        yield f"{text[0]}  # {said}"
        return
    yield from _wrapped(said, indent)
    yield from text


def _above(draft: Draft, key: str) -> Iterator[str]:
    yield from _wrapped("; ".join(_said(draft, key)))


def _said(draft: Draft, path: str) -> list[str]:
    """Where a key comes from, if it is called otherwise there, and what was decided."""
    names = [
        there
        for there, here in draft.came.items()
        if _same(here, path, draft.recipe) and there not in (path.partition(".")[0], path.rpartition(".")[2])
    ]
    return [*([", ".join(names)] if names else []), *draft.notes.get(path, [])]


def _same(here: str, path: str, recipe: Mapping[str, Any]) -> bool:
    """Whether what became `here` is told at `path`: the name of a block without other keys stands in its own line."""
    point, _, inner = here.partition(".")
    block = recipe[point]
    return here == path or (inner == "name" and path == point and not (isinstance(block, dict) and len(block) > 1))


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ",
                         break_long_words=False, break_on_hyphens=False) if text else []  # fmt: skip


def _listed(heading: str, entries: Mapping[Any, str]) -> list[str]:
    """Entries with one reason share a line."""
    if not entries:
        return []
    shared: dict[str, list[str]] = {}
    for key, why in entries.items():
        why = why.removesuffix("; remove the key")
        shared.setdefault(why, []).append(str(key))
    lines = [
        line
        for why, keys in shared.items()
        for line in textwrap.wrap(f"{', '.join(keys)}: {why}", WIDTH, initial_indent="#   ", subsequent_indent="#     ",
                                  break_long_words=False, break_on_hyphens=False)
    ]  # fmt: skip
    return ["", f"# {heading}", *lines]
