"""The root module of a run: the model and what is learnt from it, in one forward.

FSDP2 gathers the root's own weights (embeddings, final norm, head) around the root's forward. With the stage inside it,
a stage may call the model, its backbone or its head as it likes, without building full logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from llmtune.contract.errors import noting
from llmtune.contract.stages import Prepares, StageContext
from llmtune.distributed.fsdp2 import reshard
from llmtune.distributed.ranks import total
from llmtune.model.generate import evaluating

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from llmtune.contract.generation import Answer, Asked, Completion, GenerateConfig
    from llmtune.contract.records import SwitchesOff
    from llmtune.contract.stages import Batch, Stage
    from llmtune.training.rollouts import Rollouts


EVALUATION = -1
"""The number of the step that evaluations draw their seeds for."""


class Objective(nn.Module):
    """`forward(batch)` is the stage's summed loss on the model.

    `forward(function)` calls the function instead: whatever uses the model while it is sharded (generation, checks) has
    to run in here, where FSDP2 has gathered the root's weights.
    """

    stage_label: str
    context: Context

    def __init__(
        self,
        model: nn.Module,
        stage: Stage | None,
        ops: Mapping[str, Callable[..., Any]],
        autocast: torch.dtype | None,
        stage_label: str = "stage_config",
    ) -> None:
        super().__init__()
        self.model = model
        self.stage = stage
        self.stage_label = stage_label
        self.context = Context(ops)
        self.autocast = autocast
        self.train()

    def train(self, mode: bool = True) -> Objective:
        """Train, but for layers that normalise over a batch, as of some towers (FastVLM, Granite Speech): they keep to
        the statistics that they come with, else a row would count otherwise beside other rows, and what is frozen would
        move."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, batch: Batch | Callable[[], Any]) -> Any:
        device = next(self.model.parameters()).device.type
        device = "cpu" if device == "meta" else device  # without weights, where the engine reads them itself
        # Without autocast's cache of cast weights: it would hold them all through the forward pass, and what a
        # checkpointed layer computes again would not be what it computed first.
        with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None, cache_enabled=False):
            if callable(batch):
                return batch()
            assert self.stage is not None, "a model opened for use only has no stage"
            with noting(self.stage_label, "loss"):
                return self.stage.loss(self.model, batch, self.context)


def prepared(objective: Objective, batches: Iterable[Batch], step: int = EVALUATION) -> Iterable[Batch]:
    """The batches that are looked at together, as the objective's stage prepares them, where it does. Collective."""
    stage = objective.stage
    if not isinstance(stage, Prepares):
        return batches
    objective.context.step = step
    with torch.no_grad(), noting(objective.stage_label, "prepare"):
        return objective(lambda: stage.prepare(objective.model, list(batches), objective.context))


class Context(StageContext):
    """`StageContext` for a transformers model."""

    def __init__(
        self,
        ops: Mapping[str, Callable[..., Any]],
        head_explains_logits: bool | None = None,
        further: Mapping[str, FrozenModel] = MappingProxyType({}),
        tensor_ranks: int = 1,
        rollouts: Rollouts | None = None,
    ) -> None:
        self.ops: Mapping[str, Callable[..., Any]] = {
            "linear_cross_entropy": linear_cross_entropy, "linear_token_logps": linear_token_logps, **ops,
        }  # fmt: skip
        self._head_explains_logits = head_explains_logits
        self._further = further
        self._tensor_ranks = tensor_ranks
        self._rollouts = rollouts
        self.step = EVALUATION

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks; a tensor group, which computes one result, counts once."""
        return total(values.clone()) / self._tensor_ranks

    def with_model(self, name: str, compute: Callable[[nn.Module, StageContext], Tensor]) -> Tensor:
        """What `compute` makes of a further model, without gradients. Collective."""
        with torch.no_grad():
            return self._further[name](compute, self)

    @property
    def rollouts(self) -> Rollouts:
        """What roll-outs need, which there is in a run."""
        assert self._rollouts is not None, "only a run has roll-outs"
        return self._rollouts

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's tokenizer."""
        return self.rollouts.tokenizer

    @property
    def rewards(self) -> Sequence[str]:
        """The names of the recipe's rewards."""
        return self.rollouts.names

    def generate(
        self, model: Any, prompts: Sequence[Asked], config: GenerateConfig, seeds: Sequence[int]
    ) -> list[Answer]:
        """Answers by the recipe's engine. Collective."""
        return self.rollouts.generate(model, prompts, config, seeds)

    def seed_of(self, *numbers: int) -> int:
        """A seed for a draw of this step."""
        return self.rollouts.seed_of(self.step, *numbers)

    def score(self, completions: Sequence[Completion]) -> Tensor:
        """(completions, rewards) float32. Collective."""
        return self.rollouts.score(completions, [self.asking(further) for further in self.rollouts.further])

    def batch(
        self,
        sequences: Sequence[tuple[Sequence[int], int]],
        sample_ids: Sequence[int] = (),
        prompts: Sequence[Asked] = (),
    ) -> Batch:
        """A batch of token rows in the run's layout. Collective where the model reads media."""
        return self.rollouts.batch(sequences, sample_ids, prompts)

    def prompt_of(self, completion: Completion) -> Asked:
        """The prompt of an answer as the model reads it."""
        return self.rollouts.prompt_of(completion)

    def asking(self, further: Mapping[str, FrozenModel]) -> Context:
        """The same for a reward, which asks further models of its own."""
        other = copy(self)
        other._further = further
        return other

    def hidden_states(self, model: Any, batch: Batch) -> Tensor:
        """Last hidden states (B, T, D), without building logits."""
        return model.base_model(**batch.model_inputs()).last_hidden_state

    def head(self, model: Any) -> nn.Module:
        """The output head."""
        return model.get_output_embeddings()

    def logit_transform(self, model: Any) -> Callable[[Tensor], Tensor] | None:
        """What comes after the head: soft-capping (Gemma 2, RecurrentGemma), scaling up (Cohere) or down (Granite)."""
        config = model.config.get_text_config()
        cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        factor = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        if cap:
            return lambda logits: torch.tanh(logits / cap) * cap
        if factor != 1:
            return lambda logits: logits * factor
        return None

    def next_token_loss(self, model: Any, batch: Batch) -> Tensor:
        """Cross-entropy of the batch's targets under the model, times their weights, summed: a float32 scalar."""
        values_NX, head, transform = self._at_targets(model, batch)
        op = self.ops["linear_cross_entropy"] if head is not None else cross_entropy
        return weighted_sum(batch, values_NX, lambda some_NX, targets: op(some_NX, head, targets, transform))

    def token_logps(self, model: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
        """The log-probability of each of the batch's N targets under the model: (N,) float32."""
        return self._logps(batch, *self._at_targets(model, batch), temperature)

    def logps_and_states(self, model: Any, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """The same, and the (N, D) last hidden states that predict the targets. A model whose logits are not explained
        by its head is run twice."""
        values_NX, head, transform = self._at_targets(model, batch)
        logps_N = self._logps(batch, values_NX, head, transform, temperature)
        if head is not None:
            return logps_N, values_NX
        return logps_N, self.hidden_states(model, batch).flatten(0, 1).index_select(0, batch.predict_at)

    def _logps(
        self, batch: Batch, values_NX: Tensor, head: nn.Module | None, transform: Callable[[Tensor], Tensor] | None,
        temperature: float,
    ) -> Tensor:  # fmt: skip
        transform = tempered(transform, temperature)
        if head is None:
            return -cross_entropy(values_NX, None, batch.targets, transform, "none")
        return self.ops["linear_token_logps"](values_NX, head, batch.targets, transform)

    def likeliest(self, model: Any, batch: Batch) -> Tensor:
        """The token that the model finds likeliest at each of the batch's N targets: (N,). Logits are there for some
        positions at a time only."""
        values_NX, head, transform = self._at_targets(model, batch)
        found = [_logits(some_CX, head, transform).argmax(-1) for some_CX in values_NX.split(_positions(head))]
        return torch.cat(found)

    def logps_and_likeliest(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """(N,) float32, the log-probability of each of the batch's N targets, and (N,) the likeliest tokens; without
        gradients. Logits are there for some positions at a time only."""
        values_NX, head, transform = self._at_targets(model, batch)
        logps, likeliest = [], []
        size = _positions(head)
        for some_CX, targets_C in zip(values_NX.split(size), batch.targets.split(size), strict=True):
            logs_CV = _logits(some_CX, head, transform).float().log_softmax(-1)
            logps.append(logs_CV.gather(-1, targets_C[:, None])[:, 0])
            likeliest.append(logs_CV.argmax(-1))
        return torch.cat(logps), torch.cat(likeliest)

    def _at_targets(
        self, model: Any, batch: Batch
    ) -> tuple[Tensor, nn.Module | None, Callable[[Tensor], Tensor] | None]:
        """(N, D) hidden states of the batch's targets with the head and the transform that make logits of them, where
        these explain the model's logits; else the (N, V) logits themselves, and None."""
        if self._head_explains_logits is None:
            self._head_explains_logits = self._probe(model, batch)
        if self._head_explains_logits:
            values, head, transform = self.hidden_states(model, batch), self.head(model), self.logit_transform(model)
        else:
            values, head, transform = model(**batch.model_inputs()).logits, None, None
        return values.flatten(0, 1).index_select(0, batch.predict_at), head, transform

    def _probe(self, model: Any, batch: Batch) -> bool:
        """Whether head and transform on the backbone's output give this model's logits. Asked once a run, on 4 tokens:
        a model that does more to its logits than we know must not be trained on other ones."""
        if self.head(model) is None or not hasattr(model, "base_model"):
            return False
        try:
            with torch.no_grad(), evaluating(model):
                inputs = {"input_ids": batch.input_ids[:1, :4], "use_cache": False}
                logits = model(**inputs).logits
                expected = logits.float()
                found = self.head(model)(model.base_model(**inputs).last_hidden_state)
                transform = self.logit_transform(model)
                found = (transform(found) if transform else found).float()
        except (AttributeError, TypeError):
            return False
        # A cap at 30 moves logits of 0.5 by 5e-5 of themselves: float32 tells, narrower types tell it of larger ones.
        rtol, atol = (1e-5, 1e-6) if logits.dtype == torch.float32 else (1e-2, 1e-3)
        return expected.shape == found.shape and torch.allclose(expected, found, rtol=rtol, atol=atol)


def tempered(transform: Callable[[Tensor], Tensor] | None, temperature: float) -> Callable[[Tensor], Tensor] | None:
    """The transform of logits, and then their division by a temperature."""
    if temperature == 1.0:
        return transform
    return lambda logits: (logits if transform is None else transform(logits)) / temperature


def weighted_sum(batch: Batch, values_NX: Tensor, summed: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Sum over targets, each times its weight. Targets of one weight go together, so that an operation that knows no
    weights can be used: a message has one weight, so there are two or three."""
    if not batch.weight_groups:
        return summed(values_NX, batch.targets)
    losses = [
        weight * summed(values_NX.index_select(0, spots), batch.targets.index_select(0, spots))
        for weight, spots in batch.weight_groups
    ]
    return torch.stack(losses).sum()


def linear_cross_entropy(
    hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, transform: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """The plain operation: logits for all N positions at once, then summed cross-entropy in float32."""
    return cross_entropy(hidden_ND, head, targets_N, transform)


def cross_entropy(
    values_NX: Tensor,
    head: nn.Module | None,
    targets_N: Tensor,
    transform: Callable[[Tensor], Tensor] | None,
    reduction: str = "sum",
) -> Tensor:
    """Cross-entropy in float32 of the logits that `head` and `transform` make of `values_NX`, or that these are."""
    return F.cross_entropy(_logits(values_NX, head, transform).float(), targets_N, reduction=reduction)


def _logits(values_NX: Tensor, head: nn.Module | None, transform: Callable[[Tensor], Tensor] | None) -> Tensor:
    logits_NV = values_NX if head is None else head(values_NX)
    return logits_NV if transform is None else transform(logits_NV)


LOGITS_AT_ONCE = 2**24
"""Numbers of a chunk of logits, 64 MiB as float32: at a vocabulary of 49,152 these are 341 positions."""


def _positions(head: nn.Module | None) -> int:
    """Positions whose logits are there together."""
    weights = head.parameters() if head is not None else ()
    vocabulary = max((max(weight.shape) for weight in weights if weight.ndim == 2), default=2**17)
    return max(1, LOGITS_AT_ONCE // vocabulary)


def linear_token_logps(
    hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, transform: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """The plain operation: some positions at a time go through the head, and once more in the backward pass."""
    size = _positions(head)
    return -torch.cat([
        checkpoint(cross_entropy, hidden_CD, head, targets_C, transform, "none", use_reentrant=False)
        for hidden_CD, targets_C in zip(hidden_ND.split(size), targets_N.split(size), strict=True)
    ])  # fmt: skip


class FrozenModel(Protocol):
    """A further model of a stage."""

    def __call__(self, compute: Callable[[nn.Module, StageContext], Tensor], context: Context) -> Tensor:
        """What `compute` makes of the model and its context. `context` is that of the trained model."""
        ...


@dataclass(frozen=True)
class BeforeTraining:
    """The trained model while its adapters are off."""

    model: nn.Module
    peft: SwitchesOff

    def __call__(self, compute: Callable[[nn.Module, StageContext], Tensor], context: Context) -> Tensor:
        with evaluating(self.model), self.peft.disabled(self.model):
            return compute(self.model, context)


@dataclass(frozen=True)
class OwnModel:
    """A model beside the trained one, with weights of its own, spread over the ranks like it."""

    objective: Objective

    def __call__(self, compute: Callable[[nn.Module, StageContext], Tensor], context: Context) -> Tensor:
        objective = self.objective
        result = objective(lambda: compute(objective.model, objective.context))
        reshard(objective)
        return result
