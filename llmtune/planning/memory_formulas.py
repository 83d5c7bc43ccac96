"""Memory by formulas, at once: from the shapes of the plan's model, nothing run but an empty optimiser.

B rows of T tokens, N positions with a loss, D width, F width of the MLP (times the experts a token visits), H and K
query and key-value heads of width d, V vocabulary; c bytes of the compute type. docs/costs.md has the formulas.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, replace
from functools import reduce
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llmtune.contract.optimizers import ChangesWhatTrains, UpdatesInBackward
from llmtune.contract.records import HoldsGathered
from llmtune.contract.stages import RollsOut, precomputing
from llmtune.contract.structure import text_layers, transformer_layers
from llmtune.model.parameter_groups import (
    create_optimizer,
    group_parameters,
    optimizer_context,
    parameter_roles,
)
from llmtune.model.sizes import ModelSizes, sizes_of
from llmtune.planning.media_memory import tower_activations, tower_layers
from llmtune.planning.memory import Estimate, Memory, Sums

if TYPE_CHECKING:
    from llmtune.planning.micro_batch import MicroBatch
    from llmtune.planning.model_plan import ModelPlan
    from llmtune.planning.plan import Plan

LOSS_CHUNK = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Float32 logits at once that a fused loss is taken to hold."""
RECOMPUTED = {"none": 0.0, "selective": 0.5, "full": 1.0}
"""Share of what a layer would keep that is computed again, by the level of activation checkpointing."""


@dataclass(frozen=True, kw_only=True)
class Held(Sums):
    """What a module holds on this rank, in bytes, and what it is in whole."""

    weights: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    gathered: int = 0
    """Bytes of its whole weights in the type they travel in."""
    trained: int = 0
    """Numbers of its whole trained weights."""
    copied: int = 0
    """Bytes of the copies in the compute type that autocast makes of trained matrices, where nothing is gathered."""

    @property
    def static(self) -> Memory:
        """All but gradients: what is there from the first moment of a step to the last."""
        return Memory(weights=self.weights, adapters=self.adapters, optimizer=self.optimizer)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes that the layers need between their forward and their backward pass."""

    kept: list[int]
    """What each layer keeps."""
    early: int
    """What the backward pass of one layer needs besides: all that the layer saved, and gradients of its MLP."""
    late: int
    """The same when the MLP is done."""
    host: int = 0
    """What waits in host memory."""


class Rank:
    """How the plan divides parameters, and what kinds of bytes they are."""

    def __init__(self, plan: ModelPlan) -> None:
        dims, self.dist = plan.ranks.dims, plan.parts.one("dist_config").built
        self.spread = plan.ranks.size > 1 or self.dist.in_host_memory
        self.shards, self.tensor = dims.shard * dims.context, dims.tensor
        self.adapter, self.packed = plan.is_adapter, plan.ledger.packed()
        self.gather_bytes = plan.context.gather_dtype.itemsize
        self.compute_bytes = plan.precision.compute.itemsize
        says = isinstance(self.dist, HoldsGathered)
        self.keeps_weights = says and self.dist.keeps_weights
        self.keeps_gradients = self.spread and self.shards > 1 and (not says or self.dist.keeps_gradients)

    def local(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Shape of this rank's part: FSDP2 cuts the first dimension, tensor parallelism one of a matrix."""
        shape = tuple(parameter.shape)
        if not self.spread or not shape:
            return shape
        split = self.shards * (self.tensor if len(shape) > 1 else 1)
        return (-(-shape[0] // split), *shape[1:])

    def key(self, name: str, parameter: nn.Parameter) -> tuple[Any, ...]:
        """What an optimiser can tell a parameter apart by: names of layers differ in a number."""
        return re.sub(r"\d+", "#", name), self.local(parameter), parameter.dtype


def estimate_memory(plan: Plan, batch: MicroBatch, checkpointing: str | None = None) -> Estimate:
    """The peak of one step, as the largest of its moments; with another level of `checkpointing` if one is given."""
    model, level = plan.model, checkpointing or plan.model.checkpointing
    rank, layers = Rank(model), transformer_layers(model.module)
    state = optimizer_bytes(plan, rank)
    held = [hold(name + ".", layer, rank, state) for name, layer in layers]
    whole = hold("", model.module, rank, state)
    factory = plan.parts.one("optim_config").built
    if isinstance(factory, UpdatesInBackward) and factory.layerwise:  # one gradient at a time, about
        sizes = [math.prod(rank.local(p)) * p.element_size() for p in model.module.parameters() if p.requires_grad]
        whole = replace(whole, gradients=max(sizes))
    root = whole - reduce(Held.__add__, held, Held())
    acts = activations(model, batch, [layer for _, layer in text_layers(model.module)], rank, level)
    grads, always = Memory(gradients=whole.gradients), whole.static + further_weights(plan)
    kept, passing = tower_activations(model.module, batch.media, rank.compute_bytes, RECOMPUTED[level])
    always += Memory(activations=batch.media.tensor_bytes)
    base = always + Memory(host=acts.host)
    if batch.micro_steps > 1:  # those of the micro-batches before are there from the start
        base += Memory(gradients=4 * whole.trained) if rank.keeps_gradients else grads
    step = Step(
        grads=grads if batch.micro_steps == 1 else Memory(), acts=acts, layers=held, root=root, rank=rank,
        logits=Memory(logits=logits_bytes(model, batch)), head=head_trained(model), again=level != "none",
    )  # fmt: skip
    towers = Memory(activations=kept)
    moments = {name: base + towers + more for name, more in (step.spread() if rank.spread else step.alone())}
    if batch.media.pieces:
        moments["towers"] = base + Memory(gathered=rank.spread * root.gathered, activations=max(kept, passing))
    moments["update"] = always + grads
    stage = plan.parts.one("stage_config").built
    if isinstance(stage, RollsOut):
        gathered = Memory(gathered=root.gathered + max((held.gathered for held in held), default=0) * rank.spread)
        moments["answers"] = always + gathered + answering(plan, batch, stage)
    if rank.dist.in_host_memory:
        moments = {name: to_host(memory) for name, memory in moments.items()}
    moment, at_peak = max(moments.items(), key=lambda item: item[1].total)
    return Estimate(at_peak=at_peak, most=reduce(Memory.most, moments.values()), moment=moment)


def answering(plan: Plan, batch: MicroBatch, stage: RollsOut) -> Memory:
    """What answers to a micro-batch of prompts need at the last of their tokens: the keys and values so far, and of
    each row logits as the model gives them, in float32, their softmax and its sums in float64."""
    sizes, width = sizes_of(plan.model.module.config), plan.model.precision.compute.itemsize
    rows = stage.splits * min(plan.recipe.train.per_device_train_batch_size, len(plan.data.batches.units))
    length = -(-batch.tokens * stage.splits // rows)
    layers = len(transformer_layers(plan.model.module))
    windows = [*sizes.windows, *[None] * (layers - len(sizes.windows))]
    kept = sum(min(length, window or length) for window in windows[:layers])
    return Memory(cache=2 * rows * kept * sizes.keys * width, logits=rows * sizes.vocabulary * (width + 4 + 4 + 8))


def further_weights(plan: Plan) -> Memory:
    """The weights of the stage's further models. What they need in passing is less than the trained model's step.
    Those that are asked before training are gone by then."""
    if precomputing(plan.parts.one("stage_config").built):
        return Memory()
    held = [hold("", further.module, Rank(further), {}) for further in plan.further.values()]
    return reduce(Held.__add__, held, Held()).static


@dataclass(frozen=True, kw_only=True)
class Step:
    """What comes and goes within a step."""

    grads: Memory
    """All gradients, where they are not there from the start."""
    acts: Activations
    layers: list[Held]
    root: Held
    """All that is in no layer."""
    logits: Memory
    head: int
    """Numbers of the output head that train."""
    rank: Rank
    again: bool
    """Whether layers are computed again."""

    def spread(self) -> Iterator[tuple[str, Memory]]:
        """With FSDP2. Two layers are gathered at a time; a layer's gradients wait whole, then in float32 as well to be
        summed; the rest of the model stays gathered from forward to backward."""
        width = self.rank.gather_bytes
        big = max(self.layers, key=lambda held: held.gathered, default=Held())
        root = Memory(gathered=self.root.gathered)
        two = root + Memory(gathered=2 * big.gathered)
        kept = Memory(activations=sum(self.acts.kept))
        if self.rank.keeps_weights:
            kept += Memory(gathered=sum(held.gathered for held in self.layers))
        early = two + kept + Memory(gathered=4 * big.trained + width * self.head)
        yield "forward", two + root
        yield "loss", root + kept + self.logits
        yield "backward", early + Memory(activations=self.acts.early)
        yield "late in a layer", early + Memory(gathered=width * big.trained, activations=self.acts.late)
        yield "end of backward", root + self.grads + Memory(gathered=self.root.trained * (width + 4))

    def alone(self) -> Iterator[tuple[str, Memory]]:
        """On one device. Without checkpointing autocast's copies of trained weights are kept for the backward pass."""
        copied = 0 if self.again else sum(held.copied for held in self.layers)
        kept = Memory(activations=sum(self.acts.kept) + copied)
        head = Memory(gradients=4 * self.head if self.grads.total else 0)
        yield "loss", kept + self.logits + Memory(activations=self.root.copied)
        yield "backward", kept + head + Memory(activations=self.acts.early)
        yield "end of backward", self.grads + Memory(activations=max(self.acts.kept, default=0) + self.acts.late)


def to_host(memory: Memory) -> Memory:
    """Shards, gradients and optimiser state counted in host memory."""
    moved = {name: getattr(memory, name) for name in ("weights", "adapters", "gradients", "optimizer")}
    return replace(memory, **dict.fromkeys(moved, 0), host=memory.host + sum(moved.values()))


def hold(prefix: str, module: nn.Module, rank: Rank, state: dict[str, int]) -> Held:
    """What a module's parameters and buffers come to."""
    held = Held(weights=sum(buffer.numel() * buffer.element_size() for buffer in module.buffers()))
    for name, parameter in module.named_parameters(prefix=prefix.removesuffix(".")):
        bytes_each, numbers = parameter.element_size(), parameter.numel()
        size = math.prod(rank.local(parameter)) * bytes_each
        travels = bytes_each if name in rank.packed else min(bytes_each, rank.gather_bytes)
        if not parameter.requires_grad:
            held += Held(weights=size, gathered=numbers * travels)
            continue
        cast = parameter.dim() > 1 and bytes_each > rank.compute_bytes
        held += Held(
            **{"adapters" if rank.adapter else "weights": size},
            gradients=size if name in state else 0, optimizer=state.get(name, 0), gathered=numbers * travels,
            trained=numbers if name in state else 0,
            copied=numbers * rank.compute_bytes if cast else 0,
        )  # fmt: skip
    return held


def optimizer_bytes(plan: Plan, rank: Rank) -> dict[str, int]:
    """State of each parameter that trains at a step, by name, found by letting the recipe's optimiser take a step for
    one of each kind: on fake tensors; where it cannot, on small real ones, its state then being taken to grow with the
    parameter; where it cannot do that either, as it wants a GPU, what AdamW has."""
    module, ledger, train = plan.model.module, plan.model.ledger, plan.recipe.train
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    kinds = {rank.key(name, p): (name, p) for name, p in reversed(trained)}
    roles, context = parameter_roles(module, ledger.roles), optimizer_context(module, train.learning_rate, train.seed)

    def states(pairs: Sequence[tuple[str, nn.Parameter]], small: bool = False) -> dict[str, int]:
        """Bytes of whole state after a first step, by name, without those that do not train at it."""
        shapes = {name: _small(tuple(p.shape)) if small else tuple(p.shape) for name, p in pairs}
        named = [(name, nn.Parameter(torch.zeros(shapes[name], dtype=p.dtype))) for name, p in pairs]
        groups = group_parameters(named, roles, ledger.lr_factors, train.learning_rate)
        optimizer = create_optimizer(plan.parts.one("optim_config").built, groups, context)
        by_turns = isinstance(optimizer, ChangesWhatTrains)
        if by_turns and len(pairs) < len(trained):  # a kind does not tell which of its parameters train
            return states(trained, small)
        if by_turns:
            optimizer.at_step(0)
        for _, parameter in named:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        found = {name: _tensor_bytes(optimizer.state.get(p, {}).values()) for name, p in named if p.requires_grad}
        return found if by_turns else {name: found[kinds[rank.key(name, p)][0]] for name, p in trained}

    whole = dict(trained)
    sizes = {name: 2 * p.numel() * p.element_size() for name, p in trained}
    # A foreign optimiser may do anything with values that fake tensors have not.
    with suppress(Exception), redirect_stderr(StringIO()):  # and what it says is of a step that is not taken
        try:
            with FakeTensorMode():
                sizes = states([*kinds.values()])
        except Exception:
            less = {name: math.prod(_small(tuple(p.shape))) for name, p in trained}
            small = states([*kinds.values()], small=True)
            sizes = {name: size * whole[name].numel() // less[name] for name, size in small.items()}
    shares = {name: math.prod(rank.local(whole[name])) / whole[name].numel() for name in sizes}
    return {name: round(size * shares[name]) for name, size in sizes.items()}


def _tensor_bytes(values: Iterable[Any]) -> int:
    return sum(each.numel() * each.element_size() for each in values if isinstance(each, torch.Tensor))


def _small(shape: tuple[int, ...]) -> tuple[int, ...]:
    """At most 2**16 numbers, with as many dimensions."""
    return tuple(min(size, 2 ** (16 // len(shape))) for size in shape)


def activations(
    plan: ModelPlan, batch: MicroBatch, layers: list[nn.Module], rank: Rank, checkpointing: str
) -> Activations:
    """What layers keep from forward to backward. Those below the first that trains have no backward pass."""
    sizes, again = sizes_of(plan.module.config), RECOMPUTED[checkpointing]
    embedding = plan.module.get_input_embeddings()
    earlier = [embedding, *tower_layers(plan.module)] if batch.media.pieces else [embedding]
    reached = any(p.requires_grad for module in earlier if module is not None for p in module.parameters())
    mlp = 3 * batch.tokens * sizes.inner * rank.compute_bytes // rank.tensor
    kept, most, host = [], 0, 0
    for layer in layers:
        reached = reached or any(p.requires_grad for p in layer.parameters())
        saved = batch.tokens * saved_per_token(layer, sizes, rank, plan.context.device) // rank.tensor if reached else 0
        hidden = batch.tokens * sizes.width * rank.compute_bytes if again and reached else 0
        if plan.offloads and plan.context.device == "cuda":
            host += hidden
            hidden = 0
        kept.append(int(saved * (1 - again)) + hidden)
        most = max(most, int(saved * again))
    return Activations(kept=kept, early=most + mlp if reached else 0, late=max(0, most - mlp), host=host)


def saved_per_token(layer: nn.Module, sizes: ModelSizes, rank: Rank, device: str) -> int:
    """Bytes that one token leaves in a layer for the backward pass.

    Two norms: their input in float32, and what multiplies their weight if that trains. Attention: queries, keys, values
    and result, and a float32 number for each head. A gated MLP: gate, its activation, the other factor. Matrix
    products keep their input where their weight trains; an adapter's in its own copy, after dropout.
    """
    c = rank.compute_bytes
    norms = 0
    for name, weight in layer.named_parameters():
        if "norm" in name.lower() and weight.numel() == sizes.width:
            norms += sizes.width * (4 + (c if weight.requires_grad else 0))
    attention = c * (2 * sizes.queries + 2 * sizes.keys) + 4 * sizes.heads
    products, dropouts = _product_inputs(layer)
    mask = 1 if device == "cuda" else c
    return norms + attention + 3 * c * sizes.inner + c * products + mask * dropouts


def _product_inputs(layer: nn.Module) -> tuple[int, int]:
    """Numbers a token leaves as inputs of trained products (each shared input once), and as masks of dropout."""
    products = dropouts = 0
    for name, module in layer.named_modules():
        weights = [child.weight for child in module.children() if isinstance(child, nn.Linear)]
        # A linear layer whose weights are stored in a form of their own may have none of that name.
        products += sum({weight.shape[1] for weight in weights if weight is not None and weight.requires_grad})
        if isinstance(module, nn.Dropout) and module.p > 0:
            parts = name.split(".")
            around: Iterator[Any] = (
                layer.get_submodule(".".join(parts[:length])) for length in range(len(parts) - 1, 0, -1)
            )
            dropouts += next((found.in_features for found in around if hasattr(found, "in_features")), 0)
    return products, dropouts


def head_trained(plan: ModelPlan) -> int:
    """Numbers of the output head that train."""
    head = plan.module.get_output_embeddings()
    return sum(p.numel() for p in head.parameters() if p.requires_grad) if head is not None else 0


def logits_bytes(plan: ModelPlan, batch: MicroBatch) -> int:
    """N x V logits in the compute type, in float32, their log-softmax, and the gradient; in chunks if the loss is
    fused."""
    sizes, c = sizes_of(plan.module.config), plan.precision.compute.itemsize
    numbers = batch.targets * sizes.vocabulary // plan.ranks.dims.tensor
    if any("linear_cross_entropy" in change.ops for _, change in plan.ledger.changes):
        numbers //= max(1, math.ceil(4 * numbers / LOSS_CHUNK[plan.context.device]))
        hidden = batch.targets * sizes.width * c * 2
        return numbers * (4 + c + (c if c < 4 else 0)) + hidden + 4 * head_trained(plan)
    return numbers * (12 if c == 4 else 4 + 4 + 4 + c) + batch.tokens * sizes.width * c
