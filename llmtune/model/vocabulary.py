"""New tokens get their ids in the tokenizer, and the rows that the model needs for them are counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import PlanError, listed
from llmtune.contract.schema import split_names

if TYPE_CHECKING:
    from llmtune.model.config import ModelConfig

MULTIPLE = 64
"""A grown number of rows is rounded up to this, as matrix products and equal shards want it."""


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
