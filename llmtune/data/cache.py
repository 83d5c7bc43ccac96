"""Tokenised data is made once for each content and each way of reading it, by one process, before any process group.

A store is written beside its final name and renamed when it is whole, so that what is there can be used by everyone.
Ranks that want the same store meet at a file lock: one works, the others wait and find its result, or its error.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.contract.errors import DataError, listed
from llmtune.data.hashes import file_state
from llmtune.data.store import StoreWriter, Tokenised, foreign_files, open_store, read_about

CODE = "llmtune_code"
"""The fact that is a hash of the code that makes tokens. It keeps the cache from what code under development made."""
_FAILED = "failed.json"
_SPEAK_AFTER_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a store is kept, and who may make it."""

    folder: Path
    facts: Mapping[str, Any]
    """Everything its content depends on."""
    chosen: bool
    """Whether the recipe names the folder, which then may hold something else."""
    shared: bool
    """Whether all machines see it, so that one of them works for all."""
    overwrite: bool
    copy_of: Place | None = None
    """Where the same store may lie already, to be copied instead of being made again."""

    def get(self, make: Callable[[StoreWriter], None]) -> Tokenised:
        """The store, made now if it is not there. Raises what `make` raises, and DataError."""
        if self.has():
            return self.open()
        self.check_ours()
        try:
            with self._locked() as waited:
                if not (self._found() and (not self.overwrite or self._just_made())):
                    self._make(make, waited)
        except OSError as error:
            key = "tokenized_path" if self.chosen else "LLMTUNE_CACHE"
            raise DataError(
                f"{self.folder}: tokenised data cannot be written ({error.strerror or error}); set {key} to a folder "
                "with room that can be written to"
            ) from None
        return self.open(checked=True)

    def _found(self) -> bool:
        """Whether the wanted store is there; DataError where a folder of the recipe's choice holds another."""
        about = read_about(self.folder)
        if about is None:
            return False
        kept, wanted = about["facts"], json.loads(json.dumps(self.facts))
        if self.chosen:  # may have been made by an earlier code, whose tokens were the same if its version is
            kept, wanted = ({key: facts[key] for key in facts if key != CODE} for facts in (kept, wanted))
        if kept == wanted:
            return self.chosen or self._just_made() or not _mended(about)
        if self.overwrite or not self.chosen:
            return False
        other = sorted(key for key in {*kept, *wanted} if kept.get(key) != wanted.get(key))
        raise DataError(
            f"tokenized_path: {self.folder} holds data that was tokenised otherwise (other {', '.join(other)}); name "
            "another folder, or set overwrite_cache: true"
        )

    def open(self, checked: bool = False) -> Tokenised:
        """The store that is there, compared with what was written unless it was `checked`. DataError if damaged."""
        try:
            return open_store(self.folder, checked)
        except (ValueError, KeyError, OSError) as error:
            raise DataError(
                f"{self.folder}: damaged ({error}); delete the folder, or set overwrite_cache: true"
            ) from None

    def has(self) -> bool:
        """Whether the wanted store is there and is to be used."""
        return not self.overwrite and self._found()

    def check_ours(self) -> None:
        """DataError where the recipe's folder holds anything that llmtune did not write: it would be replaced."""
        if self.chosen and (foreign := foreign_files(self.folder)):
            raise DataError(
                f"tokenized_path: {self.folder} holds {listed(foreign, 3)}, which llmtune did not write, so it is not "
                "replaced; name another folder"
            )

    def _just_made(self) -> bool:
        """Whether another rank of this launch made it."""
        about = read_about(self.folder)
        return about is not None and bool(_launch()) and about["made_by"] == _launch()

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """Hold the lock of this store; tells whether another process had it first."""
        from filelock import FileLock, Timeout

        name = hashlib.sha256(str(self.folder.absolute()).encode()).hexdigest()[:16]
        # A lock on this machine lets each machine work for itself; one beside the store is seen by all.
        beside = self.folder.parent if self.shared else Path(tempfile.gettempdir()) / f"llmtune-{_user()}"
        beside.mkdir(parents=True, exist_ok=True)
        lock, waited = FileLock(beside / f".{name}.lock"), False
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waited = True
            try:
                lock.acquire(timeout=_SPEAK_AFTER_S)
            except Timeout:
                print("Waiting for another process, which tokenises the same data", file=sys.stderr, flush=True)
                lock.acquire()
        try:
            yield waited
        finally:
            lock.release()

    def _make(self, make: Callable[[StoreWriter], None], waited: bool) -> None:
        note = self.folder.with_name(f".{self.folder.name}.{_FAILED}")
        if waited and _launch():
            _raise_as_noted(note)
        ours = re.compile(rf"\.{re.escape(self.folder.name)}\.\d+(\.old)?\.tmp")
        for left in self.folder.parent.iterdir() if self.folder.parent.is_dir() else ():
            if ours.fullmatch(left.name):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        new = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.tmp")
        new.mkdir(parents=True)
        try:
            if self.copy_of is not None and self.copy_of.has():
                self.copy_of.open()
                shutil.copytree(self.copy_of.folder, new, dirs_exist_ok=True)
            else:
                make(StoreWriter(folder=new, facts=self.facts, made_by=_launch()))
        except BaseException as error:
            if isinstance(error, DataError) and _launch():
                note.write_text(json.dumps({"launch": _launch(), "error": str(error)}), "utf-8")
            shutil.rmtree(new, ignore_errors=True)
            raise
        note.unlink(missing_ok=True)
        if self.folder.exists():
            old = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.old.tmp")
            self.folder.rename(old)  # who has it mapped keeps it
            shutil.rmtree(old, ignore_errors=True)
        new.rename(self.folder)


def _mended(about: Mapping[str, Any]) -> bool:
    """Whether a file that kept rows out of a store is there now, or is another one."""
    return any(file_state(Path(path)) != state for path, state in about.get("blamed", {}).items())


def key_of(facts: Mapping[str, Any]) -> str:
    """A short name for everything that tokens depend on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _raise_as_noted(note: Path) -> None:
    """What another rank of this launch found wrong need not be found out again by each."""
    try:
        noted = json.loads(note.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return
    if noted["launch"] == _launch():
        raise DataError(noted["error"])


def _launch() -> str:
    """What the processes of one launch have in common; empty for a process by itself."""
    said, names = os.environ, ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    if int(said.get("WORLD_SIZE", 1)) == 1:
        return ""
    # Every plain `torchrun` has the same names. On one machine its ranks have a parent in common, too.
    alone = "TORCHELASTIC_RUN_ID" in said and said.get("LOCAL_WORLD_SIZE") == said.get("WORLD_SIZE")
    return "/".join([*(said.get(name, "") for name in names), str(os.getppid()) if alone else ""])


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
