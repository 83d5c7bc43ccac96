"""One optimiser step on fake tensors: the run's own build path, without memory.

The plan's model is copied on the meta device, each run of equal layers cut down to four, spread over a fake process
group, and taken through forward, backward and update while a `Tracker` follows every storage. Layers in the middle of
a run behave alike, so what one of them adds to the timeline, in forward and in backward, is added again for each layer
that was left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from copy import deepcopy
from dataclasses import dataclass, replace
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from llmtune.contract.errors import PlanError
from llmtune.contract.optimizers import ChangesWhatTrains
from llmtune.contract.stages import Batch, RollsOut
from llmtune.contract.structure import transformer_layers
from llmtune.cost.tracker import Segment, Tracker, by_category
from llmtune.distributed.activation_checkpointing import HOST_COPIES
from llmtune.distributed.placement import materialise
from llmtune.planning.further_models import model_names
from llmtune.planning.media_memory import tower_layers
from llmtune.planning.memory import Estimate, Memory
from llmtune.planning.memory_formulas import estimate_memory, further_weights, logits_bytes
from llmtune.training.building import make_objective, make_training, spread
from llmtune.training.loop import clip, forward_backward, global_norm
from llmtune.training.objective import Context, Objective, prepared
from llmtune.training.optim import make_optimizer

if TYPE_CHECKING:
    from llmtune.planning.micro_batch import MicroBatch
    from llmtune.planning.model_plan import ModelPlan
    from llmtune.planning.plan import Plan

KEPT = 4
"""Layers of a run that are computed: the first and the last have neighbours of another kind, and the last but one
still has gathered weights prefetched around it."""


@dataclass
class LayerRun:
    """Equal layers in a row: `traced` of them, at positions from `first` on, stand for `count`."""

    first: int
    traced: int
    count: int

    @property
    def left_out(self) -> int:
        return self.count - self.traced


@dataclass
class Timeline:
    """What a tracked step left behind, ready to be read."""

    segments: list[Segment]
    runs: list[LayerRun]
    static: list[Memory]
    """By layer: what it holds all the time (weights, adapters, optimiser state)."""
    has_state: bool
    """Whether the optimiser could take a step on fake tensors, so that its state was counted."""


def trace(plan: Plan, shape: MicroBatch) -> Estimate:
    """Run one step on fake tensors. Raises whatever an operation without a fake version raises."""
    if isinstance(plan.parts.one("stage_config").built, RollsOut):
        raise PlanError("fake tensors have no answers to learn from")
    towers = tower_layers(plan.model.module) if shape.media.pieces else []
    if any(parameter.requires_grad for layer in towers for parameter in layer.parameters()):
        raise PlanError("fake tensors show no pictures to train a tower on")
    module, runs = cut(deepcopy(plan.model.module))
    context = replace(plan.model.context, device="cpu")
    model = replace(plan.model, module=module, device=torch.device("cpu"), context=context, compiled=False)
    traced = replace(plan, model=model)
    with fake_group(plan):
        objective = built(model)
        # A further model is taken to compute what the trained one does, without weights of its own. Whether the head
        # explains the logits is a question of values, which fake tensors have not.
        names = model_names(plan.parts)
        stand_in = dict.fromkeys(names, lambda compute, context: compute(module, context))
        objective.context = Context(objective.context.ops, head_explains_logits=True, further=stand_in)
        with FakeTensorMode(allow_non_fake_inputs=True):
            timeline = step(traced, objective, shape, runs, host=plan.model.context.device == "cuda")
    # A fused loss takes larger chunks on a GPU than on the CPU, where the trace takes place.
    chunks = logits_bytes(plan.model, shape) - logits_bytes(model, shape)
    everywhere = Memory() if timeline.has_state else Memory(optimizer=estimate_memory(plan, shape).most.optimizer)
    everywhere += further_weights(plan) + Memory(activations=shape.media.tensor_bytes)
    return unroll(timeline, everywhere=everywhere, loss=Memory(logits=chunks))


@contextmanager
def fake_group(plan: Plan) -> Iterator[None]:
    """A process group of the plan's size in which nothing is ever sent."""
    if plan.ranks.size == 1 and not plan.parts.one("dist_config").built.in_host_memory:
        yield
        return
    if dist.is_initialized():
        raise RuntimeError("this process belongs to a process group already")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=plan.ranks.size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def cut(model: Any) -> tuple[Any, list[LayerRun]]:
    """Keep four layers of each run of equal ones."""
    layers = transformer_layers(model)
    signatures = [(name.rpartition(".")[0], *_signature(layer)) for name, layer in layers]
    runs: list[LayerRun] = []
    kept: list[tuple[str, nn.Module]] = []
    start = 0
    for index in range(1, len(layers) + 1):
        if index < len(layers) and signatures[index] == signatures[start]:
            continue
        count = index - start
        runs.append(LayerRun(len(kept), min(count, KEPT), count))
        kept += layers[start : start + min(count, KEPT)]
        start = index
    by_parent: dict[str, list[nn.Module]] = {}
    for name, layer in kept:
        by_parent.setdefault(name.rpartition(".")[0], []).append(layer)
    for parent, children in by_parent.items():
        model.set_submodule(parent, nn.ModuleList(children))
    config = model.config.get_text_config()
    if getattr(config, "num_hidden_layers", None) == len(layers):
        config.num_hidden_layers = len(kept)
    return model, runs


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    parameters = tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in layer.named_parameters())
    return type(layer), parameters


def step(plan: Plan, objective: Objective, shape: MicroBatch, runs: list[LayerRun], host: bool = False) -> Timeline:
    """Take one optimiser step. The optimiser's state is there beforehand, as it is from the second step on.
    `host`: what is offloaded during the step leaves the device."""
    module: Any = plan.model.module
    materialise(module, plan.device)
    objective.train()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = stepped_optimizer(plan)
    unused: Any = optimizer  # the parts of the loop that are called here take no step
    training = make_training(plan, objective, unused)
    layerwise, training = training.layerwise, replace(training, layerwise=None, balance=None)
    micros = list(prepared(objective, [fake_batch(shape) for _ in range(min(2, shape.micro_steps))]))
    large_norm = 2.0 * (training.max_grad_norm or 1.0)
    # Beforehand once: DTensor works out how each operation spreads, on tensors that are not the step's.
    clip(training, global_norm(parameters), large_norm)
    for parameter in parameters:
        parameter.grad = None
    tracker = Tracker()
    observer = Observer(plan, objective, optimizer, tracker, host)
    with torch.random.fork_rng(devices=[]), tracker:
        observer.begin()
        with layerwise.updating(len(micros)) if layerwise else nullcontext():
            forward_backward(training, micros, torch.ones(()), 0)
        observer.update()
        if layerwise is None:
            clip(training, global_norm(parameters), large_norm)
        if optimizer is not None:
            optimizer.step()
        tracker.mark("end")
    return Timeline(tracker.segments, runs, observer.static, optimizer is not None)


def stepped_optimizer(plan: Plan) -> torch.optim.Optimizer | None:
    """The recipe's optimiser with its state made by a first step, or None where it cannot work on fake tensors."""
    try:
        with redirect_stderr(StringIO()):  # what it says is of a step that is not taken
            optimizer = make_optimizer(plan)
            if isinstance(optimizer, ChangesWhatTrains):
                optimizer.at_step(0)
            optimizer.step()
        return optimizer
    except Exception:
        # Whatever a foreign optimiser does with values that fake tensors have not.
        return None


def built(plan: ModelPlan) -> Objective:
    """The plan's objective, spread over the ranks, on the meta device still."""
    objective = make_objective(plan)
    if plan.attention.startswith("flash_attention"):
        plan.module.set_attn_implementation("sdpa")  # keeps the same tensors, and has a fake version
    spread(plan, objective)
    return objective


def fake_batch(shape: MicroBatch) -> Batch:
    """A micro-batch of this shape, without anything in it. A flat one is a single document."""

    def whole(*size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int64)

    rows = (shape.rows, shape.length)
    sequences = torch.arange(shape.targets) * shape.sequences // max(1, shape.targets)
    batch = Batch(
        input_ids=whole(*rows),
        labels=whole(*rows),
        weight=float(shape.targets),
        predict_at=whole(shape.targets),
        targets=whole(shape.targets),
        target_sequence=sequences,
        sequences=shape.sequences,
        position_ids=whole(*rows) if shape.flat else None,
        attention_mask=whole(*rows) if shape.masked else None,
    )
    batch.mismatched = replace(batch)
    return batch


class Observer:
    """Cuts a tracked step at its layers, and tells the tracker what things are for."""

    def __init__(
        self, plan: Plan, objective: nn.Module, optimizer: torch.optim.Optimizer | None, tracker: Tracker, host: bool
    ) -> None:
        self.tracker, self.host = tracker, host
        self.parameters = [parameter for parameter in plan.model.module.parameters() if parameter.requires_grad]
        self.forward = False
        offloaded = plan.parts.one("dist_config").built.in_host_memory
        self.kinds = {kind: "host" if offloaded else kind for kind in ("weights", "adapters", "gradients", "optimizer")}
        self.trained = self.kinds["adapters" if plan.model.is_adapter else "weights"]
        layers = [layer for _, layer in transformer_layers(plan.model.module)]
        self.last = len(layers) - 1
        self._hold(plan.model.module, optimizer)
        self.static = [self._hold(layer, optimizer) for layer in layers]
        objective.register_forward_pre_hook(self._begin_forward)
        objective.register_forward_hook(self._end_forward)
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, index=index: self._enter(index))
            layer.register_forward_hook(lambda _, __, output, index=index: self._leave(index, output))

    def _hold(self, module: nn.Module, optimizer: torch.optim.Optimizer | None) -> Memory:
        """What a module holds all the time."""
        parameters = list(module.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        held = [optimizer.state.get(parameter, {}) for parameter in trained] if optimizer else []
        states = [value for state in held for value in state.values() if isinstance(value, Tensor)]
        frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        assign = self.tracker.assign
        storages = assign(module.buffers(), "weights") + assign(frozen, self.kinds["weights"])
        return by_category(storages + assign(trained, self.trained) + assign(states, self.kinds["optimizer"]))

    def begin(self) -> None:
        self.tracker.mark("start")

    def _begin_forward(self, *_: Any) -> None:
        # What the micro-batch before has left behind is gradients that wait for the last one.
        self.tracker.turn("activations", self.kinds["gradients"])
        self._gradients()
        self.forward, self.tracker.kind = True, "activations"
        self.tracker.mark("forward", -1)

    def _enter(self, index: int) -> None:
        if self.forward:
            self.tracker.mark("forward", index)

    def _leave(self, index: int, output: Any) -> None:
        if not self.forward:
            return
        if self.host:
            self.tracker.assign(list(HOST_COPIES.values()), "host")
        tensor = output[0] if isinstance(output, tuple) else output
        if tensor.requires_grad:
            tensor.register_hook(lambda _, index=index: self._backward(index))
        if index == self.last:
            self.tracker.mark("loss")
            self.tracker.kind = "logits"

    def _end_forward(self, *_: Any) -> None:
        self.forward = False

    def _backward(self, index: int) -> None:
        self.tracker.kind = "activations"
        self._gradients()
        self.tracker.mark("backward", index)

    def _gradients(self) -> None:
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.tracker.assign(grads, self.kinds["gradients"])

    def update(self) -> None:
        """Backward is over."""
        self._gradients()
        self.tracker.mark("update")
        self.tracker.kind = self.kinds["optimizer"]


def unroll(timeline: Timeline, everywhere: Memory, loss: Memory) -> Estimate:
    """Add the layers that were left out to every moment of the timeline, and what was not traced; find the largest."""
    shift = everywhere
    for run in timeline.runs:
        if run.left_out:
            shift += timeline.static[run.first + 1].times(run.left_out)
    best, most, moment = Memory(), Memory(), ""
    segments = timeline.segments
    for index, segment in enumerate(segments):
        if index and (left_out := _inserted(segments[index - 1].name, segment.name, timeline.runs)):
            shift += (by_category(segment.start) - by_category(segments[index - 1].start)).times(left_out)
        now = shift + loss if segment.name[0] == "loss" else shift
        found = by_category(segment.peak) + now
        most = most.most(found).most(Memory(**segment.most) + now)
        if found.total > best.total:
            best, moment = found, segment.name[0]
    return Estimate(at_peak=best, most=most, moment=moment)


def _inserted(before: tuple[str, int], now: tuple[str, int], runs: Sequence[LayerRun]) -> int:
    """Layers to insert between two segments: after the second layer of a run in forward, its third in backward."""
    for run in runs:
        middle = run.first + 1
        if before == ("forward", middle) and now == ("forward", middle + 1):
            return run.left_out
        if before == ("backward", middle + 1) and now == ("backward", middle):
            return run.left_out
    return 0
