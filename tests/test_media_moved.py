"""Pictures are what their files hold: a run goes on where they were moved, and stops where they are others."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune.contract.errors import CheckpointError, DataError
from tests.test_resume import assert_equal_runs, forget_after
from tests.tiny_media import MODELS, rows

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(MODELS["llava"](tmp_path_factory.mktemp("moved") / "llava"))


@pytest.fixture
def keys(llava: str, tmp_path: Path) -> dict[str, Any]:
    """Three steps over eight rows, whose pictures are in a folder of their own."""
    found = rows(tmp_path)
    (tmp_path / "here").mkdir()
    for picture in tmp_path.glob("*.png"):
        picture.rename(tmp_path / "here" / picture.name)
    return {
        "model": llava, "dataset": str(found), "media_dir": str(tmp_path / "here"), "output_dir": str(tmp_path / "run"),
        "bf16": False, "max_steps": 3, "per_device_train_batch_size": 2, "save_steps": 1, "disable_shuffling": True,
    }  # fmt: skip


def repainted(folder: Path) -> Path:
    """Other pictures of the same names and sizes."""
    for picture in folder.glob("*.png"):
        Image.eval(Image.open(picture), lambda value: 255 - value).save(picture)
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_goes_on_where_its_pictures_were_moved_and_not_with_others(
    streaming: bool, keys: dict[str, Any], tmp_path: Path
) -> None:
    keys["streaming"] = streaming
    llmtune.train(keys)
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    forget_after(tmp_path / "run", 1)
    other = repainted(Path(shutil.copytree(tmp_path / "here", tmp_path / "other")))
    with pytest.raises(CheckpointError, match="are not those .* what rows show"):
        llmtune.train({**keys, "media_dir": str(other)})
    (tmp_path / "here").rename(tmp_path / "there")
    llmtune.train({**keys, "media_dir": str(tmp_path / "there")})
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_a_row_that_was_left_out_for_its_picture_is_taken_once_that_is_mended(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))

    def bad() -> dict[str, int]:
        return dict(llmtune.plan({**keys, "on_bad_record": "skip"}).data.prepared.report.sources[0].bad)

    missing, broken = tmp_path / "here" / "0.png", tmp_path / "here" / "1.png"
    away, whole = missing.rename(tmp_path / "away.png"), broken.read_bytes()
    broken.write_bytes(whole[:60])
    assert bad() == {"missing media": 1, "broken media": 1}
    (about,) = (tmp_path / "cache" / "data").glob("*/about.json")
    made = about.stat().st_mtime_ns
    assert bad() == {"missing media": 1, "broken media": 1} and about.stat().st_mtime_ns == made, "not made again"
    away.rename(missing)
    assert bad() == {"broken media": 1}
    broken.write_bytes(whole)
    assert bad() == {}


def test_a_picture_of_the_same_size_that_is_another_one_is_not_learnt_from(keys: dict[str, Any]) -> None:
    llmtune.plan(keys)  # tokenises the rows
    repainted(Path(keys["media_dir"]))
    with pytest.raises(DataError, match=r"0\.png has changed since the data were tokenised.*overwrite_cache: true"):
        llmtune.train(keys)
    llmtune.train({**keys, "overwrite_cache": True})


def shows(*pictures: bytes) -> list[dict[str, Any]]:
    urls = [f"data:image/png;base64,{base64.b64encode(each).decode()}" for each in pictures]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    answer = {"role": "assistant", "content": "red"}
    return [{"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "what"}]}, answer]}] * 2


def test_what_rows_hold_themselves_is_kept_and_told_of_in_their_own_words(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    whole, data = (tmp_path / "here" / "0.png").read_bytes(), Path(keys["dataset"])
    data.write_text(json.dumps(shows(whole, whole[:60])))
    with pytest.raises(DataError, match=r"rows\.json:row 1: .*what image 2 holds cannot be read") as caught:
        llmtune.plan(keys)
    assert str(tmp_path / "cache") not in str(caught.value)
    data.write_text(json.dumps(shows(whole)))
    llmtune.plan(keys)
    shutil.rmtree(tmp_path / "cache" / "media")
    with pytest.raises(DataError, match="where the content of a row was kept; set overwrite_cache: true"):
        llmtune.train(keys)
    llmtune.train({**keys, "overwrite_cache": True})


def test_a_set_of_the_hub_has_the_pictures_of_each_recipes_folder(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where paths in its rows count from."""
    table = pytest.importorskip("datasets").Dataset.from_list(json.loads(Path(keys["dataset"]).read_text()))
    monkeypatch.setattr("llmtune.data.reading.hub._loaded", lambda *args, **more: table)
    repainted(Path(shutil.copytree(tmp_path / "here", tmp_path / "other")))
    digests = set()
    for name in ("here", "other"):
        monkeypatch.chdir(tmp_path / name)
        samples = llmtune.plan({**keys, "dataset": "hub:some/set", "media_dir": None}).data.prepared.train
        assert {Path(path).parent.name for at in range(8) for path in samples.pictures(at)} == {name}
        digests.add(samples.digest)
    assert len(digests) == 2
