"""Which tuners of PEFT train here, and why the others do not. The tests hold both lists against the installed PEFT."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from llmtune import PlanError

TRAINS = frozenset({
    "BEFT", "BOFT", "C3A", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LOHA", "LOKR", "MISS", "OFT",
    "PEANUT", "ROAD", "WAVEFT",
})  # fmt: skip
"""Each has been trained on one rank and on two, saved, read by PEFT and merged."""

ON_QUANTISED = frozenset({"BEFT", "C3A", "FOURIERFT", "GRALORA", "IA3", "MISS", "OFT"})
"""Those that only call the layer they adapt, and never look at its weight."""

_PROMPTS = (
    "puts virtual tokens before each text, which shifts positions and labels and does not fit packed rows; use lora"
)
_SHARED = "shares tensors between layers, which cannot be sharded layer by layer; use lora, or PEFT's own loop"
_FROM_WEIGHTS = "starts from the values of the base's weights, which come after the structure is made; use "
REFUSED: dict[str, str] = {
    "LORA": "has a plugin of its own; use peft_config lora",
    "ADALORA": "needs a loss of its own and to be told of each step; use lora with rank_pattern",
    "ADAMSS": "needs a call after each step; use lora",
    "ADAPTION_PROMPT": "wraps attention of Llama models only and is no adapter of layers; use lora",
    "SHADOW": "is a second network beside the model, no adapter of layers; use lora",
    "XLORA": "mixes trained adapters by a classifier in two forward passes; use lora",
    "POLY": "needs the number of the task beside each row; use lora",
    "TRAINABLE_TOKENS": "trains rows of the embedding; use lora with modules_to_save: embed_tokens",
    "LN_TUNING": f"{_FROM_WEIGHTS}peft_config freeze with freeze_trainable_modules naming the norms",
    **dict.fromkeys(
        ("SHIRA", "SUPERTUNING"),
        "looks for its places in the weights, which have no values when the structure is made; use lora",
    ),
    "OSF": f"{_FROM_WEIGHTS}lora",
    "DEFT": f"{_FROM_WEIGHTS}lora",
    "DELORA": f"{_FROM_WEIGHTS}lora with use_dora",
    "PSOFT": f"{_FROM_WEIGHTS}oft",
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"), _PROMPTS
    ),
    **dict.fromkeys(("VERA", "PVERA", "RANDLORA", "VBLORA", "FROD", "TINYLORA", "UNILORA", "LILY"), _SHARED),
}


def named_type(name: str) -> str:
    """PEFT's type of the tuner that a recipe names by its type or its config class, in capitals or not."""
    types = {kind.value: config.__name__ for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    wanted = name.upper().removesuffix("CONFIG")
    spellings = {kind: kind for kind in types}
    spellings |= {config.upper().removesuffix("CONFIG"): kind for kind, config in types.items()}
    if wanted not in spellings:
        near = get_close_matches(wanted, spellings, n=1, cutoff=0.6)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise PlanError(
            f'peft_config.tuner: found "{name}", which the installed PEFT does not have.{hint} There are: '
            f"{', '.join(sorted(TRAINS & types.keys()))}"
        )
    return spellings[wanted]


def require_trainable(kind: str) -> None:
    """Raise PlanError for a tuner of PEFT that does not train here."""
    if kind in TRAINS:
        return
    reason = REFUSED.get(kind, "is newer than this package and has not been tried")
    raise PlanError(f"peft_config.tuner: PEFT's {kind} {reason}. There are: {', '.join(sorted(TRAINS))}")


def config_class(kind: str) -> Any:
    """PEFT's config class of a tuner."""
    return {known.value: config for known, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}[kind]
