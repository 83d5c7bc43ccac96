"""Does a recipe that `llmtune convert` wrote learn what LLaMA-Factory 0.9.5 learns from the file it was made of?

    python benchmarks/convert_parity.py [--model DIR_OR_ID] [--steps 20] [--write RESULT.md]

A classic LoRA file is given to `llamafactory-cli train` in an environment of its own (that of benchmarks/peers.py, made
by pip once), and converted and trained here: float32 on the CPU, no dropout. Both begin with one adapter, which PEFT
made in that environment, read the same `dataset_info.json`, and take the rows in the order of the file
(`disable_shuffling: true`), as two trainers' random orders are never the same. The template is Mistral's, as
LLaMA-Factory also trains the line break that others write after an answer's end, and answers begin with a letter, as it
also trains a space of the template that is a token of its own. Reported: the losses of each step; the exit code says
whether they agree to 1e-3.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

FILE = """### model
model_name_or_path: {model}
adapter_name_or_path: adapter

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: rows
dataset_dir: sets
template: mistral
cutoff_len: 256
disable_shuffling: true
overwrite_cache: true

### output
output_dir: there
logging_steps: 1
save_strategy: "no"
overwrite_output_dir: true
report_to: none

### train
per_device_train_batch_size: 4
learning_rate: 1.0e-3
max_steps: {steps}
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: false
"""
ADAPTER = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).save_pretrained("adapter")
"""


def write_rows(folder: Path, count: int) -> None:
    """Shipped conversations of one turn, each with a system message, so that no template adds one of its own."""
    text = resources.files("llmtune").joinpath("data/sets/quickstart.jsonl").read_text(encoding="utf-8")
    chats = [[m for m in json.loads(line)["messages"] if m["role"] != "system"] for line in text.splitlines()]
    rows = [
        {"system": "You help.", "instruction": question["content"], "input": "", "output": answer["content"]}
        for question, answer, *_ in chats
        if answer["content"][0].isalpha()  # before a digit the template's space is a token, which LLaMA-Factory trains
    ]
    rows.sort(key=lambda row: len(row["instruction"] + row["output"]))
    folder.mkdir()
    (folder / "rows.json").write_text(json.dumps(rows[:count]))
    columns = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json", "columns": columns}}))


def there(model: str) -> list[float]:
    """The losses of LLaMA-Factory's own run of `there.yaml`."""
    from benchmarks.peers import python_of

    python = python_of("LLaMA-Factory")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([python, "-c", ADAPTER, model], check=True, env=environment)
    subprocess.run([python.parent / "llamafactory-cli", "train", "there.yaml"], check=True, env=environment)
    state = json.loads(Path("there/trainer_state.json").read_text())
    return [line["loss"] for line in state["log_history"] if "loss" in line]


def here() -> list[float]:
    """The losses of the recipe that `llmtune convert` writes of the same file."""
    import llmtune

    llmtune.convert("there.yaml", "here.yaml", strict=True)
    run = llmtune.train("here.yaml", output_dir="here")
    lines = (run.output_dir / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--write", metavar="FILE")
    options = parser.parse_args()
    from llmtune.model.config import ModelConfig
    from llmtune.model.source import resolve_model

    model = str(resolve_model(ModelConfig(model=options.model), weights=True).folder)
    target = Path(options.write).absolute() if options.write else None
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        write_rows(Path("sets"), 4 * options.steps)
        Path("there.yaml").write_text(FILE.format(model=model, steps=options.steps))
        theirs, ours = there(model), here()
        recipe = Path("here.yaml").read_text().replace(model, options.model)
    pairs = list(zip(theirs, ours, strict=True))
    lines = ["| step | LLaMA-Factory | llmtune | difference |", "|---|---|---|---|"]
    lines += [f"| {step} | {a:.4f} | {b:.4f} | {abs(a - b):.1e} |" for step, (a, b) in enumerate(pairs, 1)]
    worst = max(abs(a - b) for a, b in pairs)
    text = (
        f"# A file of LLaMA-Factory 0.9.5, and its conversion\n\n{options.model}, float32, CPU, LoRA without "
        f"dropout, 4 rows a step, in the order of the file on both sides. Largest difference of a "
        f"step's loss: {worst:.1e}.\n\n"
        + "\n".join(lines) + "\n\nThe recipe that `llmtune convert` wrote:\n\n"
        f"```yaml\n{recipe}```\n\nRerun: `python benchmarks/convert_parity.py`\n"
    )  # fmt: skip
    print(text)
    if target:
        target.write_text(text)
    if worst > 1e-3:
        raise SystemExit(f"the losses differ by {worst:.1e}, more than 1e-3")


if __name__ == "__main__":
    main()
