"""The hooks. A recipe key that ends in `_config` is an extension point and has one hook of the same name.

Hooks return records; they do not act. The one exception watches and can change nothing: `observe`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pluggy

from llmtune.contract.events import Event
from llmtune.contract.extension_points import EXTENSION_POINTS, POINTS, ExtensionPoint
from llmtune.contract.records import Plugin

__all__ = ["EXTENSION_POINTS", "HOOKS", "hookimpl", "hookspec", "observe"]

hookspec = pluggy.HookspecMarker("llmtune")
hookimpl = pluggy.HookimplMarker("llmtune")


def _hook(point: ExtensionPoint) -> Callable[[], Iterable[Plugin]]:
    def hook() -> Iterable[Plugin]:  # type: ignore[empty-body]
        ...

    hook.__name__ = hook.__qualname__ = point.name
    hook.__doc__ = f"{point.question} `build` returns a `{point.protocol.__name__}`."
    return hookspec(hook)


@hookspec
def observe(event: Event) -> None:
    """Watch a run: called on rank 0 after logged steps, evaluations and checkpoints."""


HOOKS = type("Hooks", (), {point.name: staticmethod(_hook(point)) for point in POINTS.values()} | {"observe": observe})
"""The specifications of all hooks, by name, as pluggy reads them."""
