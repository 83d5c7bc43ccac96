"""Files and commands of other trainers become recipes: every key accounted for, nothing in silence."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune import RecipeError
from llmtune.cli import main
from llmtune.contract.errors import ErrorList
from llmtune.conversion.convert import Conversion, convert, offer
from llmtune.conversion.source import read
from llmtune.conversion.torchtune import flat
from llmtune.inference.reopen import recipe_of
from llmtune.recipe.parameters import official_keys
from llmtune.recipe.recipe import load_recipe
from tests.test_parameters import values

FOREIGN = Path(__file__).parent / "foreign"
FILES = sorted(str(path.relative_to(FOREIGN)) for path in FOREIGN.rglob("*") if path.is_file())
BASE = {"model_name_or_path": "m", "stage": "sft", "do_train": True, "dataset": "d", "template": "llama3"}


@pytest.fixture(autouse=True)
def among_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOREIGN)
    monkeypatch.setenv("HF_TOKEN", "not-a-token")


def made_of(folder: Path, given: dict[str, Any]) -> Conversion:
    """The conversion of a file with these keys."""
    (folder / "there.json").write_text(json.dumps(given))
    return convert(folder / "there.json")


def made(folder: Path, **keys: Any) -> Conversion:
    """The conversion of a classic file of LLaMA-Factory with these keys."""
    return made_of(folder, {**BASE, **keys})


@pytest.mark.parametrize("file", FILES)
def test_every_key_is_accounted_for_and_the_recipe_is_one(file: str, tmp_path: Path) -> None:
    found, given = convert(file, tmp_path / "recipe.yaml"), read(file)
    keys = flat(given.tree) if found.trainer == "torchtune" else given.tree
    assert not set(keys) - {*found.came, *found.idle, *found.lost}
    assert not set(found.lost) & {*found.came}
    assert all(len(why.split()) > 2 for why in (*found.lost.values(), *found.idle.values()))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.tree == {**found.recipe, **{key: {"name": value["name"]} for key, value in found.recipe.items()
                                              if isinstance(value, dict) and set(value) == {"name"}}}  # fmt: skip
    assert found.command == f"llmtune {found.verb} {tmp_path}/recipe.yaml" or " --nproc " in found.command
    if not file.endswith((".sh", ".json")):
        for comment in re.findall(r"(?:^|\s)#+ (.*)$", Path(file).read_text(), re.M):
            assert comment in found.text


@pytest.mark.parametrize("name", official_keys())
def test_each_documented_key_is_accounted_for(name: str, tmp_path: Path) -> None:
    for value in values(name):
        found = made(tmp_path, **{name: value})
        assert name in {*found.came, *found.idle, *found.lost}


WRITTEN: dict[str, dict[str, Any]] = {
    "llama_factory/lora_sft_defaults.yaml": {
        "peft_config": {"name": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0}, "group_by_length": False,
    },
    "llama_factory/lora_sft.yaml": {"peft_config": {"name": "lora", "r": 16, "lora_alpha": 32, "lora_dropout": 0.0,
                                                    "target_modules": "all"},
                                    "lr_scheduler_config": {"name": "cosine"}},
    "llama_factory/lora_targets.yaml": {"peft_config": {
        "name": "lora", "r": 8, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "q_proj,v_proj",
        "modules_to_save": "embed_tokens,lm_head", "use_rslora": True}},
    "llama_factory/lora_pretrain.yaml": {"stage_config": {"name": "pt"}, "packing": True, "neat_packing": False},
    "llama_factory/lora_packing.yaml": {"packing": True, "neat_packing": False},
    "llama_factory/lora_neat_packing.yaml": {"packing": True, "neat_packing": True},
    "llama_factory/lora_eval.yaml": {"val_size": 0.1, "eval_strategy": "steps", "eval_steps": 50,
                                     "eval_config": {"name": "accuracy"}},
    "llama_factory/lora_ppo.yaml": {
        "stage_config": {"name": "ppo", "temperature": 0.95, "top_p": 0.9, "top_k": 0, "max_new_tokens": 128,
                         "ppo_epochs": 2, "ppo_target": 4.0},
        "reward_config": {"name": "model", "reward_model": "saves/reward", "reward_model_type": "lora"}},
    "llama_factory/ppo_endpoint.yaml": {"reward_config": [{"name": "endpoint", "url": "http://localhost:9000/score"}]},
    "llama_factory/full_dpo_reference.yaml": {
        "stage_config": {"name": "dpo", "pref_ftx": 0.1, "ref_model": "org/judge-7b", "dpo_label_smoothing": 0.1,
                         "pref_loss": "sigmoid"}, "dist_config": {"name": "fsdp2"}},
    "llama_factory/full_sft.yaml": {"dist_config": {"name": "fsdp2", "reshard_after_forward": False}},
    "llama_factory/lora_z3.yaml": {"dist_config": {"name": "fsdp2", "offload_params": True}},
    "llama_factory/lora_fsdp.yaml": {"dist_config": {"name": "fsdp2", "offload_params": True}},
    "llama_factory/lora_online.yaml": {"dataset": ["hub:org/set-one", "hub:org/set-two"],
                                       "interleave_probs": "0.7,0.3"},
    "llama_factory/lora_unsloth.yaml": {"flash_attn": "fa2", "kernel_config": {"name": "auto"}},
    "llama_factory/lora_tensorboard.yaml": {"logger_config": {"name": "tensorboard", "log_dir": "logs/tb"}},
    "llama_factory/lora_ray.yaml": {"launch_config": {
        "name": "ray", "ray_run_name": "hello", "ray_storage_path": "./saves", "ray_num_workers": 4,
        "placement_strategy": "PACK", "resources_per_worker": {"GPU": 1}}},
    "llama_factory/qlora_bitsandbytes_4.yaml": {
        "quant_config": {"name": "bnb", "quantization_bit": 4, "double_quantization": False}},
    "llama_factory/qlora_bitsandbytes_8.yaml": {"quant_config": {"name": "hqq", "quantization_bit": 8}},
    "llama_factory/qlora_hqq_4.yaml": {"quant_config": {"name": "hqq", "quantization_bit": 4}},
    "llama_factory/full_pure_bf16.yaml": {"pure_bf16": True, "optim_config": {
        "name": "adamw_8bit", "paged": True, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    "llama_factory/freeze_sft.yaml": {"peft_config": {
        "name": "freeze", "freeze_trainable_layers": 4, "freeze_trainable_modules": "mlp",
        "freeze_extra_modules": "embed_tokens,norm"}},
    "llama_factory/llama_pro.yaml": {"peft_config": {"name": "llama_pro", "num_expanded_layers": 4}},
    "llama_factory/galore.yaml": {"max_grad_norm": 0, "optim_config": {
        "name": "galore", "layerwise": True, "target": "mlp,self_attn", "rank": 32, "scale": 2.0}},
    "llama_factory/badam.yaml": {"optim_config": {
        "name": "badam", "mode": "layer", "switch_mode": "ascending", "switch_interval": 20, "verbose": 2}},
    "llama_factory/schedules.yaml": {"warmup_steps": 20, "save_strategy": "epoch",
                                     "lr_scheduler_config": {"name": "cosine_with_min_lr", "min_lr_rate": 0.04}},
    "llama_factory/hub_push.yaml": {"token": "${oc.env:HF_TOKEN}", "export_hub_model_id": "org/mine"},
    "llama_factory/train.json": {"template": "phi", "fp16": True, "device": "cpu", "dataset_dir": "sets"},
    "llama_factory/train.sh": {"per_device_train_batch_size": 4, "dataset": "greetings,more", "fp16": True},
    "llama_factory_v1/full_fsdp2.yaml": {"dataset": "data/greetings.jsonl", "gradient_accumulation_steps": 8,
                                         "lr_scheduler_config": {"name": "constant"}, "save_steps": None},
    "llama_factory_v1/muon.yaml": {"learning_rate": 1e-4, "optim_config": {
        "name": "muon", "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "ns_steps": 5, "betas": [0.9, 0.95],
        "eps": 1e-8}},
    "llama_factory_v1/context_parallel.yaml": {"flash_attn": "fa2", "bf16": False,
                                               "dist_config": {"name": "fsdp2", "cp_size": 2}},
    "llama_factory_v1/full_deepspeed.yaml": {"dist_config": {"name": "fsdp2", "reshard_after_forward": False}},
    "axolotl/lora.yml": {
        "peft_config": {"name": "lora", "r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all"},
        "dataset": [{"path": "hub:org/greetings", "format": "alpaca"}], "learning_rate": 2e-4, "packing": True,
        "optim_config": {"name": "adamw_8bit"}, "cutoff_len": 2048, "num_train_epochs": 1, "val_size": 0.05},
    "axolotl/full_liger_fsdp.yml": {"template": "llama3", "kernel_config": {"name": "auto"}, "dataset": [{
        "path": "hub:org/talks", "format": "sharegpt", "tags": {"role_tag": "from", "content_tag": "value"},
        "split": "train[:20%]"}], "eval_strategy": "steps", "eval_steps": 0.25, "cutoff_policy": "drop"},
    "axolotl/completion.yml": {"stage_config": {"name": "pt"}, "save_strategy": "epoch", "cutoff_policy": None},
    "axolotl/dpo.yml": {"stage_config": {"name": "dpo", "pref_beta": 0.1}, "group_by_length": False,
                        "quant_config": {"name": "bnb", "quantization_bit": 4}},
    "axolotl/kto.yml": {"stage_config": {"name": "kto", "pref_beta": 0.5, "kto_chosen_weight": 0.2}},
    "axolotl/pretrain.yml": {"stage_config": {"name": "pt"}, "streaming": True, "warmup_ratio": 0.03,
                             "pure_bf16": True},
    "torchtune/lora_single_device.yaml": {
        "model": "/models/tiny", "pure_bf16": True, "train_on_prompt": True, "max_grad_norm": None, "warmup_steps": 100,
        "peft_config": {"name": "lora", "r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": [
            "q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
        "optim_config": {"name": "adamw", "weight_decay": 0.01}},
    "torchtune/qlora_single_device.yaml": {"quant_config": {"name": "bnb", "quantization_bit": 4}, "packing": True},
    "torchtune/full_distributed.yaml": {"lr_scheduler_config": {"name": "constant"}, "optim_config": {
        "name": "adamw", "weight_decay": 0.01}, "dist_config": {"name": "fsdp2", "offload_params": True, "tp_size": 2}},
    "torchtune/lora_dpo.yaml": {"stage_config": {"name": "dpo", "pref_beta": 0.1, "dpo_label_smoothing": 0}},
    "torchtune/instruct.sh": {"per_device_train_batch_size": 4, "learning_rate": 1e-4},
    "trl/sft.sh": {"peft_config": {"name": "lora", "r": 32, "lora_alpha": 16, "lora_dropout": 0.05,
                                   "target_modules": "q_proj,v_proj"}, "train_on_prompt": True, "cutoff_len": 1024,
                   "eval_dataset": {"path": "hub:org/talks", "split": "test"}},
    "trl/sft.yaml": {"warmup_ratio": 0.1, "learning_rate": 2e-5, "save_steps": None,
                     "dataset": {"path": "hub:org/talks", "subset": "en", "split": "train_sft"}},
    "trl/dpo.sh": {"stage_config": {"name": "dpo", "pref_loss": "sigmoid", "pref_beta": 0.05}, "learning_rate": 5e-7},
    "trl/kto.sh": {"stage_config": {"name": "kto", "pref_beta": 0.2, "kto_chosen_weight": 1.5}, "learning_rate": 1e-6,
                   "quant_config": {"name": "bnb", "quantization_bit": 4, "double_quantization": False}},
    "trl/grpo.sh": {"stage_config": {"name": "grpo", "num_generations": 4, "temperature": 0.9, "max_new_tokens": 64},
                    "reward_config": [{"name": "function", "function": "rewards:right_answer"}]},
}  # fmt: skip
"""Files, and some keys of the recipes that they become."""


@pytest.mark.parametrize("file", WRITTEN)
def test_values_mean_what_they_mean_there(file: str) -> None:
    found = convert(file).recipe
    assert {key: found.get(key) for key in WRITTEN[file]} == WRITTEN[file]


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("llama_factory/chat_lora.yaml", "chat org/tiny-chat-7b 'peft_config={name: lora, adapter_name_or_path: "
         "saves/lora_sft}' template=llama3 temperature=0.3"),
        ("llama_factory/merge_lora.yaml", "export org/tiny-chat-7b 'peft_config={name: lora, adapter_name_or_path: "
         "saves/lora_sft}' template=llama3 export_dir=output/merged export_size=4 export_device=cpu "
         "export_legacy_format=false"),
        ("llama_factory/predict.yaml", "predict org/tiny-chat-7b 'peft_config={name: lora, adapter_name_or_path: "
         "saves/lora_sft}' dataset=greetings template=llama3 cutoff_len=1024 max_samples=50 output_dir=saves/predict "
         "per_device_eval_batch_size=1"),
        ("llama_factory/merge_quantised.yaml", "export org/tiny-chat-7b template=llama3 export_dir=output/few_bits "
         "export_size=2 export_quantization_bit=4 export_quantization_dataset=data/c4_demo.jsonl "
         "export_quantization_nsamples=64 export_quantization_maxlen=512 export_device=auto "
         "export_legacy_format=false export_hub_model_id=org/few-bits"),
        ("llama_factory/eval_mmlu.yaml", "eval org/tiny-chat-7b task=mmlu_test n_shot=5 lang=en batch_size=4 "
         "save_dir=saves/eval 'peft_config={name: lora, adapter_name_or_path: saves/lora_sft}'"),
        ("llama_factory/eval_ceval.yaml", "eval saves/full_sft task=ceval_validation n_shot=5 eval_config.seed=7 "
         "download_mode=force_redownload apply_chat_template=true template=qwen"),
        ("llama_factory/train.sh", "train recipe.yaml --nproc 2"),
        ("trl/dpo.sh", "train recipe.yaml --nproc 4"),
    ],
)  # fmt: skip
def test_the_command_to_type(file: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = convert(file)
    if found.verb == "predict":
        command = command.replace(
            " dataset=greetings template=llama3", " template=llama3 'eval_config={name: generate}' dataset=greetings"
        )
    assert found.command == f"llmtune {command}"
    assert main(["convert", file]) == 0
    assert (capsys.readouterr().out == found.command + "\n") == (found.verb != "train")


def test_share_of_steps_and_weights_of_the_others(tmp_path: Path) -> None:
    assert made(tmp_path, save_steps=0.1).recipe["save_steps"] == 0.1
    words = "trl sft --model_name_or_path m --dataset_name o/p --dtype bfloat16 --bf16 true"
    found = convert(f"{words} --packing true --packing_strategy wrapped").recipe
    assert (found["pure_bf16"], found["neat_packing"]) == (True, False)
    assert "bf16" not in found and "bf16" in convert(f"{words} --use_peft").recipe
    assert "cutoff_len" not in convert("trl grpo --model_name_or_path m --dataset_name o/p").recipe
    epochs = {"model": "m", "train_dataset": "d.jsonl", "micro_batch_size": 1, "num_train_epochs": 4, "save_epochs": 2}
    assert made_of(tmp_path, epochs).recipe["save_steps"] == 0.5
    several = {"dataset": {"_component_": "torchtune.datasets.chat_dataset", "source": "json",
                           "data_files": ["a.json", "b.json"]}}  # fmt: skip
    found = made_of(tmp_path, several)
    assert [entry["path"] for entry in found.recipe["dataset"]] == ["a.json", "b.json"]


def test_texts_of_templates_are_kept(tmp_path: Path) -> None:
    """What a template there says of itself is written; one that writes texts of its own is not taken for another."""
    found = made(tmp_path, template="alpaca")
    assert found.recipe["default_system"].startswith("Below is an instruction that describes a task.")
    assert made(tmp_path, template="alpaca", default_system="Be brief.").recipe["default_system"] == "Be brief."
    assert made(tmp_path, template="smollm").recipe["template"] == "chatml"  # llmtune's smollm2 has a system message
    found = made(tmp_path, template="default")
    assert "texts of its own" in found.lost["template"] and "template" not in found.recipe


def test_what_is_lost_is_said_and_strict_makes_it_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "recipe.yaml"
    assert main(["convert", "llama_factory/lora_unsloth.yaml", "-o", str(target)]) == 0
    out, err = capsys.readouterr()
    assert "1 not taken over. Next: llmtune train" in " ".join(out.split())
    assert "not taken over: use_unsloth: Unsloth replaces" in err
    assert "#   use_unsloth: Unsloth replaces" in target.read_text()
    target.unlink()
    with pytest.raises(ErrorList, match="use_unsloth: Unsloth"):
        convert("llama_factory/lora_unsloth.yaml", target, strict=True)
    assert main(["convert", "llama_factory/lora_unsloth.yaml", "-o", str(target), "--strict"]) == 2
    assert not target.exists()
    assert not convert("llama_factory/lora_sft.yaml", strict=True).lost


def test_a_key_that_nobody_knows_is_lost_and_secrets_are_not_said(tmp_path: Path) -> None:
    found = made(tmp_path, frobnicate=3, swanlab_api_key="abc123xyz")
    assert found.lost["frobnicate"] == "llmtune knows no such key of LLaMA-Factory"
    assert "abc123xyz" not in found.text


def test_several_trackers_get_their_own_keys(tmp_path: Path) -> None:
    found = made(
        tmp_path, report_to=["wandb", "tensorboard", "trackio"], use_swanlab=True, swanlab_project="demo",
        swanlab_mode="local", run_name="first", logging_dir="logs", trackio_space_id="me/space",
    )  # fmt: skip
    assert not found.lost
    assert found.recipe["logger_config"] == [
        {"name": "swanlab", "swanlab_run_name": "first", "swanlab_project": "demo", "swanlab_mode": "local"},
        {"name": "wandb", "run_name": "first"}, {"name": "tensorboard", "log_dir": "logs"},
        {"name": "trackio", "run_name": "first", "space_id": "me/space"},
    ]  # fmt: skip
    assert made(tmp_path, report_to="swanlab", use_swanlab=True).recipe["logger_config"] == {"name": "swanlab"}
    assert "logger_config" not in made(tmp_path, report_to="none", run_name="first", swanlab_mode="local").recipe


def test_what_a_yaml_file_of_v1_says_of_data_becomes_entries(tmp_path: Path) -> None:
    (tmp_path / "sets.yaml").write_text(
        "mine: {path: data/mine.json, source: local, converter: alpaca}\n"
        "pairs: {path: org/pairs, split: train_prefs, converter: pair, size: 100, weight: 0.5}\n"
        "old: {file_name: old.jsonl, dataset_dir: data, converter: other, weight: 2.0, streaming: false}\n"
    )
    keys = {"model": "m", "train_dataset": str(tmp_path / "sets.yaml"), "micro_batch_size": 1, "save_epochs": 1}
    (tmp_path / "there.json").write_text(json.dumps(keys))
    found = convert(tmp_path / "there.json")
    assert found.recipe["dataset"] == [
        {"path": "data/mine.json", "format": "alpaca"},
        {"path": "hub:org/pairs", "format": "preference", "split": "train_prefs", "num_samples": 50},
        {"path": "data/old.jsonl"},
    ]
    assert [lost.partition(": ")[2] for lost in found.lost] == ["old: converter", "old: weight"]
    assert found.recipe["save_strategy"] == "epoch"


@pytest.mark.parametrize(
    ("loss", "stage"),
    [
        ({"_component_": "torchtune.rlhf.loss.RSOLoss", "gamma": 0.2}, {"pref_loss": "hinge", "pref_beta": 0.2}),
        ({"_component_": "torchtune.rlhf.loss.IPOLoss", "tau": 0.3}, {"pref_loss": "ipo", "pref_beta": 0.3}),
        (
            {"_component_": "torchtune.rlhf.loss.SimPOLoss", "gamma": 0.7},
            {"pref_loss": "simpo", "simpo_gamma": 0.7, "pref_beta": 2.0},
        ),
    ],
)
def test_losses_of_torchtune_keep_their_strength(loss: dict[str, Any], stage: dict[str, Any], tmp_path: Path) -> None:
    there = {"optimizer": {"lr": 1e-4}, "loss": loss, "checkpointer": {"checkpoint_dir": "m"},
             "dataset": {"_component_": "torchtune.datasets.chat_dataset", "source": "org/talks",
                         "conversation_column": "talk", "conversation_style": "sharegpt"}}  # fmt: skip
    (tmp_path / "there.json").write_text(json.dumps(there))
    found = convert(tmp_path / "there.json").recipe
    assert found["stage_config"] == {"name": "dpo", **stage}
    assert found["dataset"] == {"path": "hub:org/talks", "format": "sharegpt", "columns": {"conversations": "talk"}}


def test_references_follow_their_keys(tmp_path: Path) -> None:
    found = made(
        tmp_path, output_dir="saves/${model_name_or_path}/${lora_rank}", lora_rank=4, tokenized_path="${stage}/x"
    )
    assert found.recipe["output_dir"] == "saves/${model}/${peft_config.r}"
    assert found.recipe["tokenized_path"] == "sft/x"


def test_no_file_that_somebody_wrote_is_written_over(tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text("model: m\n")
    with pytest.raises(RecipeError, match="is there already"):
        convert("llama_factory/lora_sft.yaml", target)
    assert target.read_text() == "model: m\n"
    for _ in range(2):
        convert("llama_factory/lora_sft.yaml", tmp_path / "again.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: m\ndataset: d\n", "is a recipe of llmtune already"),
        ("colour: blue\n", "is no file of LLaMA-Factory, Axolotl, torchtune or TRL"),
        ("compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\n", "a configuration of accelerate"),
        ("- a\n- b\n", "found no keys"),
    ],
)
def test_what_is_no_file_of_another_trainer_is_said(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(RecipeError, match=said):
        convert(tmp_path / "file.yaml")
    assert offer(tmp_path / "file.yaml") is None


@pytest.mark.parametrize("file", ["axolotl/lora.yml", "llama_factory/lora_sft.yaml"])
def test_commands_that_use_a_model_offer_the_conversion_of_a_file_for_training(file: str) -> None:
    with pytest.raises(RecipeError, match=f"{file} is a file of .*; `llmtune convert {file} -o recipe.yaml`"):
        recipe_of(file)
    assert offer("llama_factory/chat_lora.yaml", for_use=True) is None


def test_a_command_is_taken_in_quotes() -> None:
    found = convert(
        "trl sft --model_name_or_path m --dataset_name org/talks --assistant_only_loss true --learning_rate=1e-3"
    )
    assert (found.trainer, found.recipe["learning_rate"], found.recipe["dataset"]) == (
        "TRL",
        1e-3,
        {"path": "hub:org/talks"},
    )
    assert "train_on_prompt" not in found.recipe
    found = convert("llamafactory-cli train llama_factory/lora_sft.yaml lora_rank=4 --learning_rate 3e-4")
    assert found.recipe["peft_config"]["r"] == 4
    assert found.recipe["learning_rate"] == 3e-4
    with pytest.raises(RecipeError, match="names the file gone.yaml, which is not there"):
        convert("axolotl train gone.yaml")


@pytest.mark.parametrize("command", ["train", "plan"])
def test_another_trainers_file_is_answered_with_its_conversion(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for file, trainer in (("llama_factory/lora_dpo.yaml", "LLaMA-Factory"), ("axolotl/lora.yml", "Axolotl")):
        assert main([command, file]) == 2
        said = " ".join(capsys.readouterr().err.split())
        command_there = f"`llmtune convert {file} -o recipe.yaml`"
        assert said == f"llmtune: {file} is a file of {trainer}; {command_there} writes it as a recipe"


def test_converted_files_are_planned(
    tmp_path: Path, tiny_llama: str, chats: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the data set that a dataset_info.json of LLaMA-Factory describes."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    info = {"greetings": {"file_name": chats, "formatting": "sharegpt", "columns": {"messages": "messages"},
                          "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user",
                                   "assistant_tag": "assistant", "system_tag": "system"}}}  # fmt: skip
    Path("data/dataset_info.json").write_text(json.dumps(info))
    for name in ("lora_sft", "galore"):
        text = (FOREIGN / f"llama_factory/{name}.yaml").read_text().replace("org/tiny-chat-7b", tiny_llama)
        Path(f"{name}.yaml").write_text(re.sub("template: .*", "template: chatml", text))
        convert(f"{name}.yaml", f"{name}_here.yaml", strict=True)
        assert llmtune.plan(f"{name}_here.yaml", device="cpu").steps > 0


def test_converting_takes_no_torch() -> None:
    code = (
        "import sys, llmtune; llmtune.convert('llama_factory/lora_sft.yaml')\n"
        "print([name for name in sys.modules if name in ('torch', 'transformers')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
