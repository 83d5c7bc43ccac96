"""Checkpoints that are stored quantised: each kind made by hand, turned back, trained on, and read by others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
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
from llmtune.model import prequantised
from llmtune.testing.tiny import tiny_chats, tiny_model_folder
from tests.by_hand import adapt_by_hand, assert_same, train_by_hand
from tests.runs import recipe
from tests.test_resume import assert_equal_runs, forget_after

IDS = torch.arange(3, 40)[None]
Stored = tuple[dict[str, Tensor], Tensor]
"""The tensors that a weight is stored as, by the end of their names, and the weight that they stand for."""


def fp8(weight: Tensor) -> Stored:
    """Blocks of 16 x 16 in float8 with a scale each, as DeepSeek stores them."""
    rows, columns = weight.shape
    scales = weight.view(rows // 16, 16, columns // 16, 16).abs().amax((1, 3)) / 448
    wide = scales.repeat_interleave(16, 0).repeat_interleave(16, 1)
    codes = (weight / wide).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * wide


def int4(weight: Tensor) -> Stored:
    """compressed-tensors' pack-quantized: eight numbers in an int32, a scale for each 16 of a row."""
    groups = weight.view(len(weight), -1, 16)
    scales = groups.abs().amax(2) / 7
    codes = (groups / scales[..., None]).round().clamp(-8, 7)
    eights = (codes.view(len(weight), -1, 8).to(torch.int64) + 8) << torch.arange(0, 32, 4)
    packed = eights.sum(2)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    stored = {"weight_packed": packed, "weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}
    return stored, (codes * scales[..., None]).view_as(weight)


def mxfp4(weight: Tensor) -> Stored:
    """Experts as GPT-OSS has them: (experts, in, out) in blocks of 32 inputs, 4-bit floats and a power of two."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    blocks = weight.transpose(1, 2).reshape(len(weight), weight.shape[2], -1, 32)
    powers = (blocks.abs().amax(3) / 6).log2().ceil()
    codes = ((blocks / 2 ** powers[..., None])[..., None] - values).abs().argmin(-1)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    back = (values[codes] * 2 ** powers[..., None]).flatten(2).transpose(1, 2)
    return {"blocks": packed, "scales": (powers + 127).to(torch.uint8)}, back.contiguous()


CT = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16,
    }}},
}  # fmt: skip
KINDS: dict[str, tuple[str, Callable[[Tensor], Stored], dict[str, Any]]] = {
    "fp8": ("llama", fp8, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}),
    "compressed-tensors": ("llama", int4, CT),
    "mxfp4": ("gpt_oss", mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
}


def stored_as(kind: str, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A model folder of that kind, and all weights that it stands for."""
    family, store, says = KINDS[kind]
    base = tiny_model_folder(folder / "plain", family=family, initializer_range=0.2)
    tensors, meant = load_file(base / "model.safetensors"), {}
    made = dict(tensors)
    for name, tensor in tensors.items():
        expert = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        if not (expert if kind == "mxfp4" else name.endswith("_proj.weight")):
            meant[name] = tensor
            continue
        stored, meant[name] = store(made.pop(name).float())
        prefix = f"{name}_" if expert else name.removesuffix("weight")
        made |= {prefix + end: value for end, value in stored.items()}
    target = Path(shutil.copytree(base, folder / kind))
    save_file(made, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": says}))
    return target, meant


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_that_the_stored_ones_stand_for(kind: str, tmp_path: Path) -> None:
    if kind == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    base, meant = stored_as(kind, tmp_path)
    model, _ = llmtune.build({"model": str(base), "device": "cpu"})
    found = model.state_dict()
    assert found.keys() == meant.keys()
    for name, tensor in meant.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    assert "quantization_config" not in model.config.to_dict()


def test_an_adapter_is_trained_on_it_and_read_by_others(tmp_path: Path) -> None:
    """Step by step as transformers and PEFT by hand, and in the end both as an adapter and merged."""
    base, _ = stored_as("fp8", tmp_path)
    data = str(tiny_chats(tmp_path))
    lora = {"name": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    keys = recipe(
        str(base), data, tmp_path / "run", peft_config=lora, max_steps=3, gradient_accumulation_steps=1,
        lr_scheduler_config="cosine", warmup_steps=0,
        optim_config={"name": "adamw", "weight_decay": 0.1}, save_steps=1, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    assert "stored quantised (fp8), and dequantised once" in str(llmtune.plan(keys))
    model, _ = llmtune.build(keys)
    starts = {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name}
    theirs = adapt_by_hand(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora, starts)
    expected = train_by_hand(keys, theirs, llmtune.plan(keys))
    run = llmtune.train(keys)
    assert_same([(row["loss"], row["grad_norm"]) for row in run.metrics if "grad_norm" in row], expected)

    shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    forget_after(tmp_path / "stopped", 2)
    shutil.rmtree(tmp_path / "cache")  # the weights are turned back a second time
    continued = llmtune.train({**keys, "output_dir": str(tmp_path / "stopped")})
    assert [row["loss"] for row in continued.metrics] == [row["loss"] for row in run.metrics]
    assert_equal_runs(tmp_path / "run", tmp_path / "stopped")

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "run" / "model"))
    torch.testing.assert_close(logits(plain), logits(theirs), rtol=1e-4, atol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(run.export(tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), logits(theirs), rtol=1e-4, atol=1e-4)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_the_folder_of_what_was_turned_back_is_named_by_what_it_was_made_of(tmp_path: Path) -> None:
    """Other files, or another transformers, are not answered with the weights of before."""
    base, _ = stored_as("fp8", tmp_path)
    keys = {"model": str(base), "device": "cpu", "cache_dir": str(tmp_path / "cache")}

    def made() -> set[str]:
        llmtune.build(keys)
        return {path.name for path in (tmp_path / "cache" / "dequantised").iterdir() if path.is_dir()}

    (first,) = made()
    assert made() == {first} and first.startswith("fp8-") and first.endswith(f"-{version('transformers')}")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (second,) = made() - {first}
    norm = load_file(tmp_path / "cache" / "dequantised" / second / "model.safetensors")["model.norm.weight"]
    assert torch.equal(norm, tensors["model.norm.weight"])


@pytest.mark.parametrize("kind", ["hqq", "bitsandbytes", "aqlm"])
def test_what_cannot_be_turned_back_is_refused_in_a_sentence(kind: str, tmp_path: Path) -> None:
    base, _ = stored_as("fp8", tmp_path)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": kind}}))
    with pytest.raises(LoadError, match=rf"is stored quantised \({kind}\).*use the model it was made from, with quant"):
        llmtune.plan({"model": str(base), "dataset": str(tiny_chats(tmp_path)), "device": "cpu", "max_steps": 1})


def test_a_package_that_is_missing_is_named_by_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prequantised, "find_spec", lambda name: None)
    base, _ = stored_as("fp8", tmp_path)
    with pytest.raises(LoadError, match="needs the package accelerate to read it: pip install accelerate"):
        llmtune.plan({"model": str(base), "dataset": str(tiny_chats(tmp_path)), "device": "cpu", "max_steps": 1})


def test_a_checkpoint_with_a_scale_too_few_is_not_used(tmp_path: Path) -> None:
    """transformers would take the codes for the weight."""
    base, _ = stored_as("fp8", tmp_path)
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"layers\.0\.mlp\.up_proj\.weight has no scales"):
        llmtune.build({"model": str(base), "device": "cpu"})
