"""How fast do rows become packed tokens, against `datasets.map` as TRL uses it, on the same rows and tokenizer?

    python benchmarks/data.py ALPACA.json [--model DIR_OR_ID] [--rows 100000] [--workers 2] [--chats SHAREGPT.json]
                              [--write RESULT.md]

ALPACA is a data set of instruction, input, output; it is repeated to `--rows` rows, each made different by its number.
Each side is a process of its own with a cold cache and the same number of worker processes: it reads the file, renders,
tokenises with a loss mask and packs to 2048 tokens. TRL's side is what its SFTTrainer does with prompt and completion:
one `datasets.map` that renders prompt and whole, then `trl.pack_dataset` (needs `pip install datasets trl`). "again" is
a second process that finds the first one's cache. With `--chats`, tokens that multi-turn training takes are compared
with one sample for each assistant turn (prefix expansion), and with the rendering of each conversation once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CUTOFF = 2048
SIDES = ("TRL", "TRL again", "llmtune", "llmtune again")


def write_rows(source: Path, target: Path, rows: int) -> None:
    """`source` repeated; a number in each row keeps caches and identical rows out of the comparison."""
    original = json.loads(source.read_text("utf-8"))
    with target.open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = original[number % len(original)]
            instruction = f"{row['instruction']} ({number})"
            line = {"instruction": instruction, "input": row.get("input", ""), "output": row["output"]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def tokenizer_of(model: str) -> Any:
    from llmtune.model.config import ModelConfig
    from llmtune.model.source import load_tokenizer, resolve_model

    config = ModelConfig(model=model)
    return load_tokenizer(resolve_model(config, weights=False), config)


def cpu_seconds() -> float:
    """Of this process and of those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def run_llmtune(options: argparse.Namespace) -> dict[str, Any]:
    from llmtune.data import DataConfig, pack, prepare

    tokenizer = tokenizer_of(options.model)
    start, cpu = time.perf_counter(), cpu_seconds()
    config = DataConfig(dataset=options.data, cutoff_len=CUTOFF, preprocessing_num_workers=options.workers)
    samples = prepare(config, tokenizer, seed=0).train
    rows = len(pack(samples.lengths, CUTOFF))
    seconds = time.perf_counter() - start
    return {
        "tokens": samples.tokens,
        "trained": int(samples.trained.sum()),
        "rows": rows,
        "seconds": seconds,
        "cpu": cpu_seconds() - cpu,
    }


def run_trl(options: argparse.Namespace) -> dict[str, Any]:
    import datasets
    import trl

    tokenizer = tokenizer_of(options.model)
    start, cpu = time.perf_counter(), cpu_seconds()
    table = datasets.load_dataset("json", data_files=options.data, split="train")

    def messages(row: dict[str, str]) -> dict[str, Any]:
        asked = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        return {
            "prompt": [{"role": "user", "content": asked}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }

    def tokenise(row: dict[str, Any]) -> dict[str, Any]:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        shared = next((at for at, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        return {"input_ids": whole, "completion_mask": [0] * shared + [1] * (len(whole) - shared)}

    table = table.map(messages, remove_columns=table.column_names, num_proc=options.workers)
    table = table.map(tokenise, remove_columns=table.column_names, num_proc=options.workers)
    tokens = sum(len(part) for part in table.data.column("input_ids").to_numpy(zero_copy_only=False))
    packed = trl.pack_dataset(table, CUTOFF, "bfd", map_kwargs={"num_proc": options.workers})
    rows = len(packed)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    trained = sum(int(part.sum()) for part in table.data.column("completion_mask").to_numpy(zero_copy_only=False))
    return {"tokens": tokens, "trained": trained, "rows": rows, "seconds": seconds, "cpu": cpu}


def in_process(options: argparse.Namespace, side: str, data: Path, cache: Path) -> dict[str, Any]:
    """One side in a process of its own; what it prints last is its result."""
    command = [sys.executable, __file__, str(data), "--model", options.model, "--workers", str(options.workers)]
    homes = {
        "LLMTUNE_CACHE": str(cache / "llmtune"),
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "OMP_NUM_THREADS": "1",
    }
    found = subprocess.run(
        [*command, "--side", side.split()[0]], env={**os.environ, **homes}, check=True, capture_output=True, text=True
    )
    return json.loads(found.stdout.strip().splitlines()[-1])


def throughput(options: argparse.Namespace) -> list[str]:
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.jsonl"
        write_rows(Path(options.data), data, options.rows)
        found = {side: in_process(options, side, data, Path(scratch)) for side in SIDES}
    peer = found["TRL"]
    lines = [
        "| side | seconds | CPU seconds | tokens/s | against TRL | packed rows of 2048 | filled | tokens | trained |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for side, one in found.items():
        rate = one["tokens"] / one["seconds"]
        ratio = f"{rate / (peer['tokens'] / peer['seconds']):.2f} x" if "again" not in side else ""
        fill = one["tokens"] / (one["rows"] * CUTOFF)
        numbers = [f"{one['seconds']:.1f}", f"{one['cpu']:.1f}", f"{rate:,.0f}", ratio, f"{one['rows']:,}"]
        cells = [side, *numbers, f"{fill:.2%}", f"{one['tokens']:,}", f"{one['trained']:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def multi_turn(options: argparse.Namespace) -> list[str]:
    """Tokens that training takes: ours, each conversation once, and one sample for each assistant turn."""
    from llmtune.data import DataConfig, Source, chunks, find, prepare, read_row
    from llmtune.data.formats.builtin import builtin_formats
    from llmtune.data.tool_format import read_tool_format, with_tools_as_text

    tokenizer = tokenizer_of(options.model)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["LLMTUNE_CACHE"] = scratch
        keys = DataConfig(dataset=options.chats, cutoff_len=10**6, tool_format="hermes")
        ours = prepare(keys, tokenizer, seed=0).train
        tokens = ours.tokens
    found = find(Source(path=options.chats), Path.cwd())
    rows = [row.data for chunk in chunks(found) for row in chunk.rows()]
    chosen, written = builtin_formats().of(found, rows[:100]), read_tool_format("hermes", Path.cwd())
    once = expanded = turns = 0
    for row in rows:
        example = read_row(chosen, row)
        assert example.kind == "conversation" and written is not None
        messages = with_tools_as_text(example, written).messages
        ends = [at for at, message in enumerate(messages, start=1) if message["role"] == "assistant"]
        sizes = [len(tokenizer.apply_chat_template(messages[:end], return_dict=True)["input_ids"]) for end in ends]
        once, expanded, turns = once + sizes[-1], expanded + sum(sizes), turns + len(ends)
    return [
        f"{len(rows):,} conversations with {turns / len(rows):.1f} assistant turns on average:",
        "",
        "| samples | tokens | against one rendering |",
        "|---|---|---|",
        f"| each conversation rendered once | {once:,} | 1.00 x |",
        f"| llmtune | {tokens:,} | {tokens / once:.2f} x |",
        f"| one sample for each assistant turn | {expanded:,} | {expanded / once:.2f} x |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="ALPACA.json")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--chats", metavar="SHAREGPT.json")
    parser.add_argument("--write", metavar="RESULT.md")
    parser.add_argument("--side", choices=("TRL", "llmtune"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print("\n" + json.dumps((run_trl if options.side == "TRL" else run_llmtune)(options)))
        return
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    head = f"{options.rows:,} rows, {options.workers} workers, {machine}"
    lines = [head, "", *throughput(options)]
    if options.chats:
        lines += ["", *multi_turn(options)]
    text = "\n".join(lines)
    print(text)
    if options.write:
        Path(options.write).write_text(f"{text}\n", "utf-8")


if __name__ == "__main__":
    main()
