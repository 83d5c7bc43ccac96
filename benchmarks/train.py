"""How fast and how large is LoRA training, against a bare PyTorch + PEFT loop on the same tokens?

    python benchmarks/train.py DATA.json [--model DIR_OR_ID] [--rows 96] [--repeats 3] [--write RESULT.md] [--peers]

DATA is any data set that llmtune reads. Both sides train LoRA (r 8, all linear layers, no dropout), in float32 on a
CPU or bfloat16 on a GPU, on the same rows in the same order, 8 rows a step; each run is its own process, so
that peak memory is its own. Reported: the median over repeats of tokens per second, counted without padding and
without the first step, and of peak resident (GPU: allocated) memory. The losses must agree, or nothing is reported.

With `--peers` llmtune, LLaMA-Factory and TRL train the same Alpaca rows as they come: each with the number type,
checkpointing, kernels and adapter that it chooses where nothing is said. `peers.py` makes their environments.
"""

from __future__ import annotations

import argparse
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

from peers import PEERS, run_peer

ROWS_A_STEP = 8
CUTOFF = 1024
SIDES = ("bare loop, padded", "llmtune, padded", "llmtune, kernels", "llmtune, packed")
DEFAULTS = "llmtune"
"""The side that leaves everything to llmtune."""


def recipe(options: argparse.Namespace, folder: str, side: str) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "model": options.model,
        "dataset": options.data,
        "max_samples": options.rows,
        "cutoff_len": CUTOFF,
        "output_dir": folder,
        "peft_config": "lora",
        "per_device_train_batch_size": ROWS_A_STEP,
        "learning_rate": 1e-4,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_steps": None,
    }
    if side == DEFAULTS:
        return keys
    keys |= {
        "peft_config": {"name": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
        "bf16": None if on_gpu() else False,
        "disable_shuffling": True,
        "disable_gradient_checkpointing": True,
        "kernel_config": None if side == "llmtune, padded" else "auto",
    }
    if side == "llmtune, packed":
        # One pack holds about as many tokens as the eight rows of the other sides.
        keys |= {
            "packing": True,
            "per_device_train_batch_size": max(1, round(ROWS_A_STEP * mean_length(options) / CUTOFF)),
        }
    return keys


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def mean_length(options: argparse.Namespace) -> float:
    import llmtune

    plan = llmtune.plan(recipe(options, "unused", "llmtune, padded"))
    assert plan.data is not None
    return float(plan.data.prepared.train.lengths.mean())


def run_llmtune(options: argparse.Namespace, side: str) -> dict[str, Any]:
    import llmtune

    with tempfile.TemporaryDirectory() as folder:
        metrics = llmtune.train(recipe(options, folder, side)).metrics
    steps = [row for row in metrics if "loss" in row]
    counts = [steps[0]["tokens"], *(b["tokens"] - a["tokens"] for a, b in pairwise(steps))]
    seconds = sum(n / row["tokens_per_second"] for n, row in zip(counts[1:], steps[1:], strict=True))
    return {"tokens": sum(counts[1:]), "seconds": seconds, "losses": [row["loss"] for row in steps]}


def run_bare(options: argparse.Namespace) -> dict[str, Any]:
    """What one writes by hand: transformers, PEFT, padding to the longest row, torch's AdamW."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import llmtune

    plan = llmtune.plan(recipe(options, "unused", "llmtune, padded"))
    samples, order, device = plan.data.prepared.train, plan.data.batches.order, plan.device
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(plan.model.files.folder, dtype=dtype).to(device)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0, fused=True
    )
    steps = order.steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, (steps - step) / steps))
    losses, tokens, started = [], 0, 0.0
    model.train()
    for step in range(steps):
        rows = [samples.sample(index) for index in order.step_units(step)]
        longest = max(len(ids) for ids, _ in rows)
        ids, mask, labels = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(3))
        labels.fill_(-100)
        for row, (sample, trained) in enumerate(rows):
            ids[row, : len(sample)] = torch.from_numpy(sample.astype("int64"))
            mask[row, : len(sample)] = 1
            counted = torch.from_numpy(trained)
            labels[row, : len(sample)][counted] = ids[row, : len(sample)][counted]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 0:
            started = time.perf_counter()
        else:
            tokens += sum(len(sample) for sample, _ in rows)
    return {"tokens": tokens, "seconds": time.perf_counter() - started, "losses": losses}


def one_side(options: argparse.Namespace) -> None:
    """Run `options.side` in this process and print its figures as JSON."""
    import torch

    figures = run_bare(options) if options.side.startswith("bare") else run_llmtune(options, options.side)
    if torch.cuda.is_available():
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
    else:
        figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("FIGURES " + json.dumps(figures))


def measure(options: argparse.Namespace, side: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, options.data, "--model", options.model, "--rows", str(options.rows), "--side", side],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if not lines:
        raise SystemExit(f"{side} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(lines[0].removeprefix("FIGURES "))


def table(options: argparse.Namespace) -> str:
    """Sides take turns, so that a slow minute of the machine hits all of them."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(options.repeats):
        for side in SIDES:
            found[side].append(measure(options, side))
    check(found)
    speed = {side: statistics.median(f["tokens"] / f["seconds"] for f in runs) for side, runs in found.items()}
    memory = {side: statistics.median(f["peak_bytes"] for f in runs) for side, runs in found.items()}
    bare = SIDES[0]
    lines = [
        "| side | tokens/s | against the loop | peak memory | first loss | last loss |",
        "|---|---|---|---|---|---|",
    ]
    for side in SIDES:
        losses = found[side][0]["losses"]
        lines.append(
            f"| {side} | {speed[side]:.0f} | {speed[side] / speed[bare]:.2f} x | {memory[side] / 2**30:.2f} GiB "
            f"({memory[side] / memory[bare]:.2f} x) | {losses[0]:.5f} | {losses[-1]:.5f} |"
        )
    return "\n".join(lines)


def peers_table(options: argparse.Namespace) -> str:
    """llmtune, LLaMA-Factory and TRL as they come, taking turns."""
    import llmtune

    rows = json.loads(Path(options.data).read_text())[: options.rows]
    model = str(llmtune.plan(recipe(options, "unused", DEFAULTS)).model.files.folder)
    job = {"model": model, "rows": rows, "cutoff": CUTOFF, "batch": ROWS_A_STEP, "template": options.template}
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in (DEFAULTS, *PEERS)}
    for turn in range(options.repeats):
        for side in found:
            found[side].append(measure(options, side) if side == DEFAULTS else run_peer(side, job))
            done = found[side][-1]
            print(f"turn {turn + 1}: {side} {done['tokens'] / done['seconds']:.0f} tokens/s", flush=True)
    speed = {side: statistics.median(f["tokens"] / f["seconds"] for f in runs) for side, runs in found.items()}
    lines = ["| as it comes | tokens/s | llmtune against it | peak memory | tokens timed |", "|---|---|---|---|---|"]
    for side, runs in found.items():
        memory = statistics.median(f["peak_bytes"] for f in runs) / 2**30
        times = f"{speed[DEFAULTS] / speed[side]:.2f} x"
        lines.append(f"| {side} | {speed[side]:.0f} | {times} | {memory:.2f} GiB | {runs[0]['tokens']:,} |")
    return "\n".join(lines)


def cpu_name() -> str:
    """The CPU by its own name, family and model: what a virtual machine shows of it."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in lines.items()}
    flags = facts.get("flags", "").split()
    units = ", ".join(flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags)
    return f"{facts.get('model name')}, family {facts.get('cpu family')}, model {facts.get('model')} ({units})"


def check(found: dict[str, list[dict[str, Any]]]) -> None:
    """Same rows, same losses: adapters start at zero effect, so the first loss agrees however A was drawn."""
    expected = found[SIDES[0]][0]["losses"]
    for side in SIDES[1:3]:
        losses = found[side][0]["losses"]
        if len(losses) != len(expected) or abs(losses[0] / expected[0] - 1) > 1e-4:
            raise SystemExit(f"{side}: losses {losses[:3]} are not the loop's {expected[:3]}; nothing is reported")
        if any(abs(a / b - 1) > 0.02 for a, b in zip(losses, expected, strict=True)):
            raise SystemExit(f"{side}: the losses drift apart; nothing is reported")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", metavar="FILE")
    parser.add_argument("--peers", action="store_true", help="against LLaMA-Factory and TRL as they come")
    parser.add_argument("--template", default="smollm2", help="LLaMA-Factory's name of the model's template")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        one_side(options)
        return
    import torch

    name = cpu_name()
    device = torch.cuda.get_device_name() if on_gpu() else f"{name}, {torch.get_num_threads()} threads"
    title = "llmtune, LLaMA-Factory and TRL as they come" if options.peers else "llmtune against a bare loop"
    text = (
        f"# LoRA training: {title}\n\n{device}, torch {torch.__version__}, Python "
        f"{platform.python_version()}. {options.model}, {options.rows} rows of {Path(options.data).name}, "
        f"medians of {options.repeats} runs.\n\n{peers_table(options) if options.peers else table(options)}\n\n"
        f"Rerun: `python benchmarks/train.py {Path(options.data).name} --rows {options.rows} "
        f"--repeats {options.repeats}{' --peers' if options.peers else ''}`\n"
    )
    print(text)
    if options.write:
        Path(options.write).write_text(text)


if __name__ == "__main__":
    main()
