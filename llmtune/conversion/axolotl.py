"""Axolotl's files."""

from __future__ import annotations

from typing import Any

from llmtune.contract.errors import listed
from llmtune.conversion import trainer_arguments as trainer
from llmtune.conversion.draft import Draft
from llmtune.conversion.source import ForeignSource
from llmtune.conversion.tables import table
from llmtune.data.template import template_names, template_of

_STAGES = {"dpo": ("dpo", "sigmoid"), "ipo": ("dpo", "ipo"), "simpo": ("dpo", "simpo"), "orpo": ("dpo", "orpo"),
           "kto": ("kto", None), "grpo": ("grpo", None)}  # fmt: skip
_FIELDS = {"split": "split", "name": "subset", "shards": None}
_IDLE = (
    "model_type",
    "tokenizer_type",
    "tokenizer_config",
    "is_llama_derived_model",
    "is_mistral_derived_model",
    "strict",
    "dataset_prepared_path",
    "dataset_processes",
    "eval_sample_packing",
    "pad_to_sequence_len",
    "tf32",
    "debug",
    "local_rank",
    "special_tokens",
    "lora_fan_in_fan_out",
    "eval_table_size",
    "eval_max_new_tokens",
    "save_safetensors",
    "logging_first_step",
    "lora_mlp_kernel",
    "lora_qkv_kernel",
    "lora_o_kernel",
    "sample_packing_eff_est",
    "total_num_tokens",
    "xformers_attention",
    "sdp_attention",
    "s2_attention",
    "flash_attn_cross_entropy",
    "flash_attn_rms_norm",
    "flash_attn_fuse_mlp",
    "flash_attn_fuse_qkv",
    "auto_resume_from_checkpoints",
    "wandb_watch",
    "wandb_log_model",
    "ddp_find_unused_parameters",
    "loss_watchdog_threshold",
    "loss_watchdog_patience",
    "shuffle_merged_datasets",
    "save_first_step",
    "chat_template_jinja",
)
"""Keys that change no number here, or that llmtune settles itself."""


def verb_of(source: ForeignSource) -> str:
    """What the command is for."""
    return {"inference": "chat", "merge-lora": "export", "merge_lora": "export"}.get(source.verb, "train")


def convert(draft: Draft, verb: str) -> None:
    """Fill the draft from an Axolotl file."""
    draft.rename({"base_model": "model", "revision_of_model": "revision", "sequence_len": "cutoff_len"})
    draft.take_remote_code()
    _adapter(draft, verb == "train")
    _stage(draft)
    _datasets(draft)
    _template(draft)
    if draft.given.get("learning_rate") is not None:
        rate = draft.take("learning_rate")
        draft.set("learning_rate", float(rate) if isinstance(rate, str) and "${" not in rate else rate, "learning_rate")
    for there, here in (("num_epochs", "num_train_epochs"), ("sequence_len", "cutoff_len"), ("seed", "seed")):
        if draft.given.get(there) is None and there != "seed":
            draft.default(here, table("defaults")["Axolotl"][here])
    if verb == "train":
        trainer.optimiser(draft, "optimizer")
        if draft.given.get("warmup_steps") is None and draft.given.get("warmup_ratio") is None:
            draft.default("warmup_ratio", 0.03)
        trainer.schedule(draft, "lr_scheduler", default="cosine")
        _intervals(draft)
        draft.rename({"val_set_size": "val_size"})
        if draft.recipe.get("val_size") == 0:
            draft.recipe.pop("val_size")
            draft.came.pop("val_set_size")
            draft.ask_nothing("val_set_size", why="0 is the default")
        trainer.saving_and_evaluating(draft)
    trainer.precision(draft)
    trainer.checkpointing(draft)
    _packing(draft)
    _attention(draft)
    trainer.spreading(draft)
    trainer.pushing(draft)
    _kernels(draft)
    _trackers(draft)
    draft.ask_nothing(*_IDLE, why="llmtune settles this itself, or it changes no number")
    draft.take_rest({})


def _adapter(draft: Draft, training: bool) -> None:
    """LoRA, QLoRA, and the bits of the base."""
    kind = draft.take("adapter")
    if kind not in ("lora", "qlora"):
        (draft.lose if kind else draft.ask_nothing)(
            "adapter",
            why="only lora and qlora have a counterpart" if kind else "all parameters train without peft_config",
        )
        return
    draft.name("peft_config", "lora", "adapter")
    rank, alpha = draft.take("lora_r", 8), draft.take("lora_alpha", 16)
    draft.set("peft_config.r", rank, "lora_r")
    draft.set("peft_config.lora_alpha", alpha, "lora_alpha")
    draft.set(
        "peft_config.lora_dropout",
        float(draft.take("lora_dropout", 0.0)),
        "lora_dropout",
        note="" if draft.has("lora_dropout") else "the default of Axolotl; here it is 0.05",
    )
    names = draft.take("lora_target_modules")
    if draft.take("lora_target_linear"):
        draft.set("peft_config.target_modules", "all", "lora_target_linear")
        draft.ask_nothing("lora_target_modules", why="lora_target_linear takes all linear layers")
    elif names:
        draft.set("peft_config.target_modules", names, "lora_target_modules")
    draft.ask_nothing("lora_target_linear", "lora_target_modules", why="it is not set")
    bits = 4 if draft.take("load_in_4bit") or kind == "qlora" else 8 if draft.take("load_in_8bit") else None
    key = "load_in_4bit" if bits == 4 else "load_in_8bit"
    if bits:
        name, note = (
            ("hqq", "8 bits of bitsandbytes are for inference here; HQQ's train")
            if bits == 8 and training
            else ("bnb", "")
        )
        draft.name("quant_config", name, key, note=note)
        draft.set("quant_config.quantization_bit", bits, key)
    draft.ask_nothing(*(each for each in ("load_in_4bit", "load_in_8bit") if each not in draft.came), why="it is off")
    init = draft.take("peft_init_lora_weights")
    if init is not None:
        draft.set("peft_config.init_lora_weights", init, "peft_init_lora_weights")
    draft.rename({"peft_use_dora": "peft_config.use_dora", "peft_use_rslora": "peft_config.use_rslora"})


def _stage(draft: Draft) -> None:
    """`rl` and its parameters."""
    rl = draft.take("rl")
    if rl is None:
        if draft.given.get("pretraining_dataset"):
            draft.name("stage_config", "pt", "pretraining_dataset")
        draft.ask_nothing("rl", "rl_beta", "dpo_beta", why="rows are learnt from as they are")
        return
    if rl not in _STAGES:
        draft.lose("rl", why=f"of these there are {listed(_STAGES)}; supervised fine-tuning is taken")
        return
    stage, loss = _STAGES[rl]
    draft.name("stage_config", stage, "rl")
    if loss not in (None, "sigmoid"):
        draft.set("stage_config.pref_loss", loss)
    beta = next((key for key in ("rl_beta", "dpo_beta", "orpo_alpha") if draft.has(key)), None)
    if beta and stage != "grpo":
        draft.set("stage_config.pref_beta", draft.take(beta), beta)
    draft.rename(
        {
            "kto_desirable_weight": "stage_config.kto_chosen_weight",
            "kto_undesirable_weight": "stage_config.kto_rejected_weight",
            "simpo_gamma": "stage_config.simpo_gamma",
            "rpo_alpha": "stage_config.pref_ftx",
            "dpo_label_smoothing": "stage_config.dpo_label_smoothing",
        }
    )


def _datasets(draft: Draft) -> None:
    """`datasets`, `test_datasets` and `pretraining_dataset` as entries of `dataset`."""
    for there, here in (("datasets", "dataset"), ("pretraining_dataset", "dataset"), ("test_datasets", "eval_dataset")):
        given = draft.take(there)
        if not given:
            draft.ask_nothing(there, why="it is not set")
            continue
        several = given if isinstance(given, list) else [given]
        made = [_entry(draft, f"{there}[{number}]", each) for number, each in enumerate(several)]
        draft.set(here, made, there)
        if there == "pretraining_dataset":
            draft.set("streaming", True, note="as pretraining_dataset does; it needs max_steps")


def _entry(draft: Draft, place: str, given: Any) -> dict[str, Any]:
    """One data set; what its entry says beyond a path, a type and columns is listed."""
    row: dict[str, Any] = {"path": given} if isinstance(given, str) else dict(given)
    files = row.pop("data_files", None)
    path = str((files[0] if isinstance(files, list) and files else files) or row.pop("path", ""))
    row.pop("path", None)
    local = path.startswith((".", "/", "~")) or path.endswith((".json", ".jsonl", ".parquet", ".csv", ".txt"))
    entry: dict[str, Any] = {"path": path if local or path.startswith("hub:") else f"hub:{path}"}
    kind = row.pop("type", None)
    columns: dict[str, str] = {}
    if isinstance(kind, dict):
        columns = {key: kind.get(f"field_{key}", key) for key in ("instruction", "input", "output")}
        kind = "alpaca"
    found = dict(table("axolotl_types").get(str(kind).split(".")[0].split(":")[0], {"format": "auto"})) if kind else {}
    if lost := found.pop("lost", None):
        draft.lost[f"{place}.type"] = lost
    entry |= {key: value for key, value in found.items() if value != "auto"}
    if kind == "completion" and (column := row.pop("field", None)):
        columns = {"text": column}
    if messages := row.pop("field_messages", None):
        columns["messages"] = messages
        entry["format"] = "openai"
    mapping = row.pop("message_property_mappings", None) or {}
    old = {"role": row.pop("message_field_role", None), "content": row.pop("message_field_content", None)}
    tags = {f"{key}_tag": name for key in ("role", "content") if (name := mapping.get(key) or old[key])}
    if tags:
        entry["format"] = "sharegpt" if tags.get("role_tag") == "from" else "openai"
        if "messages" in columns:
            columns = {**columns, "messages": columns["messages"]}
        entry["tags"] = tags
    if columns:
        entry["columns"] = columns
    for key, here in _FIELDS.items():
        value = row.pop(key, None)
        if key == "split" and "[" in str(value):
            value, cut = str(value).partition("[")[0], value
            draft.lost[f"{place}.split"] = f"{cut} is part of a split; num_samples in the entry takes a number of rows"
        if value is not None and here:
            entry[here] = value
    for key in ("ds_type", "train_on_split", "roles", "revision", "roles_to_train", "train_on_eos", "train_on_eot"):
        if (value := row.pop(key, None)) is not None:
            draft.idle[f"{place}.{key}"] = "files tell their kind, and the assistant's turns train with their ends"
    for key, value in row.items():
        if value not in (None, False, [], {}):
            draft.lost[f"{place}.{key}"] = "entries of dataset have no such key (docs/data.md lists them)"
    return entry


def _template(draft: Draft) -> None:
    name = draft.take("chat_template")
    if name in (None, "tokenizer_default") or str(name).startswith("tokenizer_default"):
        draft.ask_nothing("chat_template", why="the tokenizer's own template is taken")
    elif template_of(name) in template_names():
        draft.set("template", template_of(name), "chat_template")
    else:
        draft.ask_nothing("chat_template", why="llmtune has no template of this name; the tokenizer's own is taken")
        draft.check.append("the tokenizer's own chat template is taken: `llmtune data preview` shows what is trained")


def _intervals(draft: Draft) -> None:
    """How often an epoch is saved and evaluated."""
    if (times := draft.take("evals_per_epoch")) is not None:
        if times > 1:
            draft.lose(
                "evals_per_epoch",
                why="evaluations are counted in steps or epochs; set eval_strategy: steps "
                "with eval_steps (an epoch's steps are on the plan)",
            )
        draft.ask_nothing(*(["evals_per_epoch"] if times <= 1 else []), why="after each epoch is the default")
        if times >= 1 and (draft.given.get("val_set_size") or draft.given.get("test_datasets")):
            draft.set("eval_strategy", "epoch", note=f"{times} times there")
    if (times := draft.take("saves_per_epoch")) is not None:
        draft.lose(
            "saves_per_epoch", why="checkpoints are counted in steps; set save_steps (an epoch's steps are on the plan)"
        )


def _packing(draft: Draft) -> None:
    """Packed rows do not see each other in Axolotl either."""
    packs = draft.take("sample_packing")
    if packs:
        draft.set("packing", True, "sample_packing")
    else:
        draft.ask_nothing("sample_packing", why="it is off")
        if "group_by_length" not in draft.given:
            draft.default("group_by_length", False, note="rows of any length meet in a step")
    if draft.take("group_by_length") is not None:
        draft.set("group_by_length", draft.given["group_by_length"], "group_by_length")
    draft.ask_nothing("group_by_length", why="it is not set")


def _attention(draft: Draft) -> None:
    kind = draft.take("attention", draft.take("attn_implementation"))
    flash = draft.take("flash_attention")
    keys = [key for key in ("flash_attention", "attention", "attn_implementation") if key in draft.given]
    if flash or kind in ("flash", "flash_attention_2"):
        draft.set("flash_attn", "auto", *keys, note="the fastest that is installed; fa2 insists on flash-attn")
    elif kind:
        draft.set("flash_attn", {"eager": "disabled"}.get(kind, "sdpa"), *keys)
    draft.ask_nothing(*keys if not flash and not kind else (), why="it is off")


def _kernels(draft: Draft) -> None:
    """Plugins of Axolotl; Liger's operations are kernels."""
    liger = [key for key in draft.left if key.startswith("liger_")]
    plugins = draft.take("plugins") or []
    if any("liger" in str(name).lower() for name in plugins):
        draft.name("kernel_config", "auto", "plugins", note="with Liger's where llmtune-kernels[liger] is installed")
    others = [str(name) for name in plugins if "liger" not in str(name).lower()]
    for name in others:
        draft.lost[f"plugins: {name}"] = "Axolotl's plugins do not run here; kernel_config chooses faster operations"
    if "plugins" in draft.given and "plugins" not in draft.came:
        (draft.lose if others else draft.ask_nothing)("plugins", why="see above" if others else "there are none")
    draft.ask_nothing(*liger, why="which operations are replaced is kernel_config.include_kernels' choice")


def _trackers(draft: Draft) -> None:
    """A project's name switches a tracker on."""
    names = [name for name, key in (("wandb", "wandb_project"), ("mlflow", "mlflow_tracking_uri"),
                                    ("trackio", "trackio_project_name"),
                                    ("tensorboard", "use_tensorboard")) if draft.given.get(key)]  # fmt: skip
    inner = Draft({"report_to": names}, draft.trainer)
    trainer.reports(inner)
    if loggers := inner.recipe.get("logger_config"):
        draft.set("logger_config", loggers, "use_tensorboard")
    draft.ask_nothing("use_tensorboard", why="tensorboard is chosen, or it is off")
