"""A process of its own that imports libraries one after the other and tells of each. A library that is broken may end
the process that imports it, and no report would come of that."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

SAID = "llmtune-doctor "
"""Before each line that is meant for the report: libraries print lines, too."""
PATIENCE_S = 300
TORCH = "torch"


def say(**facts: Any) -> None:
    """Tell the report."""
    print(SAID + json.dumps(facts), flush=True)


def torch_facts() -> dict[str, Any]:
    """What torch was built for, and the devices that it sees."""
    torch: Any = sys.modules[TORCH]
    facts: dict[str, Any] = {"cuda build": torch.version.cuda, "threads": torch.get_num_threads(), "devices": []}
    if torch.cuda.is_available():
        for at in range(torch.cuda.device_count()):
            about, (free, total) = torch.cuda.get_device_properties(at), torch.cuda.mem_get_info(at)
            facts["devices"].append({
                "name": about.name, "memory": total, "free": free, "capability": f"{about.major}.{about.minor}",
                "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
            })  # fmt: skip
    elif torch.version.cuda:
        try:
            torch.cuda.init()
        except Exception as error:
            facts["no device"] = " ".join(str(error).split())
    return facts


def import_all(modules: Sequence[str]) -> None:
    """Import modules in their order, up to a torch that cannot be imported: the rest stands on it."""
    for module in modules:
        say(module=module)
        try:
            import_module(module)
            say(module=module, facts=torch_facts() if module == TORCH else {})
        except BaseException as error:
            say(module=module, error=f"{type(error).__name__}: {' '.join(str(error).split())}")
            if module == TORCH:
                return


def probe(modules: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Import modules in a process of its own; for each that was tried its `facts`, or its `error`."""
    command = [sys.executable, "-m", "llmtune.doctor.probe", *modules]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S)
        out, ended = done.stdout, f"the process ended with code {done.returncode} during the import"
    except subprocess.TimeoutExpired as error:
        out = (error.stdout or b"").decode(errors="replace")
        ended = f"the import took longer than {PATIENCE_S} s"
    found: dict[str, dict[str, Any]] = {}
    for line in out.splitlines():
        if line.startswith(SAID):
            facts = json.loads(line.removeprefix(SAID))
            module = facts.pop("module")
            found[module] = facts or {"error": ended}
    return found


if __name__ == "__main__":
    import_all(sys.argv[1:])
