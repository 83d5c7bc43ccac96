"""Laws of what decides which parameters train: it trains those and no others, saves, reopens, merges, resumes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmtune.contract.records import Adapter
from llmtune.inference.export import export
from llmtune.inference.reopen import open_model
from llmtune.model.edits import named_tensors
from llmtune.testing import running
from llmtune.testing.contract import Broken, Check, Subject, names
from llmtune.testing.points import edits
from llmtune.testing.points.edits import distance, logits, probe, same_bytes
from llmtune.training.save import trained_tensors

FIRST_PARTY = {"init_config": None, "stage_config": None}
"""A run is reopened by llmtune's own parts: references exist for the laws only."""

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan


def laws(subject: Subject) -> list[Check]:
    """`others_read_what_it_saves` is asked where the test gives a reader."""
    found = [
        edits.accounts_for_every_tensor, edits.loads_completely, trains_what_it_claims, resumes_exactly,
        reopens_as_trained, merges_into_a_plain_model,
    ]  # fmt: skip
    if subject.reader is not None:
        found.append(others_read_what_it_saves)
    return found + ([edits.same_on_ranks] if subject.spreads else [])


def trains_what_it_claims(subject: Subject, folder: Path) -> None:
    """What `ModelEdit.trainable` claims gets gradients and changes; everything else gets none and keeps its bytes; what
    an adapter trains of the original model is in the files that `save` writes.
    """
    plan, objective = running.start(subject.keys(folder))
    change = edits.change_of(subject, plan.model)
    if change.trainable is None:
        raise Broken("`ModelEdit.trainable` is None, so all parameters train", "Say which train, by name")
    claimed = {name for name, _ in plan.model.module.named_parameters() if change.trainable(name)}
    built: Any = plan.parts.one(subject.point).built
    if built.kind == "adapter" and (lost := _not_saved(plan, built, claimed, folder / "saved")):
        raise Broken(
            f"it is an adapter and trains {names(lost)} of the base, which `save` writes into no safetensors file",
            'Save them and put them back in `merge`, leave them out of `ModelEdit.trainable`, or set kind = "weights"',
        )
    before = {name: tensor.detach().clone() for name, tensor in named_tensors(plan.model.module).items()}
    wrong, silent = _step(plan, objective, claimed)
    if wrong:
        raise Broken(f"{names(wrong)} get a gradient and are not claimed", "Freeze what does not train")
    if silent:
        raise Broken(
            f"{names(silent)} are claimed and get no gradient in four steps",
            "Use them in the forward pass, or leave them out of `ModelEdit.trainable`",
        )
    after = named_tensors(plan.model.module)
    own = {id(after[name]) for name in claimed}  # a tied weight has several names, one of which is claimed
    if moved := [n for n, old in before.items() if id(after[n]) not in own and not same_bytes(after[n], old)]:
        raise Broken(f"{names(moved)} changed in training without being claimed", "Leave frozen tensors alone")


def _not_saved(plan: Plan, built: Adapter, claimed: set[str], folder: Path) -> list[str]:
    """Trained tensors of the original model whose values are in no file that `save` writes."""
    if not (base := claimed & set(plan.model.ledger.direct.values())):
        return []
    tensors = trained_tensors(plan.model)
    folder.mkdir()
    built.save(plan.model.module, tensors, folder, plan.model.context)
    held = [tensor for file in folder.rglob("*.safetensors") for tensor in load_file(file).values()]
    return [name for name in sorted(base) if not any(distance(one, tensors[name]) < 1e-2 for one in held)]


def _step(plan: Plan, objective: Any, claimed: set[str]) -> tuple[list[str], list[str]]:
    """Four plain steps. Returns the parameters with a gradient that nobody claimed, and the claimed without."""
    wrong: set[str] = set()
    moved: set[str] = set()
    trained = [parameter for parameter in plan.model.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    for _ in range(4):
        optimizer.zero_grad(set_to_none=True)
        edits.first_gradients(plan, objective)
        for name, parameter in plan.model.module.named_parameters():
            if parameter.grad is None:
                continue
            if name not in claimed:
                wrong.add(name)
            if bool(parameter.grad.abs().max() > 0):
                moved.add(name)
        optimizer.step()
    return sorted(wrong), sorted(claimed - moved)


def resumes_exactly(subject: Subject, folder: Path) -> None:
    """A run continued from a checkpoint ends with the same bytes as one that was never stopped."""
    keys = subject.keys(folder, save_steps=2)
    straight = running.train({**keys, "output_dir": str(folder / "straight")})
    checkpoint = folder / "straight" / "checkpoints" / "step-00000002"
    went_on = {**keys, "output_dir": str(folder / "again"), "resume_from_checkpoint": str(checkpoint)}
    again = running.train(went_on)
    if odd := [name for name, tensor in straight.tensors.items() if not same_bytes(again.tensors[name], tensor)]:
        raise Broken(
            f"{names(odd)} differ after resuming", "Keep what training changes in trained parameters, and nowhere else"
        )


def reopens_as_trained(subject: Subject, folder: Path) -> None:
    """A finished run opens again and answers as the model did when training ended; training changed its answers."""
    _, plan = running.train_and_keep(subject.keys(folder))
    trained = logits(plan.model.module, probe(plan.model))
    model, _ = open_model(plan.output_dir, dtype=torch.float32, device=subject.device, **FIRST_PARTY)
    if (far := distance(logits(model, probe(plan.model)), trained)) > subject.tolerance:
        raise Broken(
            f"the reopened model's logits differ by {far:.1e} of their size",
            "Have the same structure and names when `context.mode` is infer, and set up the rest in `settle`",
        )
    base, _ = running.build(subject.plain_keys(folder), "infer")
    if distance(trained, logits(base.module, probe(plan.model))) == 0:
        raise Broken("four steps of training change no answer", "Use what trains in the forward pass")


def others_read_what_it_saves(subject: Subject, folder: Path) -> None:
    """The test's own reader makes a model of the saved files that answers as the trained one."""
    assert subject.reader is not None
    keys = subject.keys(folder)
    _, plan = running.train_and_keep(keys)
    theirs = subject.reader(plan.output_dir / "model", Path(keys["model"]))
    if (
        far := distance(logits(theirs, probe(plan.model)), logits(plan.model.module, probe(plan.model)))
    ) > subject.tolerance:
        raise Broken(
            f"read by others, the logits differ by {far:.1e} of their size", "Write all that the format needs in `save`"
        )


def merges_into_a_plain_model(subject: Subject, folder: Path) -> None:
    """`llmtune export` writes a model that transformers reads without the plugin, with the trained model's answers."""
    _, plan = running.train_and_keep(subject.keys(folder))
    trained = logits(plan.model.module, probe(plan.model))
    merged_at = export(plan.output_dir, export_dir=str(folder / "merged"), infer_dtype="float32", **FIRST_PARTY)
    merged = AutoModelForCausalLM.from_pretrained(merged_at, dtype=torch.float32).to(plan.device)
    if subject.recipe.get("quant_config"):
        return  # merged onto the unquantised base; `export` compares by itself
    if (far := distance(logits(merged, probe(plan.model)), trained)) > max(10 * subject.tolerance, 1e-3):
        raise Broken(f"the merged model's logits differ by {far:.1e} of their size", "Mend `merge`")
