"""Model sources: what is found where, what is refused with which sentence, and what a GGUF becomes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmtune
from llmtune.cli import main
from llmtune.contract.errors import ErrorList, LoadError, PlanError, RecipeError
from llmtune.contract.schema import decode, document, field_types
from llmtune.model.config import ModelConfig
from llmtune.model.source import (
    attention_name,
    auto_class,
    load_model_config,
    load_tokenizer,
    resolve_model,
)
from llmtune.model.weight_files import read_index, weight_names
from llmtune.recipe.recipe import load_recipe

# ---- local folders -------------------------------------------------------------------------------------------------


def test_local_folder(folder):
    config = ModelConfig(model=str(folder))
    files = resolve_model(config, weights=True)
    assert (files.folder, files.origin, files.revision, files.note) == (folder.resolve(), "folder", None, "")
    assert load_model_config(files, config).hidden_size == 32
    assert load_tokenizer(files, config).eos_token == "<|im_end|>"


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "~/absent/model", "a/b/c", "runs\\model"])
def test_a_path_that_does_not_exist_is_never_taken_for_a_hub_id(name):
    with pytest.raises(LoadError, match=r"no folder .*existing folder, or a hub id"):
        resolve_model(ModelConfig(model=name), weights=False)


def test_folder_faults(folder, tmp_path):
    with pytest.raises(LoadError, match=r"local folder .* no revisions; remove revision"):
        resolve_model(ModelConfig(model=str(folder), revision="main"), weights=False)
    with pytest.raises(LoadError, match="is a file; allowed are"):
        resolve_model(ModelConfig(model=str(folder / "config.json")), weights=False)
    (folder / "config.json").write_text("{")
    with pytest.raises(LoadError, match=r"config\.json is no JSON"):
        resolve_model(ModelConfig(model=str(folder)), weights=False)
    (folder / "config.json").unlink()
    (folder / "x.gguf").touch()
    with pytest.raises(LoadError, match=r"no config\.json.*model: .*x\.gguf"):
        resolve_model(ModelConfig(model=str(folder)), weights=False)


def test_pickles_are_refused_with_the_way_to_convert_them(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"pickles \(pytorch_model\.bin\).*can run any code.*from_pretrained"):
        resolve_model(ModelConfig(model=str(folder)), weights=False)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(LoadError, match="holds no weights"):
        resolve_model(ModelConfig(model=str(folder)), weights=False)


# ---- damaged weight files ------------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123\n"


def damaged(file: Path, kind: str) -> None:
    content = file.read_bytes()
    header = int.from_bytes(content[:8], "little")
    file.write_bytes(
        {
            "empty": b"",
            "stub": content[:5],
            "pointer": POINTER,
            "html": b"\n<!DOCTYPE html><html><body>Log in</body></html>",
            "cut": content[:-100],
            "cut header": content[: header // 2],
            "longer": content + b"\0" * 7,
            "noise": content[:8] + b"\xff" * header + content[8 + header :],
            "huge header": b"\xff" * 8 + content,
        }[kind]
    )


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("empty", r"is empty \(0 bytes\).*hf cache verify"),
        ("stub", "truncated: 5 bytes"),
        ("pointer", "Git LFS pointer.*git lfs pull"),
        ("html", "HTML page"),
        ("cut", "truncated: {whole} bytes expected, {cut} found.*hf cache verify"),
        ("cut header", "truncated: at least .* bytes expected"),
        ("longer", "longer than its header says"),
        ("noise", "no safetensors file: its header is damaged"),
        ("huge header", "its header claims"),
    ],
)
def test_damaged_weight_files(folder, kind, cause):
    file = folder / "model.safetensors"
    size = file.stat().st_size
    assert weight_names(folder) == [file.name] and read_index(folder)
    damaged(file, kind)
    with pytest.raises(LoadError, match=cause.format(whole=f"{size:,}", cut=f"{size - 100:,}")) as caught:
        resolve_model(ModelConfig(model=str(folder)), weights=True)
    assert str(file) in str(caught.value)


def indexed(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {k: n for n, half in zip(names, halves, strict=True) for k in half}}))
    return index


def test_all_damaged_shards_are_reported_at_once(folder):
    indexed(folder)
    first, second = (folder / name for name in weight_names(folder))
    first.write_bytes(POINTER)
    second.unlink()
    with pytest.raises(ErrorList) as caught:
        read_index(folder)
    assert "LFS pointer" in str(caught.value.errors[0]) and "missing" in str(caught.value.errors[1])


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a\\x.safetensors", "x.bin", 3])
def test_an_index_may_only_name_files_beside_it(folder, name):
    index = indexed(folder)
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(LoadError, match=r"only plain names of \.safetensors"):
        read_index(folder)


def test_an_index_that_is_a_pointer(folder):
    indexed(folder).write_bytes(POINTER)
    with pytest.raises(LoadError, match=r"index\.json cannot be read: it is a Git LFS pointer"):
        read_index(folder)


def test_links_may_lead_into_the_hubs_blobs_but_not_elsewhere(folder, tmp_path):
    weights = folder / "model.safetensors"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    for blobs in (tmp_path / "models--a--b" / "blobs", tmp_path / "blobs"):
        shutil.rmtree(snapshot, ignore_errors=True)
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        shutil.copy(weights, blobs / "abc")
        (snapshot / "model.safetensors").symlink_to(blobs / "abc")
        assert {tensor.file for tensor in read_index(snapshot).values()} == {"model.safetensors"}
    secret = tmp_path / "secret.safetensors"
    weights.rename(secret)
    weights.symlink_to(secret)
    with pytest.raises(LoadError, match=r"link out of its folder, to .*secret"):
        read_index(folder)


# ---- configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "llama3"])
def test_rope_scaling_by_name_builds_a_model_with_scaled_positions(folder, name):
    from transformers import AutoModelForCausalLM

    plain, scaled = ModelConfig(model=str(folder)), ModelConfig(model=str(folder), rope_scaling=name)
    files = resolve_model(plain, weights=False)
    before, after = load_model_config(files, plain), load_model_config(files, scaled)
    assert after.rope_parameters["rope_type"] == name and after.rope_parameters["factor"] == 2.0
    assert after.rope_parameters["rope_theta"] == before.rope_parameters["rope_theta"]
    # Dynamic scaling starts beyond the trained length, so that length has to stay.
    assert after.max_position_embeddings == (512 if name == "dynamic" else 1024)
    models = [AutoModelForCausalLM.from_pretrained(folder, config=config) for config in (before, after)]
    positions = torch.arange(600 if name == "dynamic" else 40)[None]
    hidden = torch.zeros(1, positions.shape[1], 32)
    cosines = [model.model.rotary_emb(hidden, positions)[0] for model in models]
    assert not torch.allclose(*cosines)
    if name == "linear":
        torch.testing.assert_close(cosines[1][:, ::2], cosines[0][:, :20])


def test_rope_scaling_by_mapping(folder):
    wanted = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0}
    config = ModelConfig(model=str(folder), rope_scaling=wanted)
    found = load_model_config(resolve_model(config, weights=False), config)
    assert found.rope_parameters["original_max_position_embeddings"] == 512
    assert found.max_position_embeddings == 2048 and found.rope_parameters["beta_fast"] == 16.0


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ({"rope_type": "yarm", "factor": 2}, "rope_type: found 'yarm', allowed is one of linear"),
        ({"rope_type": "yarn"}, "factor: found None, allowed is a number >= 1"),
        ({"rope_type": "yarn", "factor": True}, "factor: found True"),
        ("ntk", 'found "ntk"'),
    ],
)
def test_bad_rope_scaling(value, part):
    _, problems = decode(ModelConfig, {"model": "x", "rope_scaling": value})
    assert len(problems) == 1 and part in problems[0].message


def test_rope_scaling_where_it_has_no_place():
    from transformers import AutoConfig

    from llmtune.model.source import scale_rope

    with pytest.raises(PlanError, match="gpt2 models have no rotary positions"):
        scale_rope(AutoConfig.for_model("gpt2"), "linear")
    with pytest.raises(PlanError, match="for each kind of layer"):
        scale_rope(AutoConfig.for_model("gemma3_text"), "linear")
    scaled = AutoConfig.for_model("llama", rope_parameters={"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4})
    with pytest.raises(PlanError, match=r"already scaled \(linear, factor 8\.0\)"):
        scale_rope(scaled, "yarn")


def test_code_of_a_model_runs_only_at_the_word_of_a_local_recipe(folder, tmp_path):
    trusting = {"model": str(folder), "trust_remote_code": True}
    file = tmp_path / "mine.yaml"
    file.write_text(f"model: {folder}\ntrust_remote_code: true\n")
    assert load_recipe(file).model.trust_remote_code is True
    assert load_recipe({"model": "x"}).model.trust_remote_code is False
    with pytest.raises(RecipeError, match="trust_remote_code: found true in a recipe that is no local file"):
        load_recipe(trusting)
    assert load_recipe(trusting, {"trust_remote_code": True}).model.trust_remote_code is True


def test_what_a_run_wrote_down_does_not_let_code_run(folder, tmp_path, capsys):
    """Somebody else's run may ask for trust in its model's code: chat, export, plan and load do not give it."""
    run = tmp_path / "run"
    run.mkdir()
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit\n")
    tree = json.loads((folder / "config.json").read_text()) | {
        "auto_map": {"AutoConfig": "own.Own"},
        "model_type": "own",
    }
    (folder / "config.json").write_text(json.dumps(tree))
    for name in ("resolved.yaml", "recipe.yaml"):
        (run / name).write_text(f"model: {folder}\ntrust_remote_code: true\n")
    (run / "run.json").write_text("{}")
    for words in (
        ["chat", str(run), "--prompt", "x"],
        ["export", str(run), "export_dir=x"],
        ["plan", f"{run}/recipe.yaml"],
    ):
        assert main(words) == 2
        assert "trust_remote_code: found true in a recipe that is no local file" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="trust_remote_code=True as an argument"):
        llmtune.load(run).model()
    with pytest.raises(RecipeError, match="trust_remote_code=True as an argument"):
        llmtune.plan({"model": str(folder), "trust_remote_code": True})
    assert not (tmp_path / "ran").exists()
    with pytest.raises(SystemExit):
        llmtune.load(run, trust_remote_code=True).model()
    assert (tmp_path / "ran").exists()


def test_a_model_with_code_of_its_own_is_refused_without_trust(folder):
    tree = json.loads((folder / "config.json").read_text())
    tree |= {"model_type": "strange", "auto_map": {"AutoConfig": "configuration.Strange"}}
    (folder / "config.json").write_text(json.dumps(tree))
    (folder / "configuration.py").write_text("raise SystemExit('ran')")
    config = ModelConfig(model=str(folder))
    with pytest.raises(LoadError, match=r"needs Python code from its repository.*trust_remote_code: true"):
        load_model_config(resolve_model(config, weights=False), config)


def test_a_folder_without_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    config = ModelConfig(model=str(folder))
    with pytest.raises(LoadError, match="no usable tokenizer"):
        load_tokenizer(resolve_model(config, weights=False), config)


def test_model_classes_and_attention_names():
    from transformers import GPT2Config, Qwen2VLConfig, T5Config

    made = [auto_class(ModelConfig(model="x", model_class=kind), GPT2Config()) for kind in ("llm", "cls", "other")]
    assert [kind.__name__ for kind in made] == [
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
        "AutoModel",
    ]
    assert auto_class(ModelConfig(model="x"), Qwen2VLConfig()).__name__ == "AutoModelForImageTextToText"
    with pytest.raises(PlanError, match="no AutoModelForCausalLM for t5 models"):
        auto_class(ModelConfig(model="x"), T5Config())
    for kind in field_types(ModelConfig)["flash_attn"].__args__:
        attention_name(ModelConfig(model="x", flash_attn=kind))
    assert attention_name(ModelConfig(model="x", flash_attn="fa2")) == "flash_attention_2"


def test_every_key_is_documented_and_the_token_is_not_shown():
    assert set(document(ModelConfig)) == set(field_types(ModelConfig))
    assert "hf_secret" not in repr(ModelConfig(model="x", token="hf_secret"))


def test_importing_the_sources_loads_neither_torch_nor_transformers():
    heavy = {"torch", "transformers", "huggingface_hub"}
    code = "import sys, llmtune.model.source; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "llmtune.model.source" in loaded and not heavy & set(loaded)
