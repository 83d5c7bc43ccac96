"""The stage of reward models. B x T token positions · S sequences, chosen and rejected in turn · P pairs · D width."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import logsigmoid

from llmtune import Amendment, Batch, RunContext, StageContext, StageLoss, output_heads

from .answers import PAIR_METRICS, pair_metrics

if TYPE_CHECKING:
    from torch import Tensor

    from . import RmConfig


class Rewards:
    """The head's one number at the end of each answer; the chosen one's has to be larger (Bradley and Terry 1952)."""

    learns = ("preference",)
    counts = "samples"
    metrics = PAIR_METRICS

    def __init__(self, config: RmConfig) -> None:
        self.config = config

    def amend(self, config: Any, tokenizer: Any) -> Amendment:
        """A head with one output, and the padding that transformers looks for the end of a text by."""
        config.num_labels = 1
        config.pad_token_id = tokenizer.pad_token_id
        return Amendment(model_class="cls")

    def check(self, context: RunContext, model: Any) -> Iterator[str]:
        """Rewards are numbers at the end of a text, which needs to be told from padding."""
        if model.config.get_text_config().pad_token_id is None:
            yield "rm finds the end of an answer by its padding, and the tokenizer has no padding token; use another"

    def loss(self, model: Any, batch: Batch, context: StageContext) -> StageLoss:
        """The sum over the batch's pairs of -log(sigmoid(r_chosen - r_rejected - margin)), and of the penalty on their
        sum; the margin is what a pair's row says (Llama 2, arXiv 2307.09288, equation 2), else 0."""
        (head,) = output_heads(model)
        hidden_ND = context.hidden_states(model, batch).flatten(0, 1)
        last_S = last_positions(batch, model.config.get_text_config().pad_token_id)
        rewards_S = model.get_submodule(head)(hidden_ND.index_select(0, last_S)).squeeze(-1).float()
        chosen_P, rejected_P = rewards_S[0::2], rewards_S[1::2]
        ahead_P = chosen_P - rejected_P
        if batch.columns:
            ahead_P = ahead_P - ahead_P.new_tensor([row.get("margin", 0.0) for row in batch.columns])
        loss_P = -logsigmoid(ahead_P)
        if self.config.center_rewards_coefficient:
            loss_P = loss_P + self.config.center_rewards_coefficient * (chosen_P + rejected_P).square()
        return StageLoss(total=loss_P.sum(), metrics=pair_metrics(rewards_S))


def last_positions(batch: Batch, pad_id: int) -> Tensor:
    """(S,) where each sequence ends in the flattened rows: its last token that is no padding, as transformers'
    sequence classifiers look for it. A padding token that a text itself ends with is passed over, too."""
    ids_N = batch.input_ids.flatten()
    place_N = torch.arange(len(ids_N), device=ids_N.device)
    if batch.document_starts is not None:
        sequence_N = torch.bucketize(place_N, batch.document_starts[1:], right=True)
    else:
        sequence_N = place_N // batch.input_ids.shape[1]
    spots = (ids_N != pad_id) & (sequence_N < batch.sequences)
    if batch.attention_mask is not None:
        spots &= batch.attention_mask.flatten() != 0
    last_S = place_N.new_zeros(batch.sequences)
    # The start of a sequence without any other token, of which there are none in data.
    return last_S.scatter_reduce(0, sequence_N[spots], place_N[spots], "amax")
