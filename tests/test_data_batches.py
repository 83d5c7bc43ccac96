"""Both layouts of a batch predict the same tokens, each within its own document."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmtune.contract.records import ParallelDims
from llmtune.data import collate
from llmtune.data.batches import split_row
from llmtune.data.sequence import TokenSequence
from llmtune.distributed.ranks import Ranks
from llmtune.training.objective import Context
from tests.tiny import tiny_model


def sample(length: int, trained: list[int], first: int = 10) -> tuple[np.ndarray, np.ndarray]:
    mask = np.zeros(length, bool)
    mask[trained] = True
    return np.arange(first, first + length, dtype=np.int32), mask


SAMPLES = [sample(4, [0, 2, 3]), sample(2, [0, 1], 30), sample(3, [1], 50)]


def test_flat_lays_documents_end_to_end() -> None:
    batch = collate(SAMPLES, flat=True, pad_id=0, sample_ids=[7, 8, 9])
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 30, 31, 50, 51, 52]]
    assert batch.labels.tolist() == [[-100, -100, 12, 13, -100, 31, -100, 51, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert batch.document_starts.tolist() == [0, 4, 6, 9] and batch.document_starts.dtype == torch.int32
    assert (batch.longest_document, batch.weight, batch.sample_ids) == (4, 4.0, (7, 8, 9))
    assert batch.predict_at.tolist() == [1, 2, 4, 6] and batch.targets.tolist() == [12, 13, 31, 51]
    assert batch.attention_mask is None


def test_padded_gives_each_sample_a_row() -> None:
    batch = collate(SAMPLES, flat=False, pad_id=31, sample_ids=[7, 8, 9])
    assert batch.input_ids.tolist() == [[10, 11, 12, 13], [30, 31, 31, 31], [50, 51, 52, 31]]
    assert batch.labels.tolist() == [[-100, -100, 12, 13], [-100, 31, -100, -100], [-100, 51, -100, -100]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.position_ids is None and batch.document_starts is None
    assert batch.predict_at.tolist() == [1, 2, 4, 8] and batch.targets.tolist() == [12, 13, 31, 51]
    assert batch.weight == 4.0


@pytest.mark.parametrize("flat", [True, False])
def test_positions_and_labels_say_the_same(flat: bool) -> None:
    rng = np.random.default_rng(0)
    samples = [(rng.integers(0, 90, n).astype(np.int32), rng.random(n) < 0.5) for n in (1, 5, 9, 3)]
    batch = collate(samples, flat=flat, pad_id=0)
    shifted = batch.labels[:, 1:]
    at = torch.zeros_like(batch.labels)
    at[:, :-1] = shifted != -100
    assert batch.predict_at.tolist() == at.reshape(-1).nonzero()[:, 0].tolist()
    assert batch.targets.tolist() == shifted[shifted != -100].tolist()
    assert batch.weight == len(batch.targets) == sum(int(mask[1:].sum()) for _, mask in samples)


@pytest.mark.parametrize("flat", [True, False])
def test_no_samples_make_a_batch_that_runs_and_weighs_nothing(flat: bool) -> None:
    batch = collate([], flat=flat, pad_id=3)
    assert batch.input_ids.tolist() == [[3, 3]] and batch.labels.tolist() == [[-100, -100]]
    assert batch.weight == 0.0 and batch.predict_at.numel() == 0 and batch.predict_at.dtype == torch.int64
    assert torch.isfinite(tiny_model()(**batch.model_inputs()).logits).all()


def test_both_layouts_give_a_model_the_same_losses() -> None:
    model = tiny_model().eval()

    def losses(flat: bool) -> torch.Tensor:
        batch = collate(SAMPLES, flat=flat, pad_id=0)
        inputs = {key: value for key, value in batch.model_inputs().items() if "seq" not in key and "max_" not in key}
        logits = model(**inputs).logits.flatten(0, 1)[batch.predict_at]
        return torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")

    torch.testing.assert_close(losses(True), losses(False), rtol=1e-5, atol=1e-6)


def test_rows_of_one_length_need_no_mask() -> None:
    assert collate(SAMPLES[:1] * 3, flat=False, pad_id=0).attention_mask is None


def weighted(lengths: list[int], seed: int = 0) -> list[TokenSequence]:
    rng = np.random.default_rng(seed)
    weights = np.array([0.0, 0.5, 1.0, 2.0], np.float32)
    return [
        TokenSequence(rng.integers(0, 90, n).astype(np.int32), rng.random(n) < 0.8, rng.choice(weights, n))
        for n in lengths
    ]


def expected_weights(documents: list[TokenSequence]) -> list[float]:
    """What each target counts, in the order of the documents' tokens."""
    return [
        float(weight)
        for document in documents
        for weight in document.weights[1:][document.mask[1:]]  # type: ignore[index]
        if weight > 0
    ]


@pytest.mark.parametrize("flat", [True, False])
def test_each_target_has_its_weight(flat: bool) -> None:
    documents = weighted([6, 1, 20, 9])
    batch = collate(documents, flat=flat, pad_id=0)
    found = torch.zeros(len(batch.targets))
    for weight, spots in batch.weight_groups:
        assert (found[spots] == 0).all()
        found[spots] = weight
    assert found.tolist() == expected_weights(documents)
    assert batch.weight == sum(expected_weights(documents))
    assert (batch.labels != -100).sum() == len(batch.targets), "a token of weight 0 does not count"


def test_weights_that_are_all_one_are_none_and_mixed_with_none_are_one() -> None:
    plain, some = SAMPLES[0], weighted([9])[0]
    ones = TokenSequence(*plain, np.ones(4, np.float32))
    assert collate([ones], flat=True, pad_id=0).weight_groups == ()
    both = collate([TokenSequence(*plain), some], flat=True, pad_id=0)
    assert both.weight == 2.0 + sum(expected_weights([some]))
    nothing = TokenSequence(*plain, np.zeros(4, np.float32))
    empty = collate([nothing], flat=True, pad_id=0)
    assert (empty.weight, len(empty.targets), empty.weight_groups) == (0.0, 0, ())


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("way", ["head", "logits", "fused"])
def test_the_gradient_follows_the_weights(flat: bool, way: str) -> None:
    """Against autograd on a sum of weighted losses, computed document by document."""
    ops = {}
    if way == "fused":
        fused = pytest.importorskip("llmtune_kernels.linear_cross_entropy")
        ops = {"linear_cross_entropy": fused.linear_cross_entropy}
    model = tiny_model().eval()
    documents = weighted([6, 2, 20, 9])
    batch = collate(documents, flat=flat, pad_id=0)
    found = gradients(model, Context(ops, head_explains_logits=way != "logits").next_token_loss(model, batch))
    total = torch.zeros(())
    for ids, mask, weights, *_ in documents:
        tokens = torch.from_numpy(ids).long()
        logits = model(tokens[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        total = total + (losses * torch.from_numpy(weights * mask)[1:]).sum()  # type: ignore[operator]
    for name, grad in gradients(model, total).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [2, 3])
def test_pieces_of_a_row_keep_weights_and_sequences(size: int) -> None:
    documents = weighted([6, 1, 20, 9])
    whole = collate(documents, flat=True, pad_id=0)
    pieces = [split_row(whole, Ranks(rank=rank, size=size, dims=ParallelDims(context=size))) for rank in range(size)]
    assert sum(piece.weight for piece in pieces) == whole.weight
    assert torch.equal(torch.cat([piece.target_sequence for piece in pieces]), whole.target_sequence)
    found = []
    for piece in pieces:
        weights = torch.zeros(len(piece.targets))
        for weight, spots in piece.weight_groups:
            weights[spots] = weight
        found += weights.tolist()
    assert found == expected_weights(documents)


@pytest.mark.parametrize("flat", [True, False])
def test_pairs_and_labels_are_told_by_sequence(flat: bool) -> None:
    batch = collate([*SAMPLES, SAMPLES[0]], flat=flat, pad_id=0, sample_ids=[4, 2], width=2, counts_samples=True)
    assert batch.target_sequence.tolist() == [0, 0, 1, 2, 3, 3]
    assert (batch.sequences, batch.weight, batch.sample_ids) == (4, 2.0, (4, 2))
    labelled = collate(SAMPLES, flat=flat, pad_id=0, desirable=[True, False, True], counts_samples=True)
    assert labelled.desirable.tolist() == [True, False, True] and labelled.weight == 3.0
    empty = collate([], flat=flat, pad_id=0, width=2, desirable=[], counts_samples=True)
    assert (empty.sequences, empty.weight, empty.target_sequence.tolist(), empty.desirable) == (0, 0.0, [], None)


def test_prompts_have_no_targets_and_weigh_one_each() -> None:
    prompts = [(ids, np.zeros(len(ids), bool)) for ids, _ in SAMPLES]
    batch = collate(prompts, flat=False, pad_id=0, counts_samples=True)
    assert (batch.weight, batch.sequences, len(batch.targets)) == (3.0, 3, 0)
