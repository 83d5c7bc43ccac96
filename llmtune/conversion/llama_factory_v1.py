"""LLaMA-Factory's v1 files: flat keys, and blocks of plugins that are called as here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmtune.contract.errors import listed
from llmtune.conversion import trainer_arguments as trainer
from llmtune.conversion.draft import Draft
from llmtune.conversion.source import ForeignSource, read
from llmtune.conversion.tables import table
from llmtune.data.template import template_names, template_of

_VERBS = {"chat": "chat", "merge": "export", "export": "export", "rm": "train", "dpo": "train"}
_RENAMED = {"wd": "weight_decay", "adamw_betas": "betas", "adamw_eps": "eps", "rank": "r"}
_CONVERTERS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "pair": "preference"}
_FILES = (".json", ".jsonl", ".parquet", ".csv", ".txt", ".arrow")
_SAMPLING = ("sample_backend", "sample_system", "sample_user")


def verb_of(source: ForeignSource) -> str:
    """What the file is for."""
    tree = source.tree
    if source.verb in _VERBS:
        return _VERBS[source.verb]
    if (tree.get("peft_config") or {}).get("export_dir"):
        return "export"
    return "train" if tree.get("train_dataset") or tree.get("dataset") else "chat"


def convert(draft: Draft, verb: str) -> None:
    """Fill the draft from a v1 file."""
    draft.rename({"model": "model", "train_dataset": "dataset"})
    for there, here in (("train_dataset", "dataset"), ("eval_dataset", "eval_dataset")):
        if str(draft.given.get(there)).endswith((".yaml", ".yml")):
            _described(draft, there, here)
    if (draft.given.get("model_class") or "llm") == "llm":
        draft.ask_nothing("model_class", why="llm is the default")
    draft.take_remote_code()
    _template(draft)
    _blocks(draft)
    kind = draft.take("flash_attn")
    if kind:
        draft.set("flash_attn", table("attention").get(kind, kind), "flash_attn")
    trainer.checkpointing(draft, "enable_activation_checkpointing")
    _sizes(draft)
    draft.ask_nothing(*_SAMPLING, why="sampling is `llmtune chat`'s and a recipe's sample_prompts'")
    if (size := draft.take("cp_size")) and size > 1:
        draft.name("dist_config", "fsdp2")
        draft.set("dist_config.cp_size", size, "cp_size")
    draft.ask_nothing("cp_size", "cp_mode", why="context parallelism has one way, on by dist_config.cp_size")
    if verb == "train":
        for key, value in table("defaults")["LLaMA-Factory v1"].items():
            if key not in draft.given:
                draft.default(key, value)
        if not draft.has("optim_config"):
            draft.name("optim_config", "adamw", "optim_config")
            draft.set("optim_config.weight_decay", 0.01, note="the default of torch.optim.AdamW, which v1 takes")
        if draft.take("lr_scheduler_config") is None:
            draft.name("lr_scheduler_config", "constant", "lr_scheduler_config", note="v1 keeps the rate unless told")
        if draft.take("save_steps") is None:
            draft.set("save_steps", None, "save_steps", note="the default of v1")
        else:
            draft.set("save_steps", draft.given["save_steps"], "save_steps")
        if draft.take("resume_from_checkpoint") is None:
            draft.ask_nothing("resume_from_checkpoint", why="an interrupted run in output_dir is continued anyway")
        else:
            draft.set("resume_from_checkpoint", draft.given["resume_from_checkpoint"], "resume_from_checkpoint")
        if (epochs := draft.take("save_epochs")) == 1:
            draft.set("save_strategy", "epoch", "save_epochs")
        elif epochs and draft.has("save_steps"):
            draft.lose("save_epochs", why="checkpoints are counted in one way; save_steps is taken")
        elif epochs:
            share = trainer.share_of_steps(draft.given.get("num_train_epochs", 3) / epochs)
            draft.set("save_steps", share, "save_epochs", note="of all steps" if share else "the end alone")
        draft.ask_nothing("save_epochs", why="it is not set")
    trainer.precision(draft)
    draft.take_rest({})


def _described(draft: Draft, there: str, here: str) -> None:
    """The data sets that a YAML file of v1 describes, as entries of `dataset`."""
    file = Path(str(draft.take(there))).expanduser()
    if not file.is_file():
        draft.set(here, str(file), there)
        draft.check.append(
            f"{here}: {file} is not there to be read; start in the folder where it is, or name the files themselves"
        )
        return
    entries = [_entry(draft, f"{file}: {name}", dict(row)) for name, row in read(file).tree.items()]
    draft.set(here, entries if len(entries) > 1 else entries[0], there, note=f"as {file} describes them")


def _entry(draft: Draft, place: str, row: dict[str, Any]) -> dict[str, Any]:
    """A data set; what its row says beyond a place, a form and a number of rows is listed."""
    path, source = str(row.pop("path", None) or row.pop("file_name", "")), row.pop("source", None)
    folder = row.pop("dataset_dir", None)
    path = str(Path(folder) / path) if folder else path
    local = source == "local" or Path(path).expanduser().exists() or Path(path).suffix in _FILES
    entry: dict[str, Any] = {"path": path if local else f"hub:{path}"}
    if source == "ms_hub":
        draft.check.append(f"{place} is on ModelScope: set hub_config: modelscope (llmtune-hubs)")
    converter = row.pop("converter", None)
    if converter in _CONVERTERS:
        entry["format"] = _CONVERTERS[converter]
        if converter == "alpaca":
            draft.check.append(f"{place}: v1 writes input right after instruction, llmtune in a line of its own")
    elif converter is not None:
        draft.lost[f"{place}: converter"] = f"there is no format {converter}; what rows look like decides"
    if (split := row.pop("split", None)) not in (None, "train"):
        entry["split"] = split
    size, weight = row.pop("size", row.pop("num_samples", None)), row.pop("weight", None)
    if size is not None:
        entry["num_samples"] = int(size * (weight or 1))
    elif weight not in (None, 1):
        draft.lost[f"{place}: weight"] = f"write num_samples, {weight} times the rows of the set"
    for key, value in row.items():
        if value not in (None, False, [], {}):
            draft.lost[f"{place}: {key}"] = "entries of dataset have no such key (docs/data.md lists them)"
    return entry


def _template(draft: Draft) -> None:
    name = draft.take("template", draft.take("custom_chat_template"))
    keys = [key for key in ("template", "custom_chat_template") if key in draft.given]
    if name is None or name == "auto":
        draft.ask_nothing(*keys, why="the tokenizer's own template is taken")
    elif template_of(name) in template_names() or "/" in name or name.endswith(".jinja"):
        draft.set("template", template_of(name), *keys)
    else:
        draft.ask_nothing(
            *keys,
            why=f"llmtune has no template {name}; the tokenizer's own is taken (or one of "
            f"{listed(template_names(), 40)})",
        )


def _blocks(draft: Draft) -> None:
    """The blocks: those of the same name and keys as they are, others by what they do."""
    for point in ("init_config", "peft_config", "kernel_config", "quant_config", "dist_config", "optim_config",
                  "lr_scheduler_config", "stage_config"):  # fmt: skip
        given = draft.take(point)
        if given is None:
            draft.ask_nothing(point, why="null is the default")
            continue
        block: dict[str, Any] = {"name": given} if isinstance(given, str) else dict(given)
        name = str(block.pop("name", ""))
        if name == "deepspeed":
            trainer.spread_as(draft, {"deepspeed": block.get("config_file") or block}, "dist_config")
            draft.came["dist_config"] = "dist_config.name"
            continue
        if name in ("fsdpturbo", "mindspeed"):
            name = "fsdp2"
        if point == "kernel_config" and name != "auto":
            block, name = {}, "auto"
        for key in ("export_dir", "export_size", "infer_dtype", "export_legacy_format", "export_hub_model_id"):
            if point == "peft_config" and block.get(key) is not None:
                draft.set(key, block.pop(key), point)
        draft.name(point, name, point)
        known = draft.keys_of(point, name)
        for key, value in block.items():
            here = _RENAMED.get(key, key)
            if here in known and value is not None:
                draft.set(f"{point}.{here}", value, point, note=key if here != key else "")
            elif value not in (None, False, [], {}):
                draft.lost[f"{point}.{key}"] = f"{name} has no such key here"
            else:
                draft.idle[f"{point}.{key}"] = "it is not set"
        draft.came[point] = f"{point}.name"


def _sizes(draft: Draft) -> None:
    """`global_batch_size` as accumulation, for one rank."""
    micro, whole = draft.take("micro_batch_size", 1), draft.take("global_batch_size")
    draft.set("per_device_train_batch_size", micro, "micro_batch_size")
    if whole is not None and isinstance(micro, int):
        draft.set(
            "gradient_accumulation_steps",
            max(1, whole // micro),
            "global_batch_size",
            note="the rows of a step by those of a micro-batch, on one rank; divide it by the ranks",
        )
    strategy = draft.take("batching_strategy", "normal")
    if strategy in ("padding_free", "dynamic_padding_free"):
        draft.set(
            "packing", True, "batching_strategy", note=f"{strategy}: rows without padding that do not see each other"
        )
    else:
        draft.default("group_by_length", False, note="rows of any length meet in a step")
        draft.ask_nothing("batching_strategy", why="rows are padded")
    draft.ask_nothing("batching_workers", why="tokenised data are read from memory maps and need no workers")
