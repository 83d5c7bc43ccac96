"""Axolotl's files."""

from __future__ import annotations

from llmtune.contract.errors import listed
from llmtune.conversion import trainer_arguments as trainer
from llmtune.conversion import trl
from llmtune.conversion.axolotl_data import take_datasets
from llmtune.conversion.draft import Draft
from llmtune.conversion.source import ForeignSource
from llmtune.conversion.tables import table
from llmtune.data.template import template_names, template_of

_STAGES = {"dpo": ("dpo", "sigmoid"), "ipo": ("dpo", "ipo"), "simpo": ("dpo", "simpo"), "orpo": ("dpo", "orpo"),
           "kto": ("kto", None), "grpo": ("grpo", None)}  # fmt: skip
_TEMPLATES = {"qwen_25": "qwen", "phi_3": "phi", "phi_35": "phi"}
"""Templates that are called otherwise there."""
_IDLE = (
    "model_type", "tokenizer_type", "tokenizer_config", "is_llama_derived_model", "is_mistral_derived_model",
    "strict", "debug", "tf32", "dataset_prepared_path", "dataset_processes", "eval_sample_packing",
    "pad_to_sequence_len", "local_rank", "lora_fan_in_fan_out", "eval_table_size", "eval_max_new_tokens",
    "save_safetensors", "logging_first_step", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel",
    "sample_packing_eff_est", "sample_packing_group_size", "sample_packing_bin_size", "total_num_tokens",
    "xformers_attention", "sdp_attention", "flash_attn_cross_entropy", "flash_attn_rms_norm", "flash_attn_fuse_mlp",
    "flash_attn_fuse_qkv", "auto_resume_from_checkpoints", "ddp_find_unused_parameters", "save_first_step",
    "fsdp_version", "fsdp_final_state_dict_type", "gc_steps",
)  # fmt: skip
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
    _template(draft)
    take_datasets(draft)
    if draft.given.get("learning_rate") is not None:
        rate = draft.take("learning_rate")
        draft.set("learning_rate", float(rate) if isinstance(rate, str) and "${" not in rate else rate, "learning_rate")
    draft.rename({"num_epochs": "num_train_epochs"})
    for key, value in table("defaults")["Axolotl"].items():
        draft.default(key, value)
    if verb == "train":
        trainer.optimiser(draft, "optimizer")
        if draft.given.get("warmup_steps") is None and draft.given.get("warmup_ratio") is None:
            draft.default("warmup_ratio", 0.03, note="at most 100 steps there")
        trainer.schedule(draft, "lr_scheduler", default="cosine")
        if draft.has("cosine_min_lr_ratio") and draft.chosen("lr_scheduler_config") == "cosine":
            draft.rename({"cosine_min_lr_ratio": "lr_scheduler_config.min_lr_ratio"})
        draft.rename({"val_set_size": "val_size"})
        if draft.recipe.get("val_size") == 0:
            draft.recipe.pop("val_size")
            draft.came.pop("val_set_size")
            draft.ask_nothing("val_set_size", why="0 is the default")
        _intervals(draft)
        if not any(draft.has(key) for key in ("save_steps", "saves_per_epoch", "save_strategy")):
            draft.default("save_strategy", "epoch")
        if not draft.has("save_total_limit"):
            draft.default("save_total_limit", 4)
        trainer.saving_and_evaluating(draft)
        _weights(draft)
    trainer.precision(draft)
    trainer.checkpointing(draft)
    _packing(draft)
    _attention(draft)
    trainer.spreading(draft)
    trainer.pushing(draft)
    _kernels(draft)
    _trackers(draft)
    _special(draft)
    draft.ask_nothing(*_IDLE, why="llmtune settles this itself, or it changes no number")
    draft.ask_nothing("loss_watchdog_threshold", "loss_watchdog_patience", why="a loss that is no number stops a run")
    draft.ask_nothing(
        "wandb_watch", "wandb_log_model", why="trackers get numbers and texts, neither gradients nor files"
    )
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
            "cpo_alpha": "stage_config.pref_ftx",
            "dpo_label_smoothing": "stage_config.dpo_label_smoothing",
        }
    )
    if stage == "grpo":
        _rollouts(draft)
    if rl == "simpo":
        draft.default("stage_config.pref_ftx", 1.0, note="cpo_alpha of TRL")


def _rollouts(draft: Draft) -> None:
    """The block `trl`, whose keys are TRL's, and the answers of a step."""
    block = draft.take("trl", {})
    own = {key: draft.given[key] for key in ("micro_batch_size", "gradient_accumulation_steps") if key in draft.given}
    inner = Draft({"micro_batch_size": 1, **own, **block}, "TRL", registry=draft.registry)
    inner.recipe["stage_config"] = draft.recipe["stage_config"]
    if "peft_config" in draft.recipe:
        inner.recipe["peft_config"] = draft.recipe["peft_config"]
    trl.engine(inner)
    trl.rollouts(inner, "micro_batch_size")
    inner.take_rest({})
    for key, value in inner.recipe.items():
        draft.set(key, value, *(there for there in own if inner.came[there] == key))
        draft.notes.setdefault(key, []).extend(inner.notes.get(key, []))
    draft.notes |= {key: said for key, said in inner.notes.items() if "." in key}
    draft.idle |= {f"trl.{key}": why for key, why in inner.idle.items() if key in block}
    draft.lost |= {f"trl.{key}": why for key, why in inner.lost.items() if key.partition(":")[0] in block}
    draft.check += inner.check
    draft.came |= {"trl": "stage_config"} if "trl" in draft.given else {}


def _template(draft: Draft) -> None:
    name, own = draft.take("chat_template"), draft.take("chat_template_jinja")
    if own and str(own).endswith((".jinja", ".jinja2", ".j2")):
        draft.set("template", own, "chat_template_jinja")
        draft.ask_nothing("chat_template", why="chat_template_jinja is the template")
    elif own:
        draft.lose("chat_template_jinja", why="write the text into a file and name that: template: mine.jinja")
        draft.ask_nothing("chat_template", why="chat_template_jinja would be the template")
    elif name in (None, "tokenizer_default") or str(name).startswith("tokenizer_default"):
        draft.ask_nothing("chat_template", why="the tokenizer's own template is taken")
    elif (here := template_of(_TEMPLATES.get(name, name))) in template_names():
        draft.set("template", here, "chat_template")
        if name == "phi_3":
            draft.check.append(
                "template: Axolotl's phi_3 writes eight spaces after each line break, which phi and the models do not"
            )
    else:
        draft.ask_nothing("chat_template", why="llmtune has no template of this name; the tokenizer's own is taken")
        draft.check.append("the tokenizer's own chat template is taken: `llmtune data preview` shows what is trained")
    draft.ask_nothing("chat_template_jinja", why="it is not set")


def _intervals(draft: Draft) -> None:
    """How often a run is saved and evaluated: so many times an epoch are a share of all steps there, too."""
    evaluates = "eval_dataset" in draft.recipe or draft.recipe.get("val_size")
    epochs = draft.recipe["num_train_epochs"]
    for there, here in (("evals_per_epoch", "eval_steps"), ("saves_per_epoch", "save_steps")):
        times = draft.take(there)
        if not times or (here == "eval_steps" and not evaluates):
            draft.ask_nothing(there, why="it is not set" if not times else "there is nothing to evaluate on")
        elif not isinstance(epochs, int | float):
            draft.lose(there, why=f"num_epochs is {epochs}, so that it is no share of all steps; set {here}")
        elif times == 1:
            draft.set(here.replace("steps", "strategy"), "epoch", there)
        elif share := trainer.share_of_steps(times * epochs):
            draft.set(here, share, there, note=f"of all steps: {times} times an epoch")
        else:
            draft.lose(there, why="it asks for less than once in the run")
    if "eval_strategy" not in draft.given and ("eval_steps" in draft.recipe or (evaluates and draft.has("eval_steps"))):
        draft.set("eval_strategy", "steps", note="as eval_steps says")


def _weights(draft: Draft) -> None:
    """Without an adapter, weights and the optimiser's states are bfloat16 there where computing is."""
    if "peft_config" in draft.recipe:
        return
    if draft.given.get("bf16") is True:
        draft.set(
            "pure_bf16", True, "bf16", note="weights are kept in bfloat16 there; bf16: true keeps them in float32"
        )
    elif draft.given.get("bf16", "auto") in ("auto", None) and not draft.given.get("fp16"):
        draft.check.append(
            "weights train in float32 here, and in bfloat16 there where the GPU has it: pure_bf16: true takes half the "
            "memory"
        )


def _special(draft: Draft) -> None:
    """Special tokens that are given other meanings."""
    draft.rename({"s2_attention": "shift_attn", "tokens": "new_special_tokens"})
    others = {key: value for key, value in (draft.take("special_tokens") or {}).items() if key != "pad_token"}
    draft.ask_nothing("special_tokens", why="see above" if others else "the tokenizer's own are taken")
    if others:
        named = ", ".join(f"{key} {value}" for key, value in others.items())
        draft.check.append(f"special_tokens: {named}: the tokenizer's own are taken; `llmtune data preview` shows them")


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
    draft.lost |= {key: why for key, why in inner.lost.items() if key != "report_to"}
    if loggers := inner.recipe.get("logger_config"):
        draft.set("logger_config", loggers, "use_tensorboard")
    draft.ask_nothing("use_tensorboard", why="tensorboard is chosen, or it is off")
