"""Low-rank adapters by PEFT: `peft_config: lora`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from llmtune import Ge, Gt, Lt, Plugin, hookimpl


@dataclass(frozen=True, kw_only=True)
class LoraRecipe:
    """Keys of `peft_config: {name: lora}`. LoRA: https://arxiv.org/abs/2106.09685."""

    r: Annotated[int, Ge(1)] = 8
    """Inner width of the adapters: r * (inputs + outputs) new parameters for each layer."""
    lora_alpha: Annotated[int, Ge(1)] = 16
    """The adapter's output is scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, Ge(0), Lt(1)] = 0.05
    """Share of the adapter's inputs that are dropped while training."""
    target_modules: str | tuple[str, ...] = "all"
    """Layers that get an adapter: `all` (every linear layer but output heads), or names as a list or comma string."""
    target_parameters: str | tuple[str, ...] | None = None
    """Weights outside linear layers that get an adapter, such as the stacks `experts.gate_up_proj, experts.down_proj`
    of a mixture of experts, one adapter for each expert. Needs `lora_dropout: 0` and no `use_dora`."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead, which suits high ranks (arXiv 2312.03732)."""
    use_dora: bool = False
    """Train the magnitude of each output apart from its direction (arXiv 2402.09353)."""
    modules_to_save: str | tuple[str, ...] | None = None
    """Modules trained in full and saved with the adapter, such as lm_head or embed_tokens."""
    loraplus_lr_ratio: Annotated[float, Gt(0)] | None = None
    """LoRA+: the learning rate of the factors at the outputs (B), and of vectors, as a multiple of `learning_rate`,
    such as 16 (arXiv 2402.12354). null: one rate for all."""
    loraplus_lr_embedding: Annotated[float, Gt(0)] = 1e-6
    """LoRA+: the learning rate of adapters of embeddings. Counts only with `loraplus_lr_ratio`."""
    adapter_name_or_path: str | tuple[str, ...] | None = None
    """Folder or hub id (`owner/name`, `owner/name@revision`) of an adapter to continue (training), or of one or several
    to use in order (inference)."""

    def __post_init__(self) -> None:
        if self.target_parameters and self.adapter_name_or_path is None:
            if self.lora_dropout:
                raise ValueError(
                    f"lora_dropout: found {self.lora_dropout} beside target_parameters, whose adapters change the "
                    "weight itself, so that no input can be dropped; set lora_dropout: 0"
                )
            if self.use_dora:
                raise ValueError(
                    "use_dora: found true beside target_parameters, allowed is false; PEFT has no such DoRA"
                )


def build(config: LoraRecipe) -> Any:
    """The edit that `config` describes."""
    from .edit import Lora

    return Lora(config)


@hookimpl
def peft_config() -> list[Plugin]:
    """`lora`."""
    return [
        Plugin(
            name="lora",
            config=LoraRecipe,
            build=build,
            summary="LoRA, rsLoRA and DoRA adapters (PEFT)",
            requires=("peft>=0.19",),
        )
    ]
