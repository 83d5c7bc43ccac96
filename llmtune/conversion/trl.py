"""TRL's scripts: their command lines, and YAML files of the same keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmtune.conversion import trainer_arguments as trainer
from llmtune.conversion.draft import Draft
from llmtune.conversion.source import ForeignSource
from llmtune.conversion.tables import table

_LOSSES = {"exo_pair": "exo", "nca_pair": "nca", "bco_pair": "bco", "sppo_hard": "sppo"} | {
    name: name for name in ("sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "discopop")
}
_SCRIPTS = {
    "num_generations": "grpo", "reward_funcs": "grpo", "desirable_weight": "kto",
    "center_rewards_coefficient": "reward",
    "precompute_ref_log_probs": "dpo", "rpo_alpha": "dpo", "ld_alpha": "dpo",
}  # fmt: skip
"""Keys that only one script has."""


def script_of(draft: Draft) -> str:
    """The script of the command; of a file by the keys that only one script has, else sft."""
    if draft.script in table("trl"):
        return draft.script
    other = "dpo" if "beta" in draft.given else "sft"
    return next((script for key, script in _SCRIPTS.items() if key in draft.given), other)


def verb_of(source: ForeignSource) -> str:
    """What the command is for."""
    return "chat" if source.verb == "chat" else "train"


def convert(draft: Draft, verb: str) -> None:
    """Fill the draft from the keys of TRL's ScriptArguments, ModelConfig and training configuration."""
    script = script_of(draft)
    row = table("trl")[script]
    draft.rename(
        {
            "model_name_or_path": "model",
            "model_revision": "revision",
            "max_length": "cutoff_len",
            "max_seq_length": "cutoff_len",
        }
    )
    if draft.recipe.get("revision") == "main":
        draft.recipe.pop("revision")
        draft.came.pop("model_revision")
        draft.ask_nothing("model_revision", why="the default branch is taken")
    draft.take_remote_code()
    _dataset(draft)
    _adapter(draft)
    if row["stage"] != "sft":
        draft.name("stage_config", row["stage"], note=f"trl {script}")
    engine(draft)
    _stage(draft, row["stage"])
    if not draft.has("learning_rate"):
        draft.default("learning_rate", row["learning_rate"])
    for key, value in table("defaults")["TRL"].items():
        if key not in draft.given and not (key == "cutoff_len" and script == "grpo"):  # which cuts no prompt
            draft.default(key, value)
    trainer.optimiser(draft)
    trainer.schedule(draft)
    trainer.saving_and_evaluating(draft)
    trainer.precision(draft)
    trainer.checkpointing(draft)
    trainer.reports(draft)
    trainer.spreading(draft)
    trainer.pushing(draft)
    if draft.given.get("packing"):
        if draft.given.get("packing_strategy") == "wrapped":
            draft.set("neat_packing", False, "packing_strategy", note="wrapped: rows of one length, cut anywhere")
        draft.ask_nothing("packing_strategy", "eval_packing", why="whole samples are laid into rows where they fit")
    elif row["stage"] == "sft":
        draft.default("group_by_length", False, note="rows of any length meet in a step")
    draft.ask_nothing(
        "packing_strategy",
        "eval_packing",
        "dataset_num_proc",
        "pad_token",
        "eos_token",
        "dataset_kwargs",
        "use_liger_kernel",
        why="llmtune settles this itself",
    )
    draft.take_rest({})


def _dataset(draft: Draft) -> None:
    """`dataset_name` with its splits; `datasets` is a list of such."""
    several = draft.take("datasets") or []
    name = draft.take("dataset_name")
    entries = (
        [_entry(name, draft.take("dataset_config", None), draft.take("dataset_train_split", "train"))] if name else []
    )
    for each in several:
        path = each.get("path") or each.get("name")
        entries.append(_entry(path, each.get("name") if each.get("path") else None, each.get("split") or "train"))
    if entries:
        draft.set(
            "dataset",
            entries if len(entries) > 1 else entries[0],
            "dataset_name",
            "datasets",
            "dataset_train_split",
            "dataset_config",
        )
    test = draft.take("dataset_test_split")
    when = draft.given.get("eval_strategy", "no")
    if name and when not in ("no", None, False):
        draft.set(
            "eval_dataset",
            _entry(name, draft.given.get("dataset_config"), test or "test"),
            "dataset_test_split",
            note="" if test else "the default split of TRL",
        )
    draft.ask_nothing("dataset_test_split", why="there is no evaluation")
    draft.ask_nothing("dataset_text_field", why="columns are found by their names; columns in dataset says others")
    if draft.take("dataset_streaming"):
        draft.set("streaming", True, "dataset_streaming")
    draft.ask_nothing("dataset_streaming", why="it is off")


def _entry(name: str, subset: str | None, split: str) -> Any:
    local = Path(name).expanduser().exists() or name.startswith((".", "/", "~"))
    entry = {"path": name if local else f"hub:{name}"}
    return entry | ({"subset": subset} if subset else {}) | ({"split": split} if split != "train" else {})


_CORRECTION = {
    "vllm_importance_sampling_mode": "sampling_correction", "vllm_importance_sampling_cap": "sampling_clip_max",
    "vllm_importance_sampling_clip_max": "sampling_clip_max", "vllm_importance_sampling_clip_min": "sampling_clip_min",
    "vllm_importance_sampling_correction": "sampling_correction",
}  # fmt: skip
"""How the answers of vLLM are corrected, here by keys of the stage."""


def engine(draft: Draft) -> None:
    """`use_vllm`: its server follows an adapter, and no other training."""
    own = ("vllm_mode", "vllm_server_base_url", "vllm_gpu_memory_utilization", "vllm_max_model_length", *_CORRECTION)
    if not draft.take("use_vllm"):
        draft.ask_nothing("use_vllm", *own, why="vLLM is not asked")
        return
    if draft.chosen("peft_config") != "lora":
        draft.lose(
            "use_vllm", *own, why="vLLM reads weights from files and follows an adapter (peft_config: lora) only"
        )
        return
    draft.name("engine_config", "vllm", "use_vllm", note="it needs vllm_command: where vLLM's executable is")
    draft.take("vllm_mode")
    draft.ask_nothing("vllm_mode", why="vLLM is always a server here, which llmtune starts unless there is one")
    if draft.has("vllm_server_base_url"):
        url = draft.take("vllm_server_base_url")
        draft.set("engine_config.vllm_server_base_url", url, "vllm_server_base_url", note="of `vllm serve`, not of trl")
    share = draft.take("vllm_gpu_memory_utilization", 0.3)
    said = "" if draft.has("vllm_gpu_memory_utilization") else "the default of TRL"
    draft.set("engine_config.vllm_gpu_util", share, "vllm_gpu_memory_utilization", note=said)
    if draft.has("vllm_max_model_length"):
        draft.set("engine_config.vllm_maxlen", draft.take("vllm_max_model_length"), "vllm_max_model_length")
    if draft.take("vllm_importance_sampling_correction", True):
        draft.ask_nothing("vllm_importance_sampling_correction", why="answers of vLLM are corrected")
    else:
        draft.set("stage_config.sampling_correction", None, "vllm_importance_sampling_correction")
        draft.ask_nothing(*_CORRECTION, why="nothing is corrected")
    for there, here in _CORRECTION.items():
        if there in draft.left:
            draft.set(f"stage_config.{here}", draft.take(there), there)  # a limit that is null is none


def _adapter(draft: Draft) -> None:
    """`use_peft` with TRL's own defaults, and the bits of the base."""
    bits = 4 if draft.take("load_in_4bit") else 8 if draft.take("load_in_8bit") else None
    if draft.take("use_peft"):
        draft.name("peft_config", "lora", "use_peft")
        for there, here, default in (
            ("lora_r", "r", 16),
            ("lora_alpha", "lora_alpha", 32),
            ("lora_dropout", "lora_dropout", 0.05),
        ):
            draft.set(
                f"peft_config.{here}",
                draft.take(there, default),
                there,
                note="" if draft.has(there) else "the default of TRL",
            )
        names = draft.take("lora_target_modules")
        if names in (None, "all-linear", ["all-linear"]):
            draft.set(
                "peft_config.target_modules",
                "all" if names else "q_proj,v_proj",
                "lora_target_modules",
                note="" if names else "PEFT's default of most models (attention's queries and values)",
            )
        else:
            draft.set("peft_config.target_modules", names, "lora_target_modules")
        draft.ask_nothing("lora_task_type", why="the stage says it")
    else:
        draft.ask_nothing("use_peft", *(key for key in draft.left if key.startswith("lora_")), why="use_peft is off")
    key = "load_in_4bit" if bits == 4 else "load_in_8bit"
    if bits:
        note = "8 bits of bitsandbytes are for inference here; HQQ's train" if bits == 8 else ""
        draft.name("quant_config", "bnb" if bits == 4 else "hqq", key, note=note)
        draft.set("quant_config.quantization_bit", bits, key)
        draft.take("bnb_4bit_quant_type")
        if bits == 4 and draft.given.get("use_bnb_nested_quant") is not True:
            draft.set("quant_config.double_quantization", False, note="the default of TRL")
    draft.ask_nothing("load_in_4bit", "load_in_8bit", why="it is off") if not bits else None
    draft.ask_nothing(*(each for each in ("load_in_4bit", "load_in_8bit") if each not in draft.came), why="it is off")
    draft.ask_nothing(
        "use_bnb_nested_quant", "bnb_4bit_quant_type", "bnb_4bit_quant_storage", why="as written, or without bits"
    )
    kind = draft.take("attn_implementation")
    if kind:
        draft.set("flash_attn", table("attention").get(kind, "auto"), "attn_implementation")
    draft.ask_nothing("attn_implementation", why="it is not set")
    kind = draft.take("torch_dtype", draft.take("dtype"))
    if kind == "bfloat16" and not draft.given.get("use_peft"):
        draft.set("pure_bf16", True, "torch_dtype", "dtype", note="weights are kept in bfloat16")
    draft.ask_nothing("torch_dtype", "dtype", why=f"{kind}: the run's type follows from bf16, fp16 or pure_bf16")


def _stage(draft: Draft, stage: str) -> None:
    """What the stage takes from the configuration."""
    if stage == "dpo":
        loss = draft.take("loss_type", "sigmoid")
        loss = loss[0] if isinstance(loss, list) and len(loss) == 1 else loss
        if isinstance(loss, str) and loss in _LOSSES:
            draft.set("stage_config.pref_loss", _LOSSES[loss], "loss_type")
        elif isinstance(loss, str):
            draft.lose(
                "loss_type", why="this loss is not here; sigmoid is taken (docs/how-to/preferences.md lists them)"
            )
        else:
            draft.lose("loss_type", why="losses are not mixed, but for pref_ftx; sigmoid is taken")
        draft.rename(
            {
                "beta": "stage_config.pref_beta",
                "label_smoothing": "stage_config.dpo_label_smoothing",
                "rpo_alpha": "stage_config.pref_ftx",
                "ld_alpha": "stage_config.ld_alpha",
                "ref_model": "stage_config.ref_model",
                "precompute_ref_log_probs": "stage_config.precompute_reference",
            }
        )
        draft.ask_nothing("max_prompt_length", "max_completion_length", "truncation_mode", why="pairs are never cut")
    elif stage == "kto":
        draft.rename(
            {
                "beta": "stage_config.pref_beta",
                "desirable_weight": "stage_config.kto_chosen_weight",
                "undesirable_weight": "stage_config.kto_rejected_weight",
            }
        )
        draft.ask_nothing("max_prompt_length", "max_completion_length", why="rows are cut at cutoff_len")
    elif stage == "rm":
        draft.rename({"center_rewards_coefficient": "stage_config.center_rewards_coefficient"})
    elif stage == "grpo":
        rollouts(draft)
    else:
        whole = draft.take("completion_only_loss") is False or not draft.take("assistant_only_loss")
        if whole and draft.given.get("completion_only_loss") is not True:
            draft.set(
                "train_on_prompt",
                True,
                "assistant_only_loss",
                "completion_only_loss",
                note="TRL trains on all tokens of a conversation unless assistant_only_loss",
            )
            draft.check.append(
                "train_on_prompt: TRL trains on whole conversations, but of rows of prompt and completion on the "
                "completion alone; for those remove the key"
            )
        draft.ask_nothing("assistant_only_loss", "completion_only_loss", why="only the assistant's tokens train")


_REGISTRY = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")
"""Rewards of TRL's own, by the names that its script knows."""


def rollouts(draft: Draft, micro: str = "per_device_train_batch_size") -> None:
    """Roll-outs, what they are worth, and how many there are in a step; `micro` is the key of a micro-batch's rows."""
    draft.rename(
        {
            "num_generations": "stage_config.num_generations",
            "beta": "stage_config.beta",
            "num_iterations": "stage_config.num_iterations",
            "epsilon": "stage_config.epsilon",
            "epsilon_high": "stage_config.epsilon_high",
            "delta": "stage_config.delta",
            "loss_type": "stage_config.loss_type",
            "temperature": "stage_config.temperature",
            "top_p": "stage_config.top_p",
            "top_k": "stage_config.top_k",
            "reward_weights": "stage_config.reward_weights",
            "max_completion_length": "stage_config.max_new_tokens",
        }
    )
    draft.default("stage_config.max_new_tokens", 512)
    if draft.recipe["stage_config"].get("num_iterations", 1) != 1:
        draft.check.append("steps: there each update is one, here the roll-out with all of its num_iterations updates")
    _prompts(draft, micro)
    names = draft.take("reward_funcs") or draft.take("reward_model_name_or_path")
    several = [str(each) for each in (names if isinstance(names, list) else [names] if names else [])]
    given = [_reward(each) for each in several if each not in _REGISTRY]
    draft.set(
        "reward_config",
        given or [{"name": "rule"}],
        "reward_funcs",
        "reward_model_name_or_path",
        note="" if given else "a rule that compares answers with the column answer is taken",
    )
    for each in several:
        if each in _REGISTRY:
            draft.lost[f"reward_funcs: {each}"] = (
                "TRL's own function reads messages; a rule (numbers, a regular expression) or a function of your own "
                "says the same (docs/how-to/rewards.md)"
            )
    draft.check.append("reward_config: look at what answers are worth (docs/how-to/rewards.md)")


def _reward(name: str) -> dict[str, str]:
    """A function by its dotted name, else a model by its folder or id."""
    module, _, function = name.replace(":", ".").rpartition(".")
    if module and "/" not in name and not Path(name).expanduser().exists():
        return {"name": "function", "function": f"{module}:{function}"}
    return {"name": "model", "reward_model": name}


def _prompts(draft: Draft, micro: str) -> None:
    """A micro-batch there has so many answers, and here answers to so many prompts: as many prompts a step."""
    rows, times = draft.take(micro, 8), draft.take("gradient_accumulation_steps", 1)
    group = draft.recipe["stage_config"].get("num_generations", 8)
    if not all(isinstance(each, int) and each > 0 for each in (rows, times, group)):
        draft.set("per_device_train_batch_size", rows, micro)
        draft.set("gradient_accumulation_steps", times, "gradient_accumulation_steps")
        draft.check.append("per_device_train_batch_size: counts prompts here, and answers there")
        return
    answers = rows * times
    prompts = max(1, answers // group)
    size = next(size for size in range(min(rows, prompts), 0, -1) if prompts % size == 0)
    note = f"prompts of {group} answers each; there {answers} answers a step of a rank"
    draft.set("per_device_train_batch_size", size, micro, note=note)
    draft.set("gradient_accumulation_steps", prompts // size, "gradient_accumulation_steps")
    if answers != prompts * group:
        draft.check.append(
            f"per_device_train_batch_size: {answers} answers a step of a rank are no whole number of groups of "
            f"{group}, which here lie on one rank; {prompts * group} are taken"
        )
