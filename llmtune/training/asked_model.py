"""A model on all ranks that is asked what an evaluator wants to know: how likely texts are, and what follows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from llmtune.contract.generation import GenerateConfig
from llmtune.contract.stages import Batch
from llmtune.data.workers import progress
from llmtune.distributed.fsdp2 import reshard
from llmtune.distributed.ranks import from_all
from llmtune.model.generate import stop_tokens
from llmtune.model.sizes import sizes_of

if TYPE_CHECKING:
    from torch import Tensor

    from llmtune.training.predict import Predictor

UNLIMITED = 2048
"""Tokens of a model that does not say how many it takes."""


@dataclass(frozen=True)
class SpreadModel:
    """An `AskedModel`, whose questions are shared out among the ranks."""

    predictor: Predictor
    config: Any
    """Of the model, as transformers has it."""

    @property
    def tokenizer(self) -> Any:
        return self.predictor.tokenizer

    @property
    def template_variables(self) -> Mapping[str, Any]:
        return self.predictor.template_variables

    @property
    def context_tokens(self) -> int:
        return sizes_of(self.config).positions or UNLIMITED

    def continuation_logps(
        self, rows: Sequence[tuple[Sequence[int], int]], batch_size: int
    ) -> list[tuple[float, bool]]:
        return self._shared(
            [len(ids) for ids, _ in rows], batch_size, lambda own: self._logps([rows[at] for at in own])
        )

    def complete(
        self, prompts: Sequence[Sequence[int]], batch_size: int, stop: Sequence[str] = (), **generation: Any
    ) -> list[str]:
        keys: dict[str, Any] = {"do_sample": False, **generation}
        config = GenerateConfig(**keys)
        ends = stop_tokens(cast("Any", self.predictor.objective.model), self.tokenizer, self.template_variables)

        def answer(own: Sequence[int]) -> list[str]:
            watch = _StopTexts(self.tokenizer, stop, len(own))
            said = self.predictor.engine.built.generate(
                self.predictor.objective.model, self.tokenizer, [list(prompts[at]) for at in own], config,
                seeds=[self.predictor.seed + at for at in own], stop=ends, watch=watch if stop else None,
            )  # fmt: skip
            return [_until(str(self.tokenizer.decode(each.ids, skip_special_tokens=True)), stop) for each in said]

        return self._shared([len(ids) for ids in prompts], batch_size, answer)

    def _shared(self, lengths: Sequence[int], size: int, ask: Callable[[Sequence[int]], Sequence[Any]]) -> list[Any]:
        """What `ask` says of the rows of these lengths, given their numbers; long ones come first. Collective."""
        ranks, objective = self.predictor.ranks, self.predictor.objective
        order = sorted(range(len(lengths)), key=lambda at: -lengths[at])
        found: dict[int, Any] = {}
        objective.eval()
        try:
            with progress("Measuring", " questions", shown=ranks.first) as bar, torch.no_grad():
                for begin in range(0, len(order), size * ranks.batch_ranks):
                    start = begin + size * ranks.batch_rank
                    own = order[start : start + size]
                    said = objective(lambda own=own: list(ask(own)))
                    # Ranks that share a batch have said the same.
                    for part in from_all(list(zip(own, said, strict=True))):
                        found |= dict(part)
                    bar.update(len(found) - bar.n)
        finally:
            reshard(objective)
        return [found[at] for at in range(len(lengths))]

    def _logps(self, rows: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
        """Of the rows of a batch. A rank without any goes through the model all the same."""
        asked = rows or [([self.tokenizer.eos_token_id or 0] * 2, 1)]
        objective = self.predictor.objective
        device = next(objective.model.parameters()).device
        # The last token is asked and not read: a row may have one more than the model has positions.
        ids_BT, real_BT = _padded([ids[:-1] for ids, _ in asked], device)
        width, counts = ids_BT.shape[1], [count for _, count in asked]
        spots = [row * width + place for row, count in enumerate(counts) for place in range(width - count, width)]
        targets = [token for ids, count in asked for token in ids[-count:]]
        batch = Batch(
            input_ids=ids_BT, labels=ids_BT, weight=float(len(spots)), predict_at=torch.tensor(spots, device=device),
            targets=torch.tensor(targets, device=device), attention_mask=real_BT,
            position_ids=(real_BT.cumsum(-1) - 1).clamp(min=0),
        )  # fmt: skip
        logps_N, likeliest_N = objective.context.logps_and_likeliest(objective.model, batch)
        said = zip(logps_N.split(counts), (likeliest_N == batch.targets).split(counts), strict=True)
        return [(float(logps.sum()), bool(right.all())) for _, (logps, right) in zip(rows, said, strict=False)]


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, T), padded on the left, and where they are real."""
    width = max(len(row) for row in rows)
    ids = [[0] * (width - len(row)) + list(row) for row in rows]
    real = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)


def _until(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the texts in `stop`."""
    return text[: min((at for each in stop if each and (at := text.find(each)) >= 0), default=len(text))]


class _StopTexts:
    """Ends a batch of answers when each holds a text that ends it. Only the end of an answer is looked at anew."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], rows: int) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.longest = max(map(len, stop), default=0)
        self.said: list[list[int]] = [[] for _ in range(rows)]
        """The last tokens of each answer."""
        self.ended = [False] * rows

    def __call__(self, tokens: Sequence[int | None]) -> bool:
        for at, token in enumerate(tokens):
            if token is None or self.ended[at]:
                self.ended[at] = True
                continue
            self.said[at].append(token)
            text = self._text(self.said[at])
            self.ended[at] = _until(text, self.stop) != text
            self.said[at] = self._end(self.said[at], text)
        return all(self.ended)

    def _end(self, ids: list[int], text: str) -> list[int]:
        """What of an answer's last tokens a text that ends it may begin in; they have the same text alone. A character
        takes 4 tokens at most, and some more are kept so that there is mostly nothing to cut."""
        most = 4 * self.longest + 16
        if len(ids) < 2 * most:
            return ids
        end = ids[-most:]
        own = self._text(end)
        return end if len(own) >= self.longest + 4 and text.endswith(own) else ids

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
