"""LLaMA-Factory and TRL as they come: their virtual environments, and one LoRA run in each, timed step by step.

`benchmarks/train.py --peers` uses it. An environment is made once with pip and kept in `LLMTUNE_CACHE`'s folder
`peers`. This file itself runs inside of them (`python peers.py NAME JSON`), where there is no llmtune.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

PEERS = {"LLaMA-Factory": ["llamafactory==0.9.5"], "TRL": ["trl==1.16.0", "peft==0.21.2"]}
"""What pip is asked for; it brings the versions that these packages choose themselves."""


def python_of(name: str) -> Path:
    """The interpreter of a peer's environment, which is made if it is not there."""
    root = Path(os.environ.get("LLMTUNE_CACHE") or Path.home() / ".cache" / "llmtune") / "peers" / name
    python = root / "bin" / "python"
    if not (root / "ready").exists():
        print(f"making an environment for {name} in {root}", flush=True)
        venv.create(root, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PEERS[name]], check=True)
        (root / "ready").touch()
    return python


def run_peer(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """Tokens, seconds, losses and peak memory of a run: `job` says model folder, rows, cutoff and rows a step."""
    done = subprocess.run(
        [python_of(name), __file__, name, json.dumps(job)], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if not lines:
        raise SystemExit(f"{name} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return json.loads(lines[-1].removeprefix("FIGURES "))


def stopwatch() -> Any:
    """A callback of transformers' Trainer that counts tokens without padding and times the steps."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ends: list[float] = []
            self.losses: list[float] = []

        def on_train_begin(self, *_: Any, **facts: Any) -> None:
            loader = facts["train_dataloader"]
            loader = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper hands reads on, not writes
            collate = loader.collate_fn

            def counting(rows: Any) -> Any:
                batch = collate(rows)
                mask = batch.get("attention_mask")
                self.tokens.append(int(mask.sum() if mask is not None else batch["input_ids"].numel()))
                return batch

            loader.collate_fn = counting

        def on_step_end(self, *_: Any, **facts: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **facts: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))

        def figures(self) -> dict[str, Any]:
            steps = len(self.ends)
            return {
                "tokens": sum(self.tokens[1:steps]),
                "seconds": self.ends[-1] - self.ends[0],
                "losses": self.losses,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }

    return Stopwatch()


def llama_factory(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`llamafactory-cli train` on a recipe with nothing in it but what has to be said."""
    from llamafactory.train.tuner import run_exp  # pyrefly: ignore[missing-import]

    (folder / "rows.json").write_text(json.dumps(job["rows"]))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    watch = stopwatch()
    recipe = {
        "model_name_or_path": job["model"], "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "dataset": "rows", "dataset_dir": str(folder), "template": job["template"], "cutoff_len": job["cutoff"],
        "per_device_train_batch_size": job["batch"], "num_train_epochs": 1.0, "learning_rate": 1e-4,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "output_dir": str(folder / "out"),
    }  # fmt: skip
    run_exp(args=recipe, callbacks=[watch])
    return watch.figures()


def trl(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """TRL's SFTTrainer as its documentation shows it, with a LoRA on all linear layers."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer  # pyrefly: ignore[missing-import]

    def conversation(row: dict[str, str]) -> dict[str, Any]:
        question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
        return {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }

    watch = stopwatch()
    trainer = SFTTrainer(
        model=job["model"],
        train_dataset=Dataset.from_list([conversation(row) for row in job["rows"]]),
        args=SFTConfig(
            output_dir=str(folder / "out"), max_length=job["cutoff"], per_device_train_batch_size=job["batch"],
            num_train_epochs=1, learning_rate=1e-4, logging_steps=1, save_strategy="no", report_to="none",
            use_cpu=not torch.cuda.is_available(),  # without which it refuses to start
        ),
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[watch],
    )  # fmt: skip
    trainer.train()
    return watch.figures()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=list(PEERS))
    parser.add_argument("job")
    options = parser.parse_args()
    run = {"LLaMA-Factory": llama_factory, "TRL": trl}[options.name]
    with tempfile.TemporaryDirectory() as folder:
        figures = run(json.loads(options.job), Path(folder))
    print("\nFIGURES " + json.dumps(figures))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
