"""What a stage needs to let its model answer: the recipe's engine, its rewards, and batches of what was said."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmtune.contract.errors import PluginError, RewardError, blaming
from llmtune.contract.generation import ShownPrompt, asking
from llmtune.data.batches import collate, to_device
from llmtune.data.sequence import TokenSequence
from llmtune.distributed.ranks import fail_together, failing_together, from_all
from llmtune.media.read import ShownTokens
from llmtune.model.prompts import shown_by, tokens_of
from llmtune.recipe.parts import BuiltPlugin, reward_names

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from llmtune.contract.examples import ShownText
    from llmtune.contract.generation import Answer, Asked, Completion, GenerateConfig
    from llmtune.contract.stages import Batch, StageContext
    from llmtune.distributed.ranks import Ranks
    from llmtune.media.processor import MediaProcessor


KEPT_BYTES = 2**30
"""Opened media that are kept, as each is read for its prompt and again for each answer: 1,300 pictures of 512 x 512."""


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Engine, rewards and layout of a run."""

    tokenizer: PreTrainedTokenizerBase
    engine: BuiltPlugin
    rewards: Sequence[BuiltPlugin]
    further: Sequence[Mapping[str, Any]]
    """The models that each reward asks."""
    flat: bool
    pad_id: int
    device: torch.device
    ranks: Ranks
    seed: int
    media: MediaProcessor | None = None
    """What reads the media that prompts show; None where the model reads text only."""
    elsewhere: bool = False
    """Whether another model has answered, in whose prompts media may stand otherwise."""

    @property
    def names(self) -> Sequence[str]:
        """What metrics call the rewards, in the recipe's order."""
        return reward_names(self.rewards)

    def generate(
        self, model: Any, prompts: Sequence[Asked], config: GenerateConfig, seeds: Sequence[int]
    ) -> list[Answer]:
        """Answers by the engine, one for each prompt. Collective."""
        if self.media is not None:
            fail_together(self._unshown([tokens_of(each) for each in prompts], [shown_by(each) for each in prompts]))
        ask = asking(self.engine.built, self.engine.full_label, self.media)
        with blaming(self.engine.full_label, "generate"):
            return ask(model, self.tokenizer, prompts, config, seeds=seeds)

    def seed_of(self, *numbers: int) -> int:
        """A seed that follows from the run's and `numbers`."""
        return random.Random(repr((self.seed, *numbers))).getrandbits(62)

    def score(self, completions: Sequence[Completion], contexts: Sequence[StageContext]) -> Tensor:
        """(completions, rewards) float32, NaN where a reward says nothing. Each has a context of its own. Collective.

        Raises RewardError, on all ranks, where one of them has no finite number for every answer.
        """
        found = np.full((len(completions), len(self.rewards)), np.nan, dtype=np.float32)
        for at, (part, context) in enumerate(zip(self.rewards, contexts, strict=True)):
            with failing_together():
                try:
                    with blaming(part.full_label, "score"):
                        scores = part.built.score(completions, context)
                    found[:, at] = checked(part, completions, scores)
                except PluginError as met:
                    raise RewardError(str(met)) from None
        if (group := self.ranks.dims.tensor) > 1:  # computes one result, whatever a reward says the second time
            found = from_all(found)[self.ranks.rank // group * group]
        return torch.from_numpy(found).to(self.device)

    def asked_by(self, other: MediaProcessor | None) -> Rollouts:
        """The same of a further model, whose prompts `other` reads."""
        if self.media is not None and other is not None and self.media.facts() == other.facts():
            return self
        return replace(self, media=other, elsewhere=True)

    def prompt_of(self, completion: Completion) -> Asked:
        """The prompt of an answer in the model's own tokens."""
        if completion.shown is None or not self.elsewhere:
            return completion.asked
        if self.media is None:
            return tuple(self.tokenizer(completion.shown.text, add_special_tokens=False)["input_ids"])
        ids, _ = self.media.encode(completion.shown, [])
        return ShownPrompt(ids=tuple(ids.tolist()), shown=completion.shown)

    def batch(
        self,
        sequences: Sequence[tuple[Sequence[int], int]],
        sample_ids: Sequence[int] = (),
        prompts: Sequence[Asked] = (),
    ) -> Batch:
        """Token rows, each trained from a place on, as a batch that weighs as much as it has rows. What their `prompts`
        show stays in host memory. Collective where the model reads media."""
        rows = [TokenSequence(np.asarray(ids, np.int64), np.arange(len(ids)) >= first) for ids, first in sequences]
        layout: dict[str, Any] = {"flat": self.flat, "pad_id": self.pad_id, "counts_samples": True}
        if self.media is None:
            return to_device(collate(rows, sample_ids=sample_ids, **layout), self.device)
        asked = [*prompts] or [()] * len(rows)
        pairs = zip(rows, asked, strict=True)
        own = [ShownTokens(row.ids, shown_by(each), len(tokens_of(each))) for row, each in pairs]
        kinds = set().union(*from_all({medium.kind for row in own for medium in row.shown.media}))
        own += self.media.fillers(sorted(kinds), [row.shown for row in own])
        blank = [TokenSequence(each.ids, np.zeros(len(each.ids), bool)) for each in own[len(rows) :]]
        made = collate(rows, sample_ids=sample_ids, fillers=blank, **layout)
        with failing_together():
            if wrong := self._unshown([row.ids.tolist() for row in rows], [each.shown for each in own]):
                raise wrong
            read = self.media.read([row.shown for row in own])
            made.media = read.tensors(own, "flat" if self.flat else "padded")
        return replace(to_device(replace(made, media={}), self.device), media=made.media)

    def _unshown(self, rows: Sequence[Sequence[int]], shown: Sequence[ShownText]) -> PluginError | None:
        """What to say to a stage that gives rows without what they show, which the model would not miss."""
        places = set(self.media.placeholders if self.media is not None else ())
        for ids, its in zip(rows, shown, strict=False):
            if not its.media and not places.isdisjoint(ids):
                return PluginError(
                    "stage_config: a row has tokens that stand for media, and shows none; the stage has to give "
                    "`context.generate` what `Batch.prompts` gave it, and `context.batch` these prompts"
                )
        return None


LARGEST = float(np.finfo(np.float32).max)


def checked(part: BuiltPlugin, completions: Sequence[Completion], scores: Sequence[float | None]) -> list[float]:
    """The scores of a reward, NaN for None. Raises PluginError unless it has one for each answer, each a number that
    float32 can hold."""
    allowed = "allowed is a finite number for each answer, or None where there is nothing to say; "
    allowed += "nothing was learnt from this step"
    try:
        values = [math.nan if score is None else float(score) for score in scores]
    except (TypeError, ValueError):
        raise PluginError(f"{part.full_label}: score gave {scores!r:.200}, {allowed}") from None
    if len(values) != len(completions):
        raise PluginError(
            f"{part.full_label}: score gave {len(values)} numbers for {len(completions)} answers, {allowed}"
        )
    for score, value, completion in zip(scores, values, completions, strict=True):
        if score is not None and not abs(value) <= LARGEST:
            raise PluginError(
                f"{part.full_label}: score gave {score} for the answer {completion.answer[:200]!r} to the prompt that "
                f"ends in {completion.prompt[-100:]!r}, {allowed}"
            )
    return values
