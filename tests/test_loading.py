"""Weights last: every way of loading gives `from_pretrained`'s model, and nothing is ever missing in silence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmtune
from llmtune.contract.errors import LoadError
from llmtune.contract.records import RunContext
from llmtune.contract.structure import transformer_layers
from llmtune.distributed.fsdp2 import Fsdp2, Fsdp2Config
from llmtune.distributed.placement import full
from llmtune.distributed.ranks import join, ranks_from_environment
from llmtune.model.edits import Ledger, named_tensors, set_trainable
from llmtune.model.loading import WeightLoader
from llmtune.model.skeleton import build_skeleton
from tests.runs import recipe
from tests.spawn import in_ranks
from tests.tiny import tiny_model_folder

FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt2", "phi", "qwen3_moe", "mixtral"]
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _folder(tmp_path: Path, family: str, tied: bool) -> Path:
    changes: dict[str, Any] = dict(MOE) if family in ("qwen3_moe", "mixtral") else {}
    if family == "phi":
        changes["num_key_value_heads"] = 4
    if family == "gpt2":
        changes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    return tiny_model_folder(tmp_path, family, tie_word_embeddings=tied, **changes)


def _load(folder: str, way: str, dtype: torch.dtype = torch.float32) -> Any:
    return _loader(folder, way, dtype).model


def _loader(folder: str, way: str, dtype: torch.dtype = torch.float32) -> WeightLoader:
    from llmtune_init import ways
    from transformers import AutoConfig, AutoModelForCausalLM

    ranks = ranks_from_environment()
    join(ranks, torch.device("cpu"), 60)
    model = build_skeleton(AutoModelForCausalLM, AutoConfig.from_pretrained(folder), dtype, None)
    ledger = Ledger(model)
    set_trainable(model, ledger, dtype)
    if ranks.size > 1:
        from torch.distributed.device_mesh import init_device_mesh

        context = RunContext(
            mode="train", device="cpu", ranks=ranks.size, compute_dtype=dtype, trainable_dtype=dtype, gather_dtype=dtype
        )
        layers = [layer for _, layer in transformer_layers(model)]
        mesh = init_device_mesh("cpu", (ranks.size,), mesh_dim_names=("shard",))
        Fsdp2(Fsdp2Config()).apply(model, layers, mesh, context)
    loader = WeightLoader(
        model=model, ledger=ledger, folder=Path(folder), init=getattr(ways, way)(), device=torch.device("cpu"), seed=0
    )
    loader.run()
    return loader


def _bytes_read(folder: str, way: str) -> int:
    return _loader(folder, way).reader.bytes_read


def _tensors(folder: str, way: str) -> dict[str, torch.Tensor]:
    return {name: full(tensor) for name, tensor in named_tensors(_load(folder, way)).items()}


def _assert_same(loaded: dict[str, torch.Tensor], folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    expected = named_tensors(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor.detach()), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_one_rank_gives_what_from_pretrained_gives(family: str, tied: bool, tmp_path: Path) -> None:
    folder = _folder(tmp_path, family, tied)
    for way in ("OnMeta", "OnRank0", "OnDefault"):
        model = _load(str(folder), way)
        _assert_same({name: tensor.detach() for name, tensor in named_tensors(model).items()}, folder)
        if tied:
            assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_three_ranks_hold_together_what_from_pretrained_gives(family: str, tmp_path: Path) -> None:
    # Three does not divide the sizes: some shards are smaller, some ranks hold none of a tensor.
    folder = _folder(tmp_path, family, tied=True)
    for way in ("OnMeta", "OnRank0", "OnDefault"):
        for loaded in in_ranks(3, tmp_path / way, _tensors, str(folder), way):
            _assert_same(loaded, folder)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mixtral"])
def test_ranks_read_together_what_the_file_holds(family: str, tmp_path: Path) -> None:
    """Experts too, which the file holds one by one and the model in stacks."""
    folder = _folder(tmp_path, family, tied=False)
    stored = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert sum(in_ranks(2, tmp_path / "meta", _bytes_read, str(folder), "OnMeta")) == stored
    assert in_ranks(2, tmp_path / "rank0", _bytes_read, str(folder), "OnRank0") == [stored, 0]


def test_bfloat16_keeps_the_rotary_buffers_in_float32(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = _folder(tmp_path, "llama", tied=False)
    model = _load(str(folder), "OnMeta", torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.arange(12)[None]
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "missing: model.norm.weight"),
        ("surplus", "not part of the model: model.layers.7.mlp.gate_proj.weight"),
        ("shape", r"of another shape: model.norm.weight \[31\], the model wants \[32\]"),
    ],
)
def test_weights_that_do_not_fit_are_an_error_that_lists_keys(change: str, message: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path, "llama", tied=False)
    tensors = load_file(folder / "model.safetensors")
    norm = tensors["model.norm.weight"]
    if change == "missing":
        del tensors["model.norm.weight"]
    elif change == "shape":
        tensors["model.norm.weight"] = norm[:-1].clone()
    else:
        tensors["model.layers.7.mlp.gate_proj.weight"] = norm.clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(LoadError, match=message):
        _load(str(folder), "OnMeta")


def opened_weight_files(keys: dict[str, Any]) -> set[str]:
    """Names of the model's weight files that this process opens from the plan to the end of the run."""
    opened: set[str] = set()

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and (path := str(arguments[0])).endswith(".safetensors") and keys["model"] in path:
            opened.add(Path(path).name)

    sys.addaudithook(listen)
    llmtune.train(keys)
    return opened


@pytest.mark.parametrize("quant", [None, "bnb"])
def test_only_the_first_rank_opens_weight_files(quant: str | None, tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "run", init_config="init_on_rank0", quant_config=quant, max_steps=1)
    first, second = in_ranks(2, tmp_path / "ranks", opened_weight_files, keys)
    assert first == {"model.safetensors"} and second == set()
