"""Adapters that plain PEFT made are used, continued and exported, also by files as LLaMA-Factory's users write them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmtune
from llmtune import LlmtuneError, PlanError
from llmtune.cli import main
from llmtune.inference.reopen import open_model, recipe_of
from llmtune.testing.tiny import tiny_chats, tiny_model_folder
from tests.runs import recipe, stored_types

IDS = torch.arange(3, 40)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def plain(base: Path, *adapters: Path) -> Any:
    """The base with each adapter merged in, by PEFT alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("base"), initializer_range=0.5)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One with all that a file may say of ranks and scales, and a plain one."""
    made = []
    for number, keys in enumerate(({
        "r": 3, "use_rslora": True, "rank_pattern": {"layers.1.*q_proj": 5}, "alpha_pattern": {"v_proj": 2},
        "target_modules": ["q_proj", "v_proj", "down_proj"], "modules_to_save": ["lm_head"],
        "exclude_modules": r".*layers\.0\.mlp.*", "use_dora": True,
    }, {"r": 2, "target_modules": ".*layers.1.*up_proj"})):  # fmt: skip
        torch.manual_seed(number)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **keys),
        )
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        folder = tmp_path_factory.mktemp("adapters") / str(number)
        model.save_pretrained(folder)
        made.append(folder)
    return made


def written(folder: Path, base: Path, *adapters: Path, **keys: Any) -> Path:
    """A file as LLaMA-Factory's examples of inference and of merging are."""
    path = folder / "theirs.yaml"
    says = {
        "model_name_or_path": base, "adapter_name_or_path": ",".join(map(str, adapters)), "template": "chatml",
        "infer_backend": "huggingface", "trust_remote_code": "true", "finetuning_type": "lora", **keys,
    }  # fmt: skip
    path.write_text("### model\n" + "".join(f"{key}: {value}\n" for key, value in says.items()))
    return path


def test_a_foreign_adapter_is_used_as_peft_uses_it(
    base: Path, adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = plain(base, adapters[0])
    file = written(tmp_path, base, adapters[0])
    model, tokenizer = open_model(file)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-4)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = theirs.generate(**asked, do_sample=False, max_new_tokens=9)[0, asked["input_ids"].shape[1] :]
    expected = AutoTokenizer.from_pretrained(base).decode(ids, skip_special_tokens=True)
    greedy = ["--prompt", "Who?", "do_sample=false", "max_new_tokens=9"]
    for words in (
        [str(file)],
        [str(adapters[0])],  # the base is what PEFT's file says
        [str(base), f"adapter_name_or_path={adapters[0]}", "template=chatml"],
    ):
        capsys.readouterr()
        assert main(["chat", *words, *greedy]) == 0, capsys.readouterr().err
        assert capsys.readouterr().out == expected + "\n"

    chats = tiny_chats(tmp_path, rows=3)
    asks: dict[str, Any] = {
        "stage": "sft", "do_predict": "true", "eval_dataset": chats, "cutoff_len": 256, "max_samples": 50,
        "overwrite_cache": "true", "preprocessing_num_workers": 1, "per_device_eval_batch_size": 2,
        "predict_with_generate": "true", "ddp_timeout": 180000000,
    }  # fmt: skip
    keys = {"do_sample": False, "max_new_tokens": 5, "output_dir": str(tmp_path / "answers"), "nproc": 1}
    assert len(llmtune.predict(written(tmp_path, base, adapters[0], **asks), **keys).rows) == 3
    with pytest.raises(LlmtuneError, match="overwrite_output_dir"):  # answers of another adapter are not gone on with
        llmtune.predict(written(tmp_path, base, adapters[1], **asks), **keys)


def test_foreign_adapters_are_exported_from_a_file_of_llama_factory(
    base: Path, adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(
        tmp_path, base, *adapters, export_dir=tmp_path / "merged", export_size=2, export_device="cpu",
        export_legacy_format="false", export_quantization_bit="null", low_cpu_mem_usage="true", use_unsloth="false",
    )  # fmt: skip
    assert main(["export", str(file)]) == 0, capsys.readouterr().err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(plain(base, *adapters)), rtol=1e-4, atol=1e-4)
    assert stored_types(tmp_path / "merged") == {"torch.float32"}
    again = tmp_path / "again"
    assert main(["export", str(adapters[1]), f"export_dir={again}", "export_device=auto"]) == 0
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(again)), logits(plain(base, adapters[1])), rtol=1e-4, atol=1e-4
    )


def test_a_foreign_adapter_is_trained_on(base: Path, adapters: list[Path], chats: str, tmp_path: Path) -> None:
    keys = {"name": "lora", "adapter_name_or_path": str(adapters[0])}
    run = llmtune.train(recipe(str(base), chats, tmp_path / "run", max_steps=1, learning_rate=1e-9, peft_config=keys))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.output_dir / "model")
    torch.testing.assert_close(logits(model), logits(plain(base, adapters[0])), rtol=1e-4, atol=1e-4)
    before, after = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (adapters[0], run.output_dir / "model")
    )
    kept = ("r", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "exclude_modules", "modules_to_save")
    assert {key: before[key] for key in kept} == {key: after[key] for key in kept}
    assert stored_types(run.export(tmp_path / "merged", infer_dtype="float32")) == {"torch.float32"}


def test_what_cannot_be_used_is_told(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    def refused(path: Path, **keys: Any) -> str:
        with pytest.raises(LlmtuneError) as caught:
            open_model(path, **keys)
        return str(caught.value)

    told = refused(written(tmp_path, base, sglang_maxlen=8, loraplus_lr_ratio=2))
    assert f"{tmp_path / 'theirs.yaml'}:8:1  sglang_maxlen: no such key: SGLang is not called by llmtune" in told
    assert "loraplus_lr_ratio: no such key; here it is peft" in told
    told = refused(written(tmp_path, base, adapters[0], model=base))
    assert told.endswith(
        "theirs.yaml:2:1  model_name_or_path: found beside model, which is the same; remove one of the two"
    )
    assert "there is no folder /nowhere/else" in refused(written(tmp_path, Path("/nowhere/else")))
    told = refused(written(tmp_path, base, adapters[0], quantization_bit=3))
    assert "theirs.yaml:8:1  quant_config.quantization_bit: found 3" in told
    quant = {"quantization_bit": 4, "double_quantization": "false", "quantization_device_map": "auto"}
    made = recipe_of(written(tmp_path, base, adapters[0], infer_backend="vllm", vllm_maxlen=64, vllm_config="null"))
    assert made.blocks["engine_config"] == [("vllm", {"vllm_maxlen": 64})]
    assert "engine_config" not in recipe_of(written(tmp_path, base, adapters[0], vllm_maxlen=64)).blocks
    made = recipe_of(written(tmp_path, base, adapters[0], quantization_method="bitsandbytes", **quant))
    assert made.blocks["quant_config"] == [("bnb", {"quantization_bit": 4, "double_quantization": False})]
    made = recipe_of(written(tmp_path, base, adapters[0], quantization_bit=3, quantization_method="hqq"))
    assert made.blocks["quant_config"] == [("hqq", {"quantization_bit": 3})]
    made = recipe_of(written(tmp_path, base, adapters[0], quantization_method="hqq"))  # no bits: nothing is quantised
    assert not made.blocks.get("quant_config")

    odd = Path(shutil.copytree(adapters[1], tmp_path / "odd"))
    says = json.loads((odd / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps({**says, "init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(PlanError, match=r"a base that PEFT changed \(init_lora_weights: pissa_niter_4\).*convert it"):
        open_model(odd)
    (odd / "adapter_config.json").write_text(json.dumps({**says, "base_model_name_or_path": None}))
    with pytest.raises(PlanError, match="names no base model; name it: llmtune chat .* model="):
        open_model(odd)
    open_model(odd, model=str(base))


@pytest.mark.parametrize("name", ["lora", "peft"])
def test_adapters_of_every_plugin_come_from_the_recipes_hub(name: str, tiny_llama: str, tmp_path: Path) -> None:
    keys = {
        "model": tiny_llama, "device": "cpu", "dataset": "llmtune:quickstart", "output_dir": str(tmp_path / "run"),
        "hub_config": {"name": "modelscope", "endpoint": "http://127.0.0.1:1"}, "cache_dir": str(tmp_path / "cache"),
        "peft_config": {"name": name, "adapter_name_or_path": "me/adapter"},
    }  # fmt: skip
    with pytest.raises(llmtune.LoadError, match=r"adapter_name_or_path: .*Taken as a name on ModelScope, it is not in"):
        llmtune.plan(keys)
