"""What transformers' Trainer takes, which LLaMA-Factory, TRL and Axolotl hand on: values whose meaning differs here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtune.conversion.draft import Draft
from llmtune.conversion.tables import table

_RUN_NAMES = {"swanlab": "swanlab_run_name"} | dict.fromkeys(("wandb", "mlflow", "trackio"), "run_name")
"""Trackers, and their key for the name of a run."""


def precision(draft: Draft) -> None:
    """`bf16`, `fp16` and `pure_bf16`; one that is off beside one that is on says nothing."""
    kinds = [key for key in ("pure_bf16", "bf16", "fp16") if draft.given.get(key) is True]
    for key in ("pure_bf16", "bf16", "fp16"):
        if key not in draft.given:
            continue
        value = draft.take(key)
        if value == "auto":
            draft.ask_nothing(key, why="bfloat16 is chosen here, too, on GPUs that have it")
        elif value is None or (value is False and (kinds or key != "bf16")):
            draft.ask_nothing(key, why="it is off")
        elif key == "bf16" and ("pure_bf16" in kinds or "pure_bf16" in draft.recipe):
            draft.ask_nothing(key, why="pure_bf16 says it")
        else:
            draft.set(key, value, key, note="computes in float32" if value is False else "")


def optimiser(draft: Draft, key: str = "optim", *, default: str = "adamw") -> None:
    """The optimiser by its name there, with its betas and decay."""
    chosen = draft.chosen("optim_config")
    if key in draft.left and chosen is None:
        value = draft.take(key)
        row = dict(table("optimisers").get(str(value), {}))
        note = row.pop("note", "")
        if row and draft.registry.offered("optim_config", row["name"]):
            plain = row == {"name": default} and not note
            (draft.ask_nothing(key, why=f"{default} is the default") if plain else None)
            if not plain:
                draft.name("optim_config", row.pop("name"), key, note=note)
                for inner, item in row.items():
                    draft.set(f"optim_config.{inner}", item)
        elif value is not None:
            draft.lose(
                key, why="there is no such optimiser; `llmtune plugins` lists those that are installed, AdamW is taken"
            )
    elif key in draft.left:
        draft.ask_nothing(key, why=f"optim_config: {chosen} is set by another key")
    first, second = draft.take("adam_beta1"), draft.take("adam_beta2")
    moved: dict[str, tuple[Any, list[str], Any]] = {
        "betas": ([0.9 if first is None else first, 0.999 if second is None else second], ["adam_beta1", "adam_beta2"],
                  [0.9, 0.999]),
        "eps": (draft.take("adam_epsilon"), ["adam_epsilon"], 1e-8),
        "weight_decay": (draft.take("weight_decay"), ["weight_decay"], 0.0),
    }  # fmt: skip
    for inner, (value, names, own) in moved.items():
        names = [name for name in names if name in draft.given]
        if not names:
            continue
        if value is None or value == own or (inner == "weight_decay" and value == 0):
            draft.ask_nothing(*names, why="the same is the default")
            continue
        if draft.chosen("optim_config") is None:
            draft.name("optim_config", default)
        if inner in draft.keys_of("optim_config", draft.chosen("optim_config")):
            draft.set(f"optim_config.{inner}", value, *names)
        else:
            draft.lose(*names, why=f"optim_config: {draft.chosen('optim_config')} has no {inner}")


def schedule(draft: Draft, key: str = "lr_scheduler_type", *, default: str = "linear") -> None:
    """The schedule by its name there, its parameters, and warm-up. `default` is the one there."""
    given = draft.take(key)
    row = table("schedules").get(str(default if given is None else given))
    if row is None:
        draft.lose(
            key, why="there is no such schedule; `llmtune plugins` lists those that are installed, linear is taken"
        )
    elif row["name"] == "linear":
        draft.ask_nothing(key, why="linear is the default")
    else:
        draft.name("lr_scheduler_config", row["name"], key, note="" if given else f"the default of {draft.trainer}")
    options = draft.take("lr_scheduler_kwargs", {})
    options = options if isinstance(options, dict) else json.loads(options) if isinstance(options, str) else {}
    rate, name = draft.recipe.get("learning_rate", 5e-5), draft.chosen("lr_scheduler_config")
    if name == "polynomial":
        options = {"lr_end": 1e-7, **options}
    renamed = {"min_lr": "min_lr_ratio" if name != "cosine_with_min_lr" else "min_lr_rate", "lr_end": "lr_end_ratio"}
    known = draft.keys_of("lr_scheduler_config", name)
    for there, value in options.items():
        here = renamed.get(there, there)
        if here in known:
            share = (
                float(f"{value / rate:.10g}")
                if there in renamed and isinstance(rate, (int, float)) and value
                else value
            )
            note = f"{there} as a share of learning_rate" if there in renamed else ""
            draft.set(f"lr_scheduler_config.{here}", share, "lr_scheduler_kwargs", note=note)
        else:
            draft.lost[f"lr_scheduler_kwargs.{there}"] = f"lr_scheduler_config: {name or 'linear'} has no such key"
    if "lr_scheduler_kwargs" in draft.given and "lr_scheduler_kwargs" not in draft.came:
        draft.ask_nothing("lr_scheduler_kwargs", why="nothing in it is a key of the schedule")
    warm_up(draft, off=given == "constant")


def warm_up(draft: Draft, *, off: bool = False) -> None:
    """`warmup_steps`, which wins over `warmup_ratio` there and may be a share in transformers 5."""
    steps, ratio = draft.take("warmup_steps"), draft.take("warmup_ratio")
    if off:
        draft.ask_nothing("warmup_steps", "warmup_ratio", why="the schedule `constant` has no warm-up there")
        return
    if isinstance(steps, float) and 0 < steps < 1:
        draft.set("warmup_ratio", steps, "warmup_steps", note="a share of all steps")
    elif steps:
        draft.set("warmup_steps", int(steps) if isinstance(steps, float) else steps, "warmup_steps")
    else:
        draft.ask_nothing("warmup_steps", why="no warm-up is the default")
    if ratio and not steps:
        draft.set("warmup_ratio", ratio, "warmup_ratio")
    else:
        draft.ask_nothing("warmup_ratio", why="warmup_steps goes before it" if steps else "no warm-up is the default")


def share_of_steps(times: float) -> float | None:
    """What happens so many times in a run, as a share of all steps; None where that is the end of the run alone."""
    # Rounded down, as steps are rounded up.
    return math.floor(1e6 / times) / 1e6 if times > 1 else None


def saving_and_evaluating(draft: Draft) -> None:
    """When checkpoints and evaluations happen, how long a run is, and where it goes on."""
    saves = draft.take("save_strategy")
    if saves == "no":
        draft.set("save_steps", None, "save_strategy")
        draft.ask_nothing("save_steps", why="save_strategy is no")
    elif saves == "epoch":
        draft.set("save_strategy", "epoch", "save_strategy")
        draft.ask_nothing("save_steps", why="save_strategy is epoch")
    elif saves == "best":
        draft.lose("save_strategy", why="the best checkpoint is kept by load_best_model_at_end: true; steps is taken")
    else:
        draft.ask_nothing("save_strategy", why="steps is the default")
    when = draft.take("eval_strategy", draft.take("evaluation_strategy")) or draft.recipe.get("eval_strategy")
    names = [key for key in ("eval_strategy", "evaluation_strategy") if key in draft.given]
    evaluates = any(draft.has(key) for key in ("eval_dataset", "val_size")) or "eval_dataset" in draft.recipe
    end = draft.take("do_eval")
    if not evaluates and not draft.recipe.get("val_size"):
        draft.ask_nothing(*names, "do_eval", "eval_steps", "eval_on_start", why="there is nothing to evaluate on")
    elif when:
        draft.set("eval_strategy", str(when) if when is not False else "no", *names)
        draft.ask_nothing("do_eval", why="eval_strategy says when")
        if when != "steps":
            draft.ask_nothing("eval_steps", why="it counts with eval_strategy: steps")
    elif end:
        draft.set("eval_strategy", "epoch", "do_eval", *names, note="there once at the end, here after each epoch")
    else:
        draft.ask_nothing("do_eval", "eval_steps", why="it is off")
        draft.default("eval_strategy", "no")
    longest = draft.take("max_steps")
    if isinstance(longest, int) and longest <= 0:
        draft.ask_nothing("max_steps", why="the epochs say how long it is")
    elif longest is not None:
        draft.set("max_steps", longest, "max_steps")
    if draft.take("resume_from_checkpoint") is None:
        draft.ask_nothing("resume_from_checkpoint", why="an interrupted run in output_dir is continued anyway")
    else:
        draft.set("resume_from_checkpoint", draft.given["resume_from_checkpoint"], "resume_from_checkpoint")
    if "logging_strategy" in draft.left:
        why = "metrics are logged by steps; set logging_steps"
        (draft.ask_nothing if draft.take("logging_strategy") == "steps" else draft.lose)("logging_strategy", why=why)


def pushing(draft: Draft) -> None:
    """Where the result is uploaded to, and the device."""
    pushes, name = draft.take("push_to_hub"), draft.take("hub_model_id")
    if name:
        draft.set("export_hub_model_id", name, "hub_model_id", note="uploaded by `llmtune export`")
        draft.ask_nothing("push_to_hub", why="`llmtune export` uploads to export_hub_model_id")
    elif pushes:
        draft.lose("push_to_hub", why="name the repository, export_hub_model_id, to which `llmtune export` uploads")
    draft.ask_nothing("push_to_hub", "hub_model_id", why="it is off")
    if draft.take("use_cpu") or draft.take("no_cuda"):
        draft.set("device", "cpu", "use_cpu", "no_cuda")
    draft.ask_nothing("use_cpu", "no_cuda", why="it is off")


def checkpointing(draft: Draft, key: str = "gradient_checkpointing") -> None:
    """Whether layers are computed again: it changes memory and time, never a number."""
    if key in draft.given:
        value = draft.take(key)
        if value is None:
            draft.ask_nothing(key, why="it is not set")
        elif value == "offload":
            draft.set("offload_activations", True, key)
        else:
            draft.set("activation_checkpointing", "full" if value else "none", key)
    draft.ask_nothing(
        "gradient_checkpointing_kwargs",
        "use_reentrant_gc",
        "use_reentrant",
        why="the non-reentrant kind is always used: it gives the same gradients",
    )


def reports(draft: Draft) -> None:
    """Trackers by the names they have there, as far as a package offers a plugin of that name."""
    for switch, name in (("use_swanlab", "swanlab"), ("use_wandb", "wandb")):
        if draft.take(switch):
            draft.name("logger_config", name, switch)
        draft.ask_nothing(switch, why="it is off")
    given = draft.take("report_to")
    names = [name.strip() for name in given.split(",")] if isinstance(given, str) else list(given or [])
    names = [name for name in names if name not in ("none", "None", "")]
    for name in names:
        if draft.registry.offered("logger_config", name):
            draft.name("logger_config", name, "report_to")
        else:
            said = "name each tracker" if name == "all" else "no plugin of this name is installed"
            draft.lost[f"report_to: {name}"] = f"{said}; metrics.jsonl in the run's folder holds every number"
    if names and "report_to" not in draft.came:
        draft.lose("report_to", why="see above")
    draft.ask_nothing("report_to", why="no tracker is the default")
    for key, called, why in (
        ("run_name", _RUN_NAMES, "the trackers' name of the run"),
        ("logging_dir", {"tensorboard": "log_dir"}, "TensorBoard's folder"),
        ("project", {"trackio": "project"}, "trackio's project"),
    ):
        if not (draft.has(key) and draft.set_in_blocks("logger_config", called, key)):
            draft.left.pop(key, None)
            draft.ask_nothing(key, why=f"it is {why}")


def spreading(draft: Draft) -> None:
    """`deepspeed`, `fsdp` and `fsdp_config` as what FSDP2 does with parameters, gradients and states."""
    spec = draft.take("deepspeed")
    if spec:
        config, said = _deepspeed(spec)
        zero = config.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        offload = any(
            (zero.get(f"offload_{what}") or {}).get("device", "none") != "none" for what in ("param", "optimizer")
        )
        note = f"ZeRO stage {stage}{' with offload' if offload else ''}{said}"
        draft.name("dist_config", "fsdp2", "deepspeed", note=note)
        if stage in (1, 2):
            draft.set("dist_config.reshard_after_forward", False)
        if offload:
            draft.set("dist_config.offload_params", True)
    else:
        draft.ask_nothing("deepspeed", why="it is not set")
    kinds, options = draft.take("fsdp"), draft.take("fsdp_config") or {}
    words = (
        kinds.split()
        if isinstance(kinds, str)
        else list(kinds or [])
        if not isinstance(kinds, bool)
        else ["full_shard"]
    )
    options = options if isinstance(options, dict) else {}
    if not words and not options:
        draft.ask_nothing("fsdp", "fsdp_config", why="it is not set")
        return
    draft.name("dist_config", "fsdp2", "fsdp" if words else "fsdp_config")
    if "fsdp_config" in draft.given:
        draft.came["fsdp_config"] = "dist_config.name"
        draft.notes.setdefault("dist_config", []).append(
            "wrapping, prefetch and the form of checkpoints are llmtune's choice"
        )
    fsdp_options(draft, options, words)


def spread_as(draft: Draft, given: dict[str, Any], *sources: str) -> None:
    """What `spreading` makes of these keys, because of these keys there."""
    inner = Draft(given, draft.trainer)
    spreading(inner)
    draft.set("dist_config", inner.recipe["dist_config"], *sources)
    draft.notes.setdefault("dist_config", []).extend(inner.notes.get("dist_config", []))


def launched(draft: Draft, options: Mapping[str, Any]) -> None:
    """What the options or the file of accelerate, which starts the processes, say of training itself."""
    if "config_file" in options and "compute_environment" not in options:
        draft.lost["--config_file"] = (
            f"{options['config_file']} is not there to be read; processes, mixed precision and how the model is spread "
            "are taken from it where the command stands in its folder"
        )
    kind = options.get("mixed_precision")
    if kind in ("bf16", "fp16") and not {"bf16", "fp16", "pure_bf16"} & set(draft.recipe):
        draft.set(kind, True, note="accelerate's mixed_precision")
    own = options.get("deepspeed_config") or {}
    own = {**(own if isinstance(own, dict) else {}), **options}
    zero: dict[str, Any] = {"stage": own.get("zero_stage", 2)}
    zero |= {
        f"offload_{what}": {"device": own.get(f"offload_{what}_device", "none")} for what in ("optimizer", "param")
    }
    if "dist_config" in draft.recipe:
        return
    if options.get("distributed_type") == "DEEPSPEED" or options.get("use_deepspeed"):
        spread_as(draft, {"deepspeed": own.get("deepspeed_config_file") or {"zero_optimization": zero}})
    elif options.get("distributed_type") == "FSDP" or options.get("use_fsdp"):
        named = {key: value for key, value in options.items() if key.startswith("fsdp_") and key != "fsdp_config"}
        spread_as(draft, {"fsdp_config": {**(options.get("fsdp_config") or {}), **named}})


def fsdp_options(draft: Draft, options: dict[str, Any], words: list[str]) -> None:
    """Options of FSDP by accelerate's names (with or without `fsdp_`)."""
    plain = {key.removeprefix("fsdp_"): value for key, value in options.items()}
    if (
        "shard_grad_op" in words
        or plain.get("sharding_strategy") == "SHARD_GRAD_OP"
        or plain.get("reshard_after_forward") is False
    ):
        draft.set("dist_config.reshard_after_forward", False)
    if "offload" in words or plain.get("offload_params") or plain.get("cpu_offload"):
        draft.set("dist_config.offload_params", True)
    if plain.get("activation_checkpointing"):
        draft.default("activation_checkpointing", "full")


def _deepspeed(spec: Any) -> tuple[dict[str, Any], str]:
    """A configuration of DeepSpeed, read from its file, or guessed from the file's name."""
    if isinstance(spec, dict):
        return spec, ""
    name = str(spec)
    if (path := Path(name).expanduser()).is_file():
        try:
            return json.loads(path.read_text(encoding="utf-8")), ""
        except (ValueError, OSError):
            pass
    stem = Path(name).stem.lower()
    stage = next((int(digit) for digit in "3210" if f"z{digit}" in stem or f"zero{digit}" in stem), 3)
    device = {"device": "cpu" if "offload" in stem else "none"}
    return {
        "zero_optimization": {"stage": stage, "offload_param": device}
    }, ", as the file's name says; it is not there to read"
