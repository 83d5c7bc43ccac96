from __future__ import annotations

from typing import Any

import pytest
import torch
from llmtune_kernels import packed_attention as packed
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

LENGTHS = (5, 1, 9, 30, 9)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": ("llama", {}),
    "mistral-window": ("mistral", {"sliding_window": 6}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, **SLIDING}),
    "qwen3": ("qwen3", {}),
    "gemma3-window": ("gemma3_text", {**SLIDING, "query_pre_attn_scalar": 11}),
    "phi3-window": ("phi3", {"sliding_window": 6}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
}


@pytest.fixture(params=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> Any:
    family, changes = FAMILIES[request.param]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(changes if family == "gpt2" else SIZES | changes))
    config._attn_implementation = "sdpa"
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.2)  # the usual 0.02 makes attention nearly flat
    packed._apply(made, SITUATION)
    return made


class SITUATION:
    device = "cpu"


def flat_inputs(documents: list[Tensor]) -> dict[str, Any]:
    lengths = torch.tensor([len(document) for document in documents])
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return {
        "input_ids": torch.cat(documents)[None],
        "position_ids": torch.cat([torch.arange(len(document)) for document in documents])[None],
        "use_cache": False,
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 64, (length,), generator=generator) for length in LENGTHS]


def gradients(model: Any, logits: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(logits.shape[1:], generator=torch.Generator().manual_seed(4))
    model.zero_grad()
    (logits[0] * weights).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max() + 1))


def test_each_document_gets_the_logits_and_gradients_it_has_alone(model: Any) -> None:
    alone = torch.cat([model(document[None], use_cache=False).logits for document in documents()], 1)
    expected = gradients(model, alone)
    model.set_attn_implementation(packed.NAME)
    flat = model(**flat_inputs(documents())).logits
    torch.testing.assert_close(flat, alone, rtol=1e-5, atol=1e-5 * float(alone.detach().abs().max()))
    close(gradients(model, flat), expected)


def test_equals_transformers_packing_by_position_ids(model: Any) -> None:
    inputs = flat_inputs(documents())
    plain = model(**{key: inputs[key] for key in ("input_ids", "position_ids", "use_cache")}).logits
    model.set_attn_implementation(packed.NAME)
    flat = model(**inputs).logits
    torch.testing.assert_close(flat, plain, rtol=1e-5, atol=1e-5 * float(plain.detach().abs().max()))


def test_without_bounds_packed_position_ids_still_keep_documents_apart(model: Any) -> None:
    inputs = {key: value for key, value in flat_inputs(documents()).items() if "length" not in key and "cu_" not in key}
    plain = model(**inputs).logits
    model.set_attn_implementation(packed.NAME)
    assert torch.equal(model(**inputs).logits, plain)


def test_padded_rows_and_generation_are_transformers_own(model: Any) -> None:
    rows = torch.stack([documents()[3], documents()[3].flip(0)])
    mask = torch.ones_like(rows)
    mask[1, :12] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    plain, said = model(rows, attention_mask=mask).logits, model.generate(rows, **options)
    model.set_attn_implementation(packed.NAME)
    assert torch.equal(model(rows, attention_mask=mask).logits, plain)
    assert torch.equal(model.generate(rows, **options), said)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_hands_the_bounds_down(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.set_attn_implementation(packed.NAME)
    expected = gradients(model, model(**flat_inputs(documents())).logits)
    calls = []
    real = packed._document_by_document
    monkeypatch.setattr(packed, "_document_by_document", lambda *a: calls.append(1) or real(*a))
    model.train()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
        if hasattr(part, "attn_dropout"):
            part.attn_dropout.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    close(gradients(model, model(**flat_inputs(documents())).logits), expected)
    assert len(calls) == 4  # two layers, forward and again in the backward pass


def test_no_mask_over_the_batch_is_built(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(**arguments: Any) -> None:
        raise AssertionError("a (T, T) mask was built")

    model.set_attn_implementation(packed.NAME)
    monkeypatch.setattr(packed, "sdpa_mask", never)
    model(**flat_inputs(documents()))


@pytest.mark.parametrize("window", [None, 7, 300])
def test_a_long_document_in_blocks_equals_one_masked_call(window: int | None) -> None:
    length = 600
    query, key, value = (torch.randn(1, heads, length, 8, dtype=torch.float64) for heads in (4, 2, 2))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < (window or length))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=0.3, enable_gqa=True
    )
    found = packed._document_by_document(query, key, value, [length], 0.3, window, 0.0)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_bounds_that_do_not_cover_the_batch_are_an_error() -> None:
    tensors = [torch.randn(1, 2, 6, 8)] * 3
    with pytest.raises(ValueError, match="cover 5 tokens, and the batch has 6"):
        packed._document_by_document(*tensors, [2, 3], None, None, 0.0)


def test_a_copied_stand_in_without_bounds_is_an_error() -> None:
    mask = packed.packed_mask(batch_size=1, q_length=4, kv_length=4, attention_mask=None, allow_is_causal_skip=False)
    assert mask is not None and mask.untyped_storage().nbytes() == 1
    with pytest.raises(RuntimeError, match="document bounds are missing"):
        packed._real_mask(mask.detach())


def test_it_is_registered_under_its_name(model: Any) -> None:
    assert AttentionInterface()[packed.NAME] is packed.packed_attention
    assert AttentionMaskInterface()[packed.NAME] is packed.packed_mask


def flash_reference(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, left: int | None) -> Tensor:
    """What flash-attn and torch document: `left` tokens before the current one, all of them for -1 or None."""
    outputs = []
    for query, key, value in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        distance = torch.arange(len(query))[:, None] - torch.arange(len(query))
        seen = (distance >= 0) & (distance <= (len(query) if left in (None, -1) else left))
        tensors = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
        out = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=seen, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("kernel", ["_flash_attn", "_flash_attn_cute", "_torch_varlen"])
def test_kernels_are_asked_for_the_right_window_and_scale(kernel: str, window: int | None) -> None:
    query, key, value = (torch.randn(sum(LENGTHS), heads, 8) for heads in (4, 2, 2))
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)

    def call(q: Tensor, k: Tensor, v: Tensor, *bounds: Any, window_size: tuple, **rest: Any) -> Tensor:
        assert window_size[1] == 0 or (rest["causal"] and window is None)  # torch has no `causal`, it reads the window
        scale = rest["scale"] if kernel == "_torch_varlen" else rest["softmax_scale"]
        return flash_reference(q, k, v, list(LENGTHS), scale, window_size[0])

    found = getattr(packed, kernel)(call, query, key, value, starts, max(LENGTHS), 0.3, window)
    batched = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
    torch.testing.assert_close(found, packed._document_by_document(*batched, list(LENGTHS), 0.3, window, 0.0)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("window", [None, 6])
def test_the_variable_length_kernel_equals_each_document_by_itself(window: int | None) -> None:
    shape = {"device": "cuda", "dtype": torch.bfloat16}
    total, starts = sum(LENGTHS), torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device="cuda")
    inputs = [torch.randn(1, heads, total, 64, **shape, requires_grad=True) for heads in (4, 2, 2)]
    bounds = {"cu_seq_lens_q": starts, "max_length_q": max(LENGTHS), "sliding_window": window, "scaling": 0.125}
    upstream = torch.randn(1, total, 4, 64, **shape)
    found, _ = packed.packed_attention(torch.nn.Module(), *inputs, None, **bounds)
    expected = packed._document_by_document(*inputs, list(LENGTHS), 0.125, window, 0.0)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    for ours, plain in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=3e-2, atol=3e-2)
