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

from torch import Tensor, UntypedStorage
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    changes: list[tuple[bool, Storage]] = field(default_factory=list)
    """Storages in the order in which they came (true) and went."""
    peak_at: int = 0
    """How many of the changes had happened when most bytes were alive."""
    peak_bytes: int = -1
    most: dict[str, int] = field(default_factory=dict)
    """The largest sum of each category, as far as it was known at the time."""

    @property
    def peak(self) -> list[Storage]:
        """What was alive when most bytes were."""
        live = dict.fromkeys(self.start)
        for came, storage in self.changes[: self.peak_at]:
            if came:
                live[storage] = None
            else:
                del live[storage]
        return list(live)


def by_category(storages: Iterable[Storage]) -> Memory:
    """Bytes of the storages by what they turned out to be for."""
    sums: dict[str, int] = {}
    for storage in storages:
        sums[storage.kind] = sums.get(storage.kind, 0) + storage.size
    return Memory(**sums)


class Tracker(TorchDispatchMode):
    """A dispatch mode. Enter it above the fake mode, so that it sees fake tensors. Sums are kept up to date, as there
    are thousands of operations and hundreds of storages."""

    def __init__(self) -> None:
        super().__init__()
        # By the id of torch's storage, which tells when it dies.
        self._live: dict[int, Storage] = {}
        self._references: dict[int, weakref.ref[UntypedStorage]] = {}
        self._resizable: set[int] = set()
        self._sums: dict[str, int] = {}
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

    def turn(self, before: str, now: str) -> None:
        """Say that all that is alive of one category belongs to another."""
        for storage in list(self._live.values()):
            if storage.kind == before:
                self._name(storage, now)

    def _see(self, tensor: Tensor, kind: str | None) -> Storage | None:
        if tensor.device.type == "meta":
            return None
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._live.get(key)
        if known is None:
            self._references[key] = weakref.ref(storage, lambda _: self._gone(key))
            known = self._come(key, storage.nbytes(), kind or self.kind)
        elif kind is not None and (kind != "gathered" or known.kind in ("activations", "logits")):
            self._name(known, kind)
        if kind == "gathered":
            self._resizable.add(key)
        return known

    def _come(self, key: int, size: int, kind: str) -> Storage:
        made = self._live[key] = Storage(size, kind)
        self._count(made, 1)
        return made

    def _gone(self, key: int) -> None:
        del self._references[key]
        self._resizable.discard(key)
        self._count(self._live.pop(key), -1)

    def _count(self, storage: Storage, sign: int) -> None:
        self._sums[storage.kind] = self._sums.get(storage.kind, 0) + sign * storage.size
        if self.segments:
            self.segments[-1].changes.append((sign > 0, storage))

    def _name(self, storage: Storage, kind: str) -> None:
        self._sums[storage.kind] -= storage.size
        storage.kind = kind
        self._sums[kind] = self._sums.get(kind, 0) + storage.size

    def _refresh(self) -> None:
        # FSDP2 frees and refills gathered weights by resizing their storage, which is no operation that is dispatched.
        for key in list(self._resizable):
            storage = self._references[key]() if key in self._references else None
            if storage is not None and (known := self._live[key]).size != (size := storage.nbytes()):
                self._count(known, -1)
                self._come(key, size, known.kind)

    def _note(self) -> None:
        if not self.segments:
            return
        self._refresh()
        segment, total = self.segments[-1], sum(self._sums.values()) - self._sums.get("host", 0)
        for kind, size in self._sums.items():
            if size > segment.most.get(kind, 0):
                segment.most[kind] = size
        if total > segment.peak_bytes:
            segment.peak_bytes, segment.peak_at = total, len(segment.changes)
