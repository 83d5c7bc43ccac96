"""Ways to spread and to save memory: each must learn exactly what one plain process learns."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import llmtune
from tests.spawn import in_ranks
from tests.test_parity import METHODS, assert_same, numbers, recipe, train, train_each

SPREADS: dict[str, dict[str, Any]] = {
    "two copies of two shards": {"dp_replicate_size": 2},
    "four copies": {"dp_replicate_size": 4},
    "gradients sharded between micro-batches": {"accumulate_sharded": True},
    "gathered weights kept": {"reshard_after_forward": False},
    "resharded to groups of two": {"reshard_after_forward": 2},
}
TRAINED = ("full", "lora", "dora", "qlora")
RUNS = [(spread, method) for spread in SPREADS for method in ("full", "qlora")]
RUNS += [(spread, ("lora", "dora")[at % 2]) for at, spread in enumerate(SPREADS)]
"""Every spread with whole weights, on a quantised base, and with adapters of either kind in turn."""


def keys_for(model: str, data: str, output: Path, **changes: Any) -> dict[str, Any]:
    return recipe(model, data, output, **{"max_steps": 3, **changes})


@pytest.fixture(scope="module")
def four_ranks(tiny_llama: str, chats: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs on four ranks: two rows in each micro-batch, the same eight rows a step."""
    root = tmp_path_factory.mktemp("four")
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    recipes = [
        keys_for(
            tiny_llama, chats, root / f"{method}-{spread}",
            **METHODS[method], **split, dist_config={"name": "fsdp2", **SPREADS[spread]},
        )
        for spread, method in RUNS
    ]  # fmt: skip
    in_ranks(4, root / "ranks", train_each, recipes)
    return root


@pytest.fixture(scope="module")
def alone(tiny_llama: str, chats: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("alone")
    return {method: train(keys_for(tiny_llama, chats, root / method, **METHODS[method])) for method in TRAINED}


@pytest.mark.parametrize(("spread", "method"), RUNS)
def test_four_ranks_learn_what_one_learns(spread: str, method: str, four_ranks: Path, alone: dict[str, Any]) -> None:
    assert_same(numbers(llmtune.load(four_ranks / f"{method}-{spread}")), alone[method])


@pytest.mark.parametrize("method", ["full", "lora", "dora", "qlora"])
def test_checkpointing_changes_no_bit(method: str, tiny_llama: str, chats: str, tmp_path: Path) -> None:
    changes = dict(METHODS[method])
    if method != "full":
        changes["peft_config"] = {**changes["peft_config"], "lora_dropout": 0.2}
    keys = keys_for(tiny_llama, chats, tmp_path / "none", **changes, activation_checkpointing="none")
    del keys["disable_gradient_checkpointing"]
    plain = train(keys)
    for kind in ("full", "selective"):
        assert train({**keys, "activation_checkpointing": kind, "output_dir": str(tmp_path / kind)}) == plain


def test_selective_keeps_less_than_none_and_computes_less_than_full(
    tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    """Counted on one backward pass: elements that the graph holds on to, and matrix products."""
    found = {kind: kept_and_computed(tiny_llama, chats, tmp_path, kind) for kind in ("none", "selective", "full")}
    kept = [found[kind][0] for kind in ("none", "selective", "full")]
    computed = [found[kind][1] for kind in ("none", "selective", "full")]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 3, found
    assert computed == sorted(computed) and len(set(computed)) == 3, found


def kept_and_computed(model: str, data: str, folder: Path, kind: str) -> tuple[int, int]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    keys = keys_for(model, data, folder / kind, activation_checkpointing=kind, kernel_config=None)
    del keys["disable_gradient_checkpointing"]
    built, _ = llmtune.build(keys)
    built.train()
    ids = torch.arange(96).reshape(1, 96)
    before = live_elements()
    logits = built(input_ids=ids, use_cache=False).logits
    kept = live_elements() - before
    with FlopCounterMode(display=False) as flops:
        logits.float().square().mean().backward()
    return kept, flops.get_total_flops()


def live_elements() -> int:
    """Bytes the process's tensors hold, by torch's own count of allocations that are still alive."""
    import gc

    import torch

    gc.collect()
    seen = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def test_offloading_on_one_rank_learns_the_same(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    """FSDP2 with host offload runs on a single rank too; here host and device are the same memory."""
    keys = keys_for(tiny_llama, chats, tmp_path / "plain", **METHODS["qlora"])
    offload = {"name": "fsdp2", "offload_params": True}
    found = in_ranks(1, tmp_path / "ranks", train, {**keys, "output_dir": str(tmp_path / "o"), "dist_config": offload})
    assert_same(found[0], train(keys))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_offloading_from_a_gpu_learns_the_same(method: str, tiny_llama: str, chats: str, tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    keys = keys_for(tiny_llama, chats, tmp_path / "plain", **METHODS[method], device="cuda")
    offload = {"name": "fsdp2", "offload_params": True}
    found = in_ranks(1, tmp_path / "ranks", train, {**keys, "output_dir": str(tmp_path / "o"), "dist_config": offload})
    assert_same(found[0], train(keys), 2e-3)  # bfloat16


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_layers_learn_the_same(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    # Rows of one length, which are compiled once: each time takes 15 s of a core.
    rows = {"packing": True, "neat_packing": False, "cutoff_len": 64, "max_steps": 3}
    keys = keys_for(tiny_llama, chats, tmp_path / "plain", **METHODS["lora"], **rows)
    assert_same(train({**keys, "torch_compile": True, "output_dir": str(tmp_path / "c")}), train(keys))


@pytest.mark.parametrize(
    ("changes", "ranks", "sentence"),
    [
        ({"dist_config": {"name": "fsdp2", "dp_replicate_size": 3}}, 4, "dp_replicate_size 3 needs a multiple of 3"),
        ({"dist_config": {"name": "fsdp2", "reshard_after_forward": 3}}, 4, "does not divide the 4 ranks"),
        ({"activation_checkpointing": "selective", "torch_compile": True}, 1, "torch_compile: found true beside"),
        ({"activation_checkpointing": "full"}, 1, "beside disable_gradient_checkpointing true"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_the_plan(
    changes: dict[str, Any], ranks: int, sentence: str, tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    keys = keys_for(tiny_llama, chats, tmp_path / "run", **changes)
    if "torch_compile" in changes:
        del keys["disable_gradient_checkpointing"]
    with pytest.raises(llmtune.LlmtuneError, match=sentence):
        llmtune.plan(keys, nproc=ranks)


def test_ranks_of_a_group_share_a_batch() -> None:
    from llmtune.contract.records import ParallelDims
    from llmtune.distributed.ranks import Ranks

    dims = ParallelDims(replicate=2, shard=2, context=2, tensor=2)
    shares = [Ranks(rank=rank, size=16, dims=dims).batch_rank for rank in range(16)]
    assert shares == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert [Ranks(rank=rank, size=16, dims=dims).context_rank for rank in range(4)] == [0, 0, 1, 1]
    assert Ranks(rank=5, size=8).batch_rank == 5
