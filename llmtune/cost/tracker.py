"""Follow every tensor storage of a computation, real or fake: how much lives at each moment, and what it is for.

torch's own `MemTracker` does this for one module. Here the timeline is cut at marks, so that layers can be counted
again, and a storage's category may be learnt later than its birth: that something is a gradient shows only when a
parameter gets it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from llmtune.distributed.placement import local
from llmtune.planning.memory import Memory

COMMUNICATION = ("fsdp", "c10d", "_c10d_functional")
"""Namespaces of operations whose tensors travel between ranks."""


class Storage:
    """One storage of a certain size. `kind` is a category of `Memory`."""

    __slots__ = ("kind", "size")

    def __init__(self, size: int, kind: str) -> None:
        self.size, self.kind = size, kind


@dataclass
class Segment:
    """The time between two marks."""

    name: tuple[str, int]
    start: list[Storage]
    peak: list[Storage] = field(default_factory=list)
    peak_bytes: int = -1
    most: dict[str, int] = field(default_factory=dict)
    """The largest sum of each category, as far as it was known at the time."""


def by_category(storages: Iterable[Storage]) -> Memory:
    """Bytes of the storages by what they turned out to be for."""
    sums: dict[str, int] = {}
    for storage in storages:
        sums[storage.kind] = sums.get(storage.kind, 0) + storage.size
    return Memory(**sums)


class Tracker(TorchDispatchMode):
    """A dispatch mode. Enter it above the fake mode, so that it sees fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._live: WeakIdKeyDictionary = WeakIdKeyDictionary(ref_type=weakref.ref)
        self._resizable: weakref.WeakSet[Any] = weakref.WeakSet()
        self.kind = "activations"
        """Category of what is made from now on."""
        self.segments: list[Segment] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it becomes operations on local tensors, which come back here
        result = func(*args, **(kwargs or {}))
        moving = func.namespace in COMMUNICATION
        for leaf in tree_leaves((args, kwargs, result) if moving else result):
            if isinstance(leaf, Tensor):
                self._see(leaf, "gathered" if moving else None)
        self._note()
        return result

    def assign(self, tensors: Iterable[Tensor], kind: str) -> list[Storage]:
        """Say what tensors are for; DTensors by their local part. Returns their storages, each once."""
        found = {id(storage): storage for tensor in tensors if (storage := self._see(local(tensor), kind)) is not None}
        return list(found.values())

    def mark(self, name: str, number: int = 0) -> None:
        """End a segment of the timeline and begin the next."""
        self._refresh()
        self.segments.append(Segment((name, number), list(self._live.values())))
        self._note()

    def live(self) -> list[Storage]:
        """All storages that are alive."""
        return list(self._live.values())

    def _see(self, tensor: Tensor, kind: str | None) -> Storage | None:
        if tensor.device.type == "meta":
            return None
        storage = tensor.untyped_storage()
        known = self._live.get(storage)
        if known is None:
            known = self._live[storage] = Storage(storage.size(), kind or self.kind)
        elif kind is not None and (kind != "gathered" or known.kind in ("activations", "logits")):
            known.kind = kind
        if kind == "gathered":
            self._resizable.add(storage)
        return known

    def _refresh(self) -> None:
        # FSDP2 frees and refills gathered weights by resizing their storage, which is no operation that is dispatched.
        for storage in list(self._resizable):
            known = self._live[storage]
            if known.size != storage.size():
                self._live[storage] = Storage(storage.size(), known.kind)

    def _note(self) -> None:
        if not self.segments:
            return
        self._refresh()
        live = list(self._live.values())
        sums: dict[str, int] = {}
        for storage in live:
            sums[storage.kind] = sums.get(storage.kind, 0) + storage.size
        total, segment = sum(sums.values()) - sums.get("host", 0), self.segments[-1]
        for kind, size in sums.items():
            segment.most[kind] = max(segment.most.get(kind, 0), size)
        if total > segment.peak_bytes:
            segment.peak, segment.peak_bytes = live, total
