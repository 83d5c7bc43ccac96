"""Training written by hand on transformers and PEFT, without any of llmtune's arithmetic: what llmtune is compared to.

Rows are padded, the model makes all its logits, the loss is one mean over the whole step.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.model.parameter_groups import create_optimizer, model_groups, optimizer_context


def train_by_hand(
    keys: dict[str, Any], model: Any, plan: Any, loss_of: Callable[..., torch.Tensor] | None = None
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step of the recipe `keys`; `model` is trained in place, by `mean_loss` if no other
    loss of (model, rows, padding) is given.

    Only the order of rows is asked of `plan`: which of them make up a step.
    """
    from transformers import AutoTokenizer, get_cosine_schedule_with_warmup

    tokenizer = AutoTokenizer.from_pretrained(keys["model"])
    rows = encoded(keys["model"], Path(keys["dataset"]).read_text())
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_by_hand(keys, model, weights, plan)
    schedule = get_cosine_schedule_with_warmup(optimizer, keys["warmup_steps"], keys["max_steps"])
    found = []
    for step in range(keys["max_steps"]):
        if hasattr(optimizer, "at_step"):
            optimizer.at_step(step)
        units = plan.data.batches.order.step_units(step)
        loss = (loss_of or mean_loss)(
            model, [rows[row] for unit in units for row in plan.data.batches.units[unit]], tokenizer.pad_token_id
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in weights if p.grad is not None], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
        for weight in weights:
            weight.requires_grad_(True)
    return found


def optimizer_by_hand(keys: dict[str, Any], model: Any, weights: list[Any], plan: Any) -> Any:
    """torch's AdamW; any other optimiser is llmtune's, which its own tests compare with its authors', on this model."""
    if keys["optim_config"]["name"] == "adamw":
        return torch.optim.AdamW(
            [
                {"params": [p for p in weights if p.dim() > 1], "weight_decay": 0.1},
                {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=keys["learning_rate"],
        )
    base, ledger = model.get_base_model() if hasattr(model, "get_base_model") else model, plan.model.ledger
    groups = model_groups(base, ledger, keys["learning_rate"])
    context = optimizer_context(base, keys["learning_rate"], plan.recipe.train.seed, frozenset(ledger.fresh))
    return create_optimizer(plan.parts.one("optim_config").built, groups, context)


Row = tuple[list[int], list[int]]
"""Tokens and labels."""


@functools.cache
def encoded(model: str, lines: str) -> list[Any]:
    """The rows of a file by the tokenizer of `model`, once for all that train on them; of pairs both answers' rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def row(tree: dict[str, Any]) -> Any:
        if "messages" in tree:
            return encode(tokenizer, tree["messages"])
        return tuple(encode(tokenizer, tree["prompt"] + tree[answer]) for answer in ("chosen", "rejected"))

    return [row(json.loads(line)) for line in lines.splitlines()]


def encode(tokenizer: Any, messages: list[dict[str, str]]) -> Row:
    """Token by token: ChatML written out, answers and their end-of-turn counted."""
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        head = tokenizer(f"<|im_start|>{message['role']}\n", add_special_tokens=False)["input_ids"]
        body = tokenizer(f"{message['content']}<|im_end|>", add_special_tokens=False)["input_ids"]
        tail = tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids += head + body + tail
        counted = message["role"] == "assistant"
        labels += [-100] * len(head) + (body if counted else [-100] * len(body)) + [-100] * len(tail)
    return ids, labels


def padded(batch: list[Row], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels and the attention mask of rows, each as long as the longest."""
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([i + [pad] * (longest - len(i)) for i, _ in batch])
    labels = torch.tensor([y + [-100] * (longest - len(y)) for _, y in batch])
    return ids, labels, torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in batch])


def mean_loss(model: Any, batch: list[Row], pad: int) -> torch.Tensor:
    return mean_and_output(model, batch, pad)[0]


def mean_and_output(model: Any, batch: list[Row], pad: int, **keys: Any) -> tuple[torch.Tensor, Any]:
    """The mean loss over a batch of (tokens, labels), and what the model gave for it."""
    ids, labels, mask = padded(batch, pad)
    given = model(input_ids=ids, attention_mask=mask, **keys)
    logits, wanted = given.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100), given


def quantisation(quant: dict[str, Any]) -> Any:
    """transformers' settings for a `quant_config` block of bnb."""
    from transformers import BitsAndBytesConfig

    if quant.get("quantization_bit", 4) == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.get("quantization_type", "nf4"),
        bnb_4bit_use_double_quant=quant.get("double_quantization", True),
        bnb_4bit_compute_dtype=torch.float32,
    )


def base_by_hand(keys: dict[str, Any], auto_class: Any = None) -> Any:
    """The recipe's base as transformers loads it, in float32, quantised if the recipe says so."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float32}
    quant = keys.get("quant_config")
    if quant and quant["name"] == "hqq":
        return half_quadratic((auto_class or AutoModelForCausalLM).from_pretrained(keys["model"], **options), quant)
    if quant:
        options["quantization_config"] = quantisation(quant)
    model = (auto_class or AutoModelForCausalLM).from_pretrained(keys["model"], **options)
    return right_weights(model) if quant else model


def half_quadratic(model: Any, quant: dict[str, Any]) -> Any:
    """The model with the weights that HQQ rounds to, in plain layers; the plugin's tests compare those with the
    package's."""
    from llmtune_quant.hqq import HalfQuadratic

    form = HalfQuadratic(bits=quant["quantization_bit"], group=quant["group_size"], dtype=torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            stored = form.quantise(layer.weight.detach())
            layer.weight.data = form.dequantise(stored, tuple(layer.weight.shape))
    return model


def right_weights(model: Any) -> Any:
    """Plain layers for 4-bit ones of widths that bitsandbytes' CPU kernel (0.50.2) gets wrong.

    It takes every row for the beginning of a block; of one long row it makes the values that the bytes stand for.
    """
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, bnb.nn.Linear4bit) or layer.in_features % 64 == 0:
            continue
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        state = layer.weight.quant_state
        state.shape = torch.Size((1, plain.weight.numel()))
        plain.weight.data = dequantize_4bit(layer.weight.data, state).view_as(plain.weight)
        if layer.bias is not None:
            plain.bias = layer.bias
        model.set_submodule(name, plain.requires_grad_(False))
    return model


def expand_by_hand(model: Any) -> None:
    """Put a copy of a Llama's last layer behind it that adds nothing yet, as the authors of LLaMA Pro do."""
    last = model.model.layers[-1]
    new = copy.deepcopy(last)
    new.self_attn.layer_idx += 1
    for product in (new.self_attn.o_proj, new.mlp.down_proj):
        torch.nn.init.zeros_(product.weight)
    model.model.layers.append(new)
    model.config.num_hidden_layers += 1


def adapt_by_hand(
    model: Any, peft: dict[str, Any], starts: dict[str, torch.Tensor], everything: str = "all-linear"
) -> Any:
    """The adapter of a `peft_config: lora` block, made by PEFT; its A matrices start from `starts`, by our names.

    `everything` is what `target_modules: all` means, in PEFT's words or as names with commas."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if "adapter_name_or_path" in peft:
        return PeftModel.from_pretrained(model, peft["adapter_name_or_path"], is_trainable=True)
    targets = peft.get("target_modules", everything)
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=peft["r"], lora_alpha=peft["lora_alpha"], lora_dropout=0.0,
            target_modules=targets.split(",") if "," in targets else targets,
            use_dora=peft.get("use_dora", False), use_rslora=peft.get("use_rslora", False),
            modules_to_save=peft.get("modules_to_save"), task_type="CAUSAL_LM",
            target_parameters=peft.get("target_parameters"),
        ),
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name:
                parameter.copy_(starts[name.removeprefix("base_model.model.")])
    return adapted


def assert_same(found: list[tuple[float, float]], expected: list[tuple[float, float]], tolerance: float = 1e-5) -> None:
    """Equal losses and gradient norms, step by step."""
    assert len(found) == len(expected) > 0
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours == pytest.approx(theirs, rel=tolerance), f"step {step + 1}"
