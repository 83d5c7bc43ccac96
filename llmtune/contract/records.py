"""The contract between llmtune and its plugins: typed records and protocols, nothing that acts.

Plugins import these names from `llmtune`. Nothing here imports torch at run time, so that a plugin's
entry module stays light; tensors appear in annotations only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from llmtune.contract.load_rules import LoadRule, TensorReader, WeightRule

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from llmtune.contract.hubs import Hub
    from llmtune.contract.optimizers import ParameterRole

API_VERSION = 2
"""Version of this contract. A plugin that says it was made for another one is not used.

2: stages that prepare a step, ask further models and let the model answer; `OptimizerFactory.create` gets groups of
parameters and a context (1: the model's parameters)."""


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """One thing a recipe can name. A hook returns a list of these."""

    name: str
    """What the recipe writes; also the name of the entry point that leads here."""
    config: type
    """A dataclass: its fields are the recipe keys, its docstrings their documentation."""
    build: Callable[[Any], Any]
    """Called with the validated config once the recipe is valid. Heavy imports belong in here."""
    summary: str = ""
    """One line for `llmtune plugins`."""
    needs: frozenset[str] = frozenset()
    """Capability words that another part of the recipe must give."""
    gives: frozenset[str] = frozenset()
    """Capability words that this plugin adds to a recipe."""
    refuses: frozenset[str] = frozenset()
    """Capability words that make this plugin impossible."""
    requires: tuple[str, ...] = ()
    """Python requirements checked when a recipe names the plugin, such as `bitsandbytes>=0.48`."""
    api: int = API_VERSION


@dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """How the ranks of a run are arranged. Rank numbers run fastest over `tensor`, slowest over `replicate`."""

    replicate: int = 1
    """Groups of ranks that hold the same shards (HSDP)."""
    shard: int = 1
    """Ranks with batches of their own that parameters are sharded over."""
    context: int = 1
    """Ranks that share a batch, each with a piece of every row; parameters are sharded over them too."""
    tensor: int = 1
    """Ranks that share a batch and split its matrix products."""
    expert: int = 1
    """Ranks that hold different experts; a grouping of the ranks above, not a further dimension."""

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.replicate * self.shard * self.context * self.tensor


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a plugin may know of the run it takes part in. Plain values, the same on every rank."""

    mode: Literal["train", "infer"]
    device: Literal["cpu", "cuda"]
    ranks: int
    """Number of processes the model is spread over."""
    dims: ParallelDims = ParallelDims()
    """How they are arranged."""
    compute_dtype: torch.dtype
    """Type of the activations, and of frozen weights in memory."""
    trainable_dtype: torch.dtype
    """Type in which trainable parameters are stored and updated."""
    gather_dtype: torch.dtype
    """Type in which parameters travel between ranks. Packed storage of this type is never cast."""
    capabilities: frozenset[str] = frozenset()
    """Capability words that all plugins of the recipe give together."""
    frozen: frozenset[str] = frozenset()
    """Names of modules whose own parameters the recipe keeps as they are (`freeze_vision_tower` and its like), so that
    an edit of all layers leaves them out."""
    learning_rate: float = 0.0
    """The recipe's; 0 where nothing trains."""
    rewards: tuple[str, ...] = ()
    """The names of the recipe's rewards (`reward_config`), in its order."""
    autocast: bool = False
    """Whether the forward pass runs under `torch.autocast(compute_dtype)`."""
    model_name: str | None = None
    """The recipe's `model`, for files that name their base."""
    revision: str | None = None
    cache_dir: Path | str | None = None
    """The recipe's `cache_dir`, for plugins that fetch files of their own; None is the libraries' own place."""
    token: str | None = field(default=None, repr=False)
    """The recipe's `token` for private files on the hub."""
    hub: Hub | None = None
    """What the recipe's hub_config has built, for `fetch_files`; None is the default."""

    @property
    def words(self) -> frozenset[str]:
        """The former name of `capabilities`, which plugins made for version 1 of the contract read."""
        return self.capabilities

    @property
    def layout(self) -> ParallelDims:
        """The former name of `dims`."""
        return self.dims


@dataclass(frozen=True, kw_only=True)
class ModelEdit:
    """What an edit did to the model. The core checks each claim before a weight is read."""

    rules: Sequence[LoadRule] = ()
    """For each original tensor that left the model: how to load it elsewhere."""
    weight_rules: Sequence[WeightRule] = ()
    """How weights of the original model change before `rules`, of this edit and of earlier ones, convert them."""
    fresh: Mapping[str, Callable[[Tensor], object]] = field(default_factory=dict)
    """New tensors that no checkpoint holds, by name: fills the full tensor in place. The core seeds
    torch's generator from the recipe's seed and the name, so the values do not depend on the ranks."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """New tensors that start equal to another one: new name to existing name, after this edit."""
    files: Mapping[str, tuple[Path, str]] = field(default_factory=dict)
    """New tensors that a safetensors file holds: name to (file, key in it)."""
    buffers: frozenset[str] = frozenset()
    """New tensors that the edit already filled with real values, on any device but meta."""
    after_load: Sequence[Callable[[nn.Module], None]] = ()
    """Called in order once all weights are in place, for values that depend on them."""
    aside: frozenset[str] = frozenset()
    """New tensors that train whatever else does, and are in checkpoints but in no result: a value head."""
    trainable: Callable[[str], bool] | None = None
    """Which parameters train, by name. Exactly one edit may decide; without one all train."""
    roles: Mapping[str, ParameterRole] = field(default_factory=dict)
    """What new parameters are for, by name, where their place in the model does not tell: factors of adapters."""
    lr_factor: Callable[[str], float] | None = None
    """Multiplier of the learning rate of each parameter that trains, by name; None is 1 for all."""
    store_trainable: Literal["float32", "compute"] | None = None
    """Overrides the type in which trainable parameters are stored; None follows the recipe."""
    ops: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """Replacements for operations the core calls by name, such as `linear_cross_entropy`."""
    tp_follow: Mapping[str, Literal["inputs", "outputs"]] = field(default_factory=dict)
    """New linear modules inside a layer of the model, by name, that take the layer's own inputs or give its own
    outputs: where tensor parallelism splits the layer, they are split with it."""
    attention: str | None = None
    """Name of an attention function registered with transformers' `AttentionInterface`."""
    report: Sequence[str] = ()
    """Lines for `llmtune plan`: how many layers, which names."""


@runtime_checkable
class Edit(Protocol):
    """What `build` of a quant, peft or kernel plugin returns."""

    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        """Edit the structure. Everything is on the meta device; nothing may be materialised."""
        ...


@runtime_checkable
class Quant(Edit, Protocol):
    """Stores frozen base weights in another form. All it has to say is in `ModelEdit.rules`."""


@runtime_checkable
class Peft(Edit, Protocol):
    """Decides which parameters train."""

    kind: Literal["adapter", "weights"]
    """`adapter`: only the trained tensors are saved, so that it has to be an `Adapter`. `weights`: the whole model is
    saved, by the core."""


@dataclass(frozen=True, kw_only=True)
class Amendment:
    """What becomes of a model before its structure is built."""

    model_class: Literal["llm", "cls"] | None = None
    """`cls`: a head of the config's `num_labels` in place of the one over the vocabulary. None leaves it."""
    layers: Sequence[int] | None = None
    """For each layer of the amended text decoder, the layer of the files whose weights it starts from; None: its own.
    The names of the amended model are then those that edits see and that are saved."""


@runtime_checkable
class Amends(Protocol):
    """Optional on a built peft or stage object that wants another structure than the model's files have."""

    def amend(self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Amendment:
        """Change the model's config in place, before anything is built of it. What is saved says the same."""
        ...


@runtime_checkable
class Merges(Protocol):
    """Optional on a built peft object of the kind `weights` that leaves modules of its own in the model."""

    def merge(self, model: nn.Module) -> None:
        """Fold the trained tensors into the base in place, leaving plain modules (one device only)."""
        ...


@runtime_checkable
class Adapter(Peft, Merges, Protocol):
    """A peft object of the kind `adapter`: it knows the files in which others read the result.

    It may train tensors of the base, too, if `save` writes them and `merge` leaves them where they belong.
    """

    def save(self, model: nn.Module, tensors: Mapping[str, Tensor], folder: Path, context: RunContext) -> None:
        """Write the trained tensors (full, on CPU, by model name) in the format others read."""
        ...


@runtime_checkable
class SwitchesOff(Protocol):
    """Optional on a built peft object whose model computes what its base does while the trained tensors are off."""

    def disabled(self, model: nn.Module) -> AbstractContextManager[None]:
        """A block in which the base answers. It leaves the model as it was, also where an error ends it."""
        ...


@runtime_checkable
class TrainsWhole(Protocol):
    """Optional on a built peft object whose recipe can name modules to train in full, new rows of tokens included."""

    whole_modules_key: str
    """The key of its block that takes their names, such as `modules_to_save`."""


@runtime_checkable
class Reopens(Protocol):
    """Optional on a built peft object whose recipe names files that may be gone when its result is used."""

    def reopened(self, saved: Path) -> Mapping[str, Any] | None:
        """The parameters of a block that makes the same structure from `saved`, a folder that `save` wrote.

        None where the recipe's own parameters do that.
        """
        ...


@runtime_checkable
class Kernel(Edit, Protocol):
    """Replaces operations or modules by faster ones that compute the same."""


class Init(Protocol):
    """How checkpoint tensors arrive on a rank."""

    whole: bool
    """True if this rank has to see whole tensors, False if it can fetch rows."""

    def fetch(self, reader: TensorReader, key: str, rows: tuple[int, int] | None) -> Tensor:
        """Tensor `key`, or its rows `[start, stop)`.

        With `whole`, all ranks call it for the same keys in the same order, so it may use collectives of
        `torch.distributed`; without, each rank calls it for what it keeps.
        """
        ...


@runtime_checkable
class ReadsOnFirst(Protocol):
    """Optional on a built init object."""

    only_first: bool
    """Whether no rank but the first needs the weight files. The core tells the others which tensors there are."""


class Distribute(Protocol):
    """Spreads a model over the ranks of a mesh, before weights are loaded."""

    in_host_memory: bool
    """Whether shards stay in host memory. Then they are loaded there, and a single rank needs `apply`, too."""

    def layout(self, ranks: int) -> ParallelDims:
        """How to arrange so many ranks. Raises PlanError where that is impossible."""
        ...

    def apply(self, root: nn.Module, layers: Sequence[nn.Module], mesh: Any, context: RunContext) -> None:
        """Spread `root`, on the meta device, over a DeviceMesh with the dimensions `replicate`, `shard`, `tensor`:
        `shard` always, its size being `dims.shard * dims.context`; the others where they are not 1."""
        ...

    def before_backward(self, root: nn.Module, last: bool) -> None:
        """Called before each micro-batch's forward pass; gradients have to be reduced after the `last` of a step."""
        ...


@runtime_checkable
class HoldsGathered(Protocol):
    """Optional on a `Distribute`: what it holds whole, and how it can hold less, for the estimate of memory."""

    keeps_weights: bool
    """Whether a layer's gathered weights stay from its forward pass to its backward pass."""
    keeps_gradients: bool
    """Whether gradients are whole, not shards, between the micro-batches of a step."""

    def savings(self) -> Mapping[Literal["gradients", "host"], Mapping[str, Any]]:
        """The keys of its block that save memory and are not set yet: `gradients` keeps shards between micro-batches,
        `host` moves shards to host memory."""
        ...


class Schedule(Protocol):
    """Learning rate as a pure function of progress; warm-up is the core's."""

    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        """Multiplier of the learning rate for the 0-based optimiser step, `step >= warmup_steps`."""
        ...


@runtime_checkable
class FollowsEvaluations(Protocol):
    """Optional on a schedule that depends on how evaluations turn out. A recipe that names one has to evaluate."""

    def evaluated(self, value: float, greater_is_better: bool) -> None:
        """Called after each evaluation with the value of `metric_for_best_model`, the same on all ranks."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Plain numbers for the checkpoint: all that `factor` depends on besides its arguments."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave, before the first step of a continued run."""
        ...


@runtime_checkable
class Checks(Protocol):
    """Optional on any built plugin object: plan-time objections, one sentence each."""

    def check(self, context: RunContext, model: nn.Module) -> Iterable[str]: ...
