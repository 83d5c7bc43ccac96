"""Weights last: stream a checkpoint into a model that is already edited and sharded.

One tensor at a time is read, renamed and converted as transformers does it, converted as a plugin's load rule says,
and this rank's piece is kept. The largest tensor bounds what is held besides the shard.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from llmtune.contract.errors import EditError, LoadError, blaming, listed
from llmtune.contract.records import ReadsOnFirst
from llmtune.distributed.placement import local, local_box, local_rows, materialise, put, seeded, shard_group
from llmtune.distributed.ranks import first_does
from llmtune.model.edits import Ledger, PlacedRule, PlacedWeightRule, named_tensors, persistent_names
from llmtune.model.new_rows import fill_rows
from llmtune.model.skeleton import config_value
from llmtune.model.tensor_reader import FolderReader
from llmtune.model.weight_files import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

    from llmtune.contract.records import Init
    from llmtune.model.vocabulary import Vocabulary


FORMER_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Old checkpoints hold these; transformers computes them now."""


@dataclass
class Original:
    """One or more checkpoint keys that make up one or more tensors of the original model."""

    keys: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """What they become; for a plain (renamed) tensor exactly one."""
    converter: Any = None
    """transformers' `WeightConverter`, or None where the key is only renamed."""
    patterns: list[str] = field(default_factory=list)

    def stacks(self) -> bool:
        """Whether the converter stacks tensors, and joins several stacks (gate and up projections) elsewhere than along
        the stack: then row i is made of the i-th tensors alone."""
        first, *rest = self.converter.operations
        return (
            type(first) is MergeModulelist
            and first.dim == 0
            and all(type(operation) is Concatenate and operation.dim > 0 for operation in rest)
        )


def match_keys(model: Any, keys: list[str], names: set[str]) -> tuple[list[Original], list[str]]:
    """Pair checkpoint `keys` with the original model's tensor `names`, through transformers' conversion mapping.

    Returns what to read, in checkpoint order, and the keys that match nothing.
    """
    mapping = get_model_conversion_mapping(model) or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = dict.fromkeys(names, True)
    originals: dict[str, Original] = {}
    unexpected = []
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in names and key in names:
            name, pattern = key, None
        if name not in names:
            unexpected.append(key)
            continue
        original = originals.setdefault(name, Original())
        original.keys.append(key)
        if pattern is None:
            original.names = [name]
            continue
        original.patterns.append(pattern)
        if original.converter is None:
            original.converter = deepcopy(by_pattern[pattern])
            first, *_ = targets = original.converter.target_patterns
            original.names = [name.replace(first, target) for target in targets]
    return list(originals.values()), unexpected


def for_each_copy(originals: list[Original], sources: Mapping[str, str], names: set[str]) -> list[Original]:
    """`originals` under the `names` of a model with added layers: once for each layer that starts from them."""
    starting: dict[str, list[str]] = {}
    for name in sorted(names, key=dot_natural_key):
        starting.setdefault(sources.get(name, name), []).append(name)
    return [
        replace(original, names=list(copy), converter=deepcopy(original.converter))
        for original in originals
        for copy in zip(*(starting[name] for name in original.names), strict=True)
    ]


@dataclass
class WeightLoader:
    """State of one load; `run` does it."""

    model: Any
    ledger: Ledger
    folder: Path
    init: Init
    device: torch.device
    seed: int
    init_label: str = "init_config"
    """The plugin that fetches, for errors."""
    new_heads: bool = False
    """Whether tensors outside the base model may be missing (a new classification head)."""
    shards: torch.device | None = None
    """Where shards are kept; None is `device`."""
    index: Mapping[str, StoredTensor] | None = None
    """What the folder holds, where another rank has looked; None looks here."""
    vocabulary: Vocabulary | None = None
    """Rows that the checkpoint does not hold, or that it has not trained."""

    def run(self) -> None:
        """Materialise, fill, settle. Raises LoadError listing every missing, surplus or misshapen key."""
        materialise(self.model, self.device, self.shards)
        self.tensors = named_tensors(self.model)
        self.done: set[str] = set(self.ledger.filled)
        with FolderReader(self.folder, self.index) as self.reader:
            originals = self._matched()
            for original in originals:
                self._read(original)
        if self.vocabulary is not None:
            fill_rows(self.vocabulary, self.ledger, self.tensors, self.device)
        self._fill_new()
        self._check_all_filled()
        for plugin, step in self.ledger.after_load:
            with blaming(f"plugin {plugin}", "after_load"):
                step(self.model)

    def _matched(self) -> list[Original]:
        names = set(self.ledger.direct) | set(self.ledger.rules)
        sources = self.ledger.sources
        originals, unexpected = match_keys(self.model, self.reader.keys(), {sources.get(name, name) for name in names})
        if sources:
            originals = for_each_copy(originals, sources, names)
        covered = {name for original in originals for name in original.names}
        aliases = self._tied(covered)
        missing = sorted(names - covered - aliases)
        if self.new_heads:
            head = [name for name in missing if not name.startswith(self.model.base_model_prefix + ".")]
            for name in head:
                self._initialise_head(name)
            missing = [name for name in missing if name not in head]
        missing = _without(missing, self.model._keys_to_ignore_on_load_missing)
        surplus = _without(unexpected, self.model._keys_to_ignore_on_load_unexpected)
        surplus = _without(surplus, FORMER_BUFFERS)
        if self.new_heads:
            surplus = [key for key in surplus if key.startswith(self.model.base_model_prefix + ".")]
        shapes = self.ledger.shapes
        misshapen = [
            f"{original.keys[0]} {list(self.reader.shape(original.keys[0]))}, "
            f"the model wants {list(shapes[original.names[0]])}"
            for original in originals
            if original.converter is None and self.reader.shape(original.keys[0]) != shapes[original.names[0]]
        ]
        problems = [
            f"{what}: {listed(keys)}"
            for what, keys in (
                ("missing", missing),
                ("not part of the model", surplus),
                ("of another shape", misshapen),
            )
            if keys
        ]
        if problems:
            raise LoadError(
                f"{self.folder}: the weights do not fit {type(self.model).__name__}. {'; '.join(problems)}. "
                "Check that `model` and `model_class` name what the files hold"
            )
        return originals

    def _tied(self, covered: set[str]) -> set[str]:
        """Names that share their tensor with a covered one."""
        have = {id(self.tensors[self.ledger.direct[name]]) for name in covered if name in self.ledger.direct}
        return {name for name, now in self.ledger.direct.items() if id(self.tensors[now]) in have}

    def _initialise_head(self, name: str) -> None:
        tensor = self.tensors[self.ledger.direct[name]]
        value = torch.zeros(tensor.shape)
        if value.dim() > 1:
            with seeded(self.seed, name):
                value.normal_(std=config_value(self.model.config, "initializer_range") or 0.02)
        put(tensor, value)
        self.done.add(self.ledger.direct[name])

    def _read(self, original: Original) -> None:
        """Read what this rank keeps of one source, where that can be told, or all of it; convert and place it."""
        if original.converter is None:
            self._deliver(original.names[0], original.keys[0], None)
        elif (rows := self._rows_of_stack(original)) is not None:
            self._place_stack(original, rows)
        else:
            for target, value in self._converted(original, zip(original.keys, original.patterns, strict=True)).items():
                self._deliver(target, None, value)

    def _converted(self, original: Original, sources: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
        """What transformers makes of `sources`, (key, pattern) each."""
        name = original.names[0]
        for key, pattern in sources:
            # Deferred, so that a converter's tensors are read one group at a time.
            original.converter.add_tensor(name, key, pattern, lambda key=key: self._fetch(key, None))
        made = original.converter.convert(name, model=self.model, config=self.model.config)
        return {target: value[0] if isinstance(value, list) else value for target, value in made.items()}

    def _rows_of_stack(self, original: Original) -> tuple[int, int] | None:
        """This rank's rows `[start, stop)` of a tensor that has one checkpoint tensor, or one of each kind, in each
        row, as stacked experts have; None for any other."""
        name = original.names[0]
        if self.init.whole or len(original.names) > 1 or name not in self.ledger.direct or not original.stacks():
            return None
        if name in self.ledger.weight_rules:
            return None
        rows = local_rows(self.tensors[self.ledger.direct[name]])
        counts = {original.patterns.count(pattern) for pattern in original.patterns}
        return rows if counts == {self.ledger.shapes[name][0]} else None

    def _place_stack(self, original: Original, rows: tuple[int, int]) -> None:
        now = self.ledger.direct[original.names[0]]
        self.done.add(now)
        if rows[0] >= rows[1]:
            return
        kept: list[tuple[str, str]] = []
        for pattern in dict.fromkeys(original.patterns):
            keys = [key for key, other in zip(original.keys, original.patterns, strict=True) if other == pattern]
            kept += [(key, pattern) for key in keys[slice(*rows)]]
        (value,) = self._converted(original, kept).values()
        put(self.tensors[now], value, whole=False)

    def _fetch(self, key: str, rows: tuple[int, int] | None) -> Tensor:
        with blaming(self.init_label, f"fetch of {key}"):
            return self.init.fetch(self.reader, key, rows)

    def _source(self, key: str | None, value: Tensor | None) -> Tensor:
        if value is None:
            assert key is not None
            value = self._fetch(key, None)
        return value

    def _deliver(self, name: str, key: str | None, value: Tensor | None) -> None:
        for early in self.ledger.weight_rules.get(name, ()):
            key, value = None, self._changed(name, early, self._source(key, value))
        if placed := self.ledger.rules.get(name):
            self._convert(placed, key, value)
            return
        now = self.ledger.direct[name]
        tensor = self.tensors[now]
        self.done.add(now)
        box = None if self.init.whole or key is None or tensor.dim() == 0 else local_box(tensor)
        held = self.ledger.shapes[name][:1]  # rows; fewer than the model's where its vocabulary has grown
        grown = held != tuple(tensor.shape[:1])
        if box is None:
            put(tensor, self._source(key, value), grown=grown)
            return
        assert key is not None
        first = min(box[0].start, *held)
        rows = self._fetch(key, (first, max(first, min(box[0].stop, *held))))
        put(tensor, rows[(slice(None), *box[1:])], whole=False, grown=grown)

    def _changed(self, name: str, early: PlacedWeightRule, value: Tensor) -> Tensor:
        """What takes the weight's place; tensors that are made of it are filled."""
        with blaming(f"plugin {early.plugin}", f"its weight rule for {early.rule.source}"), seeded(self.seed, name):
            value, made = early.rule.convert(value.to(self.device))
        for target, now in early.where.items():
            put(self.tensors[now], made[target])
            self.done.add(now)
        return value

    def _convert(self, placed: PlacedRule, key: str | None, value: Tensor | None) -> None:
        if self.init.whole:
            value = self._source(key, value)
        pieces: Mapping[str, Tensor] | None = None
        with blaming(f"plugin {placed.plugin}", f"its load rule for {placed.rule.source}"):
            # A tensor that is here whole is converted in parts too: the other ranks do the rest of the work.
            if any(local_rows(self.tensors[now]) for now in placed.where.values()):
                pieces = placed.rule.convert_part(_SourcePart(self, placed, key, value))
            partly = pieces is not None
            if pieces is None:
                pieces = placed.rule.convert(self._source(key, value).to(self.device))
        for target, piece in pieces.items():
            now = placed.where[target]
            put(self.tensors[now], piece, whole=not (partly and local_rows(self.tensors[now])))
            self.done.add(now)

    def _fill_new(self) -> None:
        for name, fill in self.ledger.fresh.items():
            tensor = self.tensors[name]
            with seeded(self.seed, name):
                value = torch.zeros(
                    tensor.shape, dtype=torch.float32 if tensor.dtype.is_floating_point else tensor.dtype
                )
                fill(value)
            put(tensor, value)
        for name, (path, key) in self.ledger.files.items():

            def look(path: Path = path, key: str = key) -> Tensor:
                with safe_open(path, framework="pt") as file:
                    return file.get_tensor(key)

            put(self.tensors[name], first_does(look) if only_first_reads(self.init) else look())
        for name, source in self.ledger.copies.items():
            put(self.tensors[name], local(self.tensors[source]).detach(), whole=False)
        self.done |= {*self.ledger.fresh, *self.ledger.files, *self.ledger.copies}

    def _check_all_filled(self) -> None:
        filled = {id(self.tensors[name]) for name in self.done}
        persistent = persistent_names(self.model)
        if empty := [name for name in sorted(persistent) if id(self.tensors[name]) not in filled]:
            raise EditError(f"after loading, nothing has given {listed(empty)} a value")
        if meta := [name for name, tensor in self.tensors.items() if tensor.is_meta]:
            raise EditError(f"after loading, {listed(meta)} still have no storage")


def only_first_reads(init: Init) -> bool:
    """Whether the first rank alone opens weight files."""
    return isinstance(init, ReadsOnFirst) and init.only_first


class _SourcePart:
    """`TensorSlice` of a source, read in pieces or here already: what a rule asks to convert only this rank's rows."""

    def __init__(self, loader: WeightLoader, placed: PlacedRule, key: str | None, value: Tensor | None) -> None:
        self._loader, self._placed, self._key, self._value = loader, placed, key, value
        self.shape = tuple(value.shape) if value is not None else loader.reader.shape(key or "")

    def elements(self, start: int, stop: int) -> Tensor:
        if self._value is not None:
            return self._value.reshape(-1)[start:stop].to(self._loader.device)
        assert self._key is not None
        width = math.prod(self.shape[1:])
        first, last = start // width, -(-stop // width)
        rows = self._loader._fetch(self._key, (first, last)).reshape(-1)
        return rows[start - first * width : stop - first * width].to(self._loader.device)

    def rows(self, target: str) -> tuple[int, int]:
        tensor = self._loader.tensors[self._placed.where[target]]
        return local_rows(tensor) or (0, tensor.shape[0])

    def concatenate(self, piece: Tensor) -> Tensor:
        tensors = (self._loader.tensors[now] for now in self._placed.where.values())
        group = next((group for tensor in tensors if (group := shard_group(tensor)) is not None), None)
        if group is None:
            return piece
        sizes = [torch.zeros(1, dtype=torch.int64, device=piece.device) for _ in range(group.size())]
        dist.all_gather(sizes, torch.tensor([piece.numel()], device=piece.device), group=group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=piece.dtype, device=piece.device)
        padded[: piece.numel()] = piece
        pieces = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(pieces, padded, group=group)
        return torch.cat([part[: int(size)] for part, size in zip(pieces, sizes, strict=True)])


def _without(keys: list[str], patterns: Any) -> list[str]:
    return [key for key in keys if not any(re.search(pattern, key) for pattern in patterns or ())]
