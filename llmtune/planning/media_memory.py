"""What rows that show pictures or sound need besides: their tensors, and what the towers keep of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from llmtune.model.modalities import parts_of

if TYPE_CHECKING:
    from torch import Tensor

    from llmtune.data.batch_loader import UnitBatches
    from llmtune.planning.model_plan import ModelPlan


_LOOKED_AT, _OPENED = 64, 4
"""Rows among which some that show media are looked for, and of how many the files are opened."""


@dataclass(frozen=True, kw_only=True)
class MediaSizes:
    """Sizes of the media of a micro-batch."""

    tensor_bytes: int = 0
    """Bytes of the tensors that the model is given of them."""
    pieces: int = 0
    """What the towers' layers see: patches of pictures, moments of sound."""
    places: int = 0
    """Tokens that stand for them."""

    def times(self, factor: int) -> MediaSizes:
        """Those of as many such rows."""
        return MediaSizes(**{name: factor * value for name, value in vars(self).items()})


def sizes_of_media(batches: UnitBatches, unit: int, model: ModelPlan) -> MediaSizes:
    """The sizes of what a unit of a run's data shows. Opens its files."""
    if model.media is None or not batches.samples.media_kinds:
        return MediaSizes()
    batch = replace(batches, media=model.media).batch([unit])
    tensors, places = batch.media, int(np.isin(batch.input_ids.numpy(), model.media.placeholders).sum())
    found = sum(each.numel() * each.element_size() for each in tensors.values())
    return MediaSizes(tensor_bytes=found, pieces=pieces(tensors, model.module.config), places=places)


def pieces_per_token(batches: UnitBatches, model: ModelPlan) -> tuple[float, float]:
    """Pieces that towers see for each token of the data, of some rows as a sample, and the share of tokens that stand
    for media. Opens the files of these rows."""
    if model.media is None or not batches.samples.media_kinds:
        return 0.0, 0.0
    stands, bare = model.media.placeholders, replace(batches, media=None)
    share = float(np.isin(batches.samples.ids, stands).mean())
    spread = np.linspace(0, len(batches.units) - 1, _LOOKED_AT).astype(int)
    shows = (unit for unit in dict.fromkeys(spread.tolist()) if np.isin(bare.batch([unit]).input_ids, stands).any())
    some = [sizes_of_media(batches, unit, model) for unit in islice(shows, _OPENED)]
    return share * sum(each.pieces for each in some) / max(1, sum(each.places for each in some)), share


def pieces(tensors: Mapping[str, Tensor], config: Any) -> int:
    """What the towers' layers see of a processor's tensors.

    Pictures are (..., 3, height, width), cut into patches by the tower, or (..., patches, numbers) that the processor
    has cut; sound is (sounds, bands, moments), of which the towers' convolutions take two at a time.
    """
    total = 0
    for name, tensor in tensors.items():
        if name.startswith("pixel_values"):
            whole = tensor.dim() >= 4 and tensor.shape[-3] == 3
            total += tensor.numel() // (3 * _patch(config) ** 2 if whole else tensor.shape[-1])
        elif name.startswith("input_features") and tensor.is_floating_point():
            total += tensor.numel() // min(tensor.shape[1:]) // 2
    return total


def _patch(config: Any) -> int:
    """Pixels of a side of a patch; 14 where the config does not say."""
    size = vars(config.vision_config).get("patch_size", 14) if "vision_config" in config.sub_configs else 14
    return int(size[0] if isinstance(size, list | tuple) else size)


def tower_layers(model: Any) -> list[nn.Module]:
    """The repeated blocks of a model's towers."""
    parts, found = parts_of(model), {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in found):
            continue
        inside = {parts[f"{name}.{own}"] for own, _ in module.named_parameters(remove_duplicate=False)}
        if inside == {"vision_tower"}:
            found[name] = list(module)
    return [layer for layers in found.values() for layer in layers]


def saved_per_piece(layer: nn.Module) -> int:
    """Numbers that a piece leaves in a tower's layer for the backward pass: the input of each product (of those that
    share one, once), its result, the result of attention, and the activation of a gate."""
    results = products = width = 0
    for module in layer.modules():
        linear = [child for child in module.children() if isinstance(child, nn.Linear)]
        products += sum({child.in_features for child in linear})
        results += sum(child.out_features for child in linear)
        if [name for name, child in module.named_children() if "gate" in name and child in linear]:
            results += max(child.out_features for child in linear)
        width = width or next((child.in_features for child in linear), 0)
    return width + products + results


def tower_activations(model: Any, sizes: MediaSizes, compute_bytes: int, recomputed: float) -> tuple[int, int]:
    """Bytes that the towers keep for their backward pass, none where they do not train, and that one of their layers
    needs in passing."""
    if not sizes.pieces:
        return 0, 0
    layers = tower_layers(model)
    kept = most = 0
    reached = False
    for layer in layers:
        reached = reached or any(parameter.requires_grad for parameter in layer.parameters())
        saved = compute_bytes * sizes.pieces * saved_per_piece(layer)
        kept += int(saved * (1 - recomputed)) if reached else 0
        most = max(most, saved)
    return kept, most
