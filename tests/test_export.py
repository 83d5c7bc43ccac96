"""What an export writes beside plain safetensors: GGUF files, adapters, cards, Modelfiles; and where it is sent."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from gguf import GGUFReader, RopeScalingType
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

import llmtune
from llmtune.contract.errors import LoadError, PlanError
from llmtune.inference import export, upload
from llmtune.inference.gguf_export import TYPES, allowed_error, write_gguf
from llmtune.inference.model_card import told
from llmtune.inference.modelfile import go_template
from llmtune.model.gguf import gguf_folder
from llmtune.recipe.recipe import load_recipe
from llmtune.testing import tiny_model, tiny_tokenizer
from tests.runs import recipe

IDS = torch.arange(3, 40)[None]
HEAD_DIM = {"qwen3": 128, "gemma2": 256, "gemma3_text": 256}
"""What readers of GGUF files take these families to have."""


@pytest.fixture(scope="module")
def run(tiny_llama: str, chats: str, tmp_path_factory: pytest.TempPathFactory) -> llmtune.Run:
    keys = recipe(tiny_llama, chats, tmp_path_factory.mktemp("trained") / "run", max_steps=3, val_size=2)
    return llmtune.train(keys | {"token": "hf_secret"})


def read(file: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


# ---- GGUF ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"])
def test_transformers_reads_the_same_model_from_a_gguf_file(family: str, tmp_path: Path) -> None:
    dim = HEAD_DIM.get(family, 8)
    more = {"query_pre_attn_scalar": dim} if "gemma" in family else {}
    model = tiny_model(family, head_dim=dim, tie_word_embeddings="gemma" in family, **more)
    write_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf", "f32", [2], {"name": "tiny"})
    torch.testing.assert_close(logits(read(tmp_path / "model.gguf")), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_weights_of_a_gguf_file_are_those_of_the_model_but_for_rounding(kind: str, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    write_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf", kind, [2], {"name": "tiny"})
    found, steps = read(tmp_path / "model.gguf").state_dict(), {"f16": 2**11, "bf16": 2**8, "q8_0": 120, "q4_0": 7}
    for name, tensor in model.state_dict().items():
        off = (found[name] - tensor).abs().max()
        # Words of a 4-bit file have 8 bits, vectors have 32.
        words = kind == "q4_0" and ("embed" in name or "lm_head" in name)
        share = 0 if tensor.dim() == 1 else 1 / 120 if words else 1 / steps[kind]
        assert off <= share * tensor.abs().max(), name
        assert tensor.dim() == 1 or off > 0
    types = {tensor.tensor_type for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert TYPES[kind][0] in types


def test_a_weight_that_is_off_by_more_than_rounding_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, writing = tiny_model("llama"), export.write_gguf.__globals__["quantize"]

    def damaged(values: np.ndarray, kind: Any) -> np.ndarray:
        return writing(values * np.float32(1.02), kind)

    monkeypatch.setitem(export.write_gguf.__globals__, "quantize", damaged)
    with pytest.raises(PlanError, match=r"of the gguf file is off by .* more than rounding"):
        write_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf", "q8_0", [2], {"name": "tiny"})
    assert allowed_error(np.ones((1, 32), np.float32), TYPES["q8_0"][0]).max() < 0.006


def test_stretched_positions_are_in_the_file(tmp_path: Path) -> None:
    """llama.cpp divides each frequency by its factor; transformers' reader ignores them."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    model = tiny_model("llama", rope_parameters=rope)
    write_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf", "f32", [2], {"name": "tiny"})
    factors = {each.name: each.data for each in GGUFReader(tmp_path / "model.gguf").tensors}["rope_freqs.weight"]
    plain = 10000.0 ** -(np.arange(4) / 4)
    np.testing.assert_allclose(plain / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
    assert factors.min() == 1 and factors.max() == 8


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("olmo2", {}, r'is written for llama, .* and this model is "olmo2"'),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, 'in the way "yarn"'),
        ("qwen3", {"head_dim": 8}, "of a qwen3 model cannot say its head_dim"),
    ],
)
def test_what_a_gguf_file_cannot_say_is_refused(
    family: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = tiny_model(family, **changes)
    with pytest.raises(PlanError, match=said):
        write_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf", "f32", [2], {"name": "tiny"})


def test_a_run_is_exported_as_gguf_with_tokenizer_template_and_modelfile(run: llmtune.Run, tmp_path: Path) -> None:
    folder = run.export(tmp_path / "out", export_format="gguf", export_gguf_type="q8_0")
    assert sorted(path.name for path in folder.iterdir()) == ["Modelfile", "README.md", "model-q8_0.gguf"]
    merged = AutoModelForCausalLM.from_pretrained(run.export(tmp_path / "merged"))
    found, expected = logits(read(folder / "model-q8_0.gguf")), logits(merged)
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model-q8_0.gguf")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    fields = GGUFReader(folder / "model-q8_0.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert "FROM ./model-q8_0.gguf\n" in (folder / "Modelfile").read_text()
    assert 'model = Llama("out/model-q8_0.gguf")' in (folder / "README.md").read_text()


# ---- adapters, cards, Modelfiles -----------------------------------------------------------------------------------


def test_an_adapter_alone_is_exported(run: llmtune.Run, tiny_llama: str, chats: str, tmp_path: Path) -> None:
    folder = run.export(tmp_path / "adapter", export_format="adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), folder)
    torch.testing.assert_close(logits(theirs), logits(run.model()[0]), rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "peft"
    with pytest.raises(PlanError, match="has no adapter that PEFT reads"):
        export.export(tiny_llama, export_dir=str(tmp_path / "none"), export_format="adapter")
    assert not (tmp_path / "none").exists()


def test_the_card_says_what_it_is_made_of_and_nothing_private(
    run: llmtune.Run, tiny_llama: str, tmp_path: Path
) -> None:
    (Path(tiny_llama) / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    (run.output_dir / "benchmarks").mkdir(exist_ok=True)
    (run.output_dir / "benchmarks" / "mmlu.json").write_text('{"task": "mmlu", "metrics": {"acc": 0.5}}')
    try:
        card = (run.export(tmp_path / "merged") / "README.md").read_text()
    finally:
        (Path(tiny_llama) / "README.md").unlink()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "library_name": "transformers", "license": "apache-2.0", "pipeline_tag": "text-generation",
        "tags": ["llmtune", "sft", "lora"],
    }  # fmt: skip
    assert "| mmlu acc | 0.5 |" in card and "| eval_loss |" in card and "learning_rate: 0.01" in card
    assert "hf_secret" not in card and str(tmp_path.parent) not in card and str(Path(tiny_llama).parent) not in card


def test_the_generation_config_ends_answers_where_turns_end(run: llmtune.Run, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tiny_model("llama", eos_token_id=0).save_pretrained(base)
    tokenizer.save_pretrained(base)
    named = {"name": "lora", "adapter_name_or_path": str(run.output_dir / "model")}
    folder = export.export(base, export_dir=str(tmp_path / "merged"), peft_config=named)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [0, 2]
    assert 'PARAMETER stop "<|im_end|>"' in (folder / "Modelfile").read_text()


def written_by_go(template: str, messages: list[dict[str, str]]) -> str:
    """The template of a Modelfile, carried out: each role has words before and after."""
    parts = {}
    for role in ("user", "assistant", "system"):
        parts[role] = template.split(f'eq .Role "{role}" }}}}')[1].split("{{ else")[0].split("{{ end }}")[0]
    said = "".join(parts[each["role"]].replace("{{ .Content }}", each["content"]) for each in messages)
    return said + template.rpartition("{{ end }}")[2]


def test_the_modelfile_writes_conversations_as_the_template_does() -> None:
    tokenizer = tiny_tokenizer()
    found = go_template(tokenizer, {})
    assert found is not None and found[1] == ""
    talk = [{"role": role, "content": f"some {role}"} for role in ("system", "user", "assistant", "user")]
    ours = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert written_by_go(found[0], talk) == ours
    implied = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        + str(tokenizer.chat_template)
    )  # fmt: skip
    found = go_template(tokenizer, {"chat_template": implied})
    assert found is not None and found[1] == "Be kind."
    counted = "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}"
    assert go_template(tokenizer, {"chat_template": counted}) is None


# ---- elsewhere -----------------------------------------------------------------------------------------------------


def test_an_export_is_uploaded_whole(run: llmtune.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Hub:
        def __init__(self, token: str | None = None) -> None:
            calls.append(token)

        def create_repo(self, name: str, exist_ok: bool) -> None:
            calls.append(name)

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
            calls.append(sorted(path.name for path in Path(folder_path).iterdir()))

    monkeypatch.setattr(upload, "HfApi", Hub)
    run.export(tmp_path / "merged", export_hub_model_id="me/mine", token="hf_mine")
    assert calls[:2] == ["hf_mine", "me/mine"]
    assert {"README.md", "Modelfile", "config.json", "model.safetensors", "tokenizer.json", "generation_config.json",
            "chat_template.jinja"} <= set(calls[2])  # fmt: skip
    assert "me/mine" in (tmp_path / "merged" / "README.md").read_text()


def test_what_could_not_be_uploaded_is_uploaded_by_the_same_command(
    run: llmtune.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what the failed command wrote goes up, and only for the same command."""
    down, sent = True, []

    class Hub:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, name: str, exist_ok: bool) -> None:
            if down:
                raise ConnectionError("[Errno -2] Name or service not known")

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
            sent.append((repo_id, (Path(folder_path) / "README.md").stat().st_mtime_ns))

    monkeypatch.setattr(upload, "HfApi", Hub)
    target = tmp_path / "it's merged"
    keys = {"export_format": "adapter", "export_hub_model_id": "me/mine"}
    with pytest.raises(upload.UploadError) as told:
        run.export(target, **keys)
    assert "is written, but not uploaded to me/mine: no way to the hub ([Errno -2]" in str(told.value)
    assert "run the same command again, which then only uploads, or: hf upload me/mine '" in str(told.value)
    written = (target / "README.md").stat().st_mtime_ns
    with pytest.raises(PlanError, match="is not empty"):
        run.export(target, **(keys | {"export_format": "safetensors"}))
    down = False
    monkeypatch.setattr(export, "copy_adapter", None)
    run.export(target, **keys)
    assert sent == [("me/mine", written)]
    with pytest.raises(PlanError, match="is not empty"):
        run.export(target, **keys)
    with pytest.raises(PlanError, match=r"export_hub_model_id: found \"me/a/b\", allowed is a name like owner/name"):
        run.export(tmp_path / "new", export_hub_model_id="me/a/b")


def test_a_type_of_gguf_counts_with_that_format(run: llmtune.Run, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="export_gguf_type: found q4_0, which counts with export_format: gguf"):
        run.export(tmp_path / "x", export_gguf_type="q4_0")


def test_a_folder_that_cannot_be_is_refused_before_the_merge(
    run: llmtune.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "merged_plan", None)
    with pytest.raises(PlanError, match=r"export_dir: /proc/x cannot be written \(.*\); name a folder elsewhere"):
        run.export("/proc/x")
    (tmp_path / "file").touch()
    with pytest.raises(PlanError, match=r"export_dir: .*file cannot be written \(Not a directory\)"):
        run.export(tmp_path / "file")


GPTQ = """
import json
from pathlib import Path

class QuantizeConfig:
    def __init__(self, bits, group_size): self.bits = bits

class GPTQModel:
    @classmethod
    def load(cls, source, config):
        made = cls()
        made.told = {"bits": config.bits, "files": sorted(path.name for path in Path(source).iterdir())}
        return made
    def quantize(self, rows): self.told["rows"] = [row["input_ids"] for row in rows]
    def save(self, target): (Path(target) / "quantised.json").write_text(json.dumps(self.told))
"""


def test_gptq_runs_in_a_python_of_its_own(
    run: llmtune.Run, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PlanError, match=r"needs gptqmodel, best in an environment of its own: .*LLMTUNE_GPTQ_PYTHON"):
        run.export(tmp_path / "none", export_quantization_bit=4)
    (tmp_path / "gptqmodel.py").write_text(GPTQ)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("LLMTUNE_GPTQ_PYTHON", str(python))
    keys = {"export_quantization_nsamples": 3, "export_quantization_maxlen": 24, "export_quantization_dataset": chats}
    folder = run.export(tmp_path / "out", export_quantization_bit=4, **keys)
    told = json.loads((folder / "quantised.json").read_text())
    assert told["bits"] == 4 and "model.safetensors" in told["files"] and len(told["rows"]) == 3
    first = json.loads(Path(chats).read_text().splitlines()[0])["messages"]
    ids = tiny_tokenizer().apply_chat_template(first, return_dict=False)
    assert all(len(row) <= 24 for row in told["rows"]) and told["rows"][0] == ids[:24]
    with monkeypatch.context() as patch:
        patch.setattr(export, "merged_plan", None)  # rows that are not there are told before it
        with pytest.raises(llmtune.LlmtuneError, match="nothere"):
            gone = {**keys, "export_quantization_dataset": "nothere.jsonl"}
            run.export(tmp_path / "none", export_quantization_bit=4, **gone)
    monkeypatch.setenv("LLMTUNE_GPTQ_PYTHON", "false")
    with pytest.raises(PlanError, match="gptqmodel failed"):
        run.export(tmp_path / "failed", export_quantization_bit=4, **keys)
    assert not (tmp_path / "failed").exists()


@pytest.mark.parametrize("more", [{"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                   "original_max_position_embeddings": 64}, {"rope_type": "linear"}])  # fmt: skip
def test_stretched_positions_of_a_gguf_file_are_read(more: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("llama", rope_parameters={"rope_theta": 10000.0, "factor": 8.0, **more})
    write_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf", "f32", [2], {"name": "tiny"})
    found = AutoModelForCausalLM.from_pretrained(gguf_folder(tmp_path / "model.gguf", tmp_path / "cache"))
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-4)


def test_logits_that_are_no_numbers_are_not_alike() -> None:
    one, none = torch.ones(1, 2, 3), torch.full((1, 2, 3), torch.nan)
    with pytest.raises(PlanError, match="does not answer like base plus adapter"):
        export.compare(none, none, one)


def test_places_accounts_and_trackers_are_no_part_of_a_card() -> None:
    keys = {"dataset": "data/a.json,/home/me/b.json", "stage_config": {"name": "grpo"},
            "reward_config": {"name": "endpoint", "url": "http://me:pw@host/score"}}  # fmt: skip
    recipe = load_recipe({"model": "m", "logger_config": {"name": "mlflow", "tracking_uri": "http://inside"}, **keys})
    said = told(recipe)
    assert (said["dataset"], said["reward_config"]["url"]) == ("data/a.json,b.json", "http://host/score")
    assert "logger_config" not in said


def test_stretched_positions_that_nobody_reads_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = write_gguf.__globals__["_write_config"]

    def stretching(writer: Any, config: Any) -> None:
        usual(writer, config)
        writer.add_rope_scaling_type(RopeScalingType.YARN)

    monkeypatch.setitem(write_gguf.__globals__, "_write_config", stretching)
    write_gguf(tiny_model("qwen2"), tiny_tokenizer(), tmp_path / "model.gguf", "f32", [2], {"name": "tiny"})
    with pytest.raises(LoadError, match="stretches its positions in the way yarn"):
        gguf_folder(tmp_path / "model.gguf", tmp_path / "cache")
