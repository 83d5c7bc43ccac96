"""The losses of pairs that the matrix knows, written by hand: whole logits, one mean over the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from tests.by_hand import Row, padded

BETA = 0.5
STAGES: dict[str, dict[str, Any]] = {
    name: {"stage_config": {"name": "dpo", "pref_loss": loss, "pref_beta": BETA}}
    for name, loss in (("dpo", "sigmoid"), ("orpo", "orpo"), ("kto_pair", "kto_pair"))
}
"""What a recipe says for each."""

Pair = tuple[Row, Row]
"""A chosen and a rejected answer with their prompt."""


def loss_of_stage(stage: str, model: Any, rows: Sequence[Pair]) -> Callable[..., torch.Tensor]:
    """The mean loss of (model, pairs, padding); the reference is `model` as it is now."""
    with torch.no_grad():
        reference = {id(pair): torch.stack(answers(model, [pair], 0)) for pair in rows} if stage != "orpo" else {}

    def loss(model: Any, pairs: list[Pair], pad: int) -> torch.Tensor:
        if stage == "orpo":
            chosen, rejected = answers(model, pairs, pad, mean=True)
            odds = chosen - rejected - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
            return (-chosen - BETA * logsigmoid(odds)).mean()
        was = torch.cat([reference[id(pair)] for pair in pairs], dim=1)
        chosen, rejected = torch.stack(answers(model, pairs, pad)) - was
        if stage == "dpo":
            return -logsigmoid(BETA * (chosen - rejected)).mean()
        moved = [answer.detach().mean().clamp(min=0) for answer in (chosen, rejected)]
        values = torch.cat([BETA * (chosen - moved[1]), BETA * (moved[0] - rejected)])
        return (1 - values.sigmoid()).mean()

    return loss


def answers(model: Any, pairs: Sequence[Pair], pad: int, mean: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities of the chosen and of the rejected answers, summed or as means over their tokens."""
    ids, labels, mask = padded([row for pair in pairs for row in pair], pad)
    logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    counted = labels[:, 1:] != -100
    said = (logps.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * counted).sum(1)
    said = said / counted.sum(1) if mean else said
    return said[0::2], said[1::2]
