"""Checks on a loaded model, in a few tiny forwards: documents laid end to end must not see each other, and pieces of a
row must come to what the row comes to. Every model is asked, because some cannot."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from llmtune.contract.errors import PlanError
from llmtune.data.batch_loader import BatchLoader, other_answers, sample_batch
from llmtune.data.batches import collate, split_row, to_device
from llmtune.distributed.ranks import Ranks
from llmtune.model.generate import seeded

if TYPE_CHECKING:
    from torch import Tensor

    from llmtune.contract.stages import Batch
    from llmtune.data.tokens import TokenSamples
    from llmtune.media.processor import MediaProcessor
    from llmtune.training.objective import Objective

FIRST, SECOND = 9, 7
"""Tokens of the two documents."""
_ALONE = Ranks(0, 1)
_LOOKED_AT = 1000
"""Samples among which some that show media, and some that show none, are looked for."""
_OF_A_KIND = 3


def check_isolation(objective: Objective, device: torch.device, packing: bool) -> None:
    """Raise PlanError if a document's hidden states depend on the document before it. Collective; four tiny forwards.

    Recurrent layers, convolutions, position schemes counted over the whole row and attention without a mask for
    document bounds all leak, and the loss curve does not show it.
    """
    one, other, second = (_tokens(objective, size, seed) for seed, size in enumerate((FIRST, FIRST, SECOND)))
    batches = [_end_to_end(documents) for documents in ([one, second], [other, second], [second])]
    after_one, after_other, alone = (states[-SECOND:] for states in _hidden_states(objective, batches, device))
    size = alone.abs().max().clamp(min=1e-6)
    leak = ((after_one - after_other).abs().max() / size).item()
    shift = ((after_one - alone).abs().max() / size).item()
    # The first two run the same shapes, so rounding is alike; the third is laid out differently.
    if leak > 1e-4 or shift > _rounding(objective):
        found = f"a document's hidden states change by {max(leak, shift):.0e} of their size with what stands before it"
        fix = "set packing: false, or neat_packing: false" if packing else "leave packed_attention out of kernel_config"
        raise PlanError(f"packing: {type(objective.model).__name__} cannot keep documents apart ({found}); {fix}")


def check_media_isolation(objective: Objective, device: torch.device, loader: BatchLoader) -> None:
    """The same of samples that show media, where the data have any, which have to come to what they come to in a row
    of their own: masks and positions of pictures follow rules of their own. Collective; some small forwards."""
    samples = loader.samples
    if not loader.flat or not samples.media_kinds:
        return
    chosen = _some(loader)
    batches = [_batch(loader, order, flat=True) for order in (chosen, chosen[::-1])]
    found = _hidden_states(objective, [*batches, *(_batch(loader, [at], flat=False) for at in chosen)], device)
    alone = dict(zip(chosen, found[2:], strict=True))
    shift = 0.0
    for order, packed in zip((chosen, chosen[::-1]), found[:2], strict=True):
        lengths = [int(samples.lengths[at]) for at in order]
        for at, own in zip(order, packed[: sum(lengths)].split(lengths), strict=True):
            expected = alone[at][: len(own)]
            shift = max(shift, ((own - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item())
    if shift > _rounding(objective):
        raise PlanError(
            f"packing: {type(objective.model).__name__} reads documents beside ones that show media otherwise in a "
            f"packed row than in rows of their own (hidden states change by {shift:.0e} of their size); set packing: "
            "false"
        )


def check_media_reading(
    objective: Objective, device: torch.device, loader: BatchLoader, media: MediaProcessor | None
) -> None:
    """Raise PlanError if a model that reads media cannot be given what its processor makes of a sample, takes nothing
    of it, or sees tokens before they are to be said. Collective; two forwards of one sample.

    Some kinds read a prompt in both directions (PaliGemma, whose processor has to be told where it ends) or fill in
    blanks (DiffusionGemma): they would see the answers that they are to learn, and the loss curve would look splendid.
    """
    model, samples = type(objective.model).__name__, loader.samples
    if media is None or samples.kind == "prompt":
        return
    if loader.units.kind != "sample" or loader.order.batch > loader.micro_steps * loader.ranks.batch_ranks:
        _check_videos(samples, media)
    at, *_ = _some(loader)
    batch = _batch(loader, [at], loader.flat)
    own, base = (_forward_keys(each) for each in (objective.model, objective.model.base_model))
    for name in (name for name, value in batch.media.items() if value.is_floating_point()):
        if name not in own | base and not media.trust_remote_code:
            raise PlanError(
                f"model: {model} takes no {name}, which {type(media.processor).__name__} makes of what rows show: it "
                "would learn to answer blindly; use a checkpoint whose config.json names a class that reads them"
            )
    said_at = 1 + batch.predict_at[batch.predict_at < batch.input_ids.shape[1]]
    later = said_at[len(said_at) // 2 :]
    tokens, which = batch.input_ids[0, later].unique(return_inverse=True)
    changed = replace(batch, input_ids=batch.input_ids.clone())
    changed.input_ids[0, later] = tokens.roll(1)[which]
    try:
        said, other = _hidden_states(objective, [batch, changed], device)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        what = f"what its processor makes of {samples.origin(at)} ({type(error).__name__}: {error})"
        fix = "set packing: false" if loader.flat else "use a model of another kind"
        raise PlanError(f"model: transformers' {model} cannot read {what}; {fix}") from error
    before = said[: later[0]]
    leak = ((before - other[: later[0]]).norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-6)).max().item()
    if leak > (1e-4 if _rounding(objective) < 1e-2 else 5e-2):  # of the same shapes; experts may get other numbers
        raise PlanError(
            f"model: {model} sees tokens before it is to say them (hidden states change by {leak:.0e} of their size "
            "with tokens that come later), so that its loss would be that of copying; use a model that reads from "
            "left to right"
        )


def _check_videos(samples: TokenSamples, media: MediaProcessor) -> None:
    """Raise DataError where videos of two lengths cannot be given to the model together."""
    films = [at for at in range(min(len(samples), _LOOKED_AT)) if "video" in samples.kinds_shown(at)]
    if films:
        ends = (pick(films, key=samples.lengths.__getitem__) for pick in (min, max))
        media.read([each for at in ends for each in samples.shown(at)])


def _batch(loader: BatchLoader, chosen: list[int], flat: bool) -> Batch:
    others = other_answers(loader.samples, chosen)
    return sample_batch(
        loader.samples, chosen, flat=flat, pad_id=loader.pad_id, ranks=_ALONE, others=others, media=loader.media
    )


def _forward_keys(model: Any) -> set[str]:
    return set(inspect.signature(type(model).forward).parameters)


def _some(loader: BatchLoader) -> list[int]:
    """The shortest samples that show media, of each kind, and the shortest that show none, in turn: two, and more as
    far as they have no more tokens than the longest row to train on."""
    samples, lengths = loader.samples, loader.samples.lengths[:_LOOKED_AT]
    by_length = np.argsort(lengths, kind="stable").tolist()
    shown = {at: samples.kinds_shown(at) for at in by_length}
    groups = [[at for at in by_length if kind in shown[at]][:_OF_A_KIND] for kind in samples.media_kinds]
    groups.append([at for at in by_length if not shown[at]][:_OF_A_KIND])
    found = list(dict.fromkeys(at for turn in zip_longest(*groups) for at in turn if at is not None))
    fitting = int(np.searchsorted(np.cumsum(lengths[found]), loader.units.tokens.max(), "right"))
    return found[: max(2, fitting)]


def check_media_split(objective: Objective, ranks: Ranks, device: torch.device, loader: BatchLoader) -> None:
    """The same as `check_split` of rows that show media, where the data have any. Collective."""
    samples, name = loader.samples, type(objective.model).__name__
    if not samples.media_kinds:
        return
    whole = _batch(loader, _some(loader), flat=True)
    piece, begin = split_row(whole, ranks), f"dist_config: cp_size is {ranks.dims.context}, but {name} "
    expected, found = _hidden_states(objective, [whole, piece], device)
    expected = expected[piece.piece_start :][: len(found)]
    error = (expected - found[: len(expected)]).abs().max() / expected.abs().max().clamp(min=1e-6)
    dist.all_reduce(error, dist.ReduceOp.MAX)
    if not error.item() <= _rounding(objective):
        raise PlanError(
            f"{begin}lets tokens of media see each other by rules of its own, which a rank that has a piece of the row "
            f"cannot follow (hidden states change by {error.item():.0e} of their size); set cp_size: 1"
        )


def check_split(objective: Objective, ranks: Ranks, device: torch.device) -> None:
    """Raise PlanError, on all ranks, if pieces of a row give other hidden states than the row. Collective.

    Recurrent layers, convolutions and attention that does not go through transformers' AttentionInterface mix tokens
    where no exchange takes place; the loss curve does not show it.
    """
    size = ranks.dims.context
    tokens = _tokens(objective, 8 * size, 0)
    bounds = (0, 3 * size + 1, 5 * size, 8 * size)  # documents reach across the cuts between pieces
    whole = _end_to_end([tokens[start:stop] for start, stop in itertools.pairwise(bounds)])
    states, found = _hidden_states(objective, [whole, split_row(whole, ranks)], device)
    expected = states[8 * ranks.context_rank :][:8]
    error = (expected - found).abs().max() / expected.abs().max().clamp(min=1e-6)
    dist.all_reduce(error, dist.ReduceOp.MAX)
    if not error.item() <= _rounding(objective):
        raise PlanError(
            f"dist_config: cp_size is {size}, but {type(objective.model).__name__} mixes tokens outside of attention "
            f"(hidden states change by {error.item():.0e} of their size when a row is split); set cp_size: 1"
        )


def _rounding(objective: Objective) -> float:
    """How far results of differently laid out rows may lie apart, as a share of their size."""
    model: Any = objective.model
    return 1e-3 if model.dtype == torch.float32 and objective.autocast is None else 5e-2


def _tokens(objective: Objective, count: int, seed: int) -> np.ndarray:
    model: Any = objective.model
    rng = np.random.default_rng(seed)
    return rng.integers(0, model.config.get_text_config().vocab_size, count, dtype=np.int32)


def _end_to_end(documents: list[np.ndarray]) -> Batch:
    return collate([(ids, ids >= 0) for ids in documents], flat=True, pad_id=0)


def _hidden_states(objective: Objective, batches: list[Batch], device: torch.device) -> list[Tensor]:
    """The backbone's last states (T, D) of each batch's tokens, row after row without padding, in float32, without
    dropout and gradients."""
    model: Any = objective.model
    training = objective.training
    objective.eval()
    found = []
    with torch.no_grad():
        for batch in batches:
            inputs = to_device(batch, device).model_inputs()
            with seeded(0, device):  # some draw noise (VibeVoice), which is to be the same
                result = objective(lambda inputs=inputs: model.base_model(**inputs))
            # A few models are their own base model, whose result is logits.
            states = result.last_hidden_state if hasattr(result, "last_hidden_state") else result.logits
            mask = batch.attention_mask
            found.append((states.flatten(0, 1) if mask is None else states[mask.to(device).bool()]).float())
    objective.train(training)
    return found
