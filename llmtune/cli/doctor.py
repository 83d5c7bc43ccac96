"""`llmtune doctor`: a report on this machine. It works where torch does not."""

from __future__ import annotations

from typing import Any

from llmtune.cli.arguments import add_command
from llmtune.terminal import say, show_doing


def add_commands(commands: Any) -> None:
    """Add what looks at the installation."""
    doctor = add_command(
        commands, "doctor", _doctor, "Report versions, devices, disks, plugins and problems",
        "To be pasted into an issue: no secrets, nothing is fetched. The exit code is 1 where problems are found.",
    )  # fmt: skip
    doctor.add_argument("--json", action="store_true", help="for machines")


def _doctor(options: Any) -> int:
    import json

    from llmtune.doctor.report import examine

    show_doing()
    found = examine()
    if options.json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        say(str(found))
    return 1 if found.problems else 0
