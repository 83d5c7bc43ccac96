"""What a step costs besides its arithmetic: collectives, waits for the device, reads, kernels left out."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmtune.recipe.parts import Parts
from tests.guards import one_step, plan_here, start
from tests.runs import recipe
from tests.spawn import in_ranks

LAYERS = 2
METHODS: dict[str, dict[str, Any]] = {
    "full": {"peft_config": None},
    "lora": {},
    "dora": {"peft_config": {"name": "lora", "r": 4, "use_dora": True}},
    "qlora": {"quant_config": {"name": "bnb", "double_quantization": False}},
}
TRAINED_GROUPS = {"full": LAYERS + 1, "lora": LAYERS, "dora": LAYERS, "qlora": LAYERS}


def facts(recipes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each recipe the collectives of a forward pass and of a whole step, and the elements fetched from files."""
    return {name: {"fetched": fetched(keys), **collectives(keys)} for name, keys in recipes.items()}


def collectives(keys: dict[str, Any]) -> dict[str, Counter[str]]:
    """Operations of torch.distributed by name: in one forward pass, and in all passes of an optimiser step."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace in ("c10d", "_c10d_functional"):
                seen[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    _, training = start(keys)
    one_step(training)  # FSDP2 learns the order of its groups in the first step
    training.optimizer.zero_grad()
    (batch, *_) = training.batches.step(0, training.device)
    found = {}
    for name, work in {"forward": lambda: training.objective(batch), "step": lambda: one_step(training)}.items():
        training.distribute.before_backward(training.objective, True)
        seen: Counter[str] = Counter()
        with Counted(), torch.set_grad_enabled(name == "step"):
            work()
        found[name] = seen
    return found


class Counting:
    """An init plugin's object, with an account of the elements it fetched."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.whole, self.elements = inner, inner.whole, 0

    def fetch(self, reader: Any, key: str, rows: tuple[int, int] | None) -> Any:
        tensor = self.inner.fetch(reader, key, rows)
        self.elements += tensor.numel()
        return tensor


def fetched(keys: dict[str, Any]) -> int:
    from llmtune.training.building import build_objective

    plan = plan_here(keys)
    counting = Counting(plan.parts.one("init_config").built)
    parts = [replace(part, built=counting) if part.point == "init_config" else part for part in plan.model.parts.all]
    build_objective(replace(plan.model, parts=Parts(parts)))
    return counting.elements


def of(kind: str, counted: Counter[str]) -> int:
    return sum(times for name, times in counted.items() if kind in name)


@pytest.fixture(scope="module")
def ranks(tiny_llama: str, chats: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The facts of every method with 1 and 4 micro-batches a step, on each of two ranks."""
    root = tmp_path_factory.mktemp("counted")
    split = {"per_device_train_batch_size": 1, "disable_gradient_checkpointing": True}
    recipes = {
        f"{method}-{micros}": recipe(
            tiny_llama, chats, root / method, **{**METHODS[method], **split}, gradient_accumulation_steps=micros
        )
        for method in METHODS
        for micros in (1, 4)
    }
    return in_ranks(2, root / "ranks", facts, recipes)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_with_its_adapter_is_one_group(method: str, ranks: list[dict[str, Any]]) -> None:
    """One gathering of weights for each layer and one for the rest, not one for each adapter matrix."""
    for rank in ranks:
        forward = rank[f"{method}-1"]["forward"]
        assert of("allgather", forward) == LAYERS + 1, forward


@pytest.mark.parametrize("method", METHODS)
def test_gradients_travel_once_a_step_however_many_micro_batches(method: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        once, four = (rank[f"{method}-{micros}"]["step"] for micros in (1, 4))
        assert of("reduce_scatter", once) == of("reduce_scatter", four) == TRAINED_GROUPS[method], (once, four)
        assert of("allreduce", once) == of("allreduce", four) == 0


@pytest.mark.parametrize("method", METHODS)
def test_each_rank_reads_its_part_of_the_weights_only(
    method: str, ranks: list[dict[str, Any]], tiny_llama: str
) -> None:
    from safetensors import safe_open

    with safe_open(Path(tiny_llama) / "model.safetensors", framework="pt") as file:
        everything = sum(file.get_tensor(key).numel() for key in list(file.keys()))
    parts = [rank[f"{method}-1"]["fetched"] for rank in ranks]
    assert everything <= sum(parts) <= 1.1 * everything and max(parts) <= 0.6 * everything, (parts, everything)


READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select")
"""Functions of a tensor that on a GPU wait until everything queued before them is done."""


def reader() -> str:
    """The function outside torch that is reading a tensor's values right now."""
    frames = [frame for frame in reversed(traceback.extract_stack()) if "/torch/" not in frame.filename]
    frame = next(frame for frame in frames if frame.name not in ("reader", "__torch_function__", "__torch_dispatch__"))
    return f"{Path(frame.filename).name}: {frame.name}"


@pytest.mark.parametrize(
    "changes", [{"kernel_config": None}, {"packing": True, "kernel_config": "auto"}], ids=["padded", "packed"]
)
def test_no_number_is_read_back_between_micro_batches(
    changes: dict[str, Any], tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    """In all passes of a step, on a GPU each such reading is a wait.

    What remains is before the first layer of a micro-batch: transformers looks at the padding, or at the positions, to
    see whether it can do without a mask. Off a GPU, the packed attention also asks once for its documents' lengths.
    """
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") in READS:
                seen[reader()] += 1
            return func(*args, **(kwargs or {}))

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select"):
                below[reader()] += 1
            return func(*args, **(kwargs or {}))

    seen: Counter[str] = Counter()
    below: Counter[str] = Counter()
    micros = 3
    keys = recipe(tiny_llama, chats, tmp_path / "run", **changes, gradient_accumulation_steps=micros)
    _, training = start(keys)
    one_step(training)  # the first batch may ask the model what it is
    with Functions(), Operations():
        one_step(training, 1)
    allowed = {"masking_utils.py: _ignore_causal_mask_sdpa", "masking_utils.py: find_packed_sequence_indices"}
    lengths = {"packed_attention.py: _documents"} if changes["kernel_config"] else set()
    assert seen.keys() | below.keys() <= allowed | lengths
    assert max([*seen.values(), *below.values()]) <= 2 * micros


def test_the_kernels_of_a_recipe_compute_in_training(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    """The fused loss is called for every micro-batch, and the model makes no logits besides."""
    keys = recipe(tiny_llama, chats, tmp_path / "run", kernel_config="auto", gradient_accumulation_steps=3)
    plan, training = start(keys)
    objective: Any = training.objective
    kernel = objective.context.ops["linear_cross_entropy"]
    assert kernel.__module__.startswith("llmtune_kernels")
    calls: Counter[str] = Counter()

    def counting(*arguments: Any) -> Any:
        calls["loss"] += 1
        return kernel(*arguments)

    one_step(training)
    objective.context.ops["linear_cross_entropy"] = counting
    plan.model.module.get_output_embeddings().register_forward_hook(lambda *_: calls.update(["head"]))
    one_step(training, 1)
    assert calls["loss"] == 3
    assert plan.model.module.config._attn_implementation == plan.model.attention == "llmtune_packed"


@pytest.mark.parametrize("method", METHODS)
def test_the_optimiser_is_fused_and_only_matrices_decay(
    method: str, tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    decay = {"optim_config": {"name": "adamw", "weight_decay": 0.1}}
    plan, training = start(recipe(tiny_llama, chats, tmp_path / "run", **METHODS[method], **decay))
    groups = training.optimizer.param_groups
    assert all(group["fused"] for group in groups)
    rates = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    trained = {name: parameter for name, parameter in plan.model.module.named_parameters() if parameter.requires_grad}
    assert rates.keys() == {id(parameter) for parameter in trained.values()}
    for name, parameter in trained.items():
        assert rates[id(parameter)] == (0.1 if parameter.dim() > 1 else 0.0), name
    if method in ("full", "dora"):  # norms; magnitudes
        assert 0.0 in rates.values() and 0.1 in rates.values()
