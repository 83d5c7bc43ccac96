"""What generates answers: `engine_config: vllm`, a server of vLLM that is started and asked over HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from llmtune import Ge, Gt, Le, Plugin, hookimpl


@dataclass(frozen=True, kw_only=True)
class VllmConfig:
    """Keys of `engine_config: {name: vllm}`."""

    vllm_command: str = "vllm"
    """The executable of vLLM, in a virtual environment of its own, such as `~/vllm-env/bin/vllm`; a bare name is looked
    for on PATH."""
    vllm_server_base_url: str | None = None
    """Address of a vLLM server that runs already, such as `http://127.0.0.1:8000`; null starts one. Its own options
    hold, and the keys below that start a server say nothing."""
    vllm_api_key: str | None = None
    """The key that this server wants. A server that llmtune starts gets one that nobody else knows."""
    vllm_maxlen: Annotated[int, Ge(1)] = 4096
    """Most tokens of prompt and answer together; where the model was made for fewer, those."""
    vllm_gpu_util: Annotated[float, Gt(0), Le(1)] = 0.9
    """Share of the GPU's memory that vLLM takes. Beside a training on the same GPU it takes less, such as 0.3."""
    vllm_enforce_eager: bool = False
    """Run without CUDA graphs: starts sooner, answers more slowly."""
    vllm_max_lora_rank: Annotated[int, Ge(1)] = 32
    """The largest rank of an adapter. vLLM allows 8, 16, 32, 64, 128, 256, 320 and 512."""
    vllm_config: dict[str, Any] | str | None = None
    """Further options of `vllm serve`, as a mapping or as JSON: `{tensor_parallel_size: 2}`."""
    vllm_devices: str | None = None
    """The GPUs of the server, as CUDA_VISIBLE_DEVICES has them, such as `1` or `2,3`; null gives it those of this
    process."""
    vllm_server_timeout: Annotated[float, Gt(0)] = 600.0
    """Seconds that a server may take to start."""
    vllm_answer_timeout: Annotated[float, Gt(0)] = 600.0
    """Seconds that a server may give no answer to any of the prompts it was sent."""

    def __post_init__(self) -> None:
        if self.vllm_server_base_url is not None and not self.vllm_server_base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"vllm_server_base_url: found {self.vllm_server_base_url}, allowed is an address that begins with "
                "http:// or https://"
            )


def build(config: VllmConfig) -> Any:
    """The engine."""
    from .engine import VllmEngine

    return VllmEngine(config)


@hookimpl
def engine_config() -> list[Plugin]:
    """`vllm`."""
    return [
        Plugin(
            name="vllm", config=VllmConfig, build=build,
            summary="A vLLM server in an environment of its own, over the model's files and adapters",
        )
    ]  # fmt: skip
