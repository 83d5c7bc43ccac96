"""A stand-in for `vllm serve`: the options, routes and answers that vLLM documents, over transformers and PEFT.

vLLM itself takes a GPU and several GB. What this leaves out: everything that llmtune does not send.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

VALUES = (
    "host", "port", "served-model-name", "dtype", "max-model-len", "gpu-memory-utilization", "generation-config",
    "max-lora-rank", "max-loras", "logprobs-mode", "tensor-parallel-size", "max-num-seqs",
)  # fmt: skip
FLAGS = ("enable-lora", "enforce-eager", "trust-remote-code")
FAULT = os.environ.get("STAND_IN_FAULT", "")


def options(words: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    assert words.pop(0) == "serve"
    found["model"] = words.pop(0)
    while words:
        name = words.pop(0).removeprefix("--")
        if name in VALUES:
            found[name] = words.pop(0)
        elif name in FLAGS:
            found[name] = True
        else:
            sys.exit(f"vllm: error: unrecognized arguments: --{name}")
    return found


class Models:
    """The base and its adapters."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given, self.lock = given, threading.Lock()
        self.adapters: dict[str, str] = {}
        self.held: dict[str, Any] = {}
        self.base = given.get("served-model-name", given["model"])
        self.most = int(given.get("max-model-len", 128))
        if not FAULT:
            import torch
            from transformers import AutoModelForCausalLM

            self.held[self.base] = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32).eval()

    def load(self, name: str, path: str) -> str | None:
        """What is wrong, as vLLM says it."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        if name in self.adapters:
            return f"The lora adapter '{name}' has already been loaded."
        file = Path(path) / "adapter_config.json"
        if not file.exists():
            return f"Loading lora {name} failed: No adapter found for {path}"
        told = json.loads(file.read_text())
        if told["r"] > int(self.given["max-lora-rank"]):
            return f"LoRA rank {told['r']} is greater than max_lora_rank {self.given['max-lora-rank']}."
        if told.get("use_dora") or told.get("modules_to_save"):
            return "vLLM does not yet support DoRA."
        if len(self.adapters) >= int(self.given["max-loras"]):
            return "too many adapters for this test"
        base = AutoModelForCausalLM.from_pretrained(self.given["model"], dtype=self.held[self.base].dtype)
        self.held[name] = PeftModel.from_pretrained(base, path).eval()
        self.adapters[name] = path
        return None

    def cards(self) -> list[dict[str, Any]]:
        base = {"id": self.base, "root": self.given["model"], "parent": None, "max_model_len": self.most}
        others = [{"id": name, "root": path, "parent": self.base} for name, path in self.adapters.items()]
        return [base, *others]

    def tokens(self, body: dict[str, Any]) -> Any:
        """Each next token, its log-probability, and the likeliest."""
        import torch

        model, ids = self.held[body["model"]], list(body["prompt"])
        generator = torch.Generator().manual_seed(body["seed"])
        assert body["ignore_eos"] and body["return_token_ids"] and not body["skip_special_tokens"]
        for _ in range(body["max_tokens"]):
            with self.lock, torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1].float()
            raw = logits.log_softmax(-1)
            for token, value in (body["logit_bias"] or {}).items():
                logits[int(token)] += value
            seen = torch.tensor(sorted(set(ids)))
            penalty, held = body["repetition_penalty"], logits[seen]
            logits[seen] = torch.where(held < 0, held * penalty, held / penalty)
            for token in set(said := ids[len(body["prompt"]) :]):
                logits[token] -= body["presence_penalty"] + said.count(token) * body["frequency_penalty"]
            if body["temperature"] == 0:
                token, logs = int(logits.argmax()), logits.log_softmax(-1)
            else:
                logits = logits / body["temperature"]
                if body["top_k"] > 0:
                    logits[logits < logits.topk(body["top_k"]).values[-1]] = -torch.inf
                order = logits.sort(descending=True)
                before = order.values.softmax(-1).cumsum(-1) - order.values.softmax(-1)
                logits[order.indices[before >= body["top_p"]]] = -torch.inf
                logs = logits.log_softmax(-1)
                token = int(torch.multinomial(logs.exp(), 1, generator=generator))
            told = logs if self.given.get("logprobs-mode") == "processed_logprobs" else raw
            ids.append(token)
            ended = token in body["stop_token_ids"]
            yield token, told, "stop" if ended else None
            if ended:
                return


class Handler(BaseHTTPRequestHandler):
    models: Models
    said = 0

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode() if not isinstance(body, str) else body.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, message: str) -> None:
        self.answer(status, {"error": {"message": message, "type": "BadRequestError", "code": status}})

    def allowed(self) -> bool:
        key = os.environ.get("VLLM_API_KEY")
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self.answer(401, {"error": "Unauthorized"})
        return False

    def do_GET(self) -> None:
        if self.path == "/health":
            return self.answer(200, "")
        if self.allowed():
            self.answer(200, {"object": "list", "data": self.models.cards()})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        models, runtime = self.models, os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING")
        if self.path.endswith("_lora_adapter") and not (runtime and models.given.get("enable-lora")):
            return self.refuse(404, "Not Found")
        if self.path == "/v1/load_lora_adapter":
            wrong = models.load(body["lora_name"], body["lora_path"])
            return self.refuse(400, wrong) if wrong else self.answer(200, "Success: LoRA adapter added successfully.")
        if self.path == "/v1/unload_lora_adapter":
            models.adapters.pop(body["lora_name"])
            models.held.pop(body["lora_name"])
            return self.answer(200, "Success: LoRA adapter removed successfully.")
        if FAULT == "refuses":
            return self.refuse(400, "no")
        if FAULT == "dies":
            print("RuntimeError: CUDA error: out of luck", flush=True)
            os._exit(1)
        if FAULT == "slow":
            time.sleep(60)
        if body["model"] not in models.held:
            return self.refuse(404, f"The model `{body['model']}` does not exist.")
        if len(body["prompt"]) + body["max_tokens"] > models.most:
            return self.refuse(400, f"This model's maximum context length is {models.most} tokens.")
        self.complete(body)

    def complete(self, body: dict[str, Any]) -> None:
        if body["stream"]:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
        ids, logs, told, reason = [], [], [], "length"
        top = body.get("logprobs")
        for token, logs_V, ended in self.models.tokens(body):
            reason = ended or reason
            best = [] if top is None else [token, *logs_V.topk(top).indices.tolist()]
            ids.append(token)
            logs.append(float(logs_V[token]))
            told.append({f"token_id:{one}": float(logs_V[one]) for one in best})
            if body["stream"]:
                last = ended or ("length" if len(ids) == body["max_tokens"] else None)
                piece = self.choice(ids[-1:], logs[-1:], told[-1:], last, top)
                try:
                    self.wfile.write(f"data: {json.dumps({'choices': [piece]})}\n\n".encode())
                    self.wfile.flush()
                except OSError:
                    print("aborted", flush=True)
                    return
        if body["stream"]:
            self.wfile.write(b"data: [DONE]\n\n")
        else:
            self.answer(200, {"choices": [self.choice(ids, logs, told, reason, top)]})

    @staticmethod
    def choice(ids: Any, logs: Any, told: Any, reason: Any, top: Any) -> dict[str, Any]:
        beside = {"tokens": [f"token_id:{one}" for one in ids], "token_logprobs": logs, "top_logprobs": told}
        return {
            "index": 0, "text": "", "finish_reason": reason, "token_ids": ids,
            "logprobs": None if top is None else beside,
        }  # fmt: skip


def main() -> None:
    given = options(sys.argv[1:])
    if file := os.environ.get("STAND_IN_TOLD"):  # who runs, and what it was told
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
        env = {name: value for name, value in os.environ.items() if name.startswith(("VLLM_", "CUDA_", "RANK"))}
        Path(file).write_text(json.dumps({"pids": [os.getpid(), child.pid], "words": sys.argv[1:], "env": env}))
    if FAULT == "ends":
        sys.exit("ValueError: Free memory on device is less than desired GPU memory utilization")
    if FAULT == "never":
        print("Loading weights...", flush=True)
        time.sleep(600)
    Handler.models = Models(given)
    ThreadingHTTPServer.request_queue_size = 128
    ThreadingHTTPServer((given["host"], int(given["port"])), Handler).serve_forever()


if __name__ == "__main__":
    main()
