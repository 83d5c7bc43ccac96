"""The contract of stages: a batch, what is learnt from it, and what a stage may call. Tensors in annotations only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from llmtune.contract.generation import ShownPrompt

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from llmtune.contract.examples import ShownText
    from llmtune.contract.generation import Answer, Asked, Completion, GenerateConfig
    from llmtune.contract.losses import StageLoss
    from llmtune.contract.records import Amendment


@dataclass(kw_only=True)
class Batch:
    """One micro-batch of token rows, on this rank's device.

    Two layouts. Padded: `input_ids` (B, T) with `attention_mask` (B, T). Flat: `input_ids` (1, T), documents laid
    end to end, `position_ids` restarting at 0 and `document_starts` (documents + 1,) giving their bounds.
    """

    input_ids: Tensor
    labels: Tensor
    """Same shape as `input_ids`; `labels[t]` is the token *at* t, -100 where it does not count."""
    weight: float
    """This micro-batch's share of the denominator: the summed weights of its targets (their number, where each counts
    1); where samples are preferences, labelled, or prompts, the number of samples."""
    predict_at: Tensor
    """(N,) positions in the flattened (B*T) rows whose *next* token counts; found on the CPU, so that no
    device has to be waited for."""
    targets: Tensor
    """(N,) the tokens those positions have to predict."""
    weight_groups: tuple[tuple[float, Tensor], ...] = ()
    """Where targets do not all count 1: each distinct weight, and which of the N targets have it."""
    target_sequence: Tensor | None = None
    """(N,) the number of the sequence that a target stands in. Preferences are sequences chosen 0, rejected 0, chosen
    1, ...; a sequence is a row of the padded layout, a document of the flat one."""
    sequences: int = 0
    """How many sequences there are; 0 in the batch of a rank that has no rows."""
    desirable: Tensor | None = None
    """(sequences,) bool, whether an answer is one to give or to avoid, where rows are labelled so."""
    position_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    document_starts: Tensor | None = None
    """int32, on the device of `input_ids`."""
    longest_document: int = 0
    row_tokens: int = 0
    """Tokens of the whole row where this is one rank's piece of it (context parallelism); 0 for whole rows."""
    row_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """Where this is a piece of a row that shows media: `input_ids` and `position_ids` of the whole row. The model puts
    media into the embeddings of all of its tokens, and then goes on with the piece."""
    piece_start: int = 0
    """Where the piece begins in its row."""
    mismatched: Batch | None = None
    """Where rows are labelled: each of their prompts with the answer to another one, of the step if it has several
    (KTO's estimate of how far the model has moved)."""
    columns: tuple[Mapping[str, Any], ...] = ()
    """For each sample the columns of its row that are not tokens: of prompts all, of preferences `margin`, if given.
    Where the data show media, `images`, `videos` and `audios` are lists of the files that a row shows."""
    shown: tuple[ShownText, ...] = ()
    """What each sequence shows; empty where none of the data shows any media."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """What a stage that `Prepares` has put here; from one that `Precomputes`, its (sequences,) numbers of each."""
    media: Mapping[str, Tensor] = field(default_factory=dict)
    """What the model is given of pictures, video and sound, by the names of its own arguments, as its processor makes
    it: `pixel_values`, `image_grid_thw`, `mm_token_type_ids`. Those of answers lie in host memory until the model is
    given them; prompts have none, as they are read when they are answered."""
    sample_ids: tuple[int, ...] = ()
    """Numbers of the samples among those trained on, for error messages."""

    @property
    def tokens(self) -> int:
        """How many there are, without padding and documents that are no samples; 0 where there are no rows."""
        if not self.sequences:
            return 0
        if self.document_starts is not None and not self.row_tokens:
            return int(self.document_starts[self.sequences])
        rows = self.input_ids[: self.sequences]
        return rows.numel() if self.attention_mask is None else int(self.attention_mask[: self.sequences].sum())

    def rows(self) -> list[list[int]]:
        """The tokens of each sequence, without padding."""
        if self.document_starts is not None:
            bounds = self.document_starts.tolist()[: self.sequences + 1]
            ids = self.input_ids[0].tolist()
            return [ids[start:stop] for start, stop in pairwise(bounds)]
        lengths = [self.input_ids.shape[1]] * len(self.input_ids)
        if self.attention_mask is not None:
            lengths = self.attention_mask.sum(1).tolist()
        return [row[:length] for row, length in zip(self.input_ids.tolist(), lengths, strict=True)][: self.sequences]

    def prompts(self) -> list[Asked]:
        """The sequences as prompts to answer, with what they show."""
        rows = [tuple(ids) for ids in self.rows()]
        shown = self.shown or (None,) * len(rows)
        return [
            ShownPrompt(ids=ids, shown=its) if its is not None and its.media else ids
            for ids, its in zip(rows, shown, strict=True)
        ]

    def per_sequence(self, values_N: Tensor) -> Tensor:
        """(sequences,) sums over the targets of each sequence, in either layout."""
        assert self.target_sequence is not None
        return values_N.new_zeros(self.sequences).index_add(0, self.target_sequence, values_N)

    @property
    def wanted(self) -> Tensor | None:
        """The former name of `desirable`, which stages made for version 1 of the contract read."""
        return self.desirable

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments for a transformers model, document bounds included where there are any."""
        media = {name: value.to(self.input_ids.device, non_blocking=True) for name, value in self.media.items()}
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "use_cache": False, **media}
        if self.position_ids is not None:
            inputs["position_ids"] = self.position_ids
        if self.attention_mask is not None:
            inputs["attention_mask"] = self.attention_mask
        elif self.media and self.position_ids is None:  # some count the positions of media by it (Qwen-Omni)
            inputs["attention_mask"] = self.input_ids.new_ones(self.input_ids.shape)
        if self.document_starts is not None:
            inputs |= {
                "cu_seq_lens_q": self.document_starts,
                "cu_seq_lens_k": self.document_starts,
                "max_length_q": self.longest_document,
                "max_length_k": self.longest_document,
            }
        if self.row_tokens:  # a ready mask, which nothing reads, keeps the model from making one for the piece alone
            inputs |= {"attention_mask": self.input_ids.new_ones(1, 1, 1, 1), "context_row_tokens": self.row_tokens}
        if self.row_inputs:
            stop = self.piece_start + self.input_ids.shape[1]
            inputs |= {**self.row_inputs, "context_piece": (self.piece_start, stop)}
        return inputs


class StageContext(Protocol):
    """What a stage may call besides the model."""

    ops: Mapping[str, Callable[..., Any]]
    """`linear_cross_entropy(hidden_ND, head, targets_N, transform) -> summed float32 loss`,
    `linear_token_logps(hidden_ND, head, targets_N, transform) -> (N,) float32`, and what plugins add.
    `head` is the output head (a module), `transform` what `logit_transform` returned."""

    def hidden_states(self, model: nn.Module, batch: Batch) -> Tensor:
        """Last hidden states (B, T, D), without building logits; of this rank's tokens only where rows are split."""
        ...

    def next_token_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of the batch's targets, times their weights, summed: a float32 scalar."""
        ...

    def token_logps(self, model: nn.Module, batch: Batch, temperature: float = 1.0) -> Tensor:
        """The log-probability of each of the batch's N targets, without weights: (N,) float32. Logits are divided by
        `temperature`.

        Logits are there for some positions at a time only, and once more in the backward pass.
        """
        ...

    def logps_and_states(self, model: nn.Module, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """The same, and from the same forward pass the (N, D) last hidden states that predict the targets, for a head
        of the stage's own."""
        ...

    def likeliest(self, model: nn.Module, batch: Batch) -> Tensor:
        """The token that the model finds likeliest at each of the batch's N targets: (N,). No gradients."""
        ...

    def with_model(self, name: str, compute: Callable[[nn.Module, StageContext], Tensor]) -> Tensor:
        """What `compute` makes of one of the stage's further models and its context, without gradients.

        The model is in eval mode, and a rank holds all of its head and embeddings meanwhile. Collective.
        """
        ...

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks of what each has of its own batches. Collective."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's tokenizer, with its template and new tokens."""
        ...

    @property
    def rewards(self) -> Sequence[str]:
        """The names of the recipe's rewards (`reward_config`), in its order."""
        ...

    def generate(
        self, model: nn.Module, prompts: Sequence[Asked], config: GenerateConfig, seeds: Sequence[int]
    ) -> list[Answer]:
        """Answers to prompts, such as `Batch.prompts`, by the recipe's engine, one seed for each. Collective: all ranks
        call it, with prompts or none."""
        ...

    def seed_of(self, *numbers: int) -> int:
        """A seed for a draw of this step, told from its others by `numbers` (the sample, the draw); the same on
        whatever rank and in whatever batch, and again where a run is continued. Evaluations have seeds of their own."""
        ...

    def score(self, completions: Sequence[Completion]) -> Tensor:
        """(completions, rewards) float32: what each reward of the recipe says of each answer, NaN where it says
        nothing. Collective. Raises PluginError where a reward is not finite or not for every answer."""
        ...

    def batch(
        self,
        sequences: Sequence[tuple[Sequence[int], int]],
        sample_ids: Sequence[int] = (),
        prompts: Sequence[Asked] = (),
    ) -> Batch:
        """A batch of token rows on the run's device and in its layout, each with the place of the first token that
        trains; `weight` and `sequences` are their number. Without rows it is one that weighs nothing.

        `prompts` are what the rows begin with, one for each row: what they show is given to the model with them.
        Collective where the model reads media. Raises DataError, on all ranks, where one of their files cannot be read.
        """
        ...

    def prompt_of(self, completion: Completion) -> Asked:
        """The prompt of an answer as the model of this context reads it, which may be another one than that which has
        answered: in the tokens of its own processor; as text, with the marks that the template has written for media,
        where it reads text only."""
        ...

    def head(self, model: nn.Module) -> nn.Module:
        """The output head."""
        ...

    def logit_transform(self, model: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """What the model does to its logits after the head (soft-capping, scaling), or None."""
        ...


class Stage(Protocol):
    """What is learnt from a batch. Runs inside the root module's forward, so it may call any part of the model."""

    def loss(self, model: nn.Module, batch: Batch, context: StageContext) -> StageLoss: ...


@runtime_checkable
class Prepares(Protocol):
    """Optional on a stage that has to see a whole step, on all ranks, before it can say the loss of one row."""

    def prepare(self, model: nn.Module, batches: Sequence[Batch], context: StageContext) -> Sequence[Batch]:
        """The micro-batches that this rank learns from, made of those of its step: usually the same with `extra`, or
        others, whose `weight` is their share of the denominator.

        Called once before each step's losses, with the model in training mode, and before those of an evaluation with
        all its batches; without gradients, inside the root module's forward, by all ranks for as many batches each.
        All ranks return as many, too.
        """
        ...


@runtime_checkable
class RollsOut(Protocol):
    """Optional on a stage that `Prepares`: it learns from answers that the model gives to the prompts of a step.

    Of what was prepared once a step makes several updates of the weights. The number of a step counts roll-outs, and so
    do the learning rate, logs, evaluations and checkpoints.
    """

    answer_tokens: int
    """Most tokens that an answer adds to its prompt; memory is planned by it."""
    splits: int
    """Micro-batches of answers that an update learns from for each micro-batch of prompts."""
    reads: int
    """Times as many micro-batches of prompts a step reads as `gradient_accumulation_steps` says. The micro-batches of
    all ranks for one time have the same prompts, drawn by the seed, however the step is split."""
    updates: int
    """Updates of the weights in a step."""

    def update(self, number: int, prepared: Sequence[Batch], context: StageContext) -> Sequence[Batch]:
        """The micro-batches of the 0-based update `number`, out of what `prepare` returned; as many on every rank."""
        ...


@runtime_checkable
class Remembers(Protocol):
    """Optional on a stage that carries numbers from step to step, such as a coefficient that adapts."""

    def state(self) -> Mapping[str, Any]:
        """What a checkpoint keeps: plain numbers and texts, the same on every rank."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        ...


@runtime_checkable
class Precomputes(Protocol):
    """Optional on a stage that can ask its further models once for each sample, before training.

    They leave the memory then, and `loss` finds the numbers in `Batch.extra`, whatever rows a sample trains with. The
    numbers are kept beside the tokenised data until the data, the models or `precomputed` change.
    """

    precomputed: Mapping[str, Any] | None
    """Keys of the stage that the numbers depend on, and their plain values; None: nothing is computed before."""

    def precompute(self, batch: Batch, context: StageContext) -> Mapping[str, Tensor]:
        """Names of numbers, and (sequences,) float32 of each for a batch; without gradients. Collective."""
        ...


@runtime_checkable
class LearnsFrom(Protocol):
    """Optional on a stage that learns from other examples than conversations, texts and tokens."""

    learns: Sequence[str]
    """The kinds of examples that it learns from, out of `llmtune.contract.examples.KINDS`."""


@runtime_checkable
class Counts(Protocol):
    """Optional on a stage: the unit of the denominator that the summed loss of a step is divided by."""

    counts: Literal["tokens", "samples"]
    """`tokens`: the targets' weights. `samples`: the rows, a pair being one. Stages that do not say count samples of
    preferences, labelled answers and prompts, and tokens of all else."""


@runtime_checkable
class Measures(Protocol):
    """Optional on a stage: what its losses report, so that a plan knows the names."""

    metrics: Sequence[str]
    """Every name that `StageLoss.metrics` can hold; an evaluation reports `eval_NAME`. `reward`, `rewards/accuracies`,
    `rewards/margins` and `kl` are shown beside the loss, in this order."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A further model that a stage asks, frozen: what its part of the recipe says otherwise.

    Without keys it is the trained model as it was before training: where the peft plugin `SwitchesOff`, the model
    itself with its adapters off, which takes no memory, and else a copy of the base.
    """

    keys: Mapping[str, Any] = field(default_factory=dict)
    """Keys of a recipe, such as `model`, `quant_config`, `peft_config`; all others are the run's."""
    amend: Callable[[PretrainedConfig, PreTrainedTokenizerBase], Amendment] | None = None
    """Changes the model's config in place, as `Amends.amend` does; None: nothing but the plugins of `keys` do."""
    key: str = "model"
    """What the plugin's own block calls the model, for errors."""


@runtime_checkable
class UsesModels(Protocol):
    """Optional on a stage or a reward that asks further models, through `StageContext.with_model`."""

    models: Mapping[str, ModelSpec]
    """Each by the name that it is asked by. Those of a stage and of each reward are apart."""


@runtime_checkable
class WithoutDropout(Protocol):
    """Optional on a stage whose loss compares what the model says with what it says elsewhere."""

    without_dropout: bool
    """Whether every dropout of the model, adapters included, is off in training."""


LEARNS = ("conversation", "text", "tokens")
"""The kinds of examples that a stage learns from which does not say."""


def learns_of(stage: Stage) -> Sequence[str]:
    """The kinds of examples that `stage` learns from."""
    return stage.learns if isinstance(stage, LearnsFrom) else LEARNS


def precomputing(stage: Stage) -> Precomputes | None:
    """The stage, if it asks its further models before training."""
    return stage if isinstance(stage, Precomputes) and stage.precomputed is not None else None


def further_models(built: Any) -> Mapping[str, ModelSpec]:
    """The further models that a stage or a reward asks, by its names of them."""
    return built.models if isinstance(built, UsesModels) else {}
