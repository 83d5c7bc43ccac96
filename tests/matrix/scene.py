"""What all combinations share on disk, and the recipe of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmtune.testing.tiny import tiny_preferences
from tests.by_hand import base_by_hand
from tests.matrix.axes import Combo
from tests.matrix.families import FAMILIES, Family, make_model_folder
from tests.matrix.stages import STAGES

STEPS = 5
GLOBAL_BATCH = 16
"""Rows of a step on any number of ranks with any accumulation: at least one for each of 4 micro-batches on 4 ranks."""

LORA = {"name": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
METHODS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "lora": LORA,
    "dora": {**LORA, "use_dora": True},
    "rslora": {**LORA, "use_rslora": True},
    "modules_to_save": {**LORA, "modules_to_save": ["lm_head"]},
    "experts": {**LORA, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "freeze": {"name": "freeze", "freeze_trainable_layers": 1},
    "llama_pro": {"name": "llama_pro", "num_expanded_layers": 1},
    "oft": {"name": "oft", "oft_block_size": 8},
    "ia3": {
        "name": "peft", "tuner": "IA3",
        "options": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    },
}  # fmt: skip
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optim_config": {"name": "adamw", "weight_decay": 0.1}},
    "muon": {"optim_config": {"name": "muon", "weight_decay": 0.1}},
    "galore": {"optim_config": {"name": "galore", "rank": 4, "update_interval": 2, "weight_decay": 0.1}},
    "apollo": {"optim_config": {"name": "apollo", "rank": 4, "update_interval": 2, "weight_decay": 0.1}},
    "adam_mini": {"optim_config": {"name": "adam_mini", "weight_decay": 0.1}},
    "badam": {"optim_config": {"name": "badam", "switch_interval": 2, "weight_decay": 0.1}},
    "adafactor": {"optim_config": {"name": "adafactor", "weight_decay": 0.1}},
    "lion": {"optim_config": {"name": "lion", "weight_decay": 0.1}},
    "sgd": {"optim_config": {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1}, "learning_rate": 0.1},
}
BASES: dict[str, dict[str, Any] | None] = {
    "full precision": None,
    "nf4": {"name": "bnb", "double_quantization": False},
    "nf4 double": {"name": "bnb"},
    "fp4": {"name": "bnb", "quantization_type": "fp4", "double_quantization": False},
    "int8": {"name": "bnb", "quantization_bit": 8},
    "hqq 4": {"name": "hqq", "quantization_bit": 4, "group_size": 16},
    "hqq 3": {"name": "hqq", "quantization_bit": 3, "group_size": 16},
}


class Scene:
    """Models, data and adapters in one folder, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.data = self._write("train.jsonl", 44, 0)
        self.evaluation = self._write("eval.jsonl", 6, 100)
        self.pairs = str(tiny_preferences(root, rows=44))

    def _write(self, name: str, count: int, first: int) -> str:
        """Short conversations of different lengths, some with two turns."""
        lines = []
        for number in range(first, first + count):
            messages = [
                {"role": "user", "content": f"Is {number} odd?" + " Say." * (number % 4)},
                {"role": "assistant", "content": ("Yes." if number % 2 else "No.") + " Go on." * (number % 3)},
            ]
            if number % 7 == 0:
                messages += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "Done."}]
            lines.append(json.dumps({"messages": messages}) + "\n")
        (self.root / name).write_text("".join(lines))
        return str(self.root / name)

    def family(self, combo: Combo) -> Family:
        """What the combination's model is."""
        return FAMILIES[combo.family]

    def model(self, family: str) -> str:
        """Folder of the base model."""
        folder = self.root / family
        if not (folder / "config.json").exists():
            make_model_folder(folder, FAMILIES[family])
        return str(folder)

    def adapter(self, family: str) -> str:
        """Folder of an adapter that PEFT saved, neither fresh nor trained: its B matrices are random."""
        folder = self.root / f"{family}-adapter"
        if not folder.exists():
            import torch
            from peft import LoraConfig, get_peft_model

            model: Any = get_peft_model(
                base_by_hand({"model": self.model(family)}),
                LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"),
            )
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            model.save_pretrained(folder)
        return str(folder)

    def peft(self, combo: Combo) -> dict[str, Any] | None:
        """The combination's `peft_config` block."""
        if combo.method == "continued":
            return {"name": "lora", "adapter_name_or_path": self.adapter(combo.family)}
        return METHODS[combo.method]

    def recipe(self, combo: Combo, output: Path) -> dict[str, Any]:
        """The combination as a user would write it; it evaluates after every other step."""
        keys: dict[str, Any] = {
            "model": self.model(combo.family), "dataset": self.data, "output_dir": str(output), "device": "cpu",
            "init_config": combo.init, "packing": combo.packing, "cutoff_len": 128,
            "per_device_train_batch_size": GLOBAL_BATCH // (combo.ranks * combo.accumulation),
            "gradient_accumulation_steps": combo.accumulation, "activation_checkpointing": combo.checkpointing,
            "max_steps": STEPS, "learning_rate": 1e-3, "warmup_steps": 1, "lr_scheduler_config": "cosine",
            "logging_steps": 1, "save_steps": None,
            "eval_dataset": self.evaluation, "eval_strategy": "steps", "eval_steps": 2,
            "per_device_eval_batch_size": 2, "ddp_timeout": 60, "overwrite_output_dir": True,
            **FAMILIES[combo.family].keys, **OPTIMIZERS[combo.optimizer],
        }  # fmt: skip
        if combo.stage != "sft":
            keys |= {**STAGES[combo.stage], "dataset": self.pairs, "eval_dataset": self.pairs}
        keys["kernel_config"] = None if combo.kernels == "none" else combo.kernels
        if combo.method == "ia3":  # its vectors are few, and start at 1
            keys["learning_rate"] *= 10
        if quant := BASES[combo.base]:
            keys["quant_config"] = quant
        if peft := self.peft(combo):
            keys["peft_config"] = peft
        return keys
