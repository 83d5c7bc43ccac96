"""LLaMA-Factory's classic files and command lines."""

from __future__ import annotations

from typing import Any

from llmtune.contract.errors import listed
from llmtune.conversion import trainer_arguments as trainer
from llmtune.conversion.draft import Draft
from llmtune.conversion.source import ForeignSource
from llmtune.conversion.tables import table
from llmtune.data.template import template_names, template_of
from llmtune.recipe.parameters import official_keys

_OPTIMISERS = {f"use_{name}": name for name in ("galore", "apollo", "badam", "adam_mini", "muon")}
_BREAKS = (
    "chatml",
    "qwen",
    "qwen3",
    "qwen3_nothink",
    "yi",
    "smollm2",
    "granite",
    "hermes",
    "internlm2",
    "gemma",
    "phi",
)
_LINE_BREAK = "LLaMA-Factory trains the line break after an answer's end, too, llmtune the end"
_GENERATION = {"do_sample": True, "temperature": 0.95, "top_p": 0.7, "top_k": 50, "max_new_tokens": 1024}

_QUESTIONS = {"mmlu": ("test", "en"), "ceval": ("validation", "zh"), "cmmlu": ("test", "zh")}
"""Tasks of LLaMA-Factory: which questions of theirs `llmtune eval` asks, and in which language."""


_VERBS = {"chat": "chat", "webchat": "chat", "api": "serve", "export": "export", "eval": "eval", "webui": "web",
          "version": "doctor", "env": "doctor"}  # fmt: skip
"""Commands there and here, but for `train`, which does what its file says."""


def defaults() -> dict[str, Any]:
    """The official table's defaults: a key that has its own asks for nothing where it has no counterpart."""
    return {name: key.default for name, key in official_keys().items()}


def verb_of(source: ForeignSource) -> str:
    """What the file is for: train, export, predict, eval or chat."""
    tree = source.tree
    if source.verb in _VERBS:
        return _VERBS[source.verb]
    if tree.get("do_train") is True:
        return "train"
    if tree.get("do_predict") is True:
        return "predict"
    if tree.get("export_dir"):
        return "export"
    if tree.get("task"):
        return "eval"
    return "train" if tree.get("dataset") or tree.get("tokenized_path") else "chat"


def convert(draft: Draft, verb: str) -> None:
    """Fill the draft from a classic file."""
    draft.rename({"model_name_or_path": "model"})
    revision = draft.take("model_revision", "main")
    if revision == "main":
        draft.ask_nothing("model_revision", why="the default branch is taken")
    else:
        draft.set("revision", revision, "model_revision")
    if draft.take("trust_remote_code"):
        draft.set(
            "trust_remote_code",
            True,
            "trust_remote_code",
            note="as it says there; most models need none: remove it, unless yours is refused without",
        )
    else:
        draft.ask_nothing("trust_remote_code", why="it is off")
    draft.ask_nothing("do_train", why="the command says it")
    training = verb == "train"
    _method(draft, training)
    _quantisation(draft, training)
    if verb == "eval":
        _benchmark(draft)
    _data(draft)
    if training:
        _stage(draft)
        _optimiser(draft)
        trainer.schedule(draft)
        for key, value in table("defaults")["LLaMA-Factory"].items():
            if key not in draft.given:
                draft.default(key, value)
        trainer.saving_and_evaluating(draft)
        _measuring(draft)
    else:
        draft.take("stage")
        if verb == "predict" and draft.take("predict_with_generate"):
            draft.name("eval_config", "generate", "predict_with_generate")
        draft.ask_nothing("stage", "do_eval", "predict_with_generate", why="the command says what is done")
        draft.ask_nothing("do_predict", why="the command says it")
        if verb == "predict":
            draft.rename({"eval_dataset": "dataset"})
    _engine(draft, training)
    trainer.precision(draft)
    trainer.checkpointing(draft)
    trainer.reports(draft)
    trainer.spreading(draft)
    trainer.pushing(draft)
    _rest(draft)


def _engine(draft: Draft, training: bool) -> None:
    """`infer_backend`, which nothing but chat and its like looks at there."""
    own = ("vllm_maxlen", "vllm_gpu_util", "vllm_enforce_eager", "vllm_max_lora_rank", "vllm_config")
    if training or draft.given.get("infer_backend", "huggingface") != "vllm":
        if training or draft.given.get("infer_backend") == "huggingface":
            draft.ask_nothing("infer_backend", why="training asks no engine" if training else "it is the default")
        draft.ask_nothing(*own, why="vLLM is not asked")
        return
    draft.take("infer_backend")
    draft.name("engine_config", "vllm", "infer_backend", note="it needs vllm_command: where vLLM's executable is")
    for key in own:
        if draft.has(key):
            draft.set(f"engine_config.{key}", draft.take(key), key)


def _method(draft: Draft, training: bool) -> None:
    """What trains: `finetuning_type` with its defaults."""
    adapter = draft.has("adapter_name_or_path")
    kind = draft.given.get("finetuning_type") or "lora"
    if draft.given.get("use_llama_pro"):
        draft.name("peft_config", "llama_pro", "use_llama_pro", "finetuning_type")
        draft.set(
            "peft_config.num_expanded_layers", draft.take("freeze_trainable_layers", 2), "freeze_trainable_layers"
        )
        if draft.take("freeze_trainable_modules", "all") != "all":
            draft.lose("freeze_trainable_modules", why="all of the new layers train with llama_pro")
        draft.ask_nothing("freeze_trainable_modules", why="all of the new layers train")
        draft.check.append("llama_pro adds the layers itself: model has to be the base before it was expanded")
        return
    draft.ask_nothing("use_llama_pro", why="it is off")
    if kind == "full" or (not training and not adapter):
        why = "all parameters train without peft_config" if kind == "full" else "there is no adapter"
        draft.ask_nothing("finetuning_type", why=why)
        return
    said = "" if draft.has("finetuning_type") else f"the default of {draft.trainer}"
    draft.take("finetuning_type")
    draft.name("peft_config", kind, "finetuning_type", note=said)
    if kind != "lora" or not training:
        return
    rank = draft.take("lora_rank", 8)
    draft.set(
        "peft_config.r", rank, "lora_rank", note="" if draft.has("lora_rank") else f"the default of {draft.trainer}"
    )
    alpha = draft.take("lora_alpha")
    twice = 2 * rank if isinstance(rank, int) else 16
    draft.set(
        "peft_config.lora_alpha",
        twice if alpha is None else alpha,
        "lora_alpha",
        note=f"twice the rank, the default of {draft.trainer}" if alpha is None else "",
    )
    dropout = draft.take("lora_dropout", 0.0)
    draft.set(
        "peft_config.lora_dropout",
        float(dropout),
        "lora_dropout",
        note="" if draft.has("lora_dropout") else f"the default of {draft.trainer}; here it is 0.05",
    )
    draft.rename({"lora_target": "peft_config.target_modules"})


def _quantisation(draft: Draft, training: bool) -> None:
    """`quantization_bit` with its method; 8 bits of bitsandbytes do not train here."""
    bits = draft.take("quantization_bit")
    method = {"bitsandbytes": "bnb", "bnb": "bnb"}.get(m := str(draft.take("quantization_method", "bnb")), m)
    if bits is None:
        draft.ask_nothing(
            "quantization_bit",
            "quantization_method",
            "quantization_type",
            "double_quantization",
            why="quantization_bit is not set",
        )
        return
    note = ""
    if bits == 8 and method in ("bnb", "eetq") and training:
        method, note = "hqq", f"8 bits of {method} round activations, and are for inference here; HQQ's train"
    draft.name("quant_config", method, "quantization_method", note=note)
    draft.set("quant_config.quantization_bit", bits, "quantization_bit")


def _stage(draft: Draft) -> None:
    """The stage, with what it takes from other keys."""
    stage = draft.take("stage", "sft")
    if stage == "sft":
        draft.ask_nothing("stage", why="sft is the default")
    else:
        draft.name("stage_config", stage, "stage")
    if stage == "pt" and not draft.has("packing"):
        draft.default("packing", True, note="the stage pt packs")
        draft.default("neat_packing", False)
    if stage == "ppo":
        _reward(draft)
        for key in ("temperature", "top_p", "top_k", "max_new_tokens"):
            draft.set(
                f"stage_config.{key}",
                draft.take(key, _GENERATION[key]),
                key,
                note="" if draft.has(key) else f"the default of {draft.trainer}",
            )
        if draft.take("do_sample") is False:
            draft.lose("do_sample", why="answers are always drawn in PPO")
        draft.ask_nothing("do_sample", why="answers are always drawn in PPO")


def _reward(draft: Draft) -> None:
    """`reward_model` by its type."""
    kind = draft.take("reward_model_type", "lora")
    if kind == "api":
        draft.name("reward_config", "endpoint", "reward_model_type")
        draft.recipe["reward_config"] = [{"name": "endpoint", "url": draft.take("reward_model")}]
        draft.came["reward_model"] = "reward_config"
        return
    block = {"name": "model", "reward_model": draft.take("reward_model")}
    if draft.given.get("reward_model_type"):
        block["reward_model_type"] = kind
    for key in ("reward_model_adapters", "reward_model_quantization_bit"):
        if (value := draft.take(key)) is not None:
            block[key] = value
    draft.set(
        "reward_config",
        block,
        "reward_model",
        "reward_model_type",
        "reward_model_adapters",
        "reward_model_quantization_bit",
    )


def _optimiser(draft: Draft) -> None:
    """Optimisers that have a switch of their own, then `optim`."""
    on = [key for key in _OPTIMISERS if draft.given.get(key) is True]
    for key in on[:1]:
        name = _OPTIMISERS[key]
        draft.name("optim_config", name, key)
        draft.take_family(f"{name}_", "optim_config")
        if name == "galore":
            draft.default("optim_config.scale", 2.0)
        if draft.given.get(f"{name}_layerwise"):
            draft.set(
                "max_grad_norm",
                0,
                "max_grad_norm",
                note="updates in the backward pass cannot be clipped, there neither",
            )
    draft.ask_nothing(*(key for key in _OPTIMISERS if key not in on), why="it is off")
    trainer.optimiser(draft)


def _data(draft: Draft) -> None:
    """Data sets, the template, and what LLaMA-Factory does with rows unless it is told."""
    folder = draft.take("dataset_dir")
    if folder == "ONLINE":
        draft.ask_nothing("dataset_dir", why="its data sets are written as hub: ids")
        for key in ("dataset", "eval_dataset"):
            if names := draft.take(key):
                several = names.split(",") if isinstance(names, str) else names
                draft.set(key, [f"hub:{name.strip()}" for name in several], key)
    elif isinstance(folder, str) and folder.startswith("REMOTE:"):
        draft.lose("dataset_dir", why="dataset_info.json is read from a folder; download it and name the folder")
    elif folder is not None:
        draft.set("dataset_dir", folder, "dataset_dir")
    pretrains = draft.given.get("stage") == "pt"
    if "template" in draft.left:
        _template(draft, pretrains)
    if draft.given.get("neat_packing") is True and draft.given.get("packing") is None:
        draft.set("packing", True, "packing", note="neat_packing packs there, too")
    elif draft.given.get("packing") is True and not draft.given.get("neat_packing"):
        draft.set("neat_packing", False, note="samples of a row see each other there; leave it out to keep them apart")
        draft.take("neat_packing")
        draft.ask_nothing("neat_packing", why="it is off, as written")
    padded = not draft.given.get("packing") and not draft.given.get("neat_packing") and not pretrains
    if draft.has("dataset") and padded and "group_by_length" not in draft.given:
        draft.default("group_by_length", False, note="rows of any length meet in a step")
    if draft.has("tokenized_path"):
        draft.check.append(
            "tokenized_path: what LLaMA-Factory wrote there is not read; name another folder, or leave it out"
        )


def _template(draft: Draft, pretrains: bool) -> None:
    """The template by its name there, where llmtune has it."""
    name = draft.take("template")
    here = {"smollm": "chatml"}.get(name, template_of(name))
    if name is None or pretrains:
        draft.ask_nothing(
            "template", why="plain text has none" if pretrains else "the tokenizer's own template is taken"
        )
    elif here in template_names():
        notes = [f"there {name}"] if here != name else []
        notes += [_LINE_BREAK] if here in _BREAKS else []
        draft.set("template", here, "template", note="; ".join(notes))
        if (system := table("system_messages").get(name)) and not draft.has("default_system"):
            draft.set("default_system", system, note=f"what {name} says there where a row has none")
    elif name in ("default", "fewshot", "empty"):
        draft.lose(
            "template",
            why=f"LLaMA-Factory writes texts of its own for {name}, without control tokens; the tokenizer's own "
            "template is taken (template: FILE.jinja names another)",
        )
    else:
        draft.ask_nothing(
            "template",
            why=f"llmtune has no template of this name; the tokenizer's own is taken (or one "
            f"of {listed(template_names(), 40)})",
        )
        draft.check.append("the tokenizer's own chat template is taken: `llmtune data preview` shows what is trained")


def _benchmark(draft: Draft) -> None:
    """The questions of an evaluation file, put as they are there."""
    subject, _, split = str(draft.take("task")).partition("_")
    asked = _QUESTIONS.get(subject)
    draft.name("eval_config", "benchmark")
    draft.set("eval_config.task", f"{subject}_{asked[0]}" if asked else draft.given["task"], "task")
    if asked and split != asked[0]:
        draft.check.append(f"task: llmtune eval asks the {asked[0]} questions of {subject}, the file those of {split}")
    shots = draft.take("n_shot", 5)
    draft.set("eval_config.n_shot", shots, "n_shot", note="" if draft.has("n_shot") else "the default of LLaMA-Factory")
    if (language := draft.given.get("lang")) is not None and asked and language != asked[1]:
        draft.lose("lang", why=f"the questions of {subject} are put in {asked[1]} only")
    draft.rename({key: f"eval_config.{key}" for key in ("lang", "batch_size", "seed", "save_dir", "download_mode")})
    if draft.take("task_dir") not in (None, "evaluation"):
        draft.lose("task_dir", why="it has LLaMA-Factory's own files; lm-evaluation-harness fetches the questions")
    draft.ask_nothing("task_dir", why="lm-evaluation-harness fetches the questions")
    if draft.given.get("template") in (None, "fewshot", "empty"):
        draft.left.pop("template", None)
        draft.ask_nothing("template", why="questions are plain text")
    else:
        draft.set("eval_config.apply_chat_template", True, note="as template asks there")
    draft.check.append(
        "figures: lm-evaluation-harness words questions and draws examples in its own way; compare with its own only"
    )


def _measuring(draft: Draft) -> None:
    """Accuracy and generated answers among the evaluations."""
    for key, name in (("compute_accuracy", "accuracy"), ("predict_with_generate", "generate")):
        if draft.take(key):
            draft.name("eval_config", name, key)
        else:
            draft.ask_nothing(key, why="it is off")


def _rest(draft: Draft) -> None:
    """Ray, the rest of the official table, and what nobody knows."""
    if draft.take("use_ray") or any(draft.has(key) for key in ("ray_run_name", "ray_num_workers")):
        draft.name("launch_config", "ray", "use_ray")
    draft.ask_nothing("use_ray", why="it is off")
    if draft.given.get("use_reentrant_gc"):
        draft.ask_nothing("use_reentrant_gc", why="the non-reentrant kind gives the same gradients")
    if draft.take("enable_liger_kernel"):
        draft.name(
            "kernel_config",
            "auto",
            "enable_liger_kernel",
            note="with Liger's where llmtune-kernels[liger] is installed",
        )
    draft.ask_nothing("enable_liger_kernel", why="it is off")
    if draft.take("use_unsloth_gc"):
        draft.set("offload_activations", True, "use_unsloth_gc")
    draft.ask_nothing("use_unsloth_gc", why="it is off")
    draft.take_rest(defaults())
