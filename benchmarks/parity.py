"""Do twenty steps of llmtune equal twenty steps of a loop written by hand, on a real model?

    python benchmarks/parity.py [--model DIR_OR_ID] [--write RESULT.md]

For each method the same rows, in float32 on the CPU, through `llmtune.train` and through transformers + PEFT with
torch's AdamW (the loop of tests/test_parity.py). Reported: the largest relative difference of any step's loss and
gradient norm.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

METHODS = ("full", "lora", "dora", "freeze", "qlora")


def rows(path: Path, count: int = 24) -> None:
    """Shipped rows, each with a system message, so that no template adds one of its own."""
    text = resources.files("llmtune").joinpath("data/sets/quickstart.jsonl").read_text(encoding="utf-8")
    chats = [json.loads(line)["messages"] for line in text.splitlines()]
    plain = [[m for m in chat if m["role"] != "system"] for chat in chats][:count]
    lines = [json.dumps({"messages": [{"role": "system", "content": "You help."}, *chat]}) for chat in plain]
    path.write_text("\n".join(lines), encoding="utf-8")


def compare(method: str, model: str, data: str, folder: Path) -> tuple[float, float, float, float]:
    from tests.test_parity import METHODS as KEYS
    from tests.test_parity import hand_written, recipe, reference_model, train

    size: dict[str, Any] = {"per_device_train_batch_size": 1, "learning_rate": 1e-4, "save_steps": None}
    keys = recipe(model, data, folder / method, **KEYS[method], **size)
    expected, found = hand_written(keys, reference_model(keys)), train(keys)
    loss, norm = (max(abs(a[i] / b[i] - 1) for a, b in zip(found, expected, strict=True)) for i in (0, 1))
    return expected[0][0], expected[-1][0], loss, norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--write", metavar="FILE")
    options = parser.parse_args()
    import torch

    from llmtune.model.config import ModelConfig
    from llmtune.model.source import resolve_model

    folder = str(resolve_model(ModelConfig(model=options.model), weights=True).folder)
    lines = ["| method | first loss | last loss | largest difference: loss | gradient norm |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.jsonl"
        rows(data)
        for method in METHODS:
            first, last, loss, norm = compare(method, folder, str(data), Path(scratch))
            lines.append(f"| {method} | {first:.6f} | {last:.6f} | {loss:.1e} | {norm:.1e} |")
            print(lines[-1], file=sys.stderr)
    text = (
        f"# Twenty steps against a loop written by hand\n\n{options.model}, float32, CPU, torch {torch.__version__}; "
        f"2 rows a step in 2 micro-batches, the loop in one.\n\n"
        + "\n".join(lines)
        + "\n\nRerun: `python benchmarks/parity.py`\n"
    )
    print(text)
    if options.write:
        Path(options.write).write_text(text)


if __name__ == "__main__":
    main()
