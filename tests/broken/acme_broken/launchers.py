"""The stranger's launcher, spoilt in one way each."""

from __future__ import annotations

from acme_tuning.posse import Posse

from llmtune import LaunchRequest


class ForgetsTheLast(Posse):
    def ranks(self, request: LaunchRequest) -> int:
        return super().ranks(request) - 1


class WritesToDescribe(Posse):
    def describe(self, request: LaunchRequest) -> str:
        (request.output_dir.parent / "job.sh").write_text("")
        return super().describe(request)


class SwallowsFailures(Posse):
    fails_with = 0


class ForgetsWhoItIs(Posse):
    names_anew = True
