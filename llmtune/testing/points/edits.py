"""Laws of whatever edits a model: quantisers, adapters, kernels; and comparisons that other laws share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmtune.distributed.placement import seeded_step
from llmtune.model.edits import named_tensors, persistent_names
from llmtune.testing import running
from llmtune.testing.contract import Broken, Subject, names
from llmtune.testing.ranks import in_ranks

if TYPE_CHECKING:
    from llmtune.planning.model_plan import ModelPlan
    from llmtune.planning.plan import Plan


def mode_of(subject: Subject) -> running.Mode:
    """How the core makes a model for this subject."""
    return "train" if subject.mode == "train" else "infer"


def accounts_for_every_tensor(subject: Subject, folder: Path) -> None:
    """`ModelEdit` tells the truth: nothing left the model without a load rule, nothing came without an origin, nothing
    was made before the weights; the plan can say what was done; a second model is edited alike.
    """
    first, second = (running.plan_model(subject.keys(folder), mode_of(subject)) for _ in range(2))
    change = change_of(subject, first)
    if not change.report:
        raise Broken("`ModelEdit.report` is empty", "Say in a line what was edited, for `llmtune plan`")
    shapes = [{n: (tuple(t.shape), t.dtype) for n, t in named_tensors(p.module).items()} for p in (first, second)]
    if odd := {name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)}:
        raise Broken(f"edited twice, two models differ in {names(list(odd))}", "Keep no state between models")


def change_of(subject: Subject, plan: ModelPlan) -> Any:
    """What the plugin reported."""
    parts = [part for part in plan.parts.all if part.point in ("quant_config", "peft_config", "kernel_config")]
    pairs = zip(parts, plan.ledger.changes, strict=True)
    return next(change for part, (_, change) in pairs if part.point == subject.point)


def loads_completely(subject: Subject, folder: Path) -> None:
    """Once weights are loaded, every tensor has storage and finite values, and only the recipe's seed decided them."""
    states = []
    for seed in (1, 2):
        seeded_step(seed)  # what a plugin must not draw from
        plan, _ = running.build(subject.keys(folder), mode_of(subject))
        kept = persistent_names(plan.module)
        states.append({name: tensor for name, tensor in named_tensors(plan.module).items() if name in kept})
    for name, tensor in states[0].items():
        # Packed bytes may be stored under a floating type, where any pattern can occur.
        packed = name in plan.ledger.packed()
        if tensor.dtype.is_floating_point and not packed and not same_bytes(tensor, tensor.nan_to_num()):
            raise Broken(f"{name} is not finite after loading", "Give it a value in a rule, `fresh` or `settle`")
    if odd := [name for name, tensor in states[0].items() if not same_bytes(tensor, states[1][name])]:
        raise Broken(
            f"{names(odd)} depend on random numbers drawn outside `ModelEdit.fresh`",
            "Fill new tensors in `ModelEdit.fresh`, where torch's CPU generator is seeded by the recipe and the name",
        )


def same_on_ranks(subject: Subject, folder: Path) -> None:
    """Two ranks train as one does: the same losses and gradient norms at every step, the same trained tensors."""
    one = running.train(subject.keys(folder, output_dir=str(folder / "one")))
    keys = subject.keys(folder, output_dir=str(folder / "two"), gradient_accumulation_steps=1)
    two = in_ranks(2, folder / "ranks", running.train, keys)[0]
    compare_runs(one, two, "1 rank", "2 ranks", subject.tolerance, _RANKS_FIX)


_RANKS_FIX = (
    "Look for sums over one rank's part and pieces in another order; test with dropout 0: each rank draws its own"
)


def compare_runs(
    one: running.Trained, two: running.Trained, first: str, second: str, tolerance: float, fix: str
) -> None:
    """Raise Broken unless two runs logged and trained the same."""
    for row, other in zip(one.metrics, two.metrics, strict=True):
        for name in ("loss", "grad_norm"):
            if not math.isclose(row[name], other[name], rel_tol=tolerance):
                raise Broken(
                    f"at step {row['step']} {name} is {row[name]:.8g} with {first}, {other[name]:.8g} with {second}",
                    fix,
                )
    if set(one.tensors) != set(two.tensors):
        odd = names(list(set(one.tensors) ^ set(two.tensors)))
        raise Broken(f"{first} and {second} train different tensors: {odd}", fix)
    for name, tensor in one.tensors.items():
        if (far := distance(two.tensors[name], tensor)) > 10 * tolerance:
            raise Broken(f"{name} trained with {first} and {second} differs by {far:.1e} of its size", fix)


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest magnitude expected; infinite for other shapes or NaN."""
    if found.shape != expected.shape:
        return math.inf
    found, expected = (tensor.detach().double().cpu() for tensor in (found, expected))
    if not expected.numel():
        return 0.0
    far = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
    return far if math.isfinite(far) else math.inf


def same_bytes(found: Tensor, expected: Tensor) -> bool:
    """Equal bit for bit, NaN included: packed bytes under a floating type may be anything."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    found, expected = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (found, expected))
    return torch.equal(found, expected)


def probe(plan: ModelPlan) -> Tensor:
    """(2, 12) token ids."""
    vocabulary = plan.module.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, vocabulary, (2, 12), generator=generator).to(plan.device)


def logits(model: Any, ids: Tensor) -> Tensor:
    """(B, T, V) in evaluation mode, float32."""
    training = model.training
    model.eval()
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits.float()
    model.train(training)
    return found


def first_gradients(plan: Plan, objective: Any) -> tuple[float, dict[str, Tensor]]:
    """Mean loss of the first step, and the gradients of what trains, by original names where there are any."""
    objective.train()
    micros = plan.data.batches.step(0, plan.device)
    weight = sum(micro.weight for micro in micros)
    total = 0.0
    for number, micro in enumerate(micros):
        seeded_step(0, number)
        loss = objective(micro).total / weight
        loss.backward()
        total += float(loss.detach())
    origin = {now: original for original, now in plan.model.ledger.direct.items()}
    grads = {
        origin.get(name, name): parameter.grad
        for name, parameter in plan.model.module.named_parameters()
        if parameter.grad is not None
    }
    return total, grads


def compare_gradients(
    found: tuple[float, Mapping[str, Tensor]], expected: tuple[float, Mapping[str, Tensor]], tolerance: float, what: str
) -> None:
    """Raise Broken unless loss and every gradient agree."""
    if not math.isclose(found[0], expected[0], rel_tol=tolerance):
        raise Broken(f"the loss is {found[0]:.8g}, {what} {expected[0]:.8g}", "Mend the forward pass")
    if odd := set(found[1]) ^ set(expected[1]):
        raise Broken(f"{names(list(odd))} get a gradient on one side only", "Mend the backward pass")
    largest = max((float(grad.abs().max()) for grad in expected[1].values()), default=0.0)
    for name, grad in expected[1].items():
        # Some gradients are zero but for rounding (key biases); they are measured by the largest of all.
        far = (found[1][name].double() - grad.double()).abs().max().item()
        size = max(float(grad.abs().max()), 1e-3 * largest)
        if not far <= 10 * tolerance * size:
            raise Broken(f"the gradient of {name} is off by {far / size:.1e} of its size", "Mend the backward pass")


def saves_a_plain_model(subject: Subject, folder: Path) -> None:
    """A model trained whole is saved under its original names, and transformers reads it back with the same answers."""
    _, plan = running.train_and_keep(subject.keys(folder))
    saved = AutoModelForCausalLM.from_pretrained(plan.output_dir / "model", dtype=torch.float32).to(plan.device)
    ids = probe(plan.model)
    far = distance(logits(saved, ids), logits(plan.model.module, ids))
    if far > max(10 * subject.tolerance, 1e-3):
        raise Broken(
            f"the saved model's logits differ from the trained one's by {far:.1e} of their size",
            "Make `restore` the inverse of `convert`, and leave the names of other tensors alone",
        )
