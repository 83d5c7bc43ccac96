"""What new adapters start from: random numbers, or a part of the weight that they take out of the base."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmtune import LoadError, PlanError

from .files import WEIGHTS, taken_apart

FRESH: dict[str, Callable[[Tensor], object]] = {
    "lora_A": partial(nn.init.kaiming_uniform_, a=math.sqrt(5)),
    "lora_B": nn.init.zeros_,
    "lora_embedding_A": nn.init.zeros_,
    "lora_embedding_B": nn.init.normal_,
    "lora_magnitude_vector": nn.init.ones_,
}
"""How each part of a new adapter starts, as in PEFT. Magnitudes get their value when the weights are there."""


def takes_from_base(init: bool | str) -> bool:
    """Whether adapters start from a part of the weights, so that the base keeps the rest (PiSSA, OLoRA)."""
    return isinstance(init, str) and init.startswith(("pissa", "olora"))


def fresh_tensors(model: nn.Module, init: bool | str) -> dict[str, Callable[[Tensor], object]]:
    """How each random tensor of the model's new adapters is filled, by name."""
    parts = {name: tensor for name in model.state_dict() if (tensor := taken_apart(name)) and tensor.part in FRESH}
    fresh = {name: FRESH[tensor.part] for name, tensor in parts.items()}
    if init == "gaussian":
        fresh |= {name: _gaussian for name, tensor in parts.items() if tensor.part == "lora_A"}
    if init == "orthogonal":
        for name in (name for name, tensor in parts.items() if tensor.part == "lora_A"):
            pair = _Orthogonal()
            fresh |= {name: pair.fill_a, name.replace(".lora_A.", ".lora_B."): pair.fill_b}
    return fresh


def _gaussian(a: Tensor) -> None:
    nn.init.normal_(a, std=1 / a.shape[0])


class _Orthogonal:
    """A and B of one layer, whose product is zero though neither is: their rows are halves of one rotation."""

    def fill_a(self, a: Tensor) -> None:
        """(r, inputs); draws the rotation that `fill_b` uses too."""
        rank, inputs = a.shape
        self.rotation = torch.linalg.qr(torch.randn(rank, rank))[0]
        a.copy_((torch.randn(inputs, rank // 2) @ self.rotation[0::2]).T / 10)

    def fill_b(self, b: Tensor) -> None:
        """(outputs, r)."""
        outputs, rank = b.shape
        b.copy_(torch.randn(outputs, rank // 2) @ self.rotation[1::2] / 10)


def factors(weight: Tensor, rank: int, scaling: float, init: str) -> tuple[Tensor, Tensor]:
    """(A, B) with `scaling * B A` the part of `weight` (outputs, inputs) that the adapter takes over, as PEFT has them.

    PiSSA (arXiv 2404.02948) takes the largest singular values, exactly or by `torch.svd_lowrank`; OLoRA
    (arXiv 2406.01775) the first columns of a QR decomposition.
    """
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        seed = int(torch.randint(2**31, ()))  # of the CPU's generator, so that a GPU draws what the recipe's seed says
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(weight, rank, niter=int(init.rpartition("_")[2]))
        vh = v.T
    root = torch.sqrt(s / scaling)
    return root[:, None] * vh, u * root


@dataclass
class TakenOut:
    """Weight rule: an adapter starts as a part of the weight, and the base keeps the rest."""

    source: str
    layer: str
    """The adapted layer, whose adapter is called `default`."""
    rank: int
    scaling: float
    transposed: bool | None
    """Whether the weight is (inputs, outputs), as in GPT-2's Conv1D."""
    dtype: torch.dtype
    """In which the adapter is stored: the base keeps exactly what the rounded factors leave."""
    init: str
    turn: int
    """The rule's number: ranks take turns in the work."""
    initial: dict[str, Tensor] = field(repr=False)
    """Receives the factors at the start, on the CPU, by name: the result is written with them."""
    stored: Path | None = None
    """Folder of an adapter that was written by `widened`, which the factors come from."""

    @property
    def new(self) -> bool:
        """Whether nothing was trained yet."""
        return self.stored is None

    @property
    def files(self) -> tuple[Path, ...]:
        """What the factors are read from."""
        return (self.stored / WEIGHTS,) if self.stored else ()

    @property
    def targets(self) -> tuple[str, str]:
        """The adapter's two factors."""
        return f"{self.layer}.lora_A.default.weight", f"{self.layer}.lora_B.default.weight"

    def convert(self, weight: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """(the rest of the weight in float32, the factors)."""
        wide = weight.to(torch.float32)
        wide = wide.T if self.transposed else wide
        if self.stored is None:
            start_a, start_b = now_a, now_b = self._computed(wide.contiguous())
        else:
            (now_a, start_a), (now_b, start_b) = self._read(wide)
        self.initial |= dict(zip(self.targets, (start_a.cpu(), start_b.cpu()), strict=True))
        rest = wide - self.scaling * (start_b @ start_a)
        return rest.T if self.transposed else rest, dict(zip(self.targets, (now_a, now_b), strict=True))

    def _computed(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The factors, computed by one rank and sent to the others: all have the same, and share the work."""
        owner = self.turn % dist.get_world_size() if dist.is_initialized() else 0
        if not dist.is_initialized() or dist.get_rank() == owner:
            a, b = factors(weight, self.rank, self.scaling, self.init)
        else:
            a, b = weight.new_empty(self.rank, weight.shape[1]), weight.new_empty(weight.shape[0], self.rank)
        a, b = (factor.to(self.dtype).to(torch.float32).contiguous() for factor in (a, b))
        if dist.is_initialized():
            dist.broadcast(a, owner)
            dist.broadcast(b, owner)
        return a, b

    def _read(self, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
        assert self.stored is not None
        a, b = read_tensors(self.stored / WEIGHTS, [_key(name) for name in self.targets])
        if a.shape != (2 * self.rank, weight.shape[1]) or b.shape != (weight.shape[0], 2 * self.rank):
            raise LoadError(f"{self.stored / WEIGHTS}: the adapter of {self.layer} has another shape than the model's")
        a, b = (factor.to(weight.device, torch.float32) for factor in (a, b))
        return [(a[: self.rank], a[self.rank :]), (b[:, : self.rank], -b[:, self.rank :])]


def _key(name: str) -> str:
    tensor = taken_apart(name)
    assert tensor is not None
    return tensor.key


def read_tensors(file: Path, keys: list[str]) -> list[Tensor]:
    """The tensors under `keys`. Raises LoadError if one is not there."""
    with safe_open(file, framework="pt") as opened:
        there = set(opened.keys())
        if lacking := [key for key in keys if key not in there]:
            raise LoadError(f"{file}: has no tensor {lacking[0]}; check that the adapter was made for this model")
        return [opened.get_tensor(key) for key in keys]


def rules_of(
    model: Any, init: str, dtype: torch.dtype, initial: dict[str, Tensor], stored: Path | None = None
) -> list[TakenOut]:
    """A rule for each linear layer with an adapter. Raises PlanError where a layer cannot give a part of its weight."""
    held: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        held[id(parameter)] = held.get(id(parameter), 0) + 1
    rules = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or isinstance(layer, ParamWrapper) or "default" not in layer.lora_A:
            continue
        base: Any = layer.get_base_layer()
        rank, outputs, inputs = layer.r["default"], int(layer.out_features or 0), int(layer.in_features or 0)
        if held[id(base.weight)] > 1:
            raise PlanError(
                f"peft_config: {name} shares its weight with another module, which {init} would change too; "
                "leave it out of target_modules"
            )
        if rank > min(inputs, outputs):
            raise PlanError(
                f"peft_config.r: found {rank} for {name}, which has {inputs} inputs and {outputs} outputs; "
                f"{init} allows no more than the smaller of the two"
            )
        rules.append(
            TakenOut(
                source=f"{name}.weight", layer=name, rank=rank, scaling=layer.scaling["default"],
                transposed=stored_transposed(model, base), dtype=dtype, init=init, turn=len(rules), initial=initial,
                stored=stored,
            )
        )  # fmt: skip
    return rules


def stored_transposed(model: Any, layer: nn.Module) -> bool:
    """Whether the layer's weight is (inputs, outputs) in the model's files.

    Raises PlanError for a quantised layer of a model that may have both kinds.
    """
    if hasattr(layer, "dequantize") and getattr(model.config, "model_type", "") in ("gpt2", "openai-gpt", "imagegpt"):
        raise PlanError(
            f"peft_config: weights of a quantised {type(model).__name__} cannot be changed as they are loaded, which "
            "PiSSA, OLoRA and merged adapters need; remove quant_config"
        )
    return isinstance(layer, Conv1D)


def widened(
    tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor], config: LoraConfig
) -> tuple[dict[str, Tensor], LoraConfig]:
    """The adapter of twice the rank that does on the original base what `tensors` do on what was left of it.

    `W + s (B A - B0 A0)`, as PEFT converts it: [A; A0] and [B, -B0]. Changes `config` in place.
    """
    wide = dict(tensors)
    for name, start in initial.items():
        now, start = tensors[name], start.to(tensors[name].dtype)
        wide[name] = torch.cat([now, start]) if ".lora_A." in name else torch.cat([now, -start], dim=1)
    alpha = 2**0.5 if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha *= alpha  # type: ignore[assignment]  # PEFT's own conversion does so, and its files hold it
    config.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {name: alpha * value for name, value in (config.alpha_pattern or {}).items()}
    return wide, config
