"""From a model's small files to its edited structure: skeleton, quantise, adapt, fuse; all on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from llmtune.contract.errors import LlmtuneError, PlanError, blaming, raise_all
from llmtune.contract.extension_points import POINTS
from llmtune.contract.records import Amends, Edit, RunContext
from llmtune.contract.stages import WithoutDropout
from llmtune.contract.structure import language_model, transformer_layers
from llmtune.data import choose_template
from llmtune.media.processor import MediaProcessor, media_processor
from llmtune.model.added_layers import layer_sources
from llmtune.model.config import ModelConfig
from llmtune.model.dropout import switch_off
from llmtune.model.edits import Ledger, set_trainable
from llmtune.model.loading import only_first_reads
from llmtune.model.modalities import frozen_parameters
from llmtune.model.new_rows import enter, grow
from llmtune.model.precision import Precision, stored_dtype
from llmtune.model.shifted_attention import shift_attention
from llmtune.model.skeleton import build_skeleton, upcast_norms
from llmtune.model.source import (
    ModelFiles,
    attention_name,
    auto_class,
    load_model_config,
    read_tokenizer,
    resolve_model,
)
from llmtune.model.tying import untie
from llmtune.model.vocabulary import Vocabulary, extend
from llmtune.planning.model_plan import Mode, ModelPlan
from llmtune.planning.objections import packing_obstacle, plugin_objections, vocabulary_objection
from llmtune.planning.options import option_notes, option_objections
from llmtune.planning.spreading import objections_to_spreading
from llmtune.recipe.parts import Parts, collect, reward_names

if TYPE_CHECKING:
    import torch

    from llmtune.distributed.ranks import Ranks
    from llmtune.recipe.recipe import Recipe

STRUCTURE_POINTS = tuple(name for name, point in POINTS.items() if point.shapes_model)
"""The extension points that make the model, without those that only training needs."""


EDITORS = ("quant_config", "peft_config", "stage_config", "kernel_config")
"""The extension points whose plugins may edit the structure, in their order; a stage does where the model trains."""


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """What a model's small files say."""

    files: ModelFiles
    keys: ModelConfig
    """The recipe's keys of the model, as its plugins amend them."""
    layers: Sequence[int] | None = None
    """What `Amendment.layers` says, where a plugin has added layers."""
    config: Any
    tokenizer: Any
    vocabulary: Vocabulary | None
    media: MediaProcessor | None
    """What reads pictures and sound; None where the model reads text only."""


def read_pretrained(recipe: Recipe, parts: Parts, ranks: Ranks, *, described: bool, templated: bool) -> Pretrained:
    """Find the model and read its config and tokenizer, which gets the recipe's new tokens; no weights.

    `described`: the folder may lack weights, as they will not be read here. `templated`: the tokenizer gets the
    template of the recipe, too; for training, preparing the data does that. Raises LoadError and PlanError.
    """
    reads = ranks.first or not any(only_first_reads(part.built) for part in parts.at("init_config"))
    files = resolve_model(recipe.model, parts.one("hub_config").built, weights=False, described=described, check=reads)
    config = load_model_config(files, recipe.model)
    tokenizer = read_tokenizer(files, recipe.model)
    keys, layers = amended(recipe.model, parts, config, tokenizer)
    vocabulary = extend(recipe.model, tokenizer, config)
    if templated and recipe.data.template is not None:
        choose_template(recipe.data.template, tokenizer, recipe.base_dir)
    media = media_processor(files.folder, tokenizer, recipe.data, recipe.model.trust_remote_code)
    return Pretrained(
        files=files, keys=keys, layers=layers, config=config, tokenizer=tokenizer, vocabulary=vocabulary, media=media
    )


def amended(keys: ModelConfig, parts: Parts, config: Any, tokenizer: Any) -> tuple[ModelConfig, Sequence[int] | None]:
    """The keys of the model after peft and stage plugins have amended its `config`, which changes in place, and the
    layers that theirs start from."""
    layers: Sequence[int] | None = None
    for part in [*parts.at("peft_config"), *parts.at("stage_config")]:
        if isinstance(part.built, Amends):
            with blaming(part.full_label, "amend"):
                amendment = part.built.amend(config, tokenizer)
            keys = replace(keys, model_class=amendment.model_class or keys.model_class)
            layers = amendment.layers if layers is None else layers
    return keys, layers


def plan_model(
    recipe: Recipe, parts: Parts, pretrained: Pretrained, precision: Precision, ranks: Ranks, device: torch.device,
    mode: Mode,
) -> ModelPlan:  # fmt: skip
    """Build the skeleton and let the plugins edit it, in their order, each edit checked. Raises all objections."""
    recipe = replace(recipe, model=pretrained.keys)
    ledger, vocabulary = make_skeleton(recipe.model, pretrained, precision)
    module: Any = ledger.model
    frozen = frozen_parameters(module, recipe.model)
    context = RunContext(
        mode="infer" if mode in ("infer", "reopen") else "train", device="cuda" if device.type == "cuda" else "cpu",
        ranks=ranks.size, dims=ranks.dims, compute_dtype=precision.compute, trainable_dtype=precision.trainable,
        rewards=tuple(reward_names(parts.at("reward_config"))), gather_dtype=precision.compute,
        frozen=frozenset(name.rpartition(".")[0] for name in frozen), capabilities=parts.capabilities,
        learning_rate=recipe.train.learning_rate if mode == "train" else 0.0,
        autocast=precision.autocast, model_name=recipe.model.model, revision=pretrained.files.revision,
        cache_dir=recipe.model.cache_dir, token=recipe.model.token, hub=parts.one("hub_config").built,
    )  # fmt: skip
    if mode in ("train", "build") and recipe.model.upcast_layernorm:
        ledger.upcast |= upcast_norms(module)
    problems: list[LlmtuneError] = []
    for part in parts.at("stage_config") if mode == "train" else []:
        if not isinstance(part.built, Edit):
            problems += plugin_objections(part, context, module)
    apply_edits(("quant_config", "peft_config"), parts, ledger, context, problems)
    if mode in ("train", "build"):
        apply_edits(("stage_config",), parts, ledger, context, problems)
    raise_all(problems)
    trainable: list[str] = []
    if mode == "infer":
        module.requires_grad_(False)
    else:
        wish = next((change.store_trainable for _, change in ledger.changes if change.store_trainable), None)
        with collect(problems):
            trainable = set_trainable(module, ledger, stored_dtype(precision, wish), frozen)
    if vocabulary is not None and not problems:
        learning = tuple(trainable) if mode in ("train", "build") else None
        if sentence := vocabulary_objection(vocabulary, ledger, module, learning, parts):
            problems.append(PlanError(sentence))
    apply_edits(("kernel_config",), parts, ledger, context, problems)
    if mode == "train" and any(
        isinstance(part.built, WithoutDropout) and part.built.without_dropout for part in parts.at("stage_config")
    ):
        switch_off(module)
    attention, end_to_end, notes = choose_attention(recipe.model, ledger)
    if mode == "train":
        if recipe.model.shift_attn:
            attention, end_to_end = shift_attention(module, recipe.data.cutoff_len), False
        found = option_objections(recipe, parts, module, precision, ranks.dims)
        problems += [PlanError(sentence) for sentence in found]
        notes = (*notes, *option_notes(recipe, parts, module, ranks.dims))
    if mode == "train" and recipe.data.isolates and (reason := packing_obstacle(module, attention)):
        fix = "set packing: false, or neat_packing: false"
        problems.append(PlanError(f"packing: {type(module).__name__} {reason}; {fix}"))
    for part in parts.at("dist_config") if mode in ("train", "build") else []:
        problems += plugin_objections(part, context, module)
    spreading = objections_to_spreading(module, ledger, attention, ranks.dims)
    problems += [PlanError(f"dist_config: {sentence}") for sentence in spreading]
    if mode == "train" and ranks.size > 1 and not transformer_layers(module):
        what = f"{type(module).__name__} has no repeated layers to spread over ranks"
        problems.append(PlanError(f"model: {what}; use one rank"))
    raise_all(problems)
    return ModelPlan(
        keys=recipe.model, parts=parts.of(STRUCTURE_POINTS), ranks=ranks, device=device, mode=mode,
        files=pretrained.files, precision=precision, context=context, tokenizer=pretrained.tokenizer,
        media=pretrained.media, module=module, ledger=ledger, vocabulary=vocabulary, trainable=tuple(trainable),
        attention=attention, end_to_end=end_to_end,
        compiled=mode == "train" and recipe.train.torch_compile,
        offloads=mode == "train" and recipe.train.offload_activations, seed=recipe.train.seed, notes=notes,
    )  # fmt: skip


def make_skeleton(keys: ModelConfig, pretrained: Pretrained, precision: Precision) -> tuple[Ledger, Vocabulary | None]:
    """The model without weights, with a row for each token, in the ledger that will follow its edits."""
    attention, config, vocabulary = attention_name(keys), pretrained.config, pretrained.vocabulary
    kwargs = {"trust_remote_code": True} if keys.trust_remote_code else {}

    def build() -> Ledger:
        try:
            module = build_skeleton(auto_class(keys, config), config, precision.compute, attention, **kwargs)
            untie(module, pretrained.files.folder)
            return Ledger(module, sources=layer_sources(module, pretrained.layers))
        except (ValueError, ImportError) as error:
            said = " ".join(str(error).split())[:300]
            if pretrained.layers is not None:
                raise PlanError(
                    f"peft_config: transformers cannot build this model with more layers ({said})"
                ) from error
            fix = "" if keys.flash_attn == "auto" else "; leave flash_attn out, or install that package"
            raise PlanError(f"flash_attn: transformers cannot build this model ({said}){fix}") from error

    if vocabulary is None:
        ledger = build()
    else:
        former = build().shapes
        grow(config, vocabulary)
        ledger = build()
        vocabulary = enter(vocabulary, ledger, former)
    module: Any = ledger.model
    if (pretrained.files.folder / "generation_config.json").exists():  # else the one made from the model's config stays
        module.generation_config = GenerationConfig.from_pretrained(pretrained.files.folder)
    return ledger, vocabulary


def apply_edits(
    points: Sequence[str], parts: Parts, ledger: Ledger, context: RunContext, problems: list[LlmtuneError]
) -> None:
    """Let the plugins at these points edit, but those that object to the recipe; what fails goes to `problems`."""
    for part in (part for point in points for part in parts.at(point) if isinstance(part.built, Edit)):
        if found := plugin_objections(part, context, ledger.model):
            problems += found
            continue
        with collect(problems), blaming(part.full_label, "apply"):
            ledger.apply(part.plugin.name, part.built, context)


def choose_attention(keys: ModelConfig, ledger: Ledger) -> tuple[str, bool, tuple[str, ...]]:
    """A kernel's attention function, unless the recipe names one: (its name, whether rows are laid end to end, as
    it tells documents apart by their bounds and nothing else of the model mixes them, notes)."""
    module = language_model(ledger.model)
    wanted, notes = next((change.attention for _, change in ledger.changes if change.attention), None), ()
    if wanted and keys.flash_attn != "auto":
        notes = (f"flash_attn: {keys.flash_attn} is set, so the kernel's attention is not used",)
        wanted = None
    elif wanted:
        module.set_attn_implementation(wanted)
    name = wanted or str(module.config._attn_implementation)
    by_bounds = wanted is not None or name.startswith("flash_attention")
    return name, by_bounds and packing_obstacle(ledger.model, name) is None, notes
