"""Laws of launchers: every rank runs once and knows the others, failures are told and made good."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtune.contract.launching import LaunchRequest
from llmtune.testing.contract import Broken, Check, Subject, names

RANKS = 2
PATIENCE_S = 60.0
"""How long a launcher that does not wait may take."""


def laws(subject: Subject) -> list[Check]:
    """All; those on failures of launchers that wait for the ranks."""
    found = [describes_without_starting, *([starts_every_rank] if subject.ranks else [])]
    return found + ([tells_that_a_rank_failed, starts_failed_ranks_again] if subject.ranks else [])


def describes_without_starting(subject: Subject, folder: Path) -> None:
    """`describe` names what every rank will run, and leaves no process and no file behind."""
    request = _request(folder, "meet")
    with _inside(folder):
        said = subject.built().describe(request)
        if not subject.built().starts(request):
            raise Broken(f"`starts` is False for {RANKS} ranks", "Say True where there are other processes")
    if lacking := [word for word in request.command[1:] if word not in said]:
        raise Broken(f"what it describes lacks {names(lacking)} of the command", "Show the command of the ranks")
    time.sleep(0.2)
    if left := [path.name for path in folder.iterdir()]:
        raise Broken(f"`describe` left {names(left)}", "Leave starting and writing to `launch`")


def starts_every_rank(subject: Subject, folder: Path) -> None:
    """Each rank runs the command once, in this folder and with this environment, and the ranks meet."""
    with _inside(folder):
        os.environ["LLMTUNE_PROBE"] = "seen"
        code = subject.built().launch(_request(folder, "meet"))
    notes = _notes(subject, folder, 1)
    if code:
        raise Broken(f"all ranks ended well, and the exit code is {code}", "Return 0")
    for rank, note in enumerate(notes):
        known = {"size": RANKS, "sum": 3.0, "cwd": os.path.realpath(folder), "probe": "seen"}
        if odd := [name for name in known if note[name] != known[name]]:
            raise Broken(
                f"rank {rank} found {odd[0]} to be {note[odd[0]]!r}, which is {known[odd[0]]!r}",
                "Start ranks here with this environment and `llmtune.rank_environment`",
            )


def tells_that_a_rank_failed(subject: Subject, folder: Path) -> None:
    """Where a rank fails for good, the others are ended and its exit code is returned."""
    if not subject.built().waits:
        return
    with _inside(folder):
        code = subject.built().launch(_request(folder, "fail", restarts=0))
    if code != 3:
        raise Broken(f"rank 1 ended with exit code 3, and `launch` returned {code}", "Return the first failure's")
    if _alive(_notes(subject, folder, 1)[0]["pid"]):
        raise Broken("`launch` has returned, and rank 0 is still there", "End the other ranks and wait for them")


def starts_failed_ranks_again(subject: Subject, folder: Path) -> None:
    """With restarts left, all ranks are started again after one was killed, and know their launcher again."""
    with _inside(folder):
        code = subject.built().launch(_request(folder, "die", restarts=1))
    if code:
        raise Broken(f"rank 1 was killed once, and the exit code is {code}", "Start all ranks again, `restarts` times")
    for first, second in zip(_notes(subject, folder, 2, 0), _notes(subject, folder, 2, 1), strict=True):
        if first["launcher"] is None or first["launcher"] != second["launcher"]:
            raise Broken(
                f"the ranks were started by {first['launcher']}, and again by {second['launcher']}",
                "Give `rank_environment` one name for all starts of a launch, which no other has",
            )


def _request(folder: Path, what: str, **options: Any) -> LaunchRequest:
    command = (sys.executable, "-m", "llmtune.testing.launched", str(folder), what)
    return LaunchRequest(
        command=command, name="probe", output_dir=folder / "run", device="cpu", ranks=RANKS, **options
    )  # fmt: skip


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """In this folder, and with the environment as it was afterwards."""
    before, here = dict(os.environ), os.getcwd()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)


def _notes(subject: Subject, folder: Path, most: int, which: int = 0) -> list[dict[str, Any]]:
    """What each rank wrote down at its start number `which`, of `most` that there may be."""
    places = [folder / f"rank-{rank}-{which}.json" for rank in range(RANKS)]
    deadline = time.monotonic() + (0.0 if subject.built().waits else PATIENCE_S)
    while not all(place.exists() for place in places) and time.monotonic() < deadline:
        time.sleep(0.1)
    if absent := [str(rank) for rank, place in enumerate(places) if not place.exists()]:
        raise Broken(f"rank {names(absent)} of {RANKS} never ran", "Start every rank")
    if more := list(folder.glob(f"rank-*-{most}.json")) if which == most - 1 else []:
        raise Broken(f"{more[0].name[:6]} ran {most + 1} times", "Start each rank once")
    return [json.loads(place.read_text()) for place in places]


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return not Path(f"/proc/{process}/stat").exists() or " Z " not in Path(f"/proc/{process}/stat").read_text()
