"""All that is decided of one model before a weight of it is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmtune.contract.structure import output_heads
from llmtune.distributed.activation_checkpointing import Level

if TYPE_CHECKING:
    import torch

    from llmtune.contract.hubs import Hub
    from llmtune.contract.records import RunContext
    from llmtune.distributed.ranks import Ranks
    from llmtune.media.processor import MediaProcessor
    from llmtune.model.config import ModelConfig
    from llmtune.model.edits import Ledger
    from llmtune.model.precision import Precision
    from llmtune.model.source import ModelFiles
    from llmtune.model.vocabulary import Vocabulary
    from llmtune.recipe.parts import Parts

Mode = Literal["train", "build", "reopen", "infer"]
"""`train`: with data and steps. `build`: the model as it is trained, without data. `reopen`: the structure that was
trained, only to be used. `infer`: only to be used."""


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """A model, resolved: what building, loading, saving, exporting and costing it need to know.

    A run has one for each of its models. `module` is made on the meta device and edited; building spreads it over the
    ranks and fills it with weights in place, which is the only thing that ever changes.
    """

    keys: ModelConfig
    """The recipe's keys of the model."""
    parts: Parts
    """The plugins that shape it."""
    ranks: Ranks
    """The processes that it is spread over."""
    device: torch.device
    mode: Mode
    files: ModelFiles
    precision: Precision
    context: RunContext
    """What plugins were told."""
    tokenizer: Any
    """transformers' tokenizer, with the recipe's template and new tokens."""
    media: MediaProcessor | None
    """What reads pictures, video and sound for it; None where it reads text only."""
    module: Any
    """The transformers model."""
    ledger: Ledger
    """Where each of its original tensors is."""
    vocabulary: Vocabulary | None = None
    """Which rows of the embedding are new; None where none are."""
    trainable: tuple[str, ...] = ()
    """Names of the parameters that train."""
    attention: str = ""
    """transformers' name of the attention function."""
    end_to_end: bool = False
    """Whether that function tells documents apart by their bounds, so that they can lie end to end, without padding."""
    checkpointing: Level = "none"
    """What each layer computes again in its backward pass."""
    checkpointing_why: str = ""
    """The reason, where llmtune has chosen."""
    offloads: bool = False
    """Whether what layers keep for their backward pass lies in host memory."""
    compiled: bool = False
    """Whether each layer is compiled."""
    seed: int = 0
    """The seed of fresh weights."""
    finished: bool = False
    """Whether it has been trained elsewhere, so that nothing of it may start from random numbers."""
    notes: tuple[str, ...] = ()

    @property
    def hub(self) -> Hub:
        """Where its files come from that are not on this machine."""
        return self.parts.one("hub_config").built

    @property
    def is_adapter(self) -> bool:
        """Whether the trained tensors are a small addition to a base that is kept elsewhere."""
        return any(part.built.kind == "adapter" for part in self.parts.at("peft_config"))

    @property
    def head_elsewhere(self) -> bool:
        """Whether the model's files may lack the head of a classifier, which then starts from random numbers, or comes
        from an adapter's files."""
        heads = tuple(f"{name}." for name in output_heads(self.module))
        brought = any(name.startswith(heads) for name in self.ledger.files)
        return self.keys.model_class == "cls" and (brought or not self.finished)

    def parameters(self) -> tuple[int, int]:
        """(trainable, total), counted on the original shapes: a packed 4-bit weight counts its real size."""
        packed = self.ledger.packed()
        rules = sum(math.prod(self.ledger.shapes[name]) for name in self.ledger.rules)
        held = [(name, p) for name, p in self.module.named_parameters() if name not in packed]
        trainable = sum(p.numel() for _, p in held if p.requires_grad)
        return trainable, rules + sum(p.numel() for _, p in held)
