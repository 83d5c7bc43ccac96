"""Decide everything before a weight is read or a device touched. A plan can be printed, compared and trained."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmtune.contract.errors import LlmtuneError, PlanError, listed, raise_all
from llmtune.contract.extension_points import EXTENSION_POINTS, POINTS
from llmtune.contract.records import Checks, RunContext
from llmtune.contract.stages import Counts, learns_of
from llmtune.contract.structure import transformer_layers
from llmtune.data import choose_template, prepare
from llmtune.data.batch_loader import BatchLoader
from llmtune.data.mixing import counts, mixed
from llmtune.data.stream_loader import StreamLoader
from llmtune.distributed import expert_parallel, tensor_parallel
from llmtune.distributed.context_parallel import why_not_split
from llmtune.distributed.mesh import arrange
from llmtune.distributed.ranks import Ranks
from llmtune.model.edits import Ledger, set_trainable
from llmtune.model.loading import only_first_reads
from llmtune.model.precision import Precision, choose_precision, stored_dtype
from llmtune.model.skeleton import build_skeleton
from llmtune.model.source import (
    ModelFiles,
    attention_name,
    auto_class,
    load_model_config,
    read_tokenizer,
    resolve_model,
)
from llmtune.model.tying import untie
from llmtune.model.vocabulary import Vocabulary, enter, extend, grow, objection
from llmtune.planning.fitting import misfits, unstreamable
from llmtune.recipe.parts import Part, Parts, collect, find_parts, formats_of
from llmtune.training import run_folder as rundir

if TYPE_CHECKING:
    import torch

    from llmtune.cost import Cost
    from llmtune.cost.devices import Device
    from llmtune.data import Prepared
    from llmtune.recipe.recipe import Recipe
    from llmtune.recipe.registry import Registry

STRUCTURE_POINTS = tuple(name for name, point in POINTS.items() if point.shapes_model)
"""The extension points that make the model, without those that only training needs."""

Mode = Literal["train", "build", "reopen", "infer"]
"""`train`: data and steps too. `build`: the model as it is trained, without data. `reopen`: the structure that was
trained, only to be used. `infer`: only to be used."""


@dataclass(kw_only=True)
class Plan:
    """A recipe, resolved. `model` is on the meta device, edited, and ready to be spread and loaded."""

    recipe: Recipe
    parts: Parts
    ranks: Ranks
    device: torch.device
    mode: Mode
    files: ModelFiles
    precision: Precision
    context: RunContext
    tokenizer: Any
    model: Any
    ledger: Ledger
    vocabulary: Vocabulary | None = None
    """Which rows of the embedding are new; None where none are."""
    trainable: list[str] = field(default_factory=list)
    data: Prepared | None = None
    feed: BatchLoader | StreamLoader | None = None
    flat: bool = False
    attention: str = ""
    notes: list[str] = field(default_factory=list)
    target: Device | None = None
    """The described device that this is a plan for, where it need not be one of this machine."""

    @property
    def output_dir(self) -> Path:
        assert self.recipe.train.output_dir is not None  # filled in when the recipe was read
        return Path(self.recipe.train.output_dir)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        assert self.feed is not None
        train = self.recipe.train
        if train.max_steps:
            return train.max_steps
        assert self.feed.order.steps_per_epoch is not None  # a stream's plan is not made without max_steps
        return max(1, math.ceil(train.num_train_epochs * self.feed.order.steps_per_epoch - 1e-9))

    @property
    def warmup_steps(self) -> int:
        train = self.recipe.train
        return train.warmup_steps or math.ceil(train.warmup_ratio * self.steps)

    def parameters(self) -> tuple[int, int]:
        """(trainable, total), counted on the original shapes: a packed 4-bit weight counts its real size."""
        packed = self.ledger.packed()
        rules = sum(math.prod(self.ledger.shapes[name]) for name in self.ledger.rules)
        held = [(name, p) for name, p in self.model.named_parameters() if name not in packed]
        trainable = sum(p.numel() for _, p in held if p.requires_grad)
        return trainable, rules + sum(p.numel() for _, p in held)

    def facts(self) -> dict[str, Any]:
        """What all ranks must agree on."""
        from llmtune import __version__

        return {
            "llmtune": __version__,
            "recipe": json.dumps(self.recipe.resolved, sort_keys=True, default=str),
            "plugins": self.parts.fingerprint(),
            "training data": self.data_hash,
        }

    @property
    def data_hash(self) -> str:
        """SHA-256 of the tokens, masks and bounds that this run trains on; named in every checkpoint."""
        return self.data.digest if self.data else ""

    @cached_property
    def cost(self) -> Cost:
        """Memory, FLOPs and time of a step on the plan's device; traced without weights, which takes seconds."""
        from llmtune.cost import estimate

        return estimate(self)

    def __str__(self) -> str:
        from llmtune.planning.show import plan_text

        return plan_text(self)

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre>{escape(str(self))}</pre>"


def make_plan(
    recipe: Recipe,
    registry: Registry,
    ranks: Ranks,
    device: torch.device,
    mode: Mode = "train",
    dtype: torch.dtype | None = None,
    target: Device | None = None,
) -> Plan:
    """Resolve `recipe` for `ranks` processes on `device`. Raises all problems found, at once.

    `dtype` overrides the type the model is held and computed in, for using a model that was trained in another.
    `target` describes a device that this machine may not have: such a plan needs no weights, and is not for training.
    """
    problems: list[LlmtuneError] = []
    parts = find_parts(recipe, registry, problems, EXTENSION_POINTS if mode == "train" else STRUCTURE_POINTS)
    for part in parts.at("dist_config") if mode in ("train", "build") else []:
        with collect(problems):
            ranks = arrange(ranks, part.built, part.label)
    model_problems: list[LlmtuneError] = []
    with collect(model_problems):
        reads = ranks.first or not any(only_first_reads(part.built) for part in parts.at("init_config"))
        files = resolve_model(recipe.model, weights=False, described=target is not None, check=reads)
        config = load_model_config(files, recipe.model)
        tokenizer = read_tokenizer(files, recipe.model)
        vocabulary = extend(recipe.model, tokenizer, config)
        if mode != "train" and recipe.data.template is not None:  # for training, `prepare` does it
            choose_template(recipe.data.template, tokenizer, recipe.base_dir)
    precision: Precision | None = None
    with collect(problems):
        train = recipe.train
        precision = (
            Precision(dtype, dtype, autocast=False)
            if dtype
            else choose_precision(device, train.bf16, train.fp16, train.pure_bf16, target.bf16 if target else None)
        )
    if model_problems:
        raise_all([*problems, *model_problems])
    data = None
    if mode == "train":
        problems += [PlanError(sentence) for sentence in unstreamable(recipe)]
        with collect(problems):
            data = prepare_for(recipe, parts, registry, tokenizer)
    raise_all(problems)
    assert precision is not None
    context = RunContext(
        mode="infer" if mode in ("infer", "reopen") else "train", device="cuda" if device.type == "cuda" else "cpu",
        ranks=ranks.size, layout=ranks.layout, compute_dtype=precision.compute,
        trainable_dtype=precision.trainable, gather_dtype=precision.compute, capabilities=parts.capabilities,
        autocast=precision.autocast, model_name=recipe.model.model, revision=files.revision,
        cache_dir=recipe.model.cache_dir, token=recipe.model.token,
    )  # fmt: skip
    ledger, vocabulary = make_model(recipe, files, config, precision, vocabulary)
    plan = Plan(
        recipe=recipe, parts=parts, ranks=ranks, device=device, mode=mode, files=files, precision=precision,
        context=context, tokenizer=tokenizer, model=ledger.model, ledger=ledger, vocabulary=vocabulary, data=data,
        target=target,
    )  # fmt: skip
    edit(plan, problems)
    with collect(problems):
        check_output(plan)
    raise_all(problems)
    if data is not None:
        plan.feed = make_feed(plan)
    return plan


def make_model(
    recipe: Recipe, files: ModelFiles, config: Any, precision: Precision, vocabulary: Vocabulary | None
) -> tuple[Ledger, Vocabulary | None]:
    """The skeleton with the rows that `vocabulary` asks for, in the ledger that will follow its edits."""
    attention = attention_name(recipe.model)
    kwargs = {"trust_remote_code": True} if recipe.model.trust_remote_code else {}

    def build() -> Ledger:
        try:
            model = build_skeleton(auto_class(recipe.model, config), config, precision.compute, attention, **kwargs)
            untie(model, files.folder)
            return Ledger(model)
        except (ValueError, ImportError) as error:
            raise PlanError(
                f"flash_attn: transformers cannot build this model ({' '.join(str(error).split())[:300]})"
            ) from error

    if vocabulary is None:
        return build(), None
    former = build().shapes
    grow(config, vocabulary)
    ledger = build()
    return ledger, enter(vocabulary, ledger, former)


def prepare_for(
    recipe: Recipe, parts: Parts, registry: Registry, tokenizer: Any, learns: Sequence[str] | None = None
) -> Prepared:
    """The recipe's data as tokens, if they are of the kinds `learns`; None: of those that its stage learns from."""
    stage = parts.one("stage_config")
    made = prepare(
        recipe.data, tokenizer, seed=recipe.train.seed, base_dir=recipe.base_dir, formats=formats_of(parts, registry),
        learns=learns or learns_of(stage.built), stage=stage.plugin.name,
    )  # fmt: skip
    return made.counting(stage.built.counts) if isinstance(stage.built, Counts) else made


def edit(plan: Plan, problems: list[LlmtuneError]) -> None:
    """Quantise, adapt, fuse: on the meta device, in this order, each edit checked."""
    model, ledger = plan.model, plan.ledger
    before = len(problems)
    for part in plan.parts.at("stage_config") if plan.mode == "train" else []:
        problems += objections(part, plan.context, model)
    for point in ("quant_config", "peft_config"):
        for part in plan.parts.at(point):
            apply_part(part, plan, problems)
    if len(problems) > before:
        return
    if plan.mode != "infer":
        wish = next((change.store_trainable for _, change in ledger.changes if change.store_trainable), None)
        with collect(problems):
            plan.trainable = set_trainable(model, ledger, stored_dtype(plan.precision, wish))
    else:
        model.requires_grad_(False)
    if len(problems) == before and (problem := objection(plan)):
        problems.append(problem)
    for part in plan.parts.at("kernel_config"):
        apply_part(part, plan, problems)
    choose_attention(plan)
    if plan.mode == "train" and plan.recipe.data.isolates:
        from llmtune.training.isolation import packing_obstacle

        if reason := packing_obstacle(model, plan.attention):
            fix = "set packing: false, or neat_packing: false"
            problems.append(PlanError(f"packing: {type(model).__name__} {reason}; {fix}"))
    if plan.data is not None:
        problems += [PlanError(sentence) for sentence in misfits(plan)]
    for part in plan.parts.at("dist_config") if plan.mode in ("train", "build") else []:
        problems += objections(part, plan.context, model)
    layout = plan.ranks.layout
    sentences = [*why_not_split(plan), *tensor_parallel.objections(model, ledger, layout)]
    sentences += expert_parallel.objections(model, ledger, layout)
    problems += [PlanError(f"dist_config: {sentence}") for sentence in sentences]
    if plan.mode == "train" and not transformer_layers(model) and plan.ranks.size > 1:
        problems.append(
            PlanError(f"model: {type(model).__name__} has no repeated layers to spread over ranks; use one rank")
        )


def apply_part(part: Part, plan: Plan, problems: list[LlmtuneError]) -> None:
    """One edit, unless its plugin objects to this recipe."""
    if found := objections(part, plan.context, plan.model):
        problems += found
        return
    with collect(problems):
        plan.ledger.apply(part.plugin.name, part.built, plan.context)


def objections(part: Part, context: RunContext, model: Any) -> list[LlmtuneError]:
    """What a plugin has to say against this recipe, as errors that carry its extension point."""
    if not isinstance(part.built, Checks):
        return []
    return [PlanError(f"{part.point}: {sentence}") for sentence in part.built.check(context, model)]


def choose_attention(plan: Plan) -> None:
    """A kernel's attention function, unless the recipe names one itself; and the batch layout that follows."""
    wanted = next((change.attention for _, change in plan.ledger.changes if change.attention), None)
    chosen = plan.recipe.model.flash_attn
    if wanted and chosen == "auto":
        plan.model.set_attn_implementation(wanted)
    elif wanted:
        plan.notes.append(f"flash_attn: {chosen} is set, so the kernel's attention is not used")
        wanted = None
    plan.attention = wanted or plan.model.config._attn_implementation
    # These attend within a document's bounds, so rows can be laid end to end and nothing is padded.
    end_to_end = wanted is not None or plan.attention.startswith("flash_attention")
    plan.flat = end_to_end or plan.recipe.data.isolates


def make_feed(plan: Plan) -> BatchLoader | StreamLoader:
    """The order of rows and their grouping into steps."""
    from llmtune.planning.show import counted

    assert plan.data is not None
    train, data = plan.recipe.train, plan.recipe.data
    if plan.data.stream is not None:
        return StreamLoader.make(
            plan.data.stream, plan.data.train, per_device=train.per_device_train_batch_size,
            micro_steps=train.gradient_accumulation_steps, ranks=plan.ranks, flat=plan.flat,
            pad_id=pad_id(plan.tokenizer),
        )  # fmt: skip
    samples = mixed(plan.data.train, data, train.seed)
    plan.notes += [f"an epoch is mixed from {listed(found)}" for found in [counts(samples, plan.data.train)] if found]
    feed = BatchLoader.make(
        samples, packing=data.packing, neat=data.neat_packing, cutoff_len=data.cutoff_len,
        per_device=train.per_device_train_batch_size, micro_steps=train.gradient_accumulation_steps, ranks=plan.ranks,
        seed=train.seed, shuffle=not data.disable_shuffling, flat=plan.flat, pad_id=pad_id(plan.tokenizer),
        group_by_length=data.group_by_length,
    )  # fmt: skip
    if len(feed.units) < feed.order.batch:
        plan.notes.append(
            f"the data are {counted(len(feed.units), feed.units.kind)}, fewer than the {feed.order.batch} of a step: "
            "every step learns from all of them, and an epoch is one step. Lower gradient_accumulation_steps or "
            "per_device_train_batch_size for more steps an epoch"
        )
    return feed


def pad_id(tokenizer: Any) -> int:
    """Any id will do: padding is masked by position and never a target."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)


def check_output(plan: Plan) -> None:
    """Before hours are spent: `output_dir` can be made and written to, plots can be drawn."""
    from llmtune.training.plot import plotting_problem

    if plan.mode != "train":
        return
    folder = plan.output_dir
    problems: list[LlmtuneError] = []
    if plan.recipe.train.plot_loss and (reason := plotting_problem()):
        problems.append(PlanError(f"plot_loss: {reason}"))
    with collect(problems):
        rundir.check_folder(plan)
    existing = next((parent for parent in [folder, *folder.absolute().parents] if parent.is_dir()), None)
    if existing is not None and not _writable(existing):
        problems.append(
            PlanError(f"output_dir: {existing} cannot be written to; choose another folder or change its permissions")
        )
    raise_all(problems)


def _writable(folder: Path) -> bool:
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
