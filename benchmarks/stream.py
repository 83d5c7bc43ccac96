"""How long until the first batch, from a file of JSON Lines that is larger than one would like to tokenise first?

    python benchmarks/stream.py [--model DIR_OR_ID] [--gigabytes 1] [--workers 2] [--batches 200] [--map-rows 10000]
                                [--write RESULT.md]

The file is generated in a temporary folder: rows of instruction and output, 2 kB on average. Each side is a process of
its own with a cold cache, and gives batches of 8 rows of up to 2048 tokens with a loss mask:

    llmtune            `streaming: true`, shuffled 16,384 rows at a time, `--workers` processes
    llmtune, packed    the same with `packing: true`
    datasets stream    `load_dataset(streaming=True)`, `shuffle(buffer_size=16384)`, `map` with TRL's tokenising
    datasets map       `load_dataset` and TRL's two `map` calls over all rows, `--workers` processes. Only `--map-rows`
                       are mapped, and what all rows would take longer is added (0: all are mapped).

Time begins when the tokenizer is loaded. Needs `pip install datasets`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BATCH, CUTOFF, BUFFER = 8, 2048, 16384
SIDES = ("llmtune", "llmtune, packed", "datasets stream", "datasets map")


def write_rows(path: Path, size: int) -> int:
    """Rows until the file has `size` bytes; how many."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucmfw", k=draw.randint(2, 9))) for _ in range(4000)]
    texts = [" ".join(draw.choices(words, k=draw.randint(20, 600))) for _ in range(2000)]
    written = rows = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            line = {"instruction": f"Repeat after me, for the time {rows}.", "output": draw.choice(texts)}
            written += file.write(json.dumps(line) + "\n")
            rows += 1
    return rows


def tokenizer_of(model: str) -> Any:
    from llmtune.model.config import ModelConfig
    from llmtune.model.source import load_tokenizer, resolve_model

    config = ModelConfig(model=model)
    return load_tokenizer(resolve_model(config, weights=False), config)


def stream_llmtune(options: argparse.Namespace, tokenizer: Any, packed: bool) -> Iterator[int]:
    """Trained tokens of each batch."""
    import torch

    from llmtune.data import DataConfig, prepare
    from llmtune.data.stream_loader import StreamLoader
    from llmtune.distributed.ranks import Ranks

    yield 0  # imports are done
    config = DataConfig(
        dataset=options.data, cutoff_len=CUTOFF, streaming=True, buffer_size=BUFFER, packing=packed,
        preprocessing_num_workers=options.workers,
    )  # fmt: skip
    made = prepare(config, tokenizer, seed=0)
    assert made.stream is not None
    feed = StreamLoader.over(
        made.stream, made.train, per_device=BATCH, micro_steps=1, ranks=Ranks(), flat=packed, pad_id=0
    )
    try:
        for step in itertools.count():
            (batch,) = feed.step(step, torch.device("cpu"))
            yield len(batch.targets)
    finally:
        feed.close()


def stream_datasets(options: argparse.Namespace, tokenizer: Any, rows: int | None) -> Iterator[int]:
    """The same with the datasets library; `rows` are mapped before the first batch, None streams."""
    import datasets
    import torch

    yield 0

    def messages(row: dict[str, str]) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": row["instruction"]}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }

    def tokenise(row: dict[str, Any]) -> dict[str, Any]:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        mask = ([0] * len(prompt) + [1] * (len(whole) - len(prompt)))[:CUTOFF]
        return {"input_ids": whole[:CUTOFF], "completion_mask": mask}

    table: Any = datasets.load_dataset("json", data_files=options.data, split="train", streaming=rows is None)
    if rows is None:
        table = table.shuffle(seed=0, buffer_size=BUFFER).map(messages, remove_columns=["instruction", "output"])
        table = table.map(tokenise, remove_columns=["prompt", "completion"])
    else:
        whole, size = table, rows or len(table)

        def mapped(count: int) -> Any:
            part = whole.select(range(count))
            part = part.map(messages, remove_columns=part.column_names, num_proc=options.workers)
            return part.map(tokenise, remove_columns=part.column_names, num_proc=options.workers)

        begun = time.perf_counter()
        if size < len(whole):
            mapped(options.workers)
        fixed = time.perf_counter() - begun  # what the processes cost however few the rows
        table = mapped(size)
        options.unmapped = (time.perf_counter() - begun - 2 * fixed) * (len(whole) / size - 1) - fixed
        table = table.shuffle(seed=0)
    found = iter(table)
    while batch := list(itertools.islice(found, BATCH)):
        width = max(len(row["input_ids"]) for row in batch)
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in batch])
        assert ids.shape == (len(batch), width)
        yield sum(sum(row["completion_mask"]) for row in batch)


def measure(options: argparse.Namespace) -> dict[str, float]:
    tokenizer = tokenizer_of(options.model)
    options.unmapped = 0.0
    library, _, way = options.side.replace(",", "").partition(" ")
    if library == "llmtune":
        batches = stream_llmtune(options, tokenizer, way == "packed")
    else:
        batches = stream_datasets(options, tokenizer, options.map_rows if way == "map" else None)
    next(batches)
    start = time.perf_counter()
    next(batches)
    first = time.perf_counter() - start
    tokens = sum(itertools.islice(batches, options.batches))
    seconds = time.perf_counter() - start - first
    batches.close()
    return {"first": first + options.unmapped, "rate": tokens / seconds, "added": options.unmapped}


def in_process(options: argparse.Namespace, side: str, data: Path, cache: Path) -> dict[str, float]:
    """One side in a process of its own; what it prints last is its result."""
    command = [
        sys.executable,
        __file__,
        "--model",
        options.model,
        "--workers",
        str(options.workers),
        "--data",
        str(data),
    ]
    command += ["--batches", str(options.batches), "--map-rows", str(options.map_rows), "--side", side]
    homes = {
        "LLMTUNE_CACHE": str(cache / "llmtune"), "HF_DATASETS_CACHE": str(cache / "datasets"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    found = subprocess.run(command, env={**os.environ, **homes}, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--map-rows", type=int, default=10_000)
    parser.add_argument("--write", metavar="RESULT.md")
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print("\n" + json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.jsonl"
        rows = write_rows(data, int(options.gigabytes * 1e9))
        found = {side: in_process(options, side, data, Path(scratch)) for side in SIDES}
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    lines = [
        f"{options.gigabytes:g} GB of JSON Lines, {rows:,} rows, batches of {BATCH}, {options.workers} workers, "
        f"{machine}",
        "",
        f"| side | first batch, s | of it calculated, s | trained tokens/s over the next {options.batches} batches |",
        "|---|---|---|---|",
    ]
    for side, one in found.items():
        scaled = f"{one['added']:,.0f}" if one["added"] > 0 else ""
        lines.append(f"| {side} | {one['first']:,.1f} | {scaled} | {one['rate']:,.0f} |")
    text = "\n".join(lines)
    print(text)
    if options.write:
        Path(options.write).write_text(f"{text}\n", "utf-8")


if __name__ == "__main__":
    main()
