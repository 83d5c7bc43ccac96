from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from llmtune.contract.schema import Ge, Gt, Le, Lt, convert, decode, describe, document, json_schema, split_names


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base."""

    rank: Annotated[int, Ge(1)]
    """Inner
    width."""


@dataclass(frozen=True, kw_only=True)
class Config(Base):
    """All the types."""

    dropout: Annotated[float, Ge(0), Lt(1)] = 0.05
    """Share of zeros."""
    kind: Literal["nf4", "fp4"] = "nf4"
    bits: Literal[4, 8] | None = None
    modules: str | tuple[str, ...] = "all"
    folder: Path | None = None
    more: dict[str, Any] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.999)
    flag: bool | int = False

    def __post_init__(self) -> None:
        if self.rank == 7:
            raise ValueError("rank: found 7, allowed is anything else")


def test_values_are_taken_as_their_types() -> None:
    tree = {"rank": 2, "dropout": 0, "bits": 8, "modules": ["a", "b"], "folder": "x/y", "betas": [0.8, 1], "flag": 3}
    made, problems = decode(Config, tree)
    assert not problems
    assert made == Config(rank=2, dropout=0.0, bits=8, modules=("a", "b"), folder=Path("x/y"), betas=(0.8, 1.0), flag=3)
    assert isinstance(made.dropout, float) and isinstance(made.betas[1], float)
    assert decode(Config, {"rank": 1, "flag": True})[0].flag is True


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("rank", 0, "found 0, allowed is a whole number >= 1"),
        ("rank", True, "found true, allowed is a whole number >= 1"),
        ("rank", 2.0, "found 2.0, allowed is a whole number >= 1"),
        ("rank", "2", 'found "2", allowed is a whole number >= 1; write it without quotes'),
        ("rank", None, "found null, allowed is a whole number >= 1"),
        ("dropout", 1, "found 1, allowed is a number >= 0 and < 1"),
        ("dropout", float("nan"), "found nan, allowed is a number >= 0 and < 1"),
        ("kind", "nf5", 'found "nf5", allowed is one of "nf4", "fp4". Did you mean "nf4"?'),
        ("bits", 4.0, "found 4.0, allowed is one of 4, 8 or null"),
        ("bits", True, "found true, allowed is one of 4, 8 or null"),
        ("modules", 3, "found 3, allowed is text or a list of text; put it in quotes if it is meant as text"),
        ("modules", ["a", 3], "found ['a', 3], allowed is text or a list of text"),
        ("folder", 3, "found 3, allowed is a path or null"),
        ("more", [1], "found [1], allowed is a mapping"),
        ("betas", [0.9], "found [0.9], allowed is a list of 2: a number, a number"),
        ("flag", "yes", 'found "yes", allowed is true or false or a whole number; write it without quotes'),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(key: str, value: object, sentence: str) -> None:
    made, (problem,) = decode(Config, {"rank": 1} | {key: value}, "peft_config")
    assert made is None
    assert problem.key == f"peft_config.{key}"
    assert problem.message.startswith(sentence)


def test_all_problems_are_found_at_once() -> None:
    made, problems = decode(Config, {"rnak": 1, "kind": 3, "bits": 5})
    assert made is None
    assert [problem.key for problem in problems] == ["rnak", "kind", "bits", "rank"]
    assert problems[0].message.startswith('no such key. Did you mean "rank"? Known: betas, bits, dropout')
    assert problems[3].message == "required, but not given. It is a whole number >= 1"


def test_a_check_of_the_class_itself_is_a_problem() -> None:
    made, (problem,) = decode(Config, {"rank": 7}, "x")
    assert made is None and (problem.key, problem.message) == ("x", "rank: found 7, allowed is anything else")


def test_docstrings_under_fields_are_read_inherited_ones_too() -> None:
    assert document(Config) == {"rank": "Inner width.", "dropout": "Share of zeros."}


def test_json_schema_says_the_same() -> None:
    schema = json_schema(Config)
    assert schema["required"] == ["rank"] and schema["additionalProperties"] is False
    found = schema["properties"]
    assert found["rank"] == {"type": "integer", "minimum": 1, "description": "Inner width."}
    assert found["dropout"] == {
        "type": "number", "minimum": 0, "exclusiveMaximum": 1, "default": 0.05, "description": "Share of zeros.",
    }  # fmt: skip
    assert found["bits"] == {"anyOf": [{"enum": [4, 8]}, {"type": "null"}], "default": None}
    assert found["modules"]["anyOf"] == [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]
    assert found["betas"]["default"] == [0.9, 0.999] and found["more"] == {"type": "object", "default": {}}


def test_bounds_in_words() -> None:
    assert describe(Annotated[int, Gt(0), Le(9)]) == "a whole number > 0 and <= 9"
    assert convert(Annotated[float, Gt(0)], 3) == 3.0
    with pytest.raises(TypeError, match="do not know the type"):
        convert(type[int], "x")


def test_names_by_comma_list_or_null() -> None:
    assert split_names(" a, b,,c ") == split_names(["a", "b ", "c"]) == ("a", "b", "c")
    assert split_names(None) == split_names("") == ()
