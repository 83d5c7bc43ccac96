"""`python -m llmtune.testing.launched FOLDER WHAT`: a rank that leaves a note of what its launcher gave it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from llmtune.training.lock import launcher


def main(folder: Path, what: str) -> int:
    """`meet` sums the ranks' numbers, `fail` ends rank 1 with exit code 3 while the others wait, `die` kills rank 1 at
    its first start."""
    rank = int(os.environ["RANK"])
    start = len(list(folder.glob(f"rank-{rank}-*.json")))
    note: dict[str, Any] = {
        "size": int(os.environ["WORLD_SIZE"]), "local": int(os.environ["LOCAL_RANK"]), "cwd": os.getcwd(),
        "pid": os.getpid(), "launcher": launcher(), "probe": os.environ.get("LLMTUNE_PROBE"), "sum": None,
    }  # fmt: skip
    if what == "meet":
        note["sum"] = _summed(rank)
    place = folder / f"rank-{rank}-{start}.json"
    place.with_suffix(".part").write_text(json.dumps(note))
    place.with_suffix(".part").rename(place)
    if what == "meet" or start:
        return 0
    deadline = time.monotonic() + 60
    while rank == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    while not (folder / "rank-0-0.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return 3


def _summed(rank: int) -> float:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor(float(rank + 1))
    dist.all_reduce(total)
    dist.barrier()
    dist.destroy_process_group()
    return float(total)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    os._exit(code)  # gloo's threads abort some interpreters at their end
