"""How fast and how large is DPO, against TRL's DPOTrainer on the same tokens?

    python benchmarks/stages.py DATA.json [--model DIR_OR_ID] [--rows 16] [--repeats 3] [--write RESULT.md]

DATA holds preferences, as llmtune reads them; pairs with an answer that needs more than 512 tokens are left out. All
sides train the same LoRA (r 8, all linear layers) in float32 on the same pairs in the same order, 2 a step, and compare
with the base, adapters off. TRL runs as it comes, and tuned for speed: it checkpoints activations unless it is told not
to. It gets the tokens that llmtune made. Each run is its own process, so that peak memory is its own; the sides take
turns, and a ratio is the median over the turns of two runs one after the other. The first step is not timed, and what
the sides say of it must agree to 1e-4, or nothing is reported.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from peers import python_of
from train import cpu_name

PAIRS_A_STEP = 2
CUTOFF = 512
LLMTUNE = "llmtune"
TRL: dict[str, dict[str, Any]] = {"TRL": {}, "TRL, tuned": {"gradient_checkpointing": False}}
"""The sides, and what each says besides what all do."""
ALIKE = ("loss", "logps/chosen", "logps/rejected")
"""What is compared of the first step."""


def recipe(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    return {
        "model": options.model, "stage_config": {"name": "dpo", "pref_beta": 0.1}, "dataset": options.data,
        "cutoff_len": CUTOFF, "max_samples": options.rows, "disable_shuffling": True, "bf16": False,
        "peft_config": {"name": "lora", "r": 8, "lora_alpha": 16}, "learning_rate": 1e-4, "num_train_epochs": 1,
        "per_device_train_batch_size": PAIRS_A_STEP, "logging_steps": 1, "save_steps": None, "output_dir": folder,
    }  # fmt: skip


def run_llmtune(options: argparse.Namespace) -> dict[str, Any]:
    import llmtune

    with tempfile.TemporaryDirectory() as folder:
        rows = llmtune.train(recipe(options, folder)).metrics
    tokens = [rows[0]["tokens"], *(b["tokens"] - a["tokens"] for a, b in pairwise(rows))]
    seconds = [n / row["tokens_per_second"] for n, row in zip(tokens, rows, strict=True)]
    return {"seconds": sum(seconds[1:]), "steps": [{key: row[key] for key in ALIKE} for row in rows]}


def job(options: argparse.Namespace) -> dict[str, Any]:
    """What TRL needs to know: where the model is, and the tokens of the pairs in the order in which they train."""
    import llmtune

    plan = llmtune.plan(recipe(options, "unused"))
    assert plan.data is not None
    samples, order = plan.data.prepared.train, plan.data.batches.order
    pairs = []
    for number in (each for step in range(order.steps_per_epoch) for each in order.step_units(step)):
        chosen, rejected = samples.sequences(number)
        asked = int(samples.mask[chosen].argmax())
        ends = [part.stop - int(samples.mask[part][::-1].argmax()) for part in (chosen, rejected)]
        assert asked == int(samples.mask[rejected].argmax()), "both answers follow the same prompt"
        assert (
            samples.mask[chosen.start + asked : ends[0]].all() and samples.mask[rejected.start + asked : ends[1]].all()
        )
        pairs.append({
            "prompt_ids": samples.ids[chosen.start : chosen.start + asked].tolist(),
            "chosen_ids": samples.ids[chosen.start + asked : ends[0]].tolist(),
            "rejected_ids": samples.ids[rejected.start + asked : ends[1]].tolist(),
        })  # fmt: skip
    return {"model": str(plan.model.files.folder), "pairs": pairs, "tokens": int(samples.lengths.sum())}


def run_trl(given: dict[str, Any], **more: Any) -> dict[str, Any]:
    """DPOTrainer as its documentation shows it, on tokens that are there already."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer  # pyrefly: ignore[missing-import]

    ends: list[float] = []
    steps: list[dict[str, float]] = []

    class Stopwatch(TrainerCallback):
        def on_step_end(self, *_: Any, **facts: Any) -> None:
            ends.append(time.perf_counter())

        def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **facts: Any) -> None:
            if logs and "loss" in logs:
                steps.append({key: float(logs[key]) for key in ALIKE})

    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=given["model"],
            args=DPOConfig(
                output_dir=folder, max_length=CUTOFF, beta=0.1, per_device_train_batch_size=PAIRS_A_STEP, bf16=False,
                num_train_epochs=1, learning_rate=1e-4, logging_steps=1, save_strategy="no", report_to="none",
                train_sampling_strategy="sequential", use_cpu=True, model_init_kwargs={"dtype": "float32"}, **more,
            ),
            train_dataset=Dataset.from_list([{"prompt": "One", "chosen": " two", "rejected": " four"}]),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Stopwatch()],
        )  # fmt: skip
        trainer.train_dataset = Dataset.from_list(given["pairs"])
        trainer.train()
    return {"seconds": ends[-1] - ends[0], "steps": steps}


def one_side(options: argparse.Namespace) -> None:
    """Run `options.side` in this process and print its figures as JSON."""
    if options.side == LLMTUNE:
        figures = run_llmtune(options)
    else:
        figures = run_trl(json.loads(Path(options.job).read_text()), **TRL[options.side])
    figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("\nFIGURES " + json.dumps(figures))


def measure(options: argparse.Namespace, side: str, job_file: Path) -> dict[str, Any]:
    """One run of a side: TRL in this environment where it is installed, so that both have one torch."""
    here = side == LLMTUNE or importlib.util.find_spec("trl") is not None
    done = subprocess.run(
        [
            sys.executable if here else python_of("TRL"), __file__, options.data, "--model", options.model,
            "--rows", str(options.rows), "--side", side, "--job", str(job_file),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if not lines:
        raise SystemExit(f"{side} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return json.loads(lines[-1].removeprefix("FIGURES "))


def check(found: dict[str, list[dict[str, Any]]]) -> None:
    """The same pairs, the same numbers: adapters start at zero effect, so the first step agrees however A was drawn."""
    mine = found[LLMTUNE][0]["steps"]
    for side, runs in found.items():
        for run in runs:
            if len(run["steps"]) != len(mine):
                raise SystemExit(f"{side}: {len(run['steps'])} steps, llmtune {len(mine)}; nothing is reported")
            for key in ALIKE:
                if abs(run["steps"][0][key] / mine[0][key] - 1) > 1e-4:
                    raise SystemExit(
                        f"{side}: {key} begins {run['steps'][0]}, llmtune's {mine[0]}; nothing is reported"
                    )


def table(options: argparse.Namespace) -> str:
    """The sides take turns, so that a slow minute of the machine hits all of them."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in (LLMTUNE, *TRL)}
    with tempfile.TemporaryDirectory() as folder:
        given, job_file = job(options), Path(folder) / "job.json"
        job_file.write_text(json.dumps(given))
        for turn in range(options.repeats):
            for side in found:
                found[side].append(measure(options, side, job_file))
                print(f"turn {turn + 1}: {side} {found[side][-1]['seconds']:.1f} s", flush=True)
    check(found)
    timed = len(given["pairs"]) - PAIRS_A_STEP
    lines = [
        "| side | pairs/s | llmtune against it | peak memory | first logps | first loss | last loss |",
        "|" + "---|" * 7,
    ]
    for side, runs in found.items():
        ratios = [run["seconds"] / mine["seconds"] for run, mine in zip(runs, found[LLMTUNE], strict=True)]
        speed = statistics.median(timed / run["seconds"] for run in runs)
        memory = statistics.median(run["peak_bytes"] for run in runs) / 2**30
        first, last = runs[0]["steps"][0], runs[0]["steps"][-1]
        lines.append(
            f"| {side} | {speed:.3f} | {statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {memory:.2f} GiB | {first['logps/chosen']:.3f}, {first['logps/rejected']:.3f} | {first['loss']:.5f} "
            f"| {last['loss']:.4f} |"
        )
    lines += ["", f"{len(given['pairs'])} pairs of {given['tokens'] / len(given['pairs']):.0f} tokens on average."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", metavar="FILE")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        one_side(options)
        return
    import torch

    data = Path(options.data).name
    text = (
        f"# DPO: llmtune against TRL\n\n{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}. {options.model}, {options.rows} rows of {data}, "
        f"{options.repeats} turns.\n\n{table(options)}\n\n"
        f"Rerun: `python benchmarks/stages.py {data} --rows {options.rows} --repeats {options.repeats}`\n"
    )
    print(text)
    if options.write:
        Path(options.write).write_text(text)


if __name__ == "__main__":
    main()
