"""How well does `llmtune plan` know the memory of a step? Its figures against the allocator's.

    python benchmarks/memory.py [--model DIR_OR_ID] [--shapes tiny,model] [--write RESULT.md]

Each case plans, then trains two steps in a process of its own, on rows of equal length. On a GPU the truth is
`torch.cuda.max_memory_allocated` over the steps; on a CPU it is the highest level that torch's profiler
(`profile_memory`) sees the allocator reach during them. `tiny` and the sizes `1b`, `8b` are random models of that shape
with the tokenizer of `--model`; `model` is `--model` itself. A second table has the time that planning takes for a 70B
model, described by its config.json alone, on 64 ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

LORA = {"name": "lora", "r": 8, "lora_alpha": 16}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"peft_config": LORA},
    "qlora": {"peft_config": LORA, "quant_config": "bnb"},
}
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8,
             "num_key_value_heads": 4, "head_dim": 32},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
LARGE = {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
         "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
"""Llama 3 70B."""
CHECKPOINTING = ("none", "selective", "full")
TOKENS = {"tiny": (2, 256), "model": (1, 512), "1b": (2, 2048), "8b": (1, 2048)}
"""Rows and tokens of a micro-batch."""


def recipe(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    shape, method, checkpointing, kernels, precision = options.case.split("/")
    rows, length = TOKENS[shape]
    text = "The quick brown fox jumps over the lazy dog. " * length
    talk = {"messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": text}]}
    (folder / "rows.jsonl").write_text((json.dumps(talk) + "\n") * (2 * rows))
    return {
        "model": options.model if shape == "model" else random_model(options.model, shape, folder),
        "dataset": str(folder / "rows.jsonl"),
        "cutoff_len": length,
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": rows,
        "activation_checkpointing": checkpointing,
        "kernel_config": "auto" if kernels == "kernels" else None,
        "bf16": precision == "bf16",
        "max_steps": 2,
        **METHODS[method],
    }


def random_model(model: str, shape: str, folder: Path) -> str:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    size = len(tokenizer) if shape != "tiny" else 4096 * -(-len(tokenizer) // 4096)
    config = AutoConfig.for_model("llama", vocab_size=size, max_position_embeddings=8192, **SHAPES[shape])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


def one_case(options: argparse.Namespace) -> None:
    """Estimate and measure `options.case` in this process; print the figures as JSON."""
    import llmtune

    with tempfile.TemporaryDirectory() as name:
        plan = llmtune.plan(recipe(options, Path(name)), ranks=1)
        started = time.perf_counter()
        quick = plan.cost.quick
        middle = time.perf_counter()
        traced = plan.cost.traced
        seconds = time.perf_counter() - middle
        figures = {
            "closed": quick.at_peak.total,
            "traced": traced.at_peak.total if traced else None,
            "categories": asdict(traced.at_peak) if traced else {},
            "moment": traced.moment if traced else plan.cost.untraced,
            "closed_s": middle - started,
            "traced_s": seconds,
            "measured": measure_cuda(plan) if plan.device.type == "cuda" else measure_cpu(plan),
        }
    print("FIGURES " + json.dumps(figures))


def steps(plan: Any, ready: Any) -> None:
    """Build the run and take its steps; calls `ready` between the two."""
    from llmtune.training.building import build_objective, make_training
    from llmtune.training.loop import train
    from llmtune.training.optim import make_optimizer

    class Quiet:
        def after_step(self, step: int, stats: Any) -> bool:
            return False

    objective = build_objective(plan.model)
    factory, rate = plan.parts.one("optim_config").built, plan.recipe.train.learning_rate
    training = make_training(plan, objective, make_optimizer(factory, plan.model.module, rate))
    ready()
    train(replace(training, warmup_steps=0), Quiet())


def measure_cuda(plan: Any) -> int:
    import torch

    steps(plan, torch.cuda.reset_peak_memory_stats)
    return torch.cuda.max_memory_allocated()


def measure_cpu(plan: Any) -> int:
    """Highest level of the allocator during the steps, counted from before the model was built."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    began: list[int] = []

    def ready() -> None:
        with torch.profiler.record_function("steps begin"):
            began.append(1)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        steps(plan, ready)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    level, highest, running = 0, 0, False
    for event in events:
        running = running or event.name() == "steps begin"
        if event.name() == "[memory]":
            level += event.nbytes()
            highest = max(highest, level) if running else 0
    return highest


def figures(options: argparse.Namespace, what: list[str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--model", options.model, *what],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if not lines:
        raise SystemExit(f"{' '.join(what)} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(lines[0].removeprefix("FIGURES "))


def table(options: argparse.Namespace) -> str:
    lines = [
        "| model | method | checkpointing | loss | precision | measured | traced | error | formulas | error | trace |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases(options):
        found = figures(options, ["--case", case])
        row = [*case.split("/"), mib(found["measured"])]
        for name in ("traced", "closed"):
            value = found[name]
            row += [mib(value), f"{value / found['measured'] - 1:+.1%}"] if value else ["-", found["moment"]]
        lines.append("| " + " | ".join([*row, f"{found['traced_s']:.1f} s"]) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def large_table(options: argparse.Namespace) -> str:
    lines = ["| 70B, 64 ranks | planning | formulas | trace | by formulas | traced |", "|---|---|---|---|---|---|"]
    for method in METHODS:
        found = figures(options, ["--large", method])
        times = [f"{found[name]:.2f} s" for name in ("plan_s", "closed_s", "traced_s")]
        sizes = [f"{found[name] / 2**30:.2f} GiB" for name in ("closed", "traced")]
        lines.append("| " + " | ".join([method, *times, *sizes]) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def one_large(options: argparse.Namespace) -> None:
    """Plan 70B on 64 ranks with one method; print times and figures as JSON."""
    from transformers import AutoConfig, AutoTokenizer

    import llmtune

    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        AutoConfig.for_model("llama", max_position_embeddings=8192, **LARGE).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        talk = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": "The quick brown fox. " * 1500}]
        (folder / "rows.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 128)
        keys = {"model": name, "dataset": str(folder / "rows.jsonl"), "output_dir": str(folder / "run")}
        marks = [time.perf_counter()]
        plan = llmtune.plan(keys | {"cutoff_len": 4096} | METHODS[options.large], ranks=64, device="h100")
        marks.append(time.perf_counter())
        closed = plan.cost.quick.at_peak.total
        marks.append(time.perf_counter())
        traced = plan.cost.traced.at_peak.total
        marks.append(time.perf_counter())
    plan_s, closed_s, traced_s = (after - before for before, after in pairwise(marks))
    found = {"plan_s": plan_s, "closed_s": closed_s, "traced_s": traced_s, "closed": closed, "traced": traced}
    print("FIGURES " + json.dumps(found))


def cases(options: argparse.Namespace) -> list[str]:
    found = [
        f"{shape}/{method}/{checkpointing}/kernels/{precision}"
        for shape in options.shapes.split(",")
        for method in METHODS
        for checkpointing in CHECKPOINTING
        for precision in (["bf16"] if options.bf16 else ["float32"])
    ]
    few = [case for case in found if "/selective/" not in case and case.startswith("tiny")]
    return found + [case.replace("kernels", "plain") for case in few]


def mib(value: int) -> str:
    return f"{value / 2**20:,.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--shapes", default="tiny,model")
    parser.add_argument("--bf16", action="store_true", help="mixed precision (always so on a GPU in practice)")
    parser.add_argument("--write", metavar="FILE")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--large", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.large:
        one_large(options)
        return
    if options.case:
        one_case(options)
        return
    import torch

    on_gpu = torch.cuda.is_available()
    truth = "torch.cuda.max_memory_allocated" if on_gpu else "torch's CPU memory profile"
    text = (
        f"# Memory: what the plan says against what a step takes\n\n"
        f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, torch {torch.__version__}, Python "
        f"{platform.python_version()}. Measured: {truth} over two steps. {Path(options.model).name}.\n\n"
        f"{table(options)}\n\n{large_table(options)}\n\n"
        f"Rerun: `python benchmarks/memory.py --shapes {options.shapes}`\n"
    )
    print(text)
    if options.write:
        Path(options.write).write_text(text)


if __name__ == "__main__":
    main()
