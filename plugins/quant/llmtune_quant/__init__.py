"""Quantised base weights: `quant_config: hqq`, `torchao` and `eetq`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from llmtune import Ge, Le, Plugin, hookimpl


@dataclass(frozen=True, kw_only=True)
class HqqConfig:
    """Keys of `quant_config: {name: hqq}`."""

    quantization_bit: Annotated[int, Ge(1), Le(8)] = 4
    """Bits per weight, 1 to 8. Below 3 a model needs the adapter to make sense again."""
    group_size: Annotated[int, Ge(8)] = 64
    """Numbers along the inputs of a layer that share a scale and a zero point. Smaller is nearer, and larger."""


@dataclass(frozen=True, kw_only=True)
class TorchaoConfig:
    """Keys of `quant_config: {name: torchao}`."""

    quantization_type: Literal["int8", "int4", "float8"] = "int8"
    """How weights are stored: integers of 8 bits or floats of 8 bits (e4m3) with a scale for each output, or integers
    of 4 bits with a scale for each group."""
    group_size: Annotated[int, Ge(8)] = 32
    """Numbers along the inputs of a layer that share a scale (int4 only)."""


@dataclass(frozen=True, kw_only=True)
class EetqConfig:
    """Keys of `quant_config: {name: eetq}`."""

    quantization_bit: Literal[8] = 8
    """Bits per weight."""


def build_hqq(config: HqqConfig) -> Any:
    """The edit that `config` describes."""
    from .edit import PackedEdit
    from .hqq import HalfQuadratic

    bits, group = config.quantization_bit, config.group_size
    return PackedEdit(lambda dtype: HalfQuadratic(bits=bits, group=group, dtype=dtype), group)


def build_torchao(config: TorchaoConfig) -> Any:
    """The edit that `config` describes."""
    from .edit import PackedEdit
    from .torchao import WeightOnly

    kind, group = config.quantization_type, config.group_size
    return PackedEdit(lambda dtype: WeightOnly(kind=kind, group=group, dtype=dtype), group if kind == "int4" else None)


def build_eetq(config: EetqConfig) -> Any:
    """The edit, which has no settings."""
    from .eetq import Eetq

    return Eetq()


@hookimpl
def quant_config() -> list[Plugin]:
    """The three back ends."""
    given = {"gives": frozenset({"quantized_base"})}
    return [
        Plugin(name="hqq", config=HqqConfig, build=build_hqq, summary="Base weights in 1 to 8 bits (HQQ)", **given),
        Plugin(
            name="torchao", config=TorchaoConfig, build=build_torchao, requires=("torchao>=0.18",),
            summary="int8, int4 or float8 base weights (torchao)", **given,
        ),
        Plugin(name="eetq", config=EetqConfig, build=build_eetq, summary="int8 base weights (inference, GPU)", **given),
    ]  # fmt: skip
