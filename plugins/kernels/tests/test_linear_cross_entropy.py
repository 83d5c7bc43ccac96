from __future__ import annotations

from typing import Any

import pytest
import torch
from llmtune_kernels import linear_cross_entropy as chunked
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

N, D, V = 37, 12, 101


def plain(hidden: Tensor, head: nn.Module, targets: Tensor, transform: Any = None) -> Tensor:
    logits = head(hidden)
    logits = transform(logits) if transform else logits
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(exact, targets, reduction="sum")


def soft_cap(logits: Tensor) -> Tensor:
    return torch.tanh(logits / 3.0) * 3.0


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 positions of V float32 logits, so that 37 positions are five chunks."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", {"cpu": 8 * V * 4, "cuda": 8 * V * 4})


def both(head: nn.Module, transform: Any = None, dtype: torch.dtype = torch.float64, ignored: bool = False) -> list:
    """(loss, gradients) by the plain operation and by ours."""
    torch.manual_seed(1)
    values, targets = torch.randn(N, D, dtype=dtype), torch.randint(V, (N,))
    if ignored:
        targets[::5] = -100
    results = []
    for function in (plain, chunked.linear_cross_entropy):
        head.zero_grad(set_to_none=True)
        hidden = values.clone().requires_grad_()
        loss = function(hidden, head, targets, transform)
        (loss * 0.375).backward()
        grads = {name: weight.grad for name, weight in head.named_parameters()}
        results.append((loss.detach(), grads | {"hidden": hidden.grad}))
    return results


@pytest.mark.parametrize("transform", [None, soft_cap], ids=["plain", "soft-capped"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
def test_loss_and_gradients_equal_the_plain_operation(transform: Any, bias: bool, ignored: bool) -> None:
    head = nn.Linear(D, V, bias=bias, dtype=torch.float64)
    (loss, grads), (our_loss, our_grads) = both(head, transform, ignored=ignored)
    assert our_loss.dtype == torch.float32
    torch.testing.assert_close(our_loss.double(), loss, rtol=1e-6, atol=0)
    # A transform's logits go through float32, as in the plain operation.
    tolerance = 1e-12 if transform is None else 1e-5
    for name, grad in grads.items():
        torch.testing.assert_close(our_grads[name], grad, rtol=tolerance, atol=tolerance)


def test_gradient_is_the_slope_of_the_loss() -> None:
    head = nn.Linear(D, V, bias=True, dtype=torch.float64)
    hidden, targets = torch.randn(N, D, dtype=torch.float64, requires_grad=True), torch.randint(V, (N,))
    chunked.linear_cross_entropy(hidden, head, targets, None).backward()
    step = torch.randn(V, D, dtype=torch.float64) * 1e-6
    with torch.no_grad():
        before = plain(hidden, head, targets)
        head.weight += step
        after = plain(hidden, head, targets)
    assert (after - before).item() == pytest.approx((head.weight.grad * step).sum().item(), rel=1e-3)


def test_a_frozen_head_gets_no_gradient_and_hidden_states_do() -> None:
    head = nn.Linear(D, V, bias=False, dtype=torch.float64).requires_grad_(False)
    (_, grads), (_, ours) = both(head)
    assert ours["weight"] is None
    torch.testing.assert_close(ours["hidden"], grads["hidden"])


def test_frozen_hidden_states_and_a_training_head() -> None:
    head = nn.Linear(D, V, bias=False)
    hidden, targets = torch.randn(N, D), torch.randint(V, (N,))
    chunked.linear_cross_entropy(hidden, head, targets, None).backward()
    ours, head.weight.grad = head.weight.grad, None
    plain(hidden, head, targets).backward()
    torch.testing.assert_close(ours, head.weight.grad, rtol=1e-5, atol=1e-6)


def test_an_adapted_head_trains_its_adapter() -> None:
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"lm_head": nn.Linear(D, V, bias=False)})
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False), model)
    (_, grads), (_, ours) = both(model["lm_head"], dtype=torch.float32)
    adapter = [name for name, grad in grads.items() if grad is not None and "lora" in name]
    assert len(adapter) == 2
    for name in [*adapter, "hidden"]:
        torch.testing.assert_close(ours[name], grads[name], rtol=1e-4, atol=1e-5)


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32() -> None:
    head = nn.Linear(D, V, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (loss, grads), (our_loss, ours) = both(head, dtype=torch.float32)
        assert torch.is_autocast_enabled("cpu")
    assert our_loss.dtype == torch.float32
    torch.testing.assert_close(our_loss, loss, rtol=1e-4, atol=0)
    assert ours["hidden"].dtype == torch.float32
    for name, grad in grads.items():
        torch.testing.assert_close(ours[name], grad, rtol=2e-2, atol=2e-2)
    (exact, _), _ = both(head, dtype=torch.float32)
    assert not torch.equal(our_loss, exact)


def test_half_precision_head_sums_its_gradient_in_float32() -> None:
    head = nn.Linear(D, V, bias=False, dtype=torch.bfloat16)
    (loss, grads), (our_loss, ours) = both(head, dtype=torch.bfloat16)
    torch.testing.assert_close(our_loss, loss, rtol=1e-4, atol=0)
    assert ours["weight"].dtype == torch.bfloat16
    torch.testing.assert_close(ours["weight"], grads["weight"], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("transform", [None, soft_cap], ids=["plain", "soft-capped"])
def test_without_gradients_the_loss_is_the_same(transform: Any) -> None:
    head, hidden, targets = nn.Linear(D, V), torch.randn(N, D), torch.randint(V, (N,))
    with torch.no_grad():
        loss = chunked.linear_cross_entropy(hidden, head, targets, transform)
        torch.testing.assert_close(loss, plain(hidden, head, targets, transform), rtol=1e-5, atol=0)
    assert not loss.requires_grad


@pytest.mark.parametrize("transform", [None, soft_cap], ids=["plain", "soft-capped"])
def test_no_positions_give_zero_with_a_graph(transform: Any) -> None:
    head, hidden = nn.Linear(D, V), torch.randn(0, D, requires_grad=True)
    loss = chunked.linear_cross_entropy(hidden, head, torch.empty(0, dtype=torch.long), transform)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None and head.weight.grad is not None and not head.weight.grad.any()
    with torch.no_grad():
        assert chunked.linear_cross_entropy(hidden, head, torch.empty(0, dtype=torch.long), transform).item() == 0.0


def test_hooks_on_the_head_still_run() -> None:
    head = nn.Linear(D, V, bias=False, dtype=torch.float64)
    head.register_forward_hook(lambda module, inputs, logits: logits * 2)
    (loss, grads), (our_loss, ours) = both(head)
    torch.testing.assert_close(our_loss.double(), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours["hidden"], grads["hidden"], rtol=1e-5, atol=1e-6)


def test_a_second_backward_pass_is_refused() -> None:
    hidden = torch.randn(N, D, requires_grad=True)
    loss = chunked.linear_cross_entropy(hidden, nn.Linear(D, V), torch.randint(V, (N,)), None)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("transform", [None, soft_cap], ids=["plain", "soft-capped"])
@pytest.mark.parametrize("grad", [True, False])
def test_logits_of_all_positions_never_exist(transform: Any, grad: bool) -> None:
    many = 400
    head, targets = nn.Linear(D, V, bias=False), torch.randint(V, (many,))
    hidden = torch.randn(many, D, requires_grad=grad)
    with Largest() as seen, torch.set_grad_enabled(grad):
        loss = chunked.linear_cross_entropy(hidden, head, targets, transform)
        if grad:
            loss.backward()
    assert seen.elements <= many * D
    with Largest() as seen:
        plain(hidden, head, targets)
    assert seen.elements == many * V
