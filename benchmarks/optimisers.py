"""What does each optimiser and each adapter cost, and what does it learn, beside what its authors publish?

    python benchmarks/optimisers.py DATA.json [--model DIR_OR_ID] [--steps 100] [--rows 4] [--cutoff 256]
        [--only NAME;...] [--write RESULT.md]

DATA is any data set that llmtune reads. Every side trains on the same tokens in the same order, `--rows` rows of up to
`--cutoff` tokens a step, on one device: in float32 on a CPU, in bfloat16 on a GPU. The learning rate is each method's
usual one, constant after 10 steps of warm-up. Reported: memory as `llmtune plan` says it and as it was (on a GPU what
torch allocated; on a CPU how far the process grew beyond what it held before the model was loaded), the mean time of a
step without the first (on a CPU what all threads worked), and the mean loss of the last ten steps. The authors'
optimisers (galore-torch, apollo-torch, adam-mini, badam, torch.optim.Muon) step in a plain loop over llmtune's batches;
those that are not installed, or do not run, are said to be so. Each side is its own process.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train import cpu_name, on_gpu

WARMUP, LAST = 10, 10
RANK = {"rank": 16, "update_interval": 50}
LORA = {"name": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
SIDES: dict[str, dict[str, Any]] = {
    "adamw": {"learning_rate": 2e-5},
    "adamw, layerwise": {
        "learning_rate": 2e-5,
        "optim_config": {"name": "adamw", "layerwise": True},
        "max_grad_norm": 0,
    },
    "adamw_8bit": {"learning_rate": 2e-5, "optim_config": "adamw_8bit"},
    "muon": {"learning_rate": 2e-5, "optim_config": "muon"},
    "adam_mini": {"learning_rate": 2e-5, "optim_config": "adam_mini"},
    "galore": {"learning_rate": 1e-4, "optim_config": {"name": "galore", **RANK}},
    "apollo": {"learning_rate": 1e-4, "optim_config": {"name": "apollo", **RANK}},
    "badam": {"learning_rate": 2e-5, "optim_config": {"name": "badam", "switch_interval": 25}},
    "adafactor": {"learning_rate": 2e-5, "optim_config": "adafactor"},
    "lion": {"learning_rate": 4e-6, "optim_config": "lion"},
    "sgd": {"learning_rate": 1e-3, "optim_config": {"name": "sgd", "momentum": 0.9}},
    "lora": {"learning_rate": 2e-4, "peft_config": LORA},
    "lora, DoRA": {"learning_rate": 2e-4, "peft_config": {**LORA, "use_dora": True}},
    "lora, LoRA+": {"learning_rate": 1e-4, "peft_config": {**LORA, "loraplus_lr_ratio": 8.0}},
    "freeze": {"learning_rate": 2e-5, "peft_config": {"name": "freeze", "freeze_trainable_layers": 2}},
}
"""What llmtune trains, and the keys of each."""


def _matrices(model: Any) -> tuple[list[Any], list[Any]]:
    """The matrices of layers, and all else that trains."""
    inner = {id(p) for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [p for p in trained if id(p) in inner], [p for p in trained if id(p) not in inner]


def _muon(model: Any, lr: float) -> list[Any]:
    import torch

    inner, others = _matrices(model)
    first = torch.optim.Muon(inner, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [first, torch.optim.AdamW(others, lr=lr, weight_decay=0.0)]


def _galore(model: Any, lr: float) -> list[Any]:
    from galore_torch import GaLoreAdamW  # pyrefly: ignore[missing-import]

    inner, others = _matrices(model)
    keys = {"rank": RANK["rank"], "update_proj_gap": RANK["update_interval"], "scale": 0.25, "proj_type": "std"}
    return [GaLoreAdamW([{"params": others}, {"params": inner, **keys}], lr=lr, no_deprecation_warning=True)]


def _apollo(model: Any, lr: float) -> list[Any]:
    from apollo_torch import APOLLOAdamW  # pyrefly: ignore[missing-import]

    inner, others = _matrices(model)
    keys = {
        "rank": RANK["rank"], "update_proj_gap": RANK["update_interval"], "scale": 32.0, "proj": "random",
        "proj_type": "std", "scale_type": "channel",
    }  # fmt: skip
    return [APOLLOAdamW([{"params": others}, {"params": inner, **keys}], lr=lr)]


def _adam_mini(model: Any, lr: float) -> list[Any]:
    from adam_mini import Adam_mini  # pyrefly: ignore[missing-import]

    config = model.config
    heads, fewer = config.num_attention_heads, config.num_key_value_heads
    named = list(model.named_parameters())
    return [Adam_mini(named, lr=lr, weight_decay=0.0, dim=config.hidden_size, n_heads=heads, n_kv_heads=fewer)]


def _badam(model: Any, lr: float) -> list[Any]:
    import torch
    from badam import BlockOptimizer  # pyrefly: ignore[missing-import]

    base = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    return [
        BlockOptimizer(
            base_optimizer=base, named_parameters_list=list(model.named_parameters()), switch_block_every=25,
            switch_mode="ascending", verbose=0,
        )
    ]  # fmt: skip


AUTHORS: dict[str, tuple[str, Callable[[Any, float], list[Any]]]] = {
    "muon": ("torch.optim.Muon", _muon), "galore": ("galore-torch", _galore), "apollo": ("apollo-torch", _apollo),
    "adam_mini": ("adam-mini", _adam_mini), "badam": ("badam", _badam),
}  # fmt: skip
"""For a side of llmtune: what its authors' optimiser is called, and what makes it."""


def recipe(options: argparse.Namespace, side: str, folder: str) -> dict[str, Any]:
    return {
        "model": options.model, "dataset": options.data, "output_dir": folder,
        "cutoff_len": options.cutoff, "cutoff_policy": "drop",
        "per_device_train_batch_size": options.rows, "gradient_accumulation_steps": 1, "max_steps": options.steps,
        "warmup_steps": WARMUP, "lr_scheduler_config": "constant", "bf16": None if on_gpu() else False,
        "activation_checkpointing": "none", "logging_steps": 1, "save_steps": None, **SIDES[side],
    }  # fmt: skip


def begin() -> int:
    """Bytes that this process holds now, from where its peak is counted anew."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak becomes what is resident now
    return _status("VmRSS")


def peak_bytes(before: int) -> int:
    """Bytes at the peak: on a GPU as torch allocated them, on a CPU beyond `before`."""
    import torch

    return torch.cuda.max_memory_allocated() if on_gpu() else _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def clock_now() -> float:
    """Seconds: on a GPU of the clock, on a CPU of all threads' work, which other jobs on the machine disturb less."""
    return time.perf_counter() if on_gpu() else time.process_time()


def run_llmtune(options: argparse.Namespace) -> dict[str, Any]:
    from torch.nn.modules.module import register_module_forward_pre_hook
    from transformers import PreTrainedModel

    import llmtune

    with tempfile.TemporaryDirectory() as folder:
        keys = recipe(options, options.side, folder)
        planned = llmtune.plan(keys).cost.memory.at_peak.total
        before = begin()
        clock: list[float] = []

        def watch(module: Any, _: Any) -> None:
            if isinstance(module, PreTrainedModel) and module.base_model is module:
                clock.append(clock_now())

        register_module_forward_pre_hook(watch)
        losses = [row["loss"] for row in llmtune.train(keys).metrics if "loss" in row]
    seconds = (clock[-1] - clock[-options.steps]) / (options.steps - 1)  # what is run before training is no step
    return {"planned": planned, "peak": peak_bytes(before), "seconds": seconds, "losses": losses}


def run_authors(options: argparse.Namespace) -> dict[str, Any]:
    """A plain loop over llmtune's batches, with the model as transformers loads it."""
    import torch
    from transformers import AutoModelForCausalLM

    import llmtune

    keys = recipe(options, options.side, "unused")
    plan = llmtune.plan(keys)
    samples, order, device = plan.data.prepared.train, plan.data.batches.order, plan.device
    dtype = torch.bfloat16 if on_gpu() else torch.float32
    before = begin()
    model = AutoModelForCausalLM.from_pretrained(plan.model.files.folder, dtype=dtype).to(device).train()
    optimizers = AUTHORS[options.side][1](model, keys["learning_rate"])
    clock, losses = [], []
    for step in range(options.steps):
        rows = [samples.sample(int(index)) for index in order.step_units(step)]
        longest = max(len(ids) for ids, _ in rows)
        ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for row, (tokens, trains) in enumerate(rows):
            ids[row, : len(tokens)] = torch.as_tensor(tokens.astype("int64"))
            mask[row, : len(tokens)] = 1
            learnt = torch.as_tensor(trains.astype("bool"))
            labels[row, : len(tokens)][learnt] = ids[row, : len(tokens)][learnt]
        found = model(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)).loss
        found.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = keys["learning_rate"] * min(1.0, (step + 1) / WARMUP)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(found))
        clock.append(clock_now())
    seconds = (clock[-1] - clock[0]) / (options.steps - 1)
    return {"planned": None, "peak": peak_bytes(before), "seconds": seconds, "losses": losses}


def measure(options: argparse.Namespace, side: str, authors: bool) -> dict[str, Any] | str:
    """The figures of a side in a process of its own, or the line that says why there are none."""
    words = [sys.executable, __file__, options.data, "--model", options.model, "--steps", str(options.steps)]
    words += ["--rows", str(options.rows), "--cutoff", str(options.cutoff)]
    words += ["--side", side, *(["--authors"] if authors else [])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if not lines:
        return (done.stderr.strip().splitlines() or ["no output"])[-1][:90]
    return json.loads(lines[-1].removeprefix("FIGURES "))


def table(options: argparse.Namespace) -> str:
    seconds = "seconds a step" if on_gpu() else "seconds a step (CPU time)"
    lines = [
        f"| side | memory, planned | memory, measured | {seconds} | first loss | last loss |",
        "|" + "---|" * 6,
    ]
    for side in map(str.strip, options.only.split(";")) if options.only else SIDES:
        for authors in (False, True) if side in AUTHORS else (False,):
            name = f"{AUTHORS[side][0]}, plain loop" if authors else f"llmtune {side}"
            found = measure(options, side, authors)
            print(name, found if isinstance(found, str) else f"{found['seconds']:.2f} s a step", flush=True)
            if isinstance(found, str):
                lines.append(f"| {name} | | | did not run: {found} | | |")
                continue
            planned = f"{found['planned'] / 2**30:.2f} GiB" if found["planned"] else ""
            last = statistics.mean(found["losses"][-LAST:])
            lines.append(
                f"| {name} | {planned} | {found['peak'] / 2**30:.2f} GiB | {found['seconds']:.3f} "
                f"| {found['losses'][0]:.3f} | {last:.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--cutoff", type=int, default=256, help="tokens of a row at most; longer ones are left out")
    parser.add_argument("--only", metavar="NAME;...", help=f"some of: {'; '.join(SIDES)}")
    parser.add_argument("--write", metavar="FILE")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--authors", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print("\nFIGURES " + json.dumps(run_authors(options) if options.authors else run_llmtune(options)))
        return
    import torch

    where = torch.cuda.get_device_name() if on_gpu() else f"{cpu_name()}, {torch.get_num_threads()} threads"
    data, size = Path(options.data).name, f"--steps {options.steps} --rows {options.rows} --cutoff {options.cutoff}"
    text = (
        f"# Optimisers and adapters\n\n{where}, torch {torch.__version__}, Python {platform.python_version()}. "
        f"{options.model}, {options.steps} steps of {options.rows} rows of {data}, of at most {options.cutoff} tokens; "
        f"the last loss is the mean of {LAST} steps.\n\n{table(options)}\n\n"
        f"Rerun: `python benchmarks/optimisers.py {data} {size}`\n"
    )
    print(text)
    if options.write:
        Path(options.write).write_text(text)


if __name__ == "__main__":
    main()
