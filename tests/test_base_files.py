"""Base files are read as transformers reads them, and where it would refuse them, they are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmtune
from llmtune.contract.errors import LoadError
from llmtune.inference.reopen import open_model
from llmtune.model.fingerprint import fingerprint
from llmtune.model.weight_files import read_index, stored_dtype
from tests.guards import plan_here
from tests.runs import FLOAT32, LORA, recipe, stored_types
from tests.test_source import indexed
from tests.tiny import tiny_model_folder

IDS = torch.arange(3, 40)[None]
HEAD = "lm_head.weight"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def theirs(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def with_head(folder: Path, factor: float) -> Path:
    """Write the head, which the config ties to the embedding, into the file: the embedding times `factor`."""
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors["model.embed_tokens.weight"] * factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return tiny_model_folder(tmp_path / "base", tie_word_embeddings=True)


@pytest.mark.parametrize("way", ["init_on_meta", "init_on_rank0", "init_on_default"])
@pytest.mark.parametrize("factor", [1.0, -3.0])
def test_tied_weights_that_the_file_holds_twice_are_tied_where_they_are_equal(
    factor: float, way: str, tied: Path
) -> None:
    expected = theirs(with_head(tied, factor))
    model, _ = llmtune.build({"model": str(tied), "device": "cpu", "init_config": way})
    assert torch.equal(logits(model), expected)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (factor == 1.0)


@pytest.mark.parametrize("peft", [None, LORA])
def test_what_was_trained_with_two_weights_is_saved_with_two(peft: Any, tied: Path, chats: str, tmp_path: Path) -> None:
    keys = recipe(
        str(with_head(tied, -3.0)), chats, tmp_path / "run", peft_config=peft, max_steps=2, learning_rate=1e-3
    )
    run = llmtune.train(keys)
    expected = logits(run.model()[0])
    merged = run.export(tmp_path / "merged", infer_dtype="float32")
    assert stored_types(merged) == FLOAT32
    for folder in [merged] if peft else [merged, run.output_dir / "model"]:
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
        assert torch.allclose(theirs(folder), expected, atol=1e-5)
        assert torch.allclose(logits(open_model(folder)[0]), expected, atol=1e-5)


def test_two_weights_that_come_after_the_plan_are_no_surprise(tied: Path, chats: str, tmp_path: Path) -> None:
    from llmtune.training.building import build_objective

    plan = plan_here(recipe(str(tied), chats, tmp_path / "run")).model
    with_head(tied, 2.0)
    with pytest.raises(LoadError, match=r"hold lm_head\.weight apart .*run the same command again"):
        build_objective(plan)


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    index = indexed(folder)
    index.write_text(json.dumps({"metadata": {}, **json.loads(index.read_text())}))
    for shard in folder.glob("model-*.safetensors"):
        save_file({key: tensor + 1 for key, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})
    other = theirs(folder)
    assert torch.equal(logits(open_model(folder, dtype=torch.float32)[0]), other)
    (folder / "model.safetensors").write_bytes(whole)
    expected = theirs(folder)
    assert not torch.allclose(expected, other)
    assert torch.equal(logits(open_model(folder, dtype=torch.float32)[0]), expected)


@pytest.mark.parametrize("with_index", [False, True])
def test_two_files_with_one_tensor_are_refused(with_index: bool, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    index = indexed(folder)
    first, second = sorted(folder.glob("model-*.safetensors"))
    taken = next(iter(load_file(first).items()))
    save_file({**load_file(second), taken[0]: taken[1] + 1}, second, metadata={"format": "pt"})
    if not with_index:
        index.unlink()
    with pytest.raises(LoadError, match=rf"{first.name} and {second.name} both hold the tensor {taken[0]}"):
        open_model(folder)


@pytest.mark.parametrize(
    ("types", "declared", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.float32, torch.bfloat16),
        ((torch.bfloat16, torch.float32), torch.float16, torch.float16),
        ((torch.bfloat16, torch.float32), None, torch.bfloat16),
    ],
)
def test_the_type_of_a_folder_is_the_one_its_files_have(
    types: Any, declared: Any, expected: torch.dtype, tmp_path: Path
) -> None:
    tensors = {"a": torch.zeros(8, dtype=types[0]), "b": torch.zeros(4, dtype=types[1]), "c": torch.zeros(99).int()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert stored_dtype(read_index(tmp_path), declared) == expected


def test_other_weights_have_another_fingerprint(tmp_path: Path) -> None:
    one, same, other = (tiny_model_folder(tmp_path / str(seed), seed=seed // 2) for seed in (0, 1, 2))
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    before = fingerprint(one)
    tensors = load_file(one / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, one / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(one) != before
