"""The axes of the matrix, the combinations that must be refused and in what words, and a few that cover all pairs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

AXES: dict[str, tuple[Any, ...]] = {
    "init": ("init_on_meta", "init_on_rank0", "init_on_default"),
    "base": ("full precision", "nf4", "nf4 double", "fp4", "int8"),
    "method": ("full", "lora", "dora", "rslora", "modules_to_save", "continued", "freeze", "llama_pro", "oft", "ia3"),
    "kernels": ("none", "auto"),
    "ranks": (1, 2, 4),
    "accumulation": (1, 4),
    "packing": (False, True),
    "checkpointing": ("none", "full", "selective"),
}

OPTIMIZER_AXES: dict[str, tuple[Any, ...]] = {
    "optimizer": ("muon", "galore", "apollo", "adam_mini", "badam", "adafactor", "lion", "sgd"),
    "base": ("full precision", "nf4"),
    "method": AXES["method"],
    "ranks": AXES["ranks"],
    "accumulation": AXES["accumulation"],
    "packing": AXES["packing"],
}
"""The other optimisers than adamw, on what their steps could depend on."""

BASE_AXES: dict[str, tuple[Any, ...]] = {
    "base": ("hqq 4", "hqq 3"),
    "init": ("init_on_meta", "init_on_rank0"),
    "method": AXES["method"],
    "ranks": (1, 2),
    "checkpointing": ("none", "full"),
}
"""The other quantised bases than those of bitsandbytes, on what loading and computing could depend on."""

STAGE_AXES: dict[str, tuple[Any, ...]] = {
    "stage": ("dpo", "orpo", "kto_pair"),
    "base": ("full precision", "nf4"),
    "method": ("full", "lora", "modules_to_save", "continued", "llama_pro", "ia3"),
    "kernels": AXES["kernels"],
    "ranks": (1, 2),
    "accumulation": AXES["accumulation"],
    "packing": AXES["packing"],
}
"""Stages of pairs, on what their losses and references could depend on."""

USE_AXES: dict[str, tuple[Any, ...]] = {
    "use": ("inference",),
    "base": AXES["base"],
    "method": AXES["method"],
    "kernels": AXES["kernels"],
}
"""What was trained in full precision, opened on each base."""

QUANTISED = ("nf4", "nf4 double", "fp4", "int8")


@dataclass(frozen=True, kw_only=True, order=True)
class Combo:
    """One cell: a training run in every respect that an axis names, or the use of what a run saved."""

    use: str = "training"
    family: str = "llama"
    init: str = "init_on_meta"
    base: str = "full precision"
    method: str = "lora"
    kernels: str = "none"
    ranks: int = 1
    accumulation: int = 1
    packing: bool = False
    checkpointing: str = "none"
    optimizer: str = "adamw"
    stage: str = "sft"

    @property
    def name(self) -> str:
        """A text that no other combination has."""
        return " ".join(
            (
                self.use, self.family, self.init, self.base, self.method, f"kernels:{self.kernels}",
                f"ranks:{self.ranks}", f"accumulation:{self.accumulation}", "packed" if self.packing else "unpacked",
                f"checkpointing:{self.checkpointing}", *([] if self.optimizer == "adamw" else [self.optimizer]),
                *([] if self.stage == "sft" else [self.stage]),
            )
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Combinations that no sound program can run, whatever the other axes say."""

    when: Mapping[str, tuple[Any, ...]]
    """Axis to the values that meet; all of them have to."""
    why: str
    says: str
    """A part of the sentence that the plan must give."""

    def meets(self, combo: Combo) -> bool:
        """Whether `combo` is one of these."""
        return all(getattr(combo, axis) in values for axis, values in self.when.items())


REFUSED = (
    Refusal(
        when={"use": ("training",), "base": ("int8",)},
        why="8-bit products round the activations too, so there is no gradient of the model to train with",
        says="quantization_bit is 8, which is for inference only",
    ),
    Refusal(
        when={"use": ("training",), "base": ("nf4", "nf4 double", "fp4", *BASE_AXES["base"]), "method": ("full",)},
        why="a weight stored in a few bits cannot take small steps",
        says="is stored quantised and cannot train",
    ),
    Refusal(
        when={"use": ("training",), "base": QUANTISED, "method": ("freeze",)},
        why="the layers that would train are stored quantised",
        says="freeze cannot be used with quant_config bnb",
    ),
    Refusal(
        when={"base": BASE_AXES["base"], "method": ("freeze",)},
        why="the layers that would train are stored quantised",
        says="freeze cannot be used with quant_config hqq",
    ),
    Refusal(
        when={"use": ("training",), "base": QUANTISED, "method": ("llama_pro",)},
        why="the result is a whole model, whose frozen layers are stored quantised",
        says="llama_pro cannot be used with quant_config bnb",
    ),
    Refusal(
        when={"base": BASE_AXES["base"], "method": ("llama_pro",)},
        why="the result is a whole model, whose frozen layers are stored quantised",
        says="llama_pro cannot be used with quant_config hqq",
    ),
    Refusal(
        when={
            "optimizer": ("galore", "apollo"),
            "method": ("lora", "dora", "rslora", "modules_to_save", "continued", "experts", "oft", "ia3"),
        },
        why="there is no matrix of a layer that trains, whose gradient it could project",
        says="projects the gradients of layers' matrices, and peft_config lets none of them train",
    ),
)
"""Written down by hand: the test compares what the program says with this, not with itself."""


def refusals(combo: Combo) -> list[Refusal]:
    """Why `combo` must be refused; empty for a legal one."""
    return [refusal for refusal in REFUSED if refusal.meets(combo)]


def grid(axes: Mapping[str, Sequence[Any]] = AXES) -> list[Combo]:
    """Every combination of the axes' values, in their order."""
    return [Combo(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


def pairwise(combos: Sequence[Combo]) -> list[Combo]:
    """A few of `combos` in which every pair of values occurs that occurs in any of them; always the same few.

    Greedy: the next one is the first of those that add most pairs.
    """
    names = [field.name for field in fields(Combo) if len({getattr(combo, field.name) for combo in combos}) > 1]
    bits: dict[Any, int] = {}
    held = []
    for combo in combos:
        pairs = itertools.combinations([(name, getattr(combo, name)) for name in names], 2)
        held.append(sum(1 << bits.setdefault(pair, len(bits)) for pair in pairs))
    missing = (1 << len(bits)) - 1
    chosen = []
    while missing:
        best = max(range(len(combos)), key=lambda index: (held[index] & missing).bit_count())
        chosen.append(combos[best])
        missing &= ~held[best]
    return chosen


def sliced(combos: Sequence[Combo], part: str) -> list[Combo]:
    """Slice `3/50` of `combos`: every fiftieth from the third on, so that slices are alike in cost."""
    number, _, count = part.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ValueError(f'slice: found "{part}", allowed is NUMBER/COUNT such as 3/50')
    return list(combos[int(number) - 1 :: int(count)])
