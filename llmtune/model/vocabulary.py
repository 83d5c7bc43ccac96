"""New tokens: an id in the tokenizer, a row in the embedding and in the output head, and something to start from.

The skeleton is built with its new number of rows, so that every edit, every way of sharding and every file that is
saved sees one ordinary model. Only the loader knows that the checkpoint has fewer rows (`Ledger.shapes` holds the
checkpoint's shapes), and gives the others their first value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import PlanError, listed
from llmtune.contract.schema import split_names
from llmtune.distributed.placement import local, local_box

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmtune.model.config import ModelConfig
    from llmtune.model.edits import Ledger

MULTIPLE = 64
"""A grown number of rows is rounded up to this, as matrix products and equal shards want it."""
CHUNK = 4096
"""Rows that are summed at once: 128 MB in float64 at a width of 4096."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Which rows of the embedding and the output head no checkpoint has trained. Plain values, the same everywhere."""

    new: Mapping[str, int]
    """Tokens that the tokenizer did not have, with their ids."""
    trained: int
    """Rows before this one belong to tokens that the tokenizer had."""
    held: int
    """Rows in the checkpoint."""
    rows: int
    """Rows in the model."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Tensors with a row for each token, by original name, each with the name of its module."""

    @property
    def fresh(self) -> list[int]:
        """Rows that start as the mean of the trained ones: those of new tokens, and all that the checkpoint lacks."""
        return sorted({*self.new.values(), *range(self.held, self.rows)})

    def lines(self) -> list[str]:
        """For `llmtune plan`."""
        named = listed(f"{token} ({number})" for token, number in self.new.items())
        count = f"{len(self.new)} new: {named}" if self.new else "no new ones"
        place = f"in spare rows of the {self.held} that there are"
        if self.rows > self.held:
            place = f"rows grow from {self.held} to {self.rows}"
        return [count, f"{place}; new rows start as the mean of the first {self.trained}"]


def add_tokens(tokenizer: Any, names: str | tuple[str, ...] | None) -> dict[str, int]:
    """Give `tokenizer` the special tokens `names`; returns those that it did not have, with their ids.

    Raises PlanError where it cannot take tokens, or does not read one of them as one id.
    """
    wanted = list(dict.fromkeys(split_names(names)))
    if not wanted:
        return {}
    before = tokenizer.get_vocab()
    try:
        tokenizer.add_special_tokens({"extra_special_tokens": wanted}, replace_extra_special_tokens=False)
    except (NotImplementedError, ValueError, TypeError, AttributeError) as error:
        raise PlanError(
            f"new_special_tokens: {type(tokenizer).__name__} takes no new tokens ({error}); remove new_special_tokens"
        ) from error
    for token in wanted:
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if list(ids) != [tokenizer.convert_tokens_to_ids(token)]:
            raise PlanError(
                f'new_special_tokens: the tokenizer reads "{token}" as the ids {list(ids)}, not as one; choose another '
                "spelling"
            )
    return {token: tokenizer.convert_tokens_to_ids(token) for token in wanted if token not in before}


def extend(keys: ModelConfig, tokenizer: Any, config: Any) -> Vocabulary | None:
    """Add the recipe's tokens to `tokenizer`, and count the rows that the model of `config` needs for them.

    None where no row is new. Raises PlanError where rows are lacking and `resize_vocab` is false.
    """
    if not keys.new_special_tokens and not keys.resize_vocab:
        return None
    trained = max(tokenizer.get_vocab().values()) + 1
    new = add_tokens(tokenizer, keys.new_special_tokens)
    held: int = config.get_text_config().vocab_size
    needed = max(tokenizer.get_vocab().values()) + 1
    rows = held if needed <= held else -(-needed // MULTIPLE) * MULTIPLE
    if rows == held and not new:
        return None
    if rows > held and not keys.resize_vocab:
        raise PlanError(
            f"resize_vocab: found false, but {listed(new)} need ids up to {needed - 1} and the model has {held} rows, "
            f"{max(0, held - trained)} of them spare; set resize_vocab: true, which makes it {rows} rows"
        )
    return Vocabulary(new=new, trained=min(trained, held), held=held, rows=rows)


def grow(config: Any, vocabulary: Vocabulary) -> None:
    """Write the number of rows into transformers' config, from where it reaches the model and what is saved."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        if getattr(part, "vocab_size", None) == vocabulary.held:
            part.vocab_size = vocabulary.rows


def token_tensors(model: Any, rows: int) -> dict[str, str]:
    """Tensors with one row for each of `rows` tokens, by name, each with the name of its module: the input embedding,
    the output head and its bias."""
    modules = [model.get_input_embeddings()]
    if hasattr(model, "get_output_embeddings") and (head := model.get_output_embeddings()) is not None:
        modules.append(head)
    names = {id(module): name for name, module in model.named_modules()}
    return {
        f"{names[id(module)]}.{leaf}": names[id(module)]
        for module in modules
        for leaf, tensor in module.named_parameters(recurse=False)
        if tensor.shape[0] == rows
    }


def enter(vocabulary: Vocabulary, ledger: Ledger, former: Mapping[str, tuple[int, ...]]) -> Vocabulary:
    """Find the rows in the ledger's model, and tell the ledger how many of them the checkpoint holds.

    `former`: shapes of the model before it grew. Raises PlanError where other tensors than those of embedding and head
    depend on the number of tokens.
    """
    places = token_tensors(ledger.model, vocabulary.rows)
    grown = {name for name, shape in ledger.shapes.items() if former.get(name) != shape}
    wrong = grown ^ set(places) if vocabulary.rows > vocabulary.held else set()
    if wrong or not places:
        raise PlanError(
            f"resize_vocab: {type(ledger.model).__name__} does not grow by rows of its embedding and output head alone "
            f"({listed(sorted(wrong)) or 'it has neither'}); use tokens for which it has rows, or another model"
        )
    ledger.shapes |= {name: (vocabulary.held, *ledger.shapes[name][1:]) for name in places}
    return replace(vocabulary, places=places)


def fill_rows(vocabulary: Vocabulary, ledger: Ledger, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Give the fresh rows the mean of the trained ones. Collective where the tensors are sharded.

    transformers draws them from a normal distribution around that mean whose covariance is 1e-9 that of the rows, a
    noise of 3e-5 of their spread; here they are the mean itself, which no number of ranks changes. What tells two new
    tokens apart, they learn from the first step on, as each is met in other places.
    """
    import torch

    fresh = torch.tensor(vocabulary.fresh)
    places = [tensors[ledger.direct[name]] for name in vocabulary.places]
    for tensor in {id(tensor): tensor for tensor in places}.values():  # a tied one once
        mean = mean_of_rows(tensor, vocabulary.trained, device)
        piece, box = local(tensor), local_box(tensor)
        first = box[0].start if box else 0
        mine = fresh[(fresh >= first) & (fresh < first + piece.shape[0])] - first
        with torch.no_grad():
            piece[mine.to(piece.device)] = mean.to(piece)


def mean_of_rows(tensor: Tensor, stop: int, device: torch.device) -> Tensor:
    """Mean over the rows [0, stop) of a tensor of which this rank may hold a piece, in float64; (D,), or this rank's
    part of it. Collective where rows are sharded. Summed in float64, so that the order of ranks does not show."""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    piece, box = local(tensor).detach(), local_box(tensor)
    first = box[0].start if box else 0
    total = torch.zeros(piece.shape[1:], dtype=torch.float64, device=device)
    for rows in piece[: max(0, stop - first)].split(CHUNK):
        total += rows.to(device, torch.float64).sum(0)
    if isinstance(tensor, DTensor):
        for dim, placement in enumerate(tensor.placements):
            if placement.is_shard(0):
                dist.all_reduce(total, group=tensor.device_mesh.get_group(dim))
    return total / stop
