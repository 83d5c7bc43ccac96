"""Every error a user can cause, one class per cause, one sentence format for all of them.

A message answers four questions in one line: where, what was found, what is allowed, what to do.
Tests match on the class and on the parts of the sentence people act on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

KEYWORDS = ContextVar("KEYWORDS", default="keyword argument")
"""What errors call the place of overrides that are given as a mapping."""


@contextmanager
def keywords_from(place: str) -> Iterator[None]:
    """Errors in the block say that overrides were given at `place`: a command hands its words on as keywords."""
    before = KEYWORDS.set(place)
    try:
        yield
    finally:
        KEYWORDS.reset(before)


class LlmtuneError(Exception):
    """Base of all errors that llmtune raises on purpose. Shown to users without a traceback."""

    exit_code = 1
    everywhere = False
    """Whether all ranks raise this together, so that one of a machine says it."""
    where = ""
    """Which rank met it, as a beginning of the sentence, where not all did."""

    def _render_traceback_(self) -> list[str]:
        """What IPython and Jupyter print in place of a traceback."""
        return [f"{type(self).__name__}: {self.where}{self}"]


class RecipeError(LlmtuneError):
    """The recipe, or an override on the command line, cannot be understood."""

    exit_code = 2


class PlanError(LlmtuneError):
    """The parts of a recipe do not fit together, or do not fit this machine."""

    exit_code = 2


class PluginError(LlmtuneError):
    """A plugin is missing, broken, blocked, offered twice, or made for another llmtune."""

    exit_code = 2


class RewardError(PluginError):
    """A reward has no finite number for an answer, or raised. All ranks raise it together, before the update, so that
    the steps before can be saved."""


class OutOfMemoryError(LlmtuneError):
    """The memory of a device, or of the machine, ran out."""

    exit_code = 6


class DataError(LlmtuneError):
    """A data set cannot be read or holds rows that cannot be used."""

    exit_code = 3


class LoadError(LlmtuneError):
    """Model weights are missing, surplus, of the wrong shape, or in a damaged file."""

    exit_code = 4


class CheckpointError(LlmtuneError):
    """A checkpoint is damaged, or does not belong to this recipe."""

    exit_code = 4


class EditError(LlmtuneError):
    """A plugin's change of the model broke one of the laws that the core checks."""

    exit_code = 2


class DivergedError(LlmtuneError):
    """The loss or a gradient is no longer finite."""

    exit_code = 5


class ErrorList(LlmtuneError):
    """Several errors found in one go, so that a user mends them in one go."""

    exit_code = 2

    def __init__(self, errors: Sequence[LlmtuneError]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(str(error) for error in errors))

    def __reduce__(self) -> tuple[type[ErrorList], tuple[list[LlmtuneError]]]:
        # Errors travel between ranks; the default would rebuild the list from its text.
        return ErrorList, (self.errors,)


def raise_all(errors: Sequence[LlmtuneError]) -> None:
    """Raise nothing, the one error, or all of them together."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ErrorList(errors)


@contextmanager
def blaming(label: str, doing: str, *, but: type[Exception] = LlmtuneError) -> Iterator[None]:
    """Let an exception that a plugin raises carry the plugin's name and what it was doing. Errors of llmtune, those of
    memory that ran out, which have an explanation of their own, and the kind `but`, which the caller expects, pass as
    they are."""
    try:
        yield
    except (LlmtuneError, but):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())
        raise PluginError(f"{label} failed in {doing}: {type(error).__name__}: {said}") from error


@contextmanager
def noting(label: str, doing: str) -> Iterator[None]:
    """Let an exception carry, as a note, whose call it came out of: within a step, where a plugin calls the model. Its
    type and traceback stay, as the cause may as well be the model, the device or another rank."""
    try:
        yield
    except LlmtuneError:
        raise
    except Exception as error:
        error.add_note(f"raised within {doing} of {label}")
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed. On a CPU torch has no class of its own for it."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    # The last is what safetensors' Rust part ends with where Python has no memory for what it returns.
    said = {RuntimeError: "can't allocate memory", BaseException: "PyObject pointer is null"}
    return known or any(isinstance(error, kind) and words in str(error) for kind, words in said.items())


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`' Did you mean "rank"?'` where a known name is one or two slips of the keys away, else an empty string."""
    near = min(((slips(name, other), other) for other in known), default=None)
    return f' Did you mean "{near[1]}"?' if near and near[0] <= min(2, max(len(name), 3) // 3) else ""


def slips(name: str, other: str) -> int:
    """The letters to insert, delete, exchange, or swap with their neighbour that make `other` of `name`."""
    before, row = [0] * (len(other) + 1), list(range(len(other) + 1))
    for at, letter in enumerate(name):
        last, before, row = before, row, [at + 1]
        for to, wanted in enumerate(other):
            cost = min(row[to] + 1, before[to + 1] + 1, before[to] + (letter != wanted))
            if at and to and (letter, name[at - 1]) == (other[to - 1], wanted):
                cost = min(cost, last[to - 1] + 1)
            row.append(cost)
    return row[-1]


def listed(names: Iterable[object], most: int = 8) -> str:
    """`a, b, c and 12 more`: a list short enough for a sentence."""
    texts = [str(name) for name in names]
    if len(texts) <= most:
        return ", ".join(texts)
    return f"{', '.join(texts[:most])} and {len(texts) - most} more"


def counted(number: int, thing: str) -> str:
    """`1 rank`, `2,000 ranks`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
