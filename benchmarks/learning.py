"""Do the recipes of preferences and rewards learn? Each with several seeds, measured on rows that it did not see.

    python benchmarks/learning.py [dpo kto rm grpo ppo pictures] [--seeds 1 2 3] [--threads 2] [--write RESULT.md]

dpo and kto: the share of pairs of `llmtune:preferences_held_out` whose plain answer gained more log-probability than
the other one, by transformers and PEFT from what the run has saved. rm: the share of these pairs whose plain answer has
the larger reward. Chance is a half for the three. grpo and ppo: the mean reward of answers that are drawn, of the first
step before its update and of the held-out questions at the end; 1.5 is all. pictures: the share of right answers about
pictures that are drawn anew, for each kind of question, by transformers from what the run has saved; before stands
chance.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llmtune.testing.pictures import CHANCE, accuracy, answers, write_all

ROOT = Path(__file__).parents[1]
HELD_OUT = ROOT / "llmtune" / "data" / "sets" / "preferences_held_out.jsonl"
RECIPES = ("dpo", "kto", "rm", "grpo", "ppo", "pictures")


def answer_logp(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """The log-probability of an answer, by the model's own template."""
    import torch

    asked = [{"role": "user", "content": prompt}]
    ids = [
        tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, add_generation_prompt=more)
        for turns, more in ((asked, True), ([*asked, {"role": "assistant", "content": answer}], False))
    ]
    with torch.no_grad():
        logps = model(torch.tensor([ids[1]])).logits[0, :-1].float().log_softmax(-1)
    targets = torch.tensor(ids[1][1:])
    return logps.gather(1, targets[:, None])[len(ids[0]) - 1 :, 0].sum().item()


def gained_more(run: Path) -> float:
    """The share of held-out pairs whose plain answer gained more than the other one."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run / "model"
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    import llmtune

    files = llmtune.plan({"model": base, "dataset": "llmtune:quickstart", "output_dir": "unused"}).model.files.folder
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files, dtype=torch.float32), folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    gained, rows = 0, [json.loads(line) for line in HELD_OUT.read_text().splitlines()]
    for row in rows:
        now = [answer_logp(model, tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        with model.disable_adapter():
            first = [answer_logp(model, tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        gained += now[0] - first[0] > now[1] - first[1]
    return gained / len(rows)


def learn(recipe: str, seed: int, threads: int) -> tuple[dict[str, tuple[float, float]], float]:
    """Run a recipe as a user does; what it knew before and after, of each kind that is measured, and the minutes."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        if recipe == "pictures":
            write_all(Path(folder) / "shapes", seed=seed)
        started = time.perf_counter()
        command = [
            sys.executable, "-m", "llmtune", "train", str(ROOT / "recipes" / f"{recipe}.yaml"), f"seed={seed}",
            f"output_dir={run}",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
        if done.returncode:
            raise SystemExit(f"{recipe} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        minutes = (time.perf_counter() - started) / 60
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        ends = [row for row in rows if "eval_loss" in row]
        if recipe == "pictures":
            right = accuracy(answers(run / "model", Path(folder) / "shapes" / "held_out.jsonl"))
            return {f", {kind}": (CHANCE[kind], share) for kind, share in right.items()}, minutes
        if recipe in ("dpo", "kto"):
            return {"": (0.5, gained_more(run))}, minutes
        if recipe == "rm":
            return {"": (0.5, ends[-1]["eval_rewards/accuracies"])}, minutes
        return {"": (rows[0]["reward"], ends[-1]["eval_reward"])}, minutes


def lines(recipe: str, found: list[tuple[dict[str, tuple[float, float]], float]]) -> list[str]:
    """A line of the table for each kind that is measured."""
    minutes, made = statistics.median(minutes for _, minutes in found), []
    for kind in found[0][0]:
        before, after = (", ".join(f"{known[kind][at]:.2f}" for known, _ in found) for at in (0, 1))
        made.append(f"| `recipes/{recipe}.yaml`{kind} | {before} | {after} | {minutes:.1f} |")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES, choices=[*RECIPES, []])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    table = ["| recipe | before | after | minutes |", "|---|---|---|---|"]
    for recipe in options.recipes or RECIPES:
        found = []
        for seed in options.seeds:
            found.append(learn(recipe, seed, options.threads))
            print(f"{recipe}, seed {seed}: {found[-1]}", flush=True)
        table += lines(recipe, found)
    text = (
        f"# Do the recipes learn?\n\ntorch {torch.__version__}, Python {platform.python_version()}, "
        f"{options.threads} threads; seeds {', '.join(map(str, options.seeds))}.\n\n" + "\n".join(table) + "\n\n"
        "What the columns mean stands at the top of `benchmarks/learning.py`. Rerun: "
        f"`{' '.join(['python benchmarks/learning.py', *options.recipes])}`\n"
    )
    print(text)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
