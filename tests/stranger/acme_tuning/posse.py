"""Ranks as plain processes of this machine, started again together where one is killed."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import time
import uuid

from llmtune import LaunchRequest, rank_environment


class Posse:
    """A `Launcher`: processes of this machine."""

    waits = True
    fails_with = None
    names_anew = False

    def ranks(self, request: LaunchRequest) -> int:
        return request.ranks or 1

    def starts(self, request: LaunchRequest) -> bool:
        return True

    def describe(self, request: LaunchRequest) -> str:
        return f"{self.ranks(request)} x {shlex.join(request.command)}"

    def launch(self, request: LaunchRequest) -> int:
        name = uuid.uuid4().hex
        for _ in range(1 + (request.restarts or 0)):
            code = self.start(request, uuid.uuid4().hex if self.names_anew else name)
            if code >= 0:
                return self.fails_with if code and self.fails_with is not None else code
        return code

    def start(self, request: LaunchRequest, name: str) -> int:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        size = self.ranks(request)
        started = []
        for rank in range(size):
            known = rank_environment(rank, size, rank, size, "127.0.0.1", port, name)
            started.append(subprocess.Popen(request.command, env={**os.environ, **known}))
        while (codes := [process.poll() for process in started]).count(0) < size:
            if failed := [code for code in codes if code]:
                for process in started:
                    process.kill()
                    process.wait()
                return failed[0]
            time.sleep(0.02)
        return 0
