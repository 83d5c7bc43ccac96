"""torchtune's recipe configurations: components with their arguments. Keys are told with dots: `model.lora_rank`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmtune.conversion import trainer_arguments as trainer
from llmtune.conversion.draft import Draft
from llmtune.conversion.source import ForeignSource
from llmtune.conversion.tables import table
from llmtune.recipe.text import leaves, show

_COMPONENT = "_component_"
_MODULES = {"output_proj": "o_proj"}
_MLP = ["gate_proj", "up_proj", "down_proj"]
_LOSSES = {"DPOLoss": "sigmoid", "RSOLoss": "hinge", "IPOLoss": "ipo", "SimPOLoss": "simpo"}
_IDLE = (
    "profiler",
    "log_peak_memory_stats",
    "log_level",
    "save_adapter_weights_only",
    "memory_efficient_fsdp_wrap",
    "custom_sharded_layers",
    "low_cpu_ram",
    "fsdp_reshard_after_forward",
    "model_type",
    "checkpoint",
    "clear_output",
    "enable_async_checkpointing",
    "cudnn_deterministic_mode",
    "save_last_epoch_only",
    "resume",
    "run_val_every_n_steps",
)


def verb_of(source: ForeignSource) -> str:
    """What the configuration is for: one with an optimiser trains."""
    return "train" if "optimizer" in source.tree or "epochs" in source.tree else "chat"


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Every value of the blocks by its dotted key; lists stay whole."""
    made: dict[str, Any] = {}
    for path, value in leaves(tree):
        keys = [part for part in path if isinstance(part, str)]
        if any(isinstance(part, int) for part in path):
            whole: Any = tree
            for part in keys:
                whole = whole[part] if isinstance(whole, dict) else whole
            made[".".join(keys)] = whole
        else:
            made[show(path)] = value
    return made


def convert(draft: Draft, verb: str) -> None:
    """Fill the draft from a configuration whose blocks were made flat."""
    _model(draft)
    _data(draft)
    if verb == "train":
        _sizes(draft)
        _optimiser(draft)
        _stage(draft)
    kind = draft.take("dtype", "bf16")
    if kind == "bf16":
        draft.set("pure_bf16", True, "dtype", note="torchtune keeps trained weights in bfloat16")
    elif kind == "fp16":
        draft.set("fp16", True, "dtype")
    else:
        draft.set("bf16", False, "dtype", note="float32")
    if (device := draft.take("device")) in ("cpu", "cuda"):
        draft.set("device", device, "device")
    trainer.checkpointing(draft, "enable_activation_checkpointing")
    if draft.take("enable_activation_offloading"):
        draft.set("offload_activations", True, "enable_activation_offloading")
        draft.set("activation_checkpointing", "full", "enable_activation_checkpointing")
    draft.ask_nothing("enable_activation_offloading", why="it is off")
    if draft.take("compile") is True:
        draft.set("torch_compile", True, "compile")
    draft.ask_nothing("compile", why="it is off")
    _spread(draft)
    _logging(draft)
    seed = draft.take("seed")
    (
        draft.set("seed", seed, "seed")
        if seed is not None
        else draft.ask_nothing("seed", why="it is not set; 42 is taken")
    )
    draft.ask_nothing(*(key for key in draft.left if key.split(".")[0] in _IDLE), why="llmtune settles this itself")
    draft.take_rest({})


def _model(draft: Draft) -> None:
    """The folder of the checkpoint is the model; the builder's name says whether LoRA or QLoRA trains."""
    folder = draft.take("checkpointer.checkpoint_dir")
    if folder is None and (tokenizer := draft.take("tokenizer.path")):
        folder = str(Path(tokenizer).parent)
    if folder is None:
        draft.lose("model._component_", why="the model's folder or hub id is not in the file; write it as model")
    else:
        draft.set("model", folder, "checkpointer.checkpoint_dir")
    builder = str(draft.take(f"model.{_COMPONENT}", "")).rpartition(".")[2]
    lora = builder.startswith(("lora_", "qlora_")) or draft.has("model.lora_rank")
    draft.ask_nothing("model._component_", why="the model's class is in its folder")
    resumed = draft.take("resume_from_checkpoint")
    draft.ask_nothing(
        "resume_from_checkpoint", why="an interrupted run in output_dir is continued anyway" if resumed else "it is off"
    )
    if draft.take("tokenizer.prompt_template"):
        draft.lose("tokenizer.prompt_template", why="a text around rows is a chat template of your own (docs/data.md)")
    draft.ask_nothing(
        *(key for key in draft.left if key.startswith("checkpointer.")),
        "tokenizer._component_",
        "tokenizer.path",
        "tokenizer.merges_file",
        "tokenizer.prompt_template",
        why="the model's folder has it, and the run's folder is output_dir",
    )
    if not lora:
        return
    draft.name("peft_config", "lora", "model._component_")
    rank = draft.take("model.lora_rank", 8)
    draft.set("peft_config.r", rank, "model.lora_rank")
    draft.set("peft_config.lora_alpha", draft.take("model.lora_alpha", 16), "model.lora_alpha")
    draft.set("peft_config.lora_dropout", float(draft.take("model.lora_dropout", 0.0)), "model.lora_dropout")
    if draft.take("model.use_dora"):
        draft.set("peft_config.use_dora", True, "model.use_dora")
    attention = list(dict.fromkeys(_MODULES.get(name, name) for name in draft.take("model.lora_attn_modules", [])))
    mlp = _MLP if draft.take("model.apply_lora_to_mlp") else []
    if attention or mlp:
        sources = [key for key in ("model.lora_attn_modules", "model.apply_lora_to_mlp") if key in draft.given]
        draft.set("peft_config.target_modules", [*attention, *mlp], *sources)
    draft.ask_nothing("model.apply_lora_to_mlp", "model.use_dora", why="it is off")
    if draft.take("model.apply_lora_to_output"):
        draft.recipe["peft_config"].setdefault("target_modules", []).append("lm_head")
        draft.came["model.apply_lora_to_output"] = "peft_config.target_modules"
    draft.ask_nothing("model.apply_lora_to_output", why="it is off")
    if builder.startswith("qlora_") or draft.take("model.quantize_base"):
        draft.name("quant_config", "bnb", "model.quantize_base", note="NF4, as torchao's there")
        draft.set("quant_config.quantization_bit", 4)
    draft.ask_nothing("model.quantize_base", why="it is off")


def _data(draft: Draft) -> None:
    """The builder of the data set, its source and its switches."""
    length = draft.take("tokenizer.max_seq_len")
    if length is None:
        draft.ask_nothing("tokenizer.max_seq_len", why="it is not set")
        draft.set("cutoff_len", 8192, note="torchtune cuts nothing here; rows that are longer than this are cut")
    else:
        draft.set("cutoff_len", length, "tokenizer.max_seq_len")
    for block, here in (("dataset", "dataset"), ("dataset_val", "eval_dataset")):
        _dataset(draft, block, here)
    shuffle = draft.take("shuffle", True)
    if shuffle is False:
        draft.set("disable_shuffling", True, "shuffle")
    draft.ask_nothing("shuffle", why="rows are shuffled")
    if "packing" not in draft.recipe:
        draft.default("group_by_length", False, note="rows of any length meet in a step")


def _dataset(draft: Draft, block: str, here: str) -> None:
    names = [key for key in draft.left if key.startswith(f"{block}.")]
    if not names:
        return
    builder = str(draft.take(f"{block}.{_COMPONENT}", "")).rpartition(".")[2]
    entry = dict(table("torchtune_datasets").get(builder, {"format": "auto"}))
    source, files = draft.take(f"{block}.source"), draft.take(f"{block}.data_files")
    several = files if isinstance(files, list) else [files] if files else []
    if several:
        entry["path"] = several[0]
    elif source and source not in ("json", "csv", "parquet", "text"):
        entry["path"] = f"hub:{source}"
    if not entry.get("path"):
        draft.lost[f"{block}.path"] = "the file does not say where the rows are; write the path in dataset"
        entry["path"] = "PATH"
    for key in ("split", "name"):
        if value := draft.take(f"{block}.{key}"):
            entry[{"name": "subset"}.get(key, key)] = value
    if column := draft.take(f"{block}.column"):
        entry["columns"] = {"text": column}
    if isinstance(columns := draft.take(f"{block}.column_map"), dict):
        entry["columns"] = columns
    mapped = {key.rpartition(".")[2]: draft.take(key) for key in names if key.startswith(f"{block}.column_map.")}
    if mapped:
        entry["columns"] = {{"input": "instruction", "conversations": "messages"}.get(key, key): value
                            for key, value in mapped.items()}  # fmt: skip
    if entry.get("format") == "auto":
        entry.pop("format")
    if draft.take(f"{block}.packed"):
        draft.set("packing", True, f"{block}.packed", note="samples of a row do not see each other, there neither")
    whole = draft.take(f"{block}.train_on_input", "alpaca" in builder)
    if whole and here == "dataset":
        draft.set(
            "train_on_prompt",
            True,
            f"{block}.train_on_input",
            note="" if draft.has(f"{block}.train_on_input") else f"the default of {builder}",
        )
    if system := draft.take(f"{block}.new_system_prompt"):
        draft.set("default_system", system, f"{block}.new_system_prompt")
    if entry.get("format") == "text" and "stage_config" not in draft.recipe:
        draft.name("stage_config", "pt", f"{block}.{_COMPONENT}")
    draft.ask_nothing(f"{block}.packed", f"{block}.train_on_input", f"{block}.add_eos", why="as the default")
    if (style := draft.take(f"{block}.conversation_style")) in ("sharegpt", "openai"):
        entry["format"] = style
    if conversation := draft.take(f"{block}.conversation_column"):
        own = "conversations" if entry.get("format") == "sharegpt" else "messages"
        entry |= {"columns": {own: conversation}} if conversation != own else {}
    if "alpaca" in builder:
        draft.check.append(
            f"{block}: {builder} puts its own text around a row (### Instruction: ...), and the chat template around "
            "that; here there is the chat template alone"
        )
    told = (*draft.idle, *draft.came, *draft.left)
    whole_set = [{**entry, "path": file} for file in several] if len(several) > 1 else entry
    draft.set(here, whole_set, *(key for key in names if key not in told), f"{block}.{_COMPONENT}")


def _sizes(draft: Draft) -> None:
    draft.rename({"batch_size": "per_device_train_batch_size", "epochs": "num_train_epochs"})
    if "num_train_epochs" not in draft.recipe:
        draft.default("num_train_epochs", table("defaults")["torchtune"]["num_train_epochs"])
    steps = draft.take("max_steps_per_epoch")
    if steps:
        epochs = draft.recipe["num_train_epochs"]
        whole = steps * epochs if isinstance(epochs, int) else steps
        draft.set(
            "max_steps",
            whole,
            "max_steps_per_epoch",
            note="of all epochs, each of which begins anew here when its rows end",
        )
    draft.ask_nothing("max_steps_per_epoch", why="it is not set")
    clip = draft.take("clip_grad_norm")
    draft.set(
        "max_grad_norm",
        clip,
        "clip_grad_norm",
        note="" if clip is not None else "gradients are not clipped unless told",
    )


def _optimiser(draft: Draft) -> None:
    """The optimiser's component and its arguments, then the schedule's; without one the rate stays."""
    rate = draft.take("optimizer.lr")
    if rate is not None:
        draft.set("learning_rate", float(rate) if isinstance(rate, str) and "${" not in rate else rate, "optimizer.lr")
    component = str(draft.given.get(f"optimizer.{_COMPONENT}", "torch.optim.AdamW"))
    trainer.optimiser(draft, f"optimizer.{_COMPONENT}")
    decay = draft.take("optimizer.weight_decay", 0.01 if "AdamW" in component else 0.0)
    if decay:
        draft.chosen("optim_config") or draft.name("optim_config", "adamw")
        draft.set(
            "optim_config.weight_decay",
            decay,
            "optimizer.weight_decay",
            note="" if draft.has("optimizer.weight_decay") else f"the default of {component}",
        )
    known = draft.keys_of("optim_config", draft.chosen("optim_config") or "adamw")
    for key in [key for key in draft.left if key.startswith("optimizer.")]:
        inner, value = key.partition(".")[2], draft.take(key)
        if inner in ("fused", "foreach", "weight_decay"):
            draft.ask_nothing(
                key, why="the fastest that exists is taken" if inner != "weight_decay" else "0 is the default"
            )
        elif inner in known:
            draft.chosen("optim_config") or draft.name("optim_config", "adamw")
            draft.set(f"optim_config.{inner}", value, key)
        else:
            draft.lose(key, why=f"optim_config: {draft.chosen('optim_config') or 'adamw'} has no such key")
    if draft.take("optimizer_in_bwd"):
        draft.chosen("optim_config") or draft.name("optim_config", "adamw")
        if "layerwise" in draft.keys_of("optim_config", draft.chosen("optim_config")):
            draft.set("optim_config.layerwise", True, "optimizer_in_bwd")
            draft.set("max_grad_norm", 0, note="updates in the backward pass cannot be clipped")
        else:
            draft.lose("optimizer_in_bwd", why=f"optim_config: {draft.chosen('optim_config')} has no layerwise")
    draft.ask_nothing("optimizer_in_bwd", why="it is off")
    schedule = draft.given.get(f"lr_scheduler.{_COMPONENT}")
    draft.rename({"lr_scheduler.num_warmup_steps": "warmup_steps"})
    trainer.schedule(draft, f"lr_scheduler.{_COMPONENT}", default="constant")
    if schedule is None:
        draft.notes["lr_scheduler_config"] = ["there is no lr_scheduler: the rate stays as it is"]
    if (cycles := draft.take("lr_scheduler.num_cycles")) is not None:
        draft.set("lr_scheduler_config.num_cycles", cycles, "lr_scheduler.num_cycles")


def _stage(draft: Draft) -> None:
    """The loss says whether pairs are learnt from."""
    name = str(draft.take(f"loss.{_COMPONENT}", "")).rpartition(".")[2]
    if name in _LOSSES:
        draft.name("stage_config", "dpo", f"loss.{_COMPONENT}")
        if _LOSSES[name] != "sigmoid":
            draft.set("stage_config.pref_loss", _LOSSES[name])
        gamma = "stage_config.simpo_gamma" if name == "SimPOLoss" else "stage_config.pref_beta"
        draft.rename({"loss.beta": "stage_config.pref_beta", "loss.tau": "stage_config.pref_beta", "loss.gamma": gamma,
                      "loss.label_smoothing": "stage_config.dpo_label_smoothing"})  # fmt: skip
        if name == "SimPOLoss":
            draft.default("stage_config.pref_beta", 2.0)
    elif name in ("GRPOLoss", "PPOLoss") or "KD" in name:
        draft.lose(
            f"loss.{_COMPONENT}",
            why="this loss needs rewards or a teacher: docs/how-to/rewards.md says how; "
            "supervised fine-tuning is taken",
        )
    draft.ask_nothing(
        f"loss.{_COMPONENT}",
        "loss.num_output_chunks",
        "loss.ignore_index",
        "loss.reduction",
        why="cross-entropy over the trained tokens, in chunks, is the default",
    )


def _spread(draft: Draft) -> None:
    if draft.take("fsdp_cpu_offload"):
        draft.name("dist_config", "fsdp2")
        draft.set("dist_config.offload_params", True, "fsdp_cpu_offload")
    if (size := draft.take("tensor_parallel_dim", 1)) > 1:
        draft.name("dist_config", "fsdp2")
        draft.set("dist_config.tp_size", size, "tensor_parallel_dim")
    if (size := draft.take("context_parallel_dim", 1)) > 1:
        draft.name("dist_config", "fsdp2")
        draft.set("dist_config.cp_size", size, "context_parallel_dim")
    draft.ask_nothing(
        "fsdp_cpu_offload",
        "tensor_parallel_dim",
        "context_parallel_dim",
        "tensor_parallel_plan._component_",
        "data_parallel_shard_dim",
        "data_parallel_replicate_dim",
        why="what is left of the ranks shards the model",
    )


def _logging(draft: Draft) -> None:
    draft.rename({"log_every_n_steps": "logging_steps"})
    name = str(draft.take(f"metric_logger.{_COMPONENT}", "")).rpartition(".")[2]
    kind = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard", "CometLogger": "comet"}.get(name)
    if kind:
        inner = Draft({"report_to": [kind]}, draft.trainer)
        trainer.reports(inner)
        if loggers := inner.recipe.get("logger_config"):
            draft.set("logger_config", loggers, f"metric_logger.{_COMPONENT}")
        else:
            draft.lose(f"metric_logger.{_COMPONENT}", why=next(iter(inner.lost.values())))
        known = draft.keys_of("logger_config", draft.chosen("logger_config"))
        for key in ("project", "entity", "group", "name", "tags"):
            here = {"name": "run_name"}.get(key, key)
            if here in known and draft.has(f"metric_logger.{key}"):
                draft.set(f"logger_config.{here}", draft.take(f"metric_logger.{key}"), f"metric_logger.{key}")
    draft.ask_nothing(
        *(
            key
            for key in [*draft.left, f"metric_logger.{_COMPONENT}"]
            if key.startswith("metric_logger.") and key not in draft.came and key not in draft.lost
        ),
        why="metrics.jsonl in the run's folder holds every number",
    )
