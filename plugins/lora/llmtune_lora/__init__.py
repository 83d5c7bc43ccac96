"""Low-rank adapters by PEFT: `peft_config: lora`."""

from __future__ import annotations

import re
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
    rank_pattern: dict[str, int] | None = None
    """Other values of `r` for some layers: `{q_proj: 16}`. A key is a name, a path's end or a regular expression."""
    alpha_pattern: dict[str, int] | None = None
    """Other values of `lora_alpha` for some layers, as in `rank_pattern`."""
    exclude_modules: str | tuple[str, ...] | None = None
    """Layers of `target_modules` that get no adapter, by name."""
    layers_to_transform: int | tuple[int, ...] | None = None
    """Numbers of the transformer layers whose parts get adapters, from 0. null: all."""
    layers_pattern: str | tuple[str, ...] | None = None
    """The name before a layer's number (`layers`), for models with several numbered lists."""
    init_lora_weights: bool | str = True
    """What new adapters start from. true: A random, B zero. `gaussian`, `orthogonal`: random otherwise. `pissa`,
    `pissa_niter_16`, `olora`: a part of the weight, which the base then lacks."""
    pissa_init: bool = False
    """PiSSA: adapters start as the largest singular values of their weights, the (quantised) base keeps the rest
    (arXiv 2404.02948). The same as `init_lora_weights: pissa_niter_16`."""
    pissa_iter: int | None = 16
    """PiSSA: iterations of the fast singular value decomposition. -1 or null: the exact one."""
    pissa_convert: bool = False
    """Taken for recipes of other trainers: a PiSSA or OLoRA result is always written as an adapter of rank 2 r on the
    original base, as one of rank r would be wrong on any base that others have."""
    adapter_name_or_path: str | tuple[str, ...] | None = None
    """Folder or hub id (`owner/name`, `owner/name@revision`) of an adapter to continue (training) or use (inference).
    Of several, all but the last are merged into the weights, in order."""
    adapter_folder: str | None = None
    """Subfolder of each folder or repository in `adapter_name_or_path` that holds the adapter."""
    create_new_adapter: bool = False
    """Merge all of `adapter_name_or_path` into the weights and train a new adapter."""

    def __post_init__(self) -> None:
        self._check_start()
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

    @property
    def init(self) -> bool | str:
        """PEFT's name for how new adapters start."""
        if not self.pissa_init:
            return self.init_lora_weights
        return "pissa" if self.pissa_iter in (-1, None) else f"pissa_niter_{self.pissa_iter}"

    def _check_start(self) -> None:
        init = self.init_lora_weights
        if init in NOT_HERE:
            raise ValueError(f'init_lora_weights: found "{init}", {NOT_HERE[init]}; allowed: {ALLOWED}')
        if init is not True and init not in STARTS and not re.fullmatch(r"pissa_niter_\d+", str(init)):
            raise ValueError(f"init_lora_weights: found {init!r}, allowed: {ALLOWED}")
        if self.pissa_init and init is not True and init != self.init:
            raise ValueError(f"init_lora_weights: found {init!r} beside pissa_init, which says {self.init}; remove one")
        if self.pissa_iter is not None and (self.pissa_iter < -1 or self.pissa_iter == 0):
            raise ValueError(f"pissa_iter: found {self.pissa_iter}, allowed is a number from 1, or -1 (exact)")
        init = self.init
        if str(init).startswith(("pissa", "olora")) and (self.use_dora or self.target_parameters):
            key = "use_dora" if self.use_dora else "target_parameters"
            raise ValueError(
                f"{key}: set beside {init}, whose result could not be written for the original base; remove one"
            )
        ranks = [self.r, *(self.rank_pattern or {}).values()]
        if init == "orthogonal" and any(rank % 2 for rank in ranks):
            raise ValueError(f"init_lora_weights: orthogonal needs even ranks, found {ranks}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern: set without layers_to_transform, which it explains; set both, or neither")
        if self.create_new_adapter and not self.adapter_name_or_path:
            raise ValueError(
                "create_new_adapter: true, but adapter_name_or_path names no adapter to merge; without one a new "
                "adapter is trained anyway, remove the key"
            )
        if self.adapter_folder and not self.adapter_name_or_path:
            raise ValueError("adapter_folder: set, but adapter_name_or_path names nothing that it could be in")


STARTS = ("gaussian", "orthogonal", "olora", "pissa")
ALLOWED = "true, gaussian, orthogonal, olora, pissa, pissa_niter_N (N iterations)"
NOT_HERE: dict[Any, str] = {
    **dict.fromkeys(("eva", "corda", "lora_ga"), "which needs a pass over data before the first step"),
    "loftq": "which replaces the base by a rounding of its own, while quant_config stores it by another; on a "
    "quantised base pissa makes up for the rounding of what it takes",
    "mica": "whose B stays fixed, which an adapter's files do not say",
    False: "which starts from random numbers that change the model's answers",
}


def build(config: LoraRecipe) -> Any:
    """The edit that `config` describes."""
    from .edit import Lora, SwitchableLora
    from .starts import takes_from_base

    # Without its adapters, a base that gave them a part of its weights would answer wrongly.
    return Lora(config) if takes_from_base(config.init) else SwitchableLora(config)


@hookimpl
def peft_config() -> list[Plugin]:
    """`lora`."""
    return [
        Plugin(
            name="lora",
            config=LoraRecipe,
            build=build,
            summary="LoRA, rsLoRA and DoRA adapters (PEFT)",
            requires=("peft>=0.21",),
        )
    ]
