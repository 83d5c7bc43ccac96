"""Names of the contract before they took the field's terms. Plugins made for them work unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from llmtune.contract.examples import UnpairedPreference as Labelled
from llmtune.contract.load_rules import TensorPart as Part
from llmtune.contract.records import ModelEdit, RunContext
from llmtune.contract.records import ParallelDims as Layout

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Change", "Labelled", "Layout", "Part", "Situation"]


class Situation(RunContext):
    """The former `RunContext`, whose `capabilities` were called `words`, and `dims` `layout`."""

    def __init__(self, *, words: frozenset[str] = frozenset(), **facts: Any) -> None:
        facts.setdefault("capabilities", words)
        facts.setdefault("dims", facts.pop("layout", Layout()))
        super().__init__(**facts)


class Change(ModelEdit):
    """The former `ModelEdit`, whose `after_load` was called `settle`, and `tp_follow` `follow`."""

    def __init__(
        self,
        *,
        settle: Sequence[Callable[[nn.Module], None]] = (),
        follow: Mapping[str, Literal["inputs", "outputs"]] | None = None,
        **claims: Any,
    ) -> None:
        claims.setdefault("after_load", settle)
        claims.setdefault("tp_follow", follow or {})
        super().__init__(**claims)

    @property
    def settle(self) -> Sequence[Callable[[nn.Module], None]]:
        """The former name of `after_load`."""
        return self.after_load

    @property
    def follow(self) -> Mapping[str, Literal["inputs", "outputs"]]:
        """The former name of `tp_follow`."""
        return self.tp_follow
