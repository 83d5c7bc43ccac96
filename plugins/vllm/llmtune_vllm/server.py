"""A server of vLLM: started with all that it needs and ended with all that it started, or one that runs already."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import httpx

from llmtune import LlmtuneError, PlanError

from . import VllmConfig, keeper

BASE = "base"
"""What a server that llmtune starts calls the model itself."""
OWN = ("model", "host", "port", "uds", "api_key", "served_model_name", "enable_lora", "lora_modules", "max_lora_rank")
"""Options that llmtune sets, so that `vllm_config` cannot."""
TORCHRUN = ("RANK", "WORLD_SIZE", "GROUP_", "ROLE_", "LOCAL_", "MASTER_", "TORCHELASTIC_", "PYTHONPATH", "PYTHONHOME")
"""Beginnings of what the environment says of this process, and not of the server."""
LAST_LINES = 15
LOOKS_S = 0.2
ADAPTER_S = 300.0
"""Seconds that a server may take to read an adapter."""
HOW = (
    "vLLM lives in an environment of its own: `python -m venv ~/vllm-env && ~/vllm-env/bin/pip install vllm`, then set "
    "engine_config.vllm_command: ~/vllm-env/bin/vllm"
)


class VllmLost(LlmtuneError):
    """The server does not answer any more, or refuses what it was asked."""


def executable(command: str) -> str:
    """The path of vLLM's executable. PlanError where there is none."""
    found = shutil.which(os.path.expanduser(command))
    if found is None:
        raise PlanError(f'engine_config.vllm_command: there is no executable "{command}"; {HOW}')
    return found


def options(config: VllmConfig, folder: str, dtype: str, adapters: int, trains: bool) -> list[str]:
    """The words after `vllm serve` for the model of a folder and so many adapters at a time."""
    positions = _positions(folder)
    given: dict[str, Any] = {
        "served_model_name": BASE, "dtype": dtype, "max_model_len": min(config.vllm_maxlen, positions),
        "gpu_memory_utilization": config.vllm_gpu_util, "generation_config": "vllm",
    }  # fmt: skip
    if config.vllm_enforce_eager:
        given["enforce_eager"] = True
    if adapters:
        # While an adapter follows another, both are there.
        held = adapters + trains
        given |= {"enable_lora": True, "max_lora_rank": config.vllm_max_lora_rank, "max_loras": held}
    if trains:  # what an answer was drawn from, to compare with the model that trains
        given["logprobs_mode"] = "processed_logprobs"
    return [folder, *_words({**given, **further(config.vllm_config)})]


def further(given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """`vllm_config` as a mapping. PlanError where it is none, or sets what is llmtune's."""
    try:
        found = json.loads(given) if isinstance(given, str) else dict(given or {})
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise PlanError(
            f"engine_config.vllm_config: found {given!r:.80}, allowed is a mapping of options of `vllm serve`"
        )
    found = {key.replace("-", "_"): value for key, value in found.items()}
    if own := [key for key in OWN if key in found]:
        raise PlanError(f"engine_config.vllm_config: {own[0]} is set by llmtune; remove it")
    return found


def _words(given: Mapping[str, Any]) -> list[str]:
    words = []
    for key, value in given.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return words


def _positions(folder: str) -> int:
    told = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    told = told.get("text_config", told)
    return told.get("max_position_embeddings") or sys.maxsize


class VllmServer:
    """A server that answers. It ends with this object, and with this process, however that ends."""

    def __init__(self, config: VllmConfig, folder: str, dtype: str, *, adapters: int = 0, trains: bool = False) -> None:
        """Starts one, or looks at the one that `vllm_server_base_url` names. PlanError where there is none in the
        end."""
        self.config = config
        self.log: Path | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.key: str | None = None
        self.adapters: list[str] = []
        self._end = contextlib.ExitStack()
        weakref.finalize(self, self._end.close)
        if config.vllm_server_base_url is None:
            self._start(folder, dtype, adapters, trains)
        else:
            self.url = config.vllm_server_base_url.rstrip("/").removesuffix("/v1")
            self.key = config.vllm_api_key
        try:
            self._wait()
            self._look(folder)
        except BaseException:
            self.close()
            raise

    @property
    def headers(self) -> dict[str, str]:
        """What requests say of who asks."""
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}

    def _start(self, folder: str, dtype: str, adapters: int, trains: bool) -> None:
        command = [
            executable(self.config.vllm_command),
            "serve",
            *options(self.config, folder, dtype, adapters, trains),
        ]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.key = f"http://127.0.0.1:{port}", secrets.token_urlsafe(16)
        env = {name: value for name, value in os.environ.items() if not name.startswith(TORCHRUN)}
        env |= {"VLLM_API_KEY": self.key, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
        if self.config.vllm_devices is not None:
            env["CUDA_VISIBLE_DEVICES"] = self.config.vllm_devices
        handle, name = tempfile.mkstemp(prefix="llmtune-vllm-", suffix=".log")
        self.log = path = Path(name)
        words = [sys.executable, "-I", keeper.__file__, str(os.getpid()), *command, "--host", "127.0.0.1"]
        with open(handle, "wb") as log:
            self.process = subprocess.Popen(
                [*words, "--port", str(port)], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env,
                start_new_session=True,  # Ctrl-C is for this process, which ends the server when it is done with it
            )  # fmt: skip
        self._end.callback(_end, self.process, path, os.getpid())

    def _wait(self) -> None:
        """Until the server is ready. PlanError where it ends before, or takes too long."""
        begin, patience = time.monotonic(), self.config.vllm_server_timeout
        while True:
            if not self.runs:
                self._failed("vLLM ended before it was ready")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5, trust_env=self.process is None).status_code == 200:
                    return
            if self.process is None:
                raise PlanError(
                    f"engine_config.vllm_server_base_url: nothing answers at {self.url}/health; start the server, or "
                    "leave the key out, so that llmtune starts one"
                )
            if time.monotonic() - begin > patience:
                self._failed(f"vLLM was not ready after {patience:g} s (vllm_server_timeout)")
            time.sleep(LOOKS_S)

    def _failed(self, what: str) -> NoReturn:
        """Say so, with the end of the log."""
        raise PlanError(f"engine_config: {what}; the end of its log:\n{self.tail()}")

    def _look(self, folder: str) -> None:
        """The model that the server has, and how long its texts may be."""
        cards = self.ask("GET", "/v1/models")["data"]
        bases = [card for card in cards if card.get("parent") is None]
        own = [
            card
            for card in bases
            if self.process is not None or Path(str(card.get("root"))).resolve() == Path(folder).resolve()
        ]
        if not own:
            found = ", ".join(str(card.get("root") or card["id"]) for card in bases)
            raise PlanError(
                f"engine_config.vllm_server_base_url: the server at {self.url} has {found}, wanted is {folder}; start "
                f"it with `vllm serve {folder}`"
            )
        self.base, self.most_tokens = str(own[0]["id"]), int(own[0].get("max_model_len") or self.config.vllm_maxlen)

    @property
    def runs(self) -> bool:
        """Whether the server's process is there, as far as this machine can tell."""
        return self.process is None or self.process.poll() is None

    def ask(self, method: str, path: str, body: Any = None, timeout: float = 30.0) -> Any:
        """The server's answer. Raises VllmLost where there is none, or a refusal."""
        try:
            found = httpx.request(
                method, self.url + path, json=body, headers=self.headers, timeout=timeout,
                trust_env=self.process is None,
            )  # fmt: skip
        except httpx.HTTPError as error:
            raise self.lost(error) from None
        if found.status_code != 200:
            raise self.refused(path, found.status_code, found.text)
        return found.json() if "json" in found.headers.get("content-type", "") else found.text

    def lost(self, error: Exception) -> VllmLost:
        """What to say where a request got no answer."""
        told = f"{type(error).__name__}: {error}".rstrip(": ")
        if not self.runs or (self.process is not None and self._ends()):
            told = f"it has ended; the end of its log:\n{self.tail()}"
        return VllmLost(f"engine_config: vLLM at {self.url} does not answer: {told}")

    def _ends(self) -> bool:
        """Whether the process, whose connection has broken, is about to be gone."""
        assert self.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        return not self.runs

    def refused(self, path: str, status: int, text: str) -> VllmLost:
        """What to say where the server refused a request."""
        hint = ""
        if path.endswith("lora_adapter") and status in (404, 405):
            hint = "; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"
        if status == 401:
            hint = "; set engine_config.vllm_api_key"
        return VllmLost(f"engine_config: vLLM refused {path} ({status}): {_message(text)}{hint}")

    def load_adapter(self, folder: str) -> str:
        """What requests call the adapter of a folder from now on: a name that nobody has used, so that no answer goes
        on from what is cached of another. Raises VllmLost where the server refuses it."""
        name = f"llmtune-{secrets.token_hex(8)}"
        self.ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder}, ADAPTER_S)
        self.adapters.append(name)
        return name

    def unload_adapter(self, name: str) -> None:
        """Let an adapter go."""
        self.adapters.remove(name)
        self.ask("POST", "/v1/unload_lora_adapter", {"lora_name": name}, ADAPTER_S)

    def tail(self) -> str:
        """The last lines of the log."""
        if self.log is None or not self.log.exists():
            return "(there is none)"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-LAST_LINES:]) or "  (it is empty)"

    def close(self) -> None:
        """End the server, if llmtune started it; let another's adapters go."""
        if self.process is None:
            for name in list(self.adapters):
                with contextlib.suppress(VllmLost):
                    self.unload_adapter(name)
        self._end.close()


def _end(process: subprocess.Popen[bytes], log: Path, owner: int) -> None:
    if os.getpid() != owner:  # a fork of the process that started it
        return
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(keeper.TERM_S + 2 * keeper.KILL_S)
    log.unlink(missing_ok=True)


def _message(text: str) -> str:
    """What a refusal says, in a line."""
    with contextlib.suppress(ValueError, AttributeError):
        told = json.loads(text)
        return str(told.get("error", told).get("message", text))[:500]
    return " ".join(text.split())[:500]
