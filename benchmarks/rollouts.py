"""How fast does GRPO answer and learn, against TRL's GRPOTrainer with transformers' generation?

    python benchmarks/rollouts.py [--model DIR_OR_ID] [--repeats 3] [--write RESULT.md]

Both sides train LoRA (r 8, all linear layers) in float32 with the same settings: 8 prompts a step (sums such as
"What is 3 + 4?", alone and after some 200 tokens of instructions), 8 answers to each, drawn at temperature 1 from the
whole vocabulary, at most 32 tokens, a Python function as reward, AdamW. Each run is its own process; sides take turns.
Reported: medians over repeats of the tokens that a second of answering gives and of the seconds of a step, both without
the first step. Needs `pip install trl`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from train import cpu_name

PROMPTS, ANSWERS, TOKENS, STEPS = 8, 8, 32, 4
SIDES = ("TRL", "llmtune")
INSTRUCTIONS = "Read the sum with care, add up its two numbers step by step, and write the result at the end. " * 9
LENGTHS = {"short": "", "long": INSTRUCTIONS}


def questions(length: str) -> list[str]:
    """The prompts, the same for all sides."""
    return [f"{LENGTHS[length]}What is {number} + {number * 7 % 11}?" for number in range(PROMPTS * STEPS)]


class Watch:
    """Seconds and tokens of the calls of a function."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.tokens: list[int] = []

    def around(self, function: Callable[..., Any], count: Callable[[Any], int]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            found = function(*given, **named)
            self.seconds.append(time.perf_counter() - started)
            self.tokens.append(count(found))
            return found

        return timed


def length_reward(completions: list[Any], **_: Any) -> list[float]:
    """Something to learn from: short answers."""
    texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
    return [-len(text) / 100 for text in texts]


def run_llmtune(model: str, folder: str, length: str) -> dict[str, Any]:
    import llmtune
    from llmtune.training.rollouts import Rollouts

    data = Path(folder) / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in questions(length)))
    watch = Watch()
    Rollouts.generate = watch.around(  # type: ignore[method-assign]
        Rollouts.generate, lambda found: sum(len(answer.ids) for answer in found)
    )
    stage = {"name": "grpo", "num_generations": ANSWERS, "max_new_tokens": TOKENS, "beta": 0.0, "loss_type": "dapo"}
    sys.path.insert(0, str(Path(__file__).parent))
    metrics = llmtune.train({
        "model": model, "dataset": str(data), "output_dir": f"{folder}/run", "stage_config": stage,
        "reward_config": {"name": "function", "function": "rollouts:length_reward"},
        "peft_config": {"name": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0}, "bf16": False,
        "per_device_train_batch_size": PROMPTS, "learning_rate": 1e-5, "max_steps": STEPS, "logging_steps": 1,
        "save_steps": None, "disable_shuffling": True,
    }).metrics  # fmt: skip
    steps = [row for row in metrics if "loss" in row]
    return figures(watch, [(b["tokens"] - a["tokens"]) / b["tokens_per_second"] for a, b in pairwise(steps)])


def run_trl(model: str, folder: str, length: str) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ends: list[float] = []

    class Ends(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    rows = [{"prompt": [{"role": "user", "content": row}]} for row in questions(length)]
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(model), reward_funcs=length_reward,
        train_dataset=Dataset.from_list(rows), callbacks=[Ends()],
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=GRPOConfig(
            output_dir=folder, report_to=[], use_cpu=not torch.cuda.is_available(), bf16=False, max_steps=STEPS,
            per_device_train_batch_size=PROMPTS, gradient_accumulation_steps=ANSWERS, num_generations=ANSWERS,
            max_completion_length=TOKENS, temperature=1.0, top_p=1.0, top_k=0, beta=0.0, learning_rate=1e-5,
            logging_steps=1, save_strategy="no", shuffle_dataset=False, gradient_checkpointing=False,
        ),
    )  # fmt: skip
    watch = Watch()
    trainer._generate_single_turn = watch.around(
        trainer._generate_single_turn, lambda found: sum(len(ids) for ids in found[0])
    )
    trainer.train()
    return figures(watch, [later - earlier for earlier, later in pairwise(ends)])


def figures(watch: Watch, steps: list[float]) -> dict[str, Any]:
    """Without the first step, which warms up."""
    return {
        "answering": sum(watch.tokens[1:]) / sum(watch.seconds[1:]), "answer_tokens": sum(watch.tokens[1:]),
        "step": statistics.mean(steps), "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip


def measure(options: argparse.Namespace, side: str, length: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--model", options.model, "--side", side, "--length", length]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if not lines:
        raise SystemExit(f"{side} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(lines[0].removeprefix("FIGURES "))


def table(options: argparse.Namespace) -> str:
    lines = [
        "| prompts | side | answer tokens/s | against TRL | seconds a step | against TRL | peak memory |",
        "|" + "---|" * 7,
    ]
    for length in LENGTHS:
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for turn in range(options.repeats):
            for side in SIDES:
                found[side].append(measure(options, side, length))
                print(f"{length}, turn {turn + 1}: {side} {found[side][-1]}", flush=True)
        median = {
            side: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            for side, runs in found.items()
        }
        for side, one in median.items():
            lines.append(
                f"| {length} | {side} | {one['answering']:.0f} | {one['answering'] / median['TRL']['answering']:.2f} x "
                f"| {one['step']:.1f} | {median['TRL']['step'] / one['step']:.2f} x "
                f"| {one['peak_bytes'] / 2**30:.2f} GiB |"
            )
    return "\n".join(lines)


def model_folder(model: str) -> str:
    """Where llmtune keeps the model's files."""
    import llmtune

    return str(llmtune.plan({"model": model, "dataset": "llmtune:quickstart", "output_dir": "x"}).model.files.folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--length", choices=LENGTHS, default="short")
    options = parser.parse_args()
    if options.side:
        with tempfile.TemporaryDirectory() as folder:
            run = {"TRL": run_trl, "llmtune": run_llmtune}[options.side]
            print("FIGURES " + json.dumps(run(options.model, folder, options.length)))
        return
    options.model = model_folder(options.model)
    import torch

    cpu = f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    text = (
        f"# GRPO: answering and learning\n\n{table(options)}\n\n{PROMPTS} prompts a step, {ANSWERS} answers to each of "
        f"at most {TOKENS} tokens, {STEPS - 1} steps; medians of {options.repeats}. {cpu}. "
        "`python benchmarks/rollouts.py` reruns it.\n"
    )
    print(text)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
