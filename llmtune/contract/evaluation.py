"""The contract of evaluation: what is measured besides the loss, and the answers that are measured. Tensors in
annotations only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmtune.contract.stages import Batch, StageContext


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model answered to the question of a row; a line of `generated_predictions.jsonl`."""

    row: str
    """Where the row stands: `path:line` or `path:row N`."""
    prompt: str
    """What the model was asked, as the template writes it."""
    predict: str
    """The model's answer."""
    label: str | None
    """The row's own answer; None where it has none."""
    cut: bool
    """Whether the answer was ended by the limit of its length."""


class Evaluator(Protocol):
    """What is measured besides the loss. It also `MeasuresBatches`, `MeasuresAnswers`, `MeasuresModel`, or several."""

    metrics: Sequence[str]
    """Every name that it reports: an evaluation has `eval_NAME`, predictions have `predict_NAME`."""


@runtime_checkable
class MeasuresBatches(Protocol):
    """On an evaluator that looks at what the model makes of the tokens that are evaluated on."""

    def measure_batch(
        self, model: nn.Module, batch: Batch, context: StageContext
    ) -> Mapping[str, tuple[Tensor, Tensor]]:
        """(sum, count) of each metric over the batch, scalars. Sums and counts of all batches and ranks are added up,
        and their quotient is reported; it does not depend on how rows are laid into batches.

        Called without gradients, inside the root module's forward, by all ranks for as many batches each; a batch may
        have no targets.
        """
        ...


@runtime_checkable
class MeasuresAnswers(Protocol):
    """On an evaluator that compares what the model answers."""

    generation: Mapping[str, Any]
    """Keys of generation that evaluations in training take instead of the recipe's, such as `num_beams`."""
    needs_labels: bool
    """Whether answers are compared with those of the rows: rows that have none are then left out."""

    def measure_answers(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        """Each metric over the answers to all rows, in their order. Called on the first rank."""
        ...


class AskedModel(Protocol):
    """A model that is asked things of an evaluator's own. All ranks ask the same, and get the same answers."""

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer."""
        ...

    @property
    def template_variables(self) -> Mapping[str, Any]:
        """What the chat template is given besides messages, as in training."""
        ...

    @property
    def context_tokens(self) -> int:
        """The most tokens that the model takes."""
        ...

    def continuation_logps(
        self, rows: Sequence[tuple[Sequence[int], int]], batch_size: int
    ) -> list[tuple[float, bool]]:
        """Of each row, which is token ids and how many of them at its end are the continuation: the sum of the natural
        log-probabilities of these, and whether each is the likeliest token where it stands. `batch_size` rows at a
        time on a rank. Collective.
        """
        ...

    def complete(
        self, prompts: Sequence[Sequence[int]], batch_size: int, stop: Sequence[str] = (), **generation: Any
    ) -> list[str]:
        """The text that follows each prompt, up to a token that ends answers or one of the texts in `stop`, which are
        not part of it. `generation` are keys of `GenerateConfig`; without them the likeliest tokens are taken.
        Collective.
        """
        ...


@runtime_checkable
class MeasuresModel(Protocol):
    """On an evaluator that has questions of its own."""

    settings: Mapping[str, Any]
    """How it measures, as results have it beside them."""

    def measure_model(self, model: AskedModel) -> Mapping[str, Mapping[str, float]]:
        """Of each benchmark its metrics by name, the chief one first: evaluations in training report that one as
        `eval_BENCHMARK`. Called by all ranks; what the first one returns counts. What it draws at random leaves no
        trace in the run.
        """
        ...
