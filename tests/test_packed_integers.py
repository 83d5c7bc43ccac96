"""Checkpoints of GPTQ and AWQ, packed here number by number: what they become, and training on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmtune
from llmtune.contract.errors import LoadError
from llmtune.model.config import ModelConfig
from llmtune.model.source import resolve_model
from tests.by_hand import adapt_by_hand, assert_same, train_by_hand
from tests.runs import recipe
from tests.spawn import in_ranks
from tests.test_resume import forget_after
from tests.tiny import tiny_model_folder

GROUP = 16
Stored = dict[str, Tensor]


def packed(rows: Tensor, bits: int, order: list[int] | None = None) -> Tensor:
    """(rows, n) numbers to (rows, n * bits / 32) int32, one after the other, in Python's own integers."""
    count = 32 // bits
    made = []
    for row in rows.tolist():
        words = []
        for start in range(0, len(row), count):
            eight = row[start : start + count]
            word = sum(eight[at] << (bits * place) for place, at in enumerate(order or range(count)))
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        made.append(words)
    return torch.tensor(made, dtype=torch.int32)


def groups(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, zero points, scales, what they mean): random numbers of so many bits for (out, in), float32."""
    rows, columns = weight.shape
    codes = torch.randint(0, 2**bits, (rows, columns))
    zeros = torch.randint(1, 2**bits, (rows, columns // GROUP))
    scales = ((torch.rand(rows, columns // GROUP) + 0.5) / 2**bits / 4).half()
    full = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            group = column // GROUP
            full[row, column] = (codes[row, column] - zeros[row, group]) * scales[row, group].float()
    return codes, zeros, scales, full


def gptq(weight: Tensor, bits: int = 4, older: int = 1) -> tuple[Stored, Tensor]:
    codes, zeros, scales, full = groups(weight, bits)
    order = torch.randperm(weight.shape[1])  # of inputs, as desc_act has it: each says its group
    return {
        "qweight": packed(codes[:, order], bits).t().contiguous(),
        "qzeros": packed((zeros - older).t(), bits), "scales": scales.t().contiguous(),
        "g_idx": (order // GROUP).int(),
    }, full[:, order]  # fmt: skip


def awq(weight: Tensor) -> tuple[Stored, Tensor]:
    codes, zeros, scales, full = groups(weight, 4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {"qweight": packed(codes.t(), 4, order), "qzeros": packed(zeros.t(), 4, order)}
    return {**tensors, "scales": scales.t().contiguous()}, full


def fp8(weight: Tensor) -> tuple[Stored, Tensor]:
    """In blocks of 16 x 16, the last ones of 48 x 40 cut, as of DeepSeek's kv_a_proj_with_mqa."""
    codes = (weight * 8).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-weight.shape[0] // 16), -(-weight.shape[1] // 16)) / 8
    full = codes.float()
    for row in range(len(full)):
        for column in range(full.shape[1]):
            full[row, column] *= scales[row // 16, column // 16]
    return {"weight": codes, "weight_scale_inv": scales}, full


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
FORMS: dict[str, tuple[Callable[[Tensor], tuple[Stored, Tensor]], dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}),
    "gptq_v2": (
        lambda weight: gptq(weight, 8, 0),
        {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (awq, AWQ),
}
CUT = {"fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"})}


def quantised(root: Path, name: str, **sizes: Any) -> tuple[Path, Path]:
    """A checkpoint of this form, and a plain one of the same numbers."""
    torch.manual_seed(3)
    make, about = {**FORMS, **CUT}[name]
    plain = tiny_model_folder(root, **sizes)
    folder = Path(shutil.copytree(plain, root / f"{name}-model"))
    full, stored = load_file(plain / "model.safetensors"), {}
    for key, weight in list(full.items()):
        if not key.endswith("proj.weight"):
            stored[key] = weight
            continue
        tensors, full[key] = make(weight)
        stored |= {f"{key.removesuffix('weight')}{part}": tensor for part, tensor in tensors.items()}
    save_file({key: weight.contiguous() for key, weight in full.items()}, plain / "model.safetensors", {"format": "pt"})
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": about}))
    return folder, plain


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {key: weight for file in folder.glob("*.safetensors") for key, weight in load_file(file).items()}


@pytest.mark.parametrize("name", FORMS)
def test_lora_on_a_quantised_checkpoint_equals_a_loop_on_its_numbers(name: str, chats: str, tmp_path: Path) -> None:
    folder, plain = quantised(tmp_path, name, intermediate_size=48)
    keys = recipe(
        str(folder), chats, tmp_path / "run", cache_dir=str(tmp_path / "cache"), max_steps=2, warmup_steps=0,
        peft_config={"name": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0}, lr_scheduler_config="cosine",
        optim_config={"name": "adamw", "weight_decay": 0.1},
    )  # fmt: skip
    plan = llmtune.plan(keys)
    assert "dequantised once" in " ".join(str(plan).split()) and not (tmp_path / "cache").exists()
    run = llmtune.train(keys)
    found, expected = made_full(folder, tmp_path), weights_of(plain)
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-6, atol=0, msg=key)
    starts = dict(llmtune.build({**keys})[0].named_parameters())
    model = adapt_by_hand(AutoModelForCausalLM.from_pretrained(plain), keys["peft_config"], starts)
    by_hand = train_by_hand(keys, model, plan)
    assert_same(numbers(run.metrics), by_hand)


def test_blocks_of_fp8_may_be_cut_at_the_end(tmp_path: Path) -> None:
    folder, plain = quantised(tmp_path, "fp8", intermediate_size=40)
    found, expected = made_full(folder, tmp_path), weights_of(plain)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_two_ranks_resuming_and_merging(chats: str, tmp_path: Path) -> None:
    """Two ranks make one conversion and train as one rank does; a stopped run continues; the merged model is plain."""
    folder, plain = quantised(tmp_path, "gptq")
    keys = recipe(
        str(folder), chats, tmp_path / "whole", cache_dir=str(tmp_path / "cache"), max_steps=3,
        lr_scheduler_config="constant", peft_config={"name": "lora", "r": 4, "lora_dropout": 0.1},
    )  # fmt: skip
    no_dropout = {**keys, "peft_config": {"name": "lora", "r": 4, "lora_dropout": 0.0}}
    two = {**no_dropout, "output_dir": str(tmp_path / "two"), "gradient_accumulation_steps": 1}
    in_ranks(2, tmp_path / "ranks", llmtune.train, two)
    assert len(list((tmp_path / "cache" / "dequantised").glob("gptq*"))) == 1
    one = llmtune.train({**no_dropout, "output_dir": str(tmp_path / "one")})
    rows = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert_same(numbers(rows), numbers(one.metrics))

    whole = llmtune.train({**keys, "save_steps": 1})
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    forget_after(tmp_path / "stopped", 2)
    shutil.rmtree(tmp_path / "cache")  # the second conversion is the same as the first, or the run would not continue
    continued = llmtune.train({**keys, "save_steps": 1, "output_dir": str(tmp_path / "stopped")})
    assert numbers(continued.metrics) == numbers(whole.metrics)

    merged = AutoModelForCausalLM.from_pretrained(whole.export(tmp_path / "merged", infer_dtype="float32"))
    assert not hasattr(merged.config, "quantization_config")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(plain), tmp_path / "whole" / "model")
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-6)


def numbers(rows: Any) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in rows if "grad_norm" in row]


def made_full(folder: Path, root: Path) -> dict[str, Tensor]:
    return weights_of(resolve_model(ModelConfig(model=str(folder), cache_dir=root / "cache"), weights=True).folder)


@pytest.mark.parametrize(
    ("about", "sentence"),
    [
        (
            {"quant_method": "gptq", "bits": 3},
            r"\(gptq\) with bits 3, allowed is 2 or 4 or 8; use the model it was made",
        ),
        ({**AWQ, "version": "GEMV"}, r"\(awq\) with version GEMV, allowed is gemm"),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "checkpoint_format marlin, allowed is gptq or gptq_v2",
        ),
    ],
)
def test_what_cannot_be_unpacked_is_said_in_the_plan(
    about: dict[str, Any], sentence: str, folder: Path, chats: str, tmp_path: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": about}))
    with pytest.raises(LoadError, match=sentence):
        llmtune.plan(recipe(str(folder), chats, tmp_path / "run"))


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder, _ = quantised(tmp_path, "gptq")
    file = folder / "model.safetensors"
    tensors, name = load_file(file), "model.layers.1.mlp.up_proj"
    save_file({key: tensor for key, tensor in tensors.items() if key != f"{name}.scales"}, file)
    with pytest.raises(LoadError, match=rf"{name}.qweight \(4, 64\).* make no weight .*fetch the model again"):
        made_full(folder, tmp_path)
    save_file({**tensors, f"{name}.qzeros": torch.full_like(tensors[f"{name}.qzeros"], -1)}, file)
    with pytest.raises(LoadError, match=f"{name} has the zero point 15, .*gptq_v2"):
        made_full(folder, tmp_path)
    assert not [path for path in (tmp_path / "cache" / "dequantised").iterdir() if path.is_dir()]
