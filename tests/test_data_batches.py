"""Both layouts of a batch predict the same tokens, each within its own document."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmtune.data import collate
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
