"""ModelScope's library against a server of this machine, and Modelers through a stand-in for its library."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune.testing import check_plugin, laws, tiny_recipe

sys.path.insert(0, str(Path(__file__).parent))
from modelscope_server import Server

SECRET = "ms-very-secret"
FILES = {"config.json": b"{}", "more/notes.txt": b"None."}
STAND_IN = """
import os, shutil
from pathlib import Path
from types import SimpleNamespace
OM_HUB_CACHE = os.environ["OM_TEST_CACHE"]
ROOT = Path(os.environ["OM_TEST_ROOT"])
class OmHubHTTPError(OSError):
    def __init__(self, status):
        super().__init__(f"{status} of the server")
        self.response = SimpleNamespace(status_code=status)
class OmApi:
    def __init__(self, endpoint=None, token=None):
        assert endpoint is None or endpoint.startswith("https")
    def list_repo_tree(self, repo_id, path_in_repo=None, *, recursive=False, revision=None, token=None):
        if (ROOT / "down").exists():
            raise ConnectionError("no route to host")
        if not (ROOT / repo_id).is_dir():
            raise OmHubHTTPError(403 if repo_id.endswith("private") and token is None else 404)
        for path in (ROOT / repo_id).rglob("*"):
            name = str(path.relative_to(ROOT / repo_id))
            yield SimpleNamespace(path=name, lfs=None) if path.is_file() else SimpleNamespace(path=name)
def snapshot_download(repo_id, *, repo_type=None, revision=None, cache_dir=None, token=None, allow_patterns=None):
    place = Path(cache_dir or OM_HUB_CACHE) / f"{repo_type}s--{repo_id.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text("0123")
    for name in allow_patterns:
        (place / "snapshots" / "0123" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / repo_id / name, place / "snapshots" / "0123" / name)
    return str(place / "snapshots" / "0123")
"""


def write(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def modelscope(tmp_path: Path) -> Iterator[Server]:
    pytest.importorskip("modelscope_hub")
    server = Server(tmp_path / "served")
    yield server
    server.close()


@pytest.fixture
def openmind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the repositories of the stand-in, which pip would find under the library's name."""
    site, root = tmp_path / "site", tmp_path / "repositories"
    (site / "openmind_hub-1.3.0.dist-info").mkdir(parents=True)
    (site / "openmind_hub-1.3.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: openmind-hub\nVersion: 1.3.0\n"
    )
    (site / "openmind_hub.py").write_text(STAND_IN)
    monkeypatch.setenv("OM_TEST_ROOT", str(root))
    monkeypatch.setenv("OM_TEST_CACHE", str(tmp_path / "openmind"))
    monkeypatch.syspath_prepend(str(site))
    root.mkdir()
    yield root
    sys.modules.pop("openmind_hub", None)


def test_modelscope_keeps_every_law(modelscope: Server, tmp_path: Path) -> None:
    write(tmp_path / "served" / "models" / "me" / "tiny")
    parameters = {"token": SECRET, "endpoint": modelscope.url}
    assert len(laws("hub_config", "modelscope", repository="me/tiny")) > 8
    check_plugin("hub_config", "modelscope", tmp_path, parameters, repository="me/tiny", files=FILES)
    assert modelscope.tokens == {f"Bearer {SECRET}"}


def test_modelers_keeps_every_law(openmind: Path, tmp_path: Path) -> None:
    write(openmind / "me" / "tiny")
    parameters = {"token": SECRET}
    assert len(laws("hub_config", "modelers", repository="me/tiny")) > 8
    check_plugin("hub_config", "modelers", tmp_path, parameters, repository="me/tiny", files=FILES)


def stocked(tmp_path: Path, models: Path, datasets: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A recipe of files of this machine, and the same from a hub: the model, adapters to go on with, and the data."""
    first = tiny_recipe(
        tmp_path, peft_config={"name": "lora", "r": 2, "lora_dropout": 0.0}, max_steps=1, save_steps=None
    )
    run = llmtune.train(first)
    adapter = {"name": "lora", "r": 2, "lora_dropout": 0.0, "adapter_name_or_path": str(run.output_dir / "model")}
    here = {**first, "peft_config": adapter, "output_dir": str(tmp_path / "here"), "max_steps": 2}
    for source, target in (
        (Path(first["model"]), models / "me" / "tiny"), (run.output_dir / "model", models / "me" / "adapter"),
    ):  # fmt: skip
        shutil.copytree(source, target)
    (datasets / "me" / "data").mkdir(parents=True)
    shutil.copy(first["dataset"], datasets / "me" / "data" / "train.jsonl")
    there = {
        **here, "model": "me/tiny", "dataset": "me/data", "output_dir": str(tmp_path / "there"),
        "peft_config": {**adapter, "adapter_name_or_path": "me/adapter"}, "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    return here, there


def losses(keys: dict[str, Any]) -> list[float]:
    return [row["loss"] for row in llmtune.train(keys).metrics if "loss" in row]


def test_a_run_takes_all_from_modelscope_and_writes_no_token_down(
    modelscope: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import modelscope_hub

    served = tmp_path / "served"
    here, there = stocked(tmp_path, served / "models", served / "datasets")
    before = modelscope_hub.get_default_config()
    monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS", 1)  # seconds between them
    (served / "models" / "me" / "tiny" / "pytorch_model.bin").write_bytes(b"pickle")
    there["hub_config"] = {"name": "modelscope", "token": SECRET, "endpoint": modelscope.url}
    assert losses(here) == losses(there)
    assert modelscope.tokens == {f"Bearer {SECRET}"} and not any(".bin" in path for path in modelscope.asked)
    written = [path for path in (tmp_path / "there").rglob("*") if path.is_file()]
    assert (tmp_path / "there" / "run.json") in written
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    assert SECRET not in "".join(capfd.readouterr())
    modelscope.close()  # what was fetched goes on without it
    plan = str(llmtune.plan(there))
    assert "hub           modelscope (llmtune-hubs" in plan and "comes from the hub's cache" in plan
    modelscope_hub.set_default_config(replace(before, endpoint=modelscope.url))
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    with pytest.raises(llmtune.LoadError, match="on ModelScope, it is not in the cache, and ModelScope could not be"):
        llmtune.plan({**here, "model": "me/other"})
    modelscope_hub.set_default_config(before)


def test_a_run_takes_all_from_modelers(openmind: Path, tmp_path: Path) -> None:
    here, there = stocked(tmp_path, openmind, openmind)
    there["hub_config"] = "modelers"
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"listed": {"om_hub_url": "me/data", "formatting": "openai"}})
    )
    assert losses(here) == losses({**there, "dataset": "listed", "dataset_dir": str(tmp_path)})
    (openmind / "down").touch()
    llmtune.plan(there)
    with pytest.raises(llmtune.LoadError, match="Modelers could not be reached .no route to host"):
        llmtune.plan({**there, "model": "me/other"})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent", "Modelers has no model me/absent, nor is there"),
        ("private", "Modelers refuses access to me/private .403"),
    ],
)
def test_refusals_of_modelers(name: str, words: str, openmind: Path, tmp_path: Path) -> None:
    keys = tiny_recipe(tmp_path, hub_config="modelers")
    with pytest.raises(llmtune.LoadError, match=f"model: {words}"):
        llmtune.plan({**keys, "model": f"me/{name}"})
    with pytest.raises(llmtune.DataError, match=f"hub data set me/{name}: .*{words}".replace("model", "dataset")):
        llmtune.plan({**keys, "dataset": f"me/{name}"})


def test_refusals_of_modelscope(modelscope: Server, tmp_path: Path) -> None:
    keys = tiny_recipe(tmp_path, hub_config={"name": "modelscope", "endpoint": modelscope.url})
    with pytest.raises(llmtune.LoadError, match="model: ModelScope has no model me/absent, nor is there"):
        llmtune.plan({**keys, "model": "me/absent"})
    (tmp_path / "served" / "datasets" / "me" / "data").mkdir(parents=True)
    with pytest.raises(llmtune.DataError, match="me/data on ModelScope holds no file of data"):
        llmtune.plan({**keys, "dataset": "me/data"})


@pytest.mark.parametrize(("name", "package"), [("modelscope", "modelscope-hub"), ("modelers", "openmind-hub")])
def test_without_its_library_one_sentence_says_what_to_install(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = sys.modules["llmtune.recipe.packages"].version

    def version(asked: str) -> str:
        if asked == package:
            raise PackageNotFoundError(asked)
        return there(asked)

    monkeypatch.setattr("llmtune.recipe.packages.version", version)
    with pytest.raises(llmtune.PluginError, match=f'needs {package}.*; run: pip install "{package}'):
        llmtune.plan(tiny_recipe(tmp_path, hub_config=name))
