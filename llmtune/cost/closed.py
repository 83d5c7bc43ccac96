"""Memory by formulas, at once: from the shapes of the plan's model, nothing run but an empty optimiser.

B rows of T tokens, N positions with a loss, D width, F width of the MLP (times the experts a token visits), H and K
query and key-value heads of width d, V vocabulary; c bytes of the compute type. docs/costs.md has the formulas.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtune.contract.structure import transformer_layers
from llmtune.cost.memory import Estimate, Memory
from llmtune.cost.shape import Shape

if TYPE_CHECKING:
    from torch import nn

    from llmtune.planning.plan import Plan

LOSS_CHUNK = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Float32 logits at once that a fused loss is taken to hold."""


NOTHING = Memory()


@dataclass(frozen=True, kw_only=True)
class Held:
    """What part of a model holds, in bytes on this rank, and in whole."""

    memory: Memory = NOTHING
    gathered: int = 0
    """Its whole weights in the type they travel in."""
    trained: int = 0
    """Whole trained weights, in numbers."""
    copied: int = 0
    """Bytes of the copies in the compute type that autocast makes of trained matrices, where nothing is gathered."""

    def __add__(self, other: Held) -> Held:
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("gathered", "trained", "copied")}
        return Held(memory=self.memory + other.memory, **sums)


class Ways:
    """How parameters are divided, and what kind of bytes they are."""

    def __init__(self, plan: Plan) -> None:
        layout, part = plan.ranks.layout, plan.parts.one("dist_config")
        self.spread = plan.ranks.size > 1 or part.built.in_host_memory
        self.shards = layout.shard * layout.context
        self.tensor = layout.tensor
        self.offloaded = getattr(part.config, "offload_params", False)
        self.keeps = getattr(part.config, "reshard_after_forward", True) is False
        self.accumulates_whole = not getattr(part.config, "accumulate_sharded", False)
        self.adapter = plan.model.is_adapter
        self.packed = plan.model.ledger.packed()
        self.device = plan.model.context.device
        self.gather_bytes = plan.model.context.gather_dtype.itemsize
        self.compute_bytes = plan.model.precision.compute.itemsize

    def local(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of this rank's part: FSDP2 cuts the first dimension, tensor parallelism one of a matrix."""
        if not self.spread or not shape:
            return shape
        split = self.shards * (self.tensor if len(shape) > 1 else 1)
        return (-(-shape[0] // split), *shape[1:])


def closed_form(plan: Plan, shape: Shape) -> Estimate:
    """The peak of one step, as the largest of its moments."""
    ways = Ways(plan)
    state = optimizer_bytes(plan, ways)
    layers = transformer_layers(plan.model.module)
    held = [hold(name + ".", layer, ways, state) for name, layer in layers]
    everything = hold("", plan.model.module, ways, state)
    root = Held(
        memory=everything.memory - sum((h.memory for h in held), Memory()),
        gathered=everything.gathered - sum(h.gathered for h in held),
        trained=everything.trained - sum(h.trained for h in held),
        copied=everything.copied - sum(h.copied for h in held),
    )
    static = everything.memory - Memory(gradients=everything.memory.gradients)
    grads = Memory(gradients=everything.memory.gradients)
    kept, work = activations(plan, shape, [layer for _, layer in layers], ways)
    before = Memory()
    if shape.micro_steps > 1:
        whole = ways.spread and ways.shards > 1 and ways.accumulates_whole
        before = Memory(gradients=4 * everything.trained) if whole else grads
    step = Step(
        base=static + before, grads=NOTHING if before.gradients else grads, kept=kept, work=work, layers=held,
        root=root, logits=Memory(logits=logits_bytes(plan, shape)), ways=ways, head=head_trained(plan),
        checkpointed=plan.model.checkpointing != "none",
    )  # fmt: skip
    moments = {"update": static + grads, **(step.spread() if ways.spread else step.alone())}
    if ways.offloaded:
        moments = {name: to_host(memory) for name, memory in moments.items()}
    moment, at_peak = max(moments.items(), key=lambda item: item[1].total)
    most = Memory()
    for memory in moments.values():
        most = most.most(memory)
    return Estimate(at_peak=at_peak, most=most, moment=moment)


@dataclass(frozen=True, kw_only=True)
class Work:
    """Bytes that the backward pass of one layer needs besides what is kept."""

    early: int = 0
    """All that the layer saved is there, and gradients of the MLP's activations."""
    late: int = 0
    """The MLP is done."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the moments of a step are made of."""

    base: Memory
    """There all the time."""
    grads: Memory
    """All gradients, where they are not in `base` already."""
    kept: list[int]
    """Bytes that each layer keeps from forward to backward."""
    work: Work
    layers: list[Held]
    root: Held
    """All that is in no layer."""
    logits: Memory
    head: int
    """Numbers of the output head that train."""
    ways: Ways
    checkpointed: bool

    def spread(self) -> dict[str, Memory]:
        """With FSDP2. Two layers are gathered at a time; a layer's gradients wait whole, then in float32 as well to be
        summed; the rest of the model stays gathered from forward to backward."""
        width = self.ways.gather_bytes
        big = max(self.layers, key=lambda h: h.gathered, default=Held())
        root = Memory(gathered=self.root.gathered)
        two = root + Memory(gathered=2 * big.gathered)
        all_kept = Memory(activations=sum(self.kept))
        upon = Memory(gathered=sum(h.gathered for h in self.layers) if self.ways.keeps else 0)
        early = two + upon + all_kept + Memory(gathered=4 * big.trained + width * self.head)
        late = early + Memory(gathered=width * big.trained)
        moments = {
            "forward": two + root,
            "loss": root + upon + all_kept + self.logits,
            "backward": early + Memory(activations=self.work.early),
            "late in a layer": late + Memory(activations=self.work.late),
            "end of backward": root + self.grads + Memory(gathered=self.root.trained * (width + 4)),
        }
        return {name: self.base + memory for name, memory in moments.items()}

    def alone(self) -> dict[str, Memory]:
        """On one device. Without checkpointing autocast's copies of trained weights are kept for the backward pass."""
        copied = 0 if self.checkpointed else sum(h.copied for h in self.layers)
        copies = Memory(activations=copied + self.root.copied)
        all_kept = Memory(activations=sum(self.kept))
        head = Memory(gradients=4 * self.head if self.grads.total else 0)
        moments = {
            "loss": all_kept + self.logits + copies,
            "backward": all_kept + head + Memory(activations=copied + self.work.early),
            "end of backward": self.grads + Memory(activations=max(self.kept, default=0) + self.work.late),
        }
        return {name: self.base + memory for name, memory in moments.items()}


def to_host(memory: Memory) -> Memory:
    """Shards, gradients and optimiser state counted in host memory."""
    moved = {name: getattr(memory, name) for name in ("weights", "adapters", "gradients", "optimizer")}
    return memory - Memory(**moved) + Memory(host=sum(moved.values()))


def hold(prefix: str, module: nn.Module, ways: Ways, state: dict[tuple[Any, ...], int]) -> Held:
    """What a module's parameters and buffers come to."""
    sums = dict.fromkeys(("weights", "adapters", "gradients", "optimizer"), 0)
    gathered = trained = copied = 0
    for name, parameter in module.named_parameters(prefix=prefix.removesuffix(".")):
        size = math.prod(ways.local(tuple(parameter.shape))) * parameter.element_size()
        sums["adapters" if ways.adapter and parameter.requires_grad else "weights"] += size
        width = parameter.element_size() if name in ways.packed else min(parameter.element_size(), ways.gather_bytes)
        gathered += parameter.numel() * width
        if parameter.requires_grad:
            sums["gradients"] += size
            sums["optimizer"] += state[_key(name, ways.local(tuple(parameter.shape)), parameter)]
            trained += parameter.numel()
            if parameter.dim() > 1 and parameter.element_size() > ways.compute_bytes:
                copied += parameter.numel() * ways.compute_bytes
    sums["weights"] += sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    return Held(memory=Memory(**sums), gathered=gathered, trained=trained, copied=copied)


def _key(name: str, shape: tuple[int, ...], parameter: Any) -> tuple[Any, ...]:
    """Parameters that an optimiser cannot tell apart: layers differ in a number."""
    return re.sub(r"\d+", "#", name), shape, parameter.dtype


def optimizer_bytes(plan: Plan, ways: Ways) -> dict[tuple[Any, ...], int]:
    """State of each kind of trained parameter, found by letting the recipe's optimiser take a step: on fake tensors, or
    where it cannot, on small real ones, its state then being taken to grow with the parameter."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kinds: dict[tuple[Any, ...], tuple[str, tuple[int, ...], Any]] = {}
    for name, parameter in plan.model.module.named_parameters():
        if parameter.requires_grad:
            shape = ways.local(tuple(parameter.shape))
            kinds.setdefault(_key(name, shape, parameter), (name, shape, parameter.dtype))
    factory = plan.parts.one("optim_config").built
    try:
        with FakeTensorMode():
            sizes = _state_sizes(factory, list(kinds.values()))
    except Exception:
        # Whatever a foreign optimiser does with values that fake tensors have not.
        small = [(name, _small(shape), dtype) for name, shape, dtype in kinds.values()]
        ratios = [math.prod(shape) / math.prod(_small(shape)) for _, shape, _ in kinds.values()]
        sizes = [int(size * ratio) for size, ratio in zip(_state_sizes(factory, small), ratios, strict=True)]
    return dict(zip(kinds, sizes, strict=True))


def _small(shape: tuple[int, ...]) -> tuple[int, ...]:
    """At most 2**16 numbers, with as many dimensions."""
    return tuple(min(size, 2 ** (16 // len(shape))) for size in shape)


def _state_sizes(factory: Any, named: list[tuple[str, tuple[int, ...], Any]]) -> list[int]:
    """Bytes of state after a step, for parameters of these names, shapes and types."""
    import torch
    from torch import nn

    parameters = [(name, nn.Parameter(torch.zeros(shape, dtype=dtype))) for name, shape, dtype in named]
    for _, parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    matrices = [pair for pair in parameters if pair[1].dim() > 1]
    optimizer = factory.create(matrices, [pair for pair in parameters if pair[1].dim() <= 1], 1e-3)
    optimizer.step()
    states = [optimizer.state.get(parameter, {}) for _, parameter in parameters]
    return [
        sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, torch.Tensor))
        for state in states
    ]


def activations(plan: Plan, shape: Shape, layers: list[nn.Module], ways: Ways) -> tuple[list[int], Work]:
    """(bytes that each layer keeps from forward to backward, what one layer's backward needs besides)."""
    config = plan.model.module.config.get_text_config()
    tokens, c = shape.tokens, ways.compute_bytes
    reached, kept, work = _below_trains(plan), [], Work()
    for layer in layers:
        reached = reached or any(p.requires_grad for p in layer.parameters())
        if not reached:
            kept.append(0)
            continue
        saved = tokens * saved_per_token(layer, config, ways) // ways.tensor
        mlp = tokens * inner_width(config) * c // ways.tensor
        again = {"none": 0.0, "selective": 0.5, "full": 1.0}[plan.model.checkpointing]
        kept.append(int(saved * (1 - again)) + (tokens * config.hidden_size * c if again else 0))
        early, late = int(saved * again) + 3 * mlp, max(0, int(saved * again) - 3 * mlp)
        work = Work(early=max(work.early, early), late=max(work.late, late))
    return kept, work


def head_trained(plan: Plan) -> int:
    """Numbers of the output head that train."""
    head = plan.model.module.get_output_embeddings() if hasattr(plan.model.module, "get_output_embeddings") else None
    return sum(p.numel() for p in head.parameters() if p.requires_grad) if head is not None else 0


def _below_trains(plan: Plan) -> bool:
    embedding = plan.model.module.get_input_embeddings()
    return embedding is not None and any(p.requires_grad for p in embedding.parameters())


def heads(config: Any) -> tuple[int, int]:
    """(H d, K d): widths of all queries and of all keys."""
    count = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // count
    return count * width, (getattr(config, "num_key_value_heads", None) or count) * width


def inner_width(config: Any) -> int:
    """F: numbers between the projections of the MLP, for all experts that a token visits."""
    experts = getattr(config, "num_experts_per_tok", None)
    one = experts and getattr(config, "moe_intermediate_size", None)
    one = one or getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return (one or 4 * config.hidden_size) * (experts or 1)


def saved_per_token(layer: nn.Module, config: Any, ways: Ways) -> int:
    """Bytes that one token leaves in a layer for the backward pass.

    Two norms: their input in float32, and what multiplies their weight if that trains. Attention: queries, keys, values
    and result, and a float32 number for each head. A gated MLP: gate, its activation, the other factor. Matrix
    products keep their input where their weight trains; an adapter's in its own copy, after dropout.
    """
    from torch import nn

    c, width, inner = ways.compute_bytes, config.hidden_size, inner_width(config)
    queries, keys = heads(config)
    norms = [module for module in layer.modules() if "norm" in type(module).__name__.lower()]
    weights = [weight for module in norms if isinstance(weight := getattr(module, "weight", None), nn.Parameter)]
    norm = 0
    for weight in weights:
        if weight.numel() == width:
            norm += width * 4 + (width * c if weight.requires_grad else 0)
    attention = c * (2 * queries + 2 * keys) + 4 * config.num_attention_heads
    products, dropouts = _product_inputs(layer)
    mask = 1 if ways.device == "cuda" else c
    return norm + attention + 3 * c * inner + c * products + mask * dropouts


def _product_inputs(layer: nn.Module) -> tuple[int, int]:
    """Numbers a token leaves as inputs of trained products (each shared input once), and as masks of dropout."""
    import torch

    products = dropouts = 0
    for name, module in layer.named_modules():
        weights = [child.weight for child in module.children() if isinstance(child, torch.nn.Linear)]
        products += sum({weight.shape[1] for weight in weights if weight.requires_grad})
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            parts = name.split(".")
            outer = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
            around: list[Any] = [layer.get_submodule(name) for name in outer]
            dropouts += next((found.in_features for found in around if hasattr(found, "in_features")), 0)
    return products, dropouts


def logits_bytes(plan: Plan, shape: Shape) -> int:
    """N x V logits in the compute type, in float32, their log-softmax, and the gradient; in chunks if the loss is
    fused."""
    config = plan.model.module.config.get_text_config()
    c = plan.model.precision.compute.itemsize
    fused = any("linear_cross_entropy" in change.ops for _, change in plan.model.ledger.changes)
    numbers = shape.targets * config.vocab_size // plan.ranks.layout.tensor
    if fused:
        chunks = max(1, math.ceil(4 * numbers / LOSS_CHUNK[plan.model.context.device]))
        numbers //= chunks
        hidden = shape.targets * config.hidden_size * c * 2
        return numbers * (4 + c + (c if c < 4 else 0)) + hidden + 4 * head_trained(plan)
    return numbers * (12 if c == 4 else 4 + 4 + 4 + c) + shape.tokens * config.hidden_size * c
