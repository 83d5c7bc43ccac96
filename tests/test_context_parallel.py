"""Rows split over ranks: each arrangement must learn exactly what one rank learns from whole rows."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import llmtune
from llmtune.contract.records import ParallelDims
from llmtune.contract.stages import Batch
from llmtune.data.batches import collate, split_row
from llmtune.distributed.context_parallel import attend_over_ranks, over_ranks
from llmtune.distributed.ranks import Ranks
from llmtune.training.isolation import check_split
from tests.by_hand import assert_same
from tests.spawn import in_ranks
from tests.test_parity import METHODS, numbers, recipe, train, train_each
from tests.test_resume import forget_after
from tests.tiny import tiny_model_folder

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "one key-value head": ("llama", {"num_key_value_heads": 1}),
    "mistral, window 8": ("mistral", {"sliding_window": 8}),
    "gemma3, window 8": ("gemma3_text", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt2": ("gpt2", {"n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "qwen2_moe, window 8": (
        "qwen2_moe",
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "sliding_window": 8,
         "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}  # fmt: skip

CASES: dict[str, dict[str, Any]] = {
    **{name: METHODS[name] for name in ("full", "lora", "dora", "qlora", "freeze")},
    "full, packed": {"packing": True, "per_device_train_batch_size": 2},
    "lora, packed": {**METHODS["lora"], "packing": True, "per_device_train_batch_size": 2},
    "one document a row": {**METHODS["lora"], "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "layers computed again": {**METHODS["lora"], "activation_checkpointing": "full"},
    "layers computed again in part": {**METHODS["lora"], "activation_checkpointing": "selective"},
    "plain loss": {**METHODS["full"], "kernel_config": {"name": "auto", "include_kernels": "packed_attention"}},
}


EVALUATING = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 5}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        name: str(tiny_model_folder(tmp_path_factory.mktemp("family"), family, **changes))
        for name, (family, changes) in FAMILIES.items()
    }


def keys_for(model: str, data: str, output: Path, **changes: Any) -> dict[str, Any]:
    keys = recipe(model, data, output, **{"max_steps": 3, "kernel_config": "auto", "eval_dataset": data, **changes})
    if "activation_checkpointing" in changes:
        del keys["disable_gradient_checkpointing"]
    return keys


def runs(models: dict[str, str], data: str, root: Path, **split: Any) -> dict[str, dict[str, Any]]:
    """Recipes of every case and every family, by name."""
    cases = {name: keys_for(models["llama"], data, root / name, **{**case, **split}) for name, case in CASES.items()}
    families = {name: keys_for(models[name], data, root / name, **split) for name in FAMILIES if name != "llama"}
    return cases | families


@pytest.fixture(scope="module")
def alone(models: dict[str, str], chats: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("alone")
    return {name: llmtune.train(keys) for name, keys in runs(models, chats, root, **EVALUATING).items()}


@pytest.fixture(scope="module")
def two_ranks(models: dict[str, str], chats: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two")
    split = {"dist_config": {"name": "fsdp2", "cp_size": 2}, **EVALUATING}
    in_ranks(2, root / "ranks", train_each, list(runs(models, chats, root, **split).values()))
    return root


@pytest.mark.parametrize("name", [*CASES, *(name for name in FAMILIES if name != "llama")])
def test_pieces_of_rows_teach_what_whole_rows_teach(name: str, two_ranks: Path, alone: dict[str, Any]) -> None:
    found, expected = llmtune.load(two_ranks / name), alone[name]
    assert_same(numbers(found), numbers(expected))
    losses = [[row["eval_loss"] for row in run.metrics if "eval_loss" in row] for run in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0]


FOUR: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name}, two groups of two": (name, {"cp_size": 2}) for name in ("full", "qlora")},
    # A group of four has more ranks than the model has key-value heads.
    **{f"{name}, one group of four": (name, {"cp_size": 4}) for name in ("full", "lora", "dora", "qlora")},
    **{f"{name}, copies": (name, {"cp_size": 2, "dp_replicate_size": 2}) for name in ("full", "qlora")},
    **{f"{name}, split layers": (name, {"cp_size": 2, "tp_size": 2}) for name in ("full", "lora")},
    "lora, offloaded": ("lora", {"cp_size": 2, "offload_params": True, "accumulate_sharded": True}),
}


@pytest.fixture(scope="module")
def four_ranks(models: dict[str, str], chats: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("four")
    recipes = [
        keys_for(
            models["llama"], chats, root / name, **METHODS[method], **EVALUATING,
            dist_config={"name": "fsdp2", **block},
            per_device_train_batch_size=block["cp_size"] * block.get("tp_size", 1),
        )
        for name, (method, block) in FOUR.items()
    ]  # fmt: skip
    in_ranks(4, root / "ranks", train_each, recipes)
    return root


@pytest.mark.parametrize("name", FOUR)
def test_groups_of_ranks_learn_what_one_learns(name: str, four_ranks: Path, alone: dict[str, Any]) -> None:
    found, expected = llmtune.load(four_ranks / name), alone[FOUR[name][0]]
    assert_same(numbers(found), numbers(expected))
    # 24 rows in batches of five on two groups: the last batch of one of them is empty.
    assert found.metrics[-1]["eval_loss"] == pytest.approx(expected.metrics[-1]["eval_loss"], rel=1e-5)


def test_a_run_continues_with_rows_whole_that_were_split(models: dict[str, str], chats: str, tmp_path: Path) -> None:
    split = {"dist_config": {"name": "fsdp2", "cp_size": 2}}
    keys = keys_for(models["llama"], chats, tmp_path / "run", **METHODS["lora"], save_steps=3, max_steps=6)
    in_ranks(2, tmp_path / "ranks", train_each, [{**keys, **split}])
    forget_after(tmp_path / "run", 3)
    found = train(keys)
    assert_same(found, train({**keys, "output_dir": str(tmp_path / "straight")}))


def test_dropout_and_generation_work_on_pieces(models: dict[str, str], chats: str, tmp_path: Path) -> None:
    """Ranks draw masks of their own, so the numbers differ from one rank's; answers are the same on all ranks."""
    keys = keys_for(
        models["llama"], chats, tmp_path / "run", peft_config={**METHODS["lora"]["peft_config"], "lora_dropout": 0.3},
        dist_config={"name": "fsdp2", "cp_size": 2}, sample_prompts=["How much is 3 and 3?"], max_new_tokens=20,
    )  # fmt: skip
    in_ranks(2, tmp_path / "ranks", train_each, [keys])
    run = llmtune.load(tmp_path / "run")
    assert run.chat("How much is 3 and 3?", do_sample=False, max_new_tokens=20) == run.answers[0][2]
    assert all(math.isfinite(number) for step in numbers(run) for number in step)
    again = train({**keys, "dist_config": "fsdp2", "output_dir": str(tmp_path / "alone")})
    assert run.answers[0][1] == llmtune.load(tmp_path / "alone").answers[0][1]
    assert numbers(run) != again and numbers(run)[0][0] == pytest.approx(again[0][0], rel=0.05)


def flat_batch(lengths: list[int], seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    samples = [(rng.integers(3, 100, length).astype(np.int32), rng.random(length) < 0.6) for length in lengths]
    return collate(samples, flat=True, pad_id=0)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("lengths", [[2], [3, 1, 9], [40], [8, 8], [1, 1, 1, 13, 2]])
def test_pieces_make_up_the_row(lengths: list[int], size: int) -> None:
    whole = flat_batch(lengths)
    dims = ParallelDims(context=size)
    pieces = [split_row(whole, Ranks(rank=rank, size=size, dims=dims)) for rank in range(size)]
    length = sum(lengths)
    width = -(-length // size)
    for name in ("input_ids", "labels", "position_ids"):
        joined = torch.cat([getattr(piece, name) for piece in pieces], 1)
        assert joined.shape == (1, width * size)
        assert torch.equal(joined[:, :length], getattr(whole, name))
    wanted = list(zip(whole.predict_at.tolist(), whole.targets.tolist(), strict=True))
    found = [
        (at + rank * width, target)
        for rank, piece in enumerate(pieces)
        for at, target in zip(piece.predict_at.tolist(), piece.targets.tolist(), strict=True)
    ]
    assert found == wanted
    assert sum(piece.weight for piece in pieces) == whole.weight
    for piece in pieces:
        assert piece.row_tokens == width * size == int(piece.document_starts[-1])
        assert piece.document_starts[: len(lengths) + 1].tolist() == whole.document_starts.tolist()
        assert piece.longest_document == max(piece.document_starts.diff().tolist())


def test_rows_that_are_not_split_stay_as_they_are() -> None:
    whole = flat_batch([3, 4])
    assert split_row(whole, Ranks(rank=1, size=2)) is whole
    assert "context_row_tokens" not in whole.model_inputs()


HEADS = [(4, 4), (4, 2), (8, 1), (12, 3)]


def attend_in_pieces() -> None:
    """Outputs and gradients of an attention over exchanged pieces against the same attention over the whole row."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    tokens, seen = 6 * size, []

    def inner(module: Any, query: Any, key: Any, value: Any, mask: Any, **arguments: Any) -> tuple[Any, None]:
        seen.append((query.shape[1], key.shape[1], arguments.get("sliding_window")))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2), None

    attention = over_ranks(inner, dist.group.WORLD)
    config = SimpleNamespace(layer_types=["full_attention", "sliding_attention"], sliding_window=7)
    for heads, groups in HEADS:
        torch.manual_seed(0)
        shapes = [(1, heads, tokens, 4), (1, groups, tokens, 4), (1, groups, tokens, 5)]
        whole = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        weight = torch.randn(1, tokens, heads, 5, dtype=torch.float64)
        (inner(None, *whole, None)[0] * weight).sum().backward()
        mine = slice(rank * 6, rank * 6 + 6)
        pieces = [tensor.detach()[:, :, mine].requires_grad_() for tensor in whole]
        module = SimpleNamespace(config=config, layer_idx=1)
        output, _ = attention(module, *pieces, torch.ones(1, 1, 1, 1), context_row_tokens=tokens)
        torch.testing.assert_close(output, inner(None, *whole, None)[0][:, mine])
        (output * weight[:, mine]).sum().backward()
        for piece, tensor in zip(pieces, whole, strict=True):
            torch.testing.assert_close(piece.grad, tensor.grad[:, :, mine])
        assert seen[1][0] == heads // size and seen[1][1] * size == math.lcm(groups, size) and seen[1][2] == 7
        seen.clear()
    mask = torch.ones(1, 1, 6, 6)
    attention(SimpleNamespace(), *pieces, mask)
    assert seen == [(heads, groups, None)]  # a row that is not split reaches the attention untouched


def test_attention_over_exchanged_pieces_is_attention_over_the_row(tmp_path: Path) -> None:
    in_ranks(4, tmp_path, attend_in_pieces)


def refuses_mixing(keys: dict[str, Any]) -> None:
    from llmtune.distributed.ranks import join, ranks_from_environment
    from llmtune.planning.make import make_plan
    from llmtune.recipe.recipe import load_recipe
    from llmtune.recipe.registry import Registry
    from llmtune.training.building import build_objective

    ranks, device = ranks_from_environment(), torch.device("cpu")
    plan = make_plan(load_recipe(keys, {}), Registry(), ranks, device)
    join(plan.ranks, device)
    objective = build_objective(plan.model)
    check_split(objective, plan.ranks, device)
    plan.model.module.model.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: output + output.roll(1, 1)
    )
    with pytest.raises(llmtune.PlanError, match="LlamaForCausalLM mixes tokens outside of attention"):
        check_split(objective, plan.ranks, device)


def test_a_model_that_mixes_tokens_elsewhere_is_refused_before_the_first_step(
    models: dict[str, str], chats: str, tmp_path: Path
) -> None:
    keys = keys_for(models["llama"], chats, tmp_path / "run", dist_config={"name": "fsdp2", "cp_size": 2})
    in_ranks(2, tmp_path / "ranks", refuses_mixing, keys)


@pytest.mark.parametrize(
    ("changes", "ranks", "sentence"),
    [
        ({"kernel_config": None}, 2, "cp_size is 2, which needs an attention kernel .* found sdpa; set kernel_config"),
        ({"flash_attn": "sdpa"}, 2, "found sdpa; set kernel_config: auto and flash_attn: auto"),
        ({"rope_scaling": DYNAMIC}, 2, r"LlamaForCausalLM stretches rotary positions .*\(rope type dynamic\)"),
        ({"cp": 3}, 3, "cp_size 3 does not divide the 4 attention heads of LlamaForCausalLM"),
        ({"cp": 2}, 3, "cp_size 2 needs a multiple of 2 ranks, found 3"),
        ({"cp": 2, "dp_replicate_size": 2}, 6, "dp_replicate_size 2 x cp_size 2 needs a multiple of 4 ranks"),
    ],
)
def test_what_cannot_be_split_is_refused_by_the_plan(
    changes: dict[str, Any], ranks: int, sentence: str, models: dict[str, str], chats: str, tmp_path: Path
) -> None:
    copies = changes.pop("dp_replicate_size", 1)
    block = {"name": "fsdp2", "cp_size": changes.pop("cp", 2), "dp_replicate_size": copies}
    with pytest.raises(llmtune.LlmtuneError, match=sentence):
        llmtune.plan(keys_for(models["llama"], chats, tmp_path / "run", dist_config=block, **changes), nproc=ranks)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma2", {}, "it soft-caps attention scores"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of the type conv"),
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}, "does not go through"),
        ("mamba", {"state_size": 4}, "not go through transformers' AttentionInterface"),
    ],
)
def test_families_that_cannot_be_split_say_why(
    family: str, changes: dict[str, Any], reason: str, chats: str, tmp_path: Path
) -> None:
    model = tiny_model_folder(tmp_path, family, **changes)
    with pytest.raises(llmtune.LlmtuneError, match=f"cp_size is 2, .*{reason}.*; set cp_size: 1"):
        llmtune.plan(
            keys_for(str(model), chats, tmp_path / "run", dist_config={"name": "fsdp2", "cp_size": 2}), nproc=2
        )


def kept_for_backward(folder: str) -> dict[int, int]:
    """Bytes that the graph of one loss holds on this rank, parameters left out, by the number of pieces of a row."""
    import torch.distributed as dist
    from llmtune_kernels import packed_attention
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

    AttentionInterface.register(packed_attention.NAME, packed_attention.packed_attention)
    AttentionMaskInterface.register(packed_attention.NAME, packed_attention.packed_mask)
    dist.init_process_group("gloo")
    found = {}
    for size in (1, 2, 4):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=packed_attention.NAME)
        ranks = Ranks(rank=dist.get_rank(), size=4, dims=ParallelDims(shard=4 // size, context=size))
        if size > 1:
            attend_over_ranks(model, ranks.dims, torch.device("cpu"))
        found[size] = kept_by(model, split_row(flat_batch([200, 312]), ranks))
    return found


def kept_by(model: Any, batch: Batch) -> int:
    from llmtune.training.objective import Context

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = Context({}).next_token_loss(model, batch)
    loss.backward()
    return sum(storage.nbytes() for storage in held.values())


def test_a_rank_keeps_its_part_of_the_activations(models: dict[str, str], tmp_path: Path) -> None:
    for kept in in_ranks(4, tmp_path, kept_for_backward, models["llama"]):
        assert kept[2] < 1.1 * kept[1] / 2 and kept[4] < 1.2 * kept[1] / 4, kept
