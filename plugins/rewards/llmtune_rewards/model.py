"""Rewards of a sequence classifier with one output. T token positions · D width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from llmtune import Amendment, Batch, Completion, ModelSpec, PlanError, ShownPrompt, StageContext, output_heads

from .places import keys_of

if TYPE_CHECKING:
    from torch import Tensor

    from llmtune import Asked

    from . import RewardModelConfig

MARK = "Here an answer ends."


class ModelReward:
    """The number of the head at the end of a conversation, which is the prompt, the answer's tokens, and what the
    template writes after an answer, whether it came to its end or was cut: as reward models are trained and asked."""

    def __init__(self, config: RewardModelConfig) -> None:
        self.config = config

    @cached_property
    def models(self) -> Mapping[str, ModelSpec]:
        """The reward model. Raises PlanError where the config names none that can be used."""
        return {"reward": ModelSpec(keys=keys_of(self.config), amend=self._amend, key="reward_model")}

    def _amend(self, config: Any, tokenizer: Any) -> Amendment:
        """A head with one output; of a base without a head, as stage `rm` makes it."""
        if any("ForSequenceClassification" in name for name in config.architectures or ()):
            if config.num_labels != 1:
                raise PlanError(
                    f"model: {self.config.reward_model} has a head with {config.num_labels} outputs, and a reward is "
                    "one number; name a reward model"
                )
        else:
            config.pad_token_id = tokenizer.pad_token_id
        config.num_labels = 1
        return Amendment(model_class="cls")

    def score(self, completions: Sequence[Completion], context: StageContext) -> list[float]:
        """What the model says of each answer. Collective."""
        return context.with_model("reward", lambda it, its: self._read(it, its, completions, context)).tolist()

    def _read(self, model: Any, its: StageContext, completions: Sequence[Completion], context: StageContext) -> Tensor:
        """(completions,) float32, some at a time. Ranks read on until the last of them has read all of its own."""
        (head,) = output_heads(model)
        pad_id, device = model.config.get_text_config().pad_token_id, next(model.parameters()).device
        ending, prompts = written_after(context.tokenizer), [its.prompt_of(each) for each in completions]
        rows = [[*tokens_of(asked), *said(each, ending)] for asked, each in zip(prompts, completions, strict=True)]
        found = torch.zeros(len(rows))
        order = sorted(range(len(rows)), key=lambda at: -len(rows[at]))
        while context.total(torch.tensor(float(len(order)), device=device)) > 0:
            some, order = order[: self.config.batch_size], order[self.config.batch_size :]
            batch = its.batch([(rows[at], len(rows[at])) for at in some], prompts=[prompts[at] for at in some])
            hidden_TD = its.hidden_states(model, batch).flatten(0, 1)
            ends = torch.tensor(last_positions(batch, [rows[at] for at in some], pad_id), dtype=torch.int64)
            logits = model.get_submodule(head)(hidden_TD.index_select(0, ends.to(hidden_TD.device)))
            found[some] = logits.squeeze(-1).float().cpu()
        return found


def written_after(tokenizer: Any) -> list[int] | None:
    """The tokens that the template writes after an answer; None where it does not write answers as they are."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    _, said, after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(MARK)
    return tokenizer(after, add_special_tokens=False)["input_ids"] if said else None


def tokens_of(prompt: Asked) -> Sequence[int]:
    """A prompt's tokens."""
    return prompt.ids if isinstance(prompt, ShownPrompt) else prompt


def said(completion: Completion, ending: Sequence[int] | None) -> Sequence[int]:
    """The answer as the template writes it; a token that ended it is part of the `ending`."""
    if ending is None:
        return completion.ids
    return [*(completion.ids if completion.cut else completion.ids[:-1]), *ending]


def last_positions(batch: Batch, rows: Sequence[Sequence[int]], pad_id: int | None) -> list[int]:
    """Where each row ends in the batch's flattened tokens: its last one that is no padding, as transformers looks for
    it, even where the text itself ends with that token."""
    if batch.document_starts is not None:
        starts = batch.document_starts.tolist()
    else:
        starts = range(0, batch.input_ids.numel(), batch.input_ids.shape[1])
    ends = [max((at for at, token in enumerate(row) if token != pad_id), default=0) for row in rows]
    return [start + end for start, end in zip(starts, ends, strict=False)]
