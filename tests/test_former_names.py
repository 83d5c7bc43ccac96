"""What the contract was called before: every name, field and argument still works."""

from __future__ import annotations

import torch

import llmtune
from llmtune import Batch, Change, Labelled, Layout, ModelEdit, ParallelDims, RunContext, Situation, UnpairedPreference

FACTS = {"mode": "train", "device": "cpu", "ranks": 1} | dict.fromkeys(
    ("compute_dtype", "trainable_dtype", "gather_dtype"), torch.float32
)


def test_a_change_is_an_edit_by_its_former_names() -> None:
    change = Change(settle=[print], follow={"down": "inputs"}, report=["one layer"])
    assert isinstance(change, ModelEdit)
    assert (change.after_load, change.tp_follow, change.report) == ([print], {"down": "inputs"}, ["one layer"])
    assert vars(Change()) == vars(ModelEdit())
    assert Change(after_load=[print], tp_follow={"up": "outputs"}).after_load == [print]


def test_a_situation_has_words_and_capabilities() -> None:
    situation = Situation(words=frozenset({"quantized_base"}), **FACTS)
    assert isinstance(situation, RunContext)
    assert situation.words == situation.capabilities == frozenset({"quantized_base"})
    assert RunContext(capabilities=frozenset({"a"}), **FACTS).words == frozenset({"a"})
    assert Situation(capabilities=frozenset({"a"}), **FACTS).words == frozenset({"a"})
    spread = Situation(layout=Layout(shard=2), **FACTS)
    assert spread.layout == spread.dims == ParallelDims(shard=2) and Situation(**FACTS).dims == ParallelDims()


def test_a_layout_and_a_labelled_answer_are_what_they_were() -> None:
    assert Layout is ParallelDims and Layout(shard=2, tensor=2).ranks == 4
    assert Labelled is UnpairedPreference and Labelled(messages=[], label=True).kind == "labelled"


def test_a_batch_says_what_is_wanted() -> None:
    wanted = torch.tensor([True, False])
    empty = torch.zeros(0, dtype=torch.long)
    batch = Batch(input_ids=empty, labels=empty, weight=0.0, predict_at=empty, targets=empty, desirable=wanted)
    assert batch.wanted is wanted


def test_every_former_name_is_public() -> None:
    assert {"Situation", "Change", "Layout", "Labelled"} <= set(llmtune.__all__)


def test_a_former_change_is_read_by_its_former_names() -> None:
    def step(model: object) -> None: ...

    change = llmtune.Change(settle=[step], follow={"a": "inputs"})
    assert change.settle == change.after_load == [step] and change.follow == change.tp_follow == {"a": "inputs"}
