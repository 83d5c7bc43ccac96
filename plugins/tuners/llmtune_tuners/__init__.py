"""Adapters of PEFT besides LoRA: `peft_config: oft`, and `peft_config: peft` for any of its other tuners."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from llmtune import Ge, Lt, Plugin, hookimpl, split_names


@dataclass(frozen=True, kw_only=True)
class OftConfig:
    """Keys of `peft_config: {name: oft}`. OFT: https://arxiv.org/abs/2306.07280; as here, on the inputs of layers,
    OFTv2: https://arxiv.org/abs/2506.19847."""

    oft_rank: Annotated[int, Ge(0)] = 0
    """Into how many blocks a layer's inputs are cut; 0: it follows from `oft_block_size`. One of the two is 0."""
    oft_block_size: Annotated[int, Ge(0)] = 32
    """Inputs that one rotation turns together; 0: it follows from `oft_rank`. One of the two is 0."""
    oft_target: str | tuple[str, ...] = "all"
    """Layers that get rotations: `all` (every linear layer but output heads), or names as a list or comma string."""
    module_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the rotations that are left out of a forward pass while training."""
    modules_to_save: str | tuple[str, ...] | None = None
    """Modules trained in full and saved with the adapter, such as lm_head or embed_tokens."""
    adapter_name_or_path: str | None = None
    """Folder or hub id (`owner/name`, `owner/name@revision`) of an adapter to continue or to use."""

    def __post_init__(self) -> None:
        if (self.oft_rank == 0) == (self.oft_block_size == 0):
            raise ValueError(
                f"oft_rank: found {self.oft_rank} beside oft_block_size {self.oft_block_size}, and each follows from "
                "the other; set exactly one of them to 0"
            )

    @property
    def whole_modules_key(self) -> str:
        """The key that names modules to train in full."""
        return "modules_to_save"

    @property
    def tuner(self) -> str:
        """The name of PEFT's tuner."""
        return "OFT"

    @property
    def options(self) -> dict[str, Any]:
        """What PEFT's `OFTConfig` gets."""
        names = split_names(self.oft_target)
        return {
            "r": self.oft_rank, "oft_block_size": self.oft_block_size, "module_dropout": self.module_dropout,
            "target_modules": "all" if "all" in names else list(names),
            "modules_to_save": list(split_names(self.modules_to_save)) or None,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PeftTunerConfig:
    """Keys of `peft_config: {name: peft}`."""

    tuner: str | None = None
    """A tuner of the installed PEFT by its type or config class, such as IA3, LoHaConfig or HRA. null: the one that
    `adapter_name_or_path` says."""
    options: dict[str, Any] = field(default_factory=dict)
    """What its config class in PEFT takes, such as `{target_modules: [q_proj, v_proj]}`; `target_modules: all` is every
    linear layer but output heads. Left out, PEFT's own defaults count."""
    adapter_name_or_path: str | None = None
    """Folder or hub id (`owner/name`, `owner/name@revision`) of an adapter to continue or to use."""

    def __post_init__(self) -> None:
        if self.tuner is None and self.adapter_name_or_path is None:
            raise ValueError(
                "tuner: not given; name a tuner of PEFT, such as IA3, or an adapter in adapter_name_or_path"
            )

    @property
    def whole_modules_key(self) -> str:
        """The key that names modules to train in full."""
        return "options.modules_to_save"


def build(config: OftConfig | PeftTunerConfig) -> Any:
    """The edit that `config` describes."""
    from .edit import Tuner

    return Tuner(config)


@hookimpl
def peft_config() -> list[Plugin]:
    """`oft` and `peft`."""
    return [
        Plugin(
            name="oft",
            config=OftConfig,
            build=build,
            summary="Orthogonal fine-tuning: rotations of the inputs of layers (PEFT)",
            requires=("peft>=0.21",),
        ),
        Plugin(
            name="peft",
            config=PeftTunerConfig,
            build=build,
            summary="Any other tuner of PEFT that adapts layers, by its name",
            requires=("peft>=0.21",),
        ),
    ]
