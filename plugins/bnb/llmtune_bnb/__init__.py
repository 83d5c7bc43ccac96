"""Quantised base weights by bitsandbytes: `quant_config: bnb`, and `auto`, which picks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llmtune import Plugin, hookimpl


@dataclass(frozen=True, kw_only=True)
class BnbConfig:
    """Keys of `quant_config: {name: bnb}`."""

    quantization_bit: Literal[4, 8] = 4
    """Bits per weight. 4 (QLoRA, arXiv 2305.14314) trains with an adapter; 8 (LLM.int8, arXiv 2208.07339) is for
    inference only."""
    compute_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Type of the matrix products with dequantised weights (4-bit only). `auto` is the run's compute type."""
    double_quantization: bool = True
    """Quantise the block maxima to 8 bits too: 4.13 instead of 4.5 bits a weight (4-bit only)."""
    quantization_type: Literal["nf4", "fp4"] = "nf4"
    """The sixteen values a weight can take: quantiles of a normal distribution, or 4-bit floats (4-bit only)."""


@dataclass(frozen=True, kw_only=True)
class AutoConfig:
    """Keys of `quant_config: {name: auto}`."""

    quantization_bit: Literal[4, 8] | None = None
    """Bits per weight: 4, 8 (inference only), or null, which means 4."""


def build(config: BnbConfig) -> Any:
    """The edit that `config` describes."""
    from .edit import Bnb

    return Bnb(config)


def build_auto(config: AutoConfig) -> Any:
    """bitsandbytes with its defaults and the wanted number of bits."""
    return build(BnbConfig(quantization_bit=config.quantization_bit or 4))


@hookimpl
def quant_config() -> list[Plugin]:
    """`bnb`, and `auto`, which picks it."""
    given = {"gives": frozenset({"quantized_base"}), "requires": ("bitsandbytes>=0.50.2",)}
    return [
        Plugin(
            name="bnb", config=BnbConfig, build=build, summary="4-bit or 8-bit base weights (bitsandbytes)", **given
        ),
        Plugin(
            name="auto", config=AutoConfig, build=build_auto, summary="The quantiser that suits: bitsandbytes", **given
        ),
    ]
