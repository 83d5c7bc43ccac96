"""Drawn pictures show what their rows say, and none that is held out is trained on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmtune.testing.pictures import COUNTS, QUESTIONS, SIZE, accuracy, write_rows

Image = pytest.importorskip("PIL.Image")
ImageColor = pytest.importorskip("PIL.ImageColor")


def filled(corner: np.ndarray) -> float:
    """The share of what a shape's own square holds that the shape fills."""
    rows, columns = np.nonzero(corner)
    return corner.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))


def test_pictures_show_what_their_rows_say(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in write_rows(tmp_path, "train", 40, seed=3).read_text().splitlines()]
    said = {kind: [row["messages"][1]["content"] for row in rows[at::4]] for at, kind in enumerate(QUESTIONS)}
    for at, row in enumerate(rows[::4]):
        pixels = np.asarray(Image.open(tmp_path / row["images"][0]).convert("RGB"))
        drawn, half = (pixels != 255).any(-1), SIZE // 2
        assert {tuple(pixel) for pixel in pixels[drawn]} == {ImageColor.getrgb(said["color"][at])}
        corners = [drawn[y : y + half, x : x + half] for x in (0, half) for y in (0, half)]
        shown = [corner for corner in corners if corner.any()]
        assert COUNTS[len(shown) - 1] == said["count"][at]
        expected = {"square": 1.0, "circle": np.pi / 4, "triangle": 0.5, "ring": np.pi / 4 * (1 - (2 / 3) ** 2)}
        for corner in shown:  # the nearest of the four shapes, by how much it fills
            assert min(expected, key=lambda shape: abs(expected[shape] - filled(corner))) == said["shape"][at]
        ending = "" if said["count"][at] == "one" else "s"
        assert said["all"][at] == f"{said['count'][at]} {said['color'][at]} {said['shape'][at]}{ending}"


def test_the_script_says_what_it_writes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmtune.testing.pictures"]
    for words, code in ((["--help"], 0), ([], 2), (["--colour"], 2)):
        done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == code and "writes `FOLDER/model`" in done.stdout
    assert not list(tmp_path.iterdir())


def test_no_picture_that_is_held_out_is_trained_on(tmp_path: Path) -> None:
    found = []
    for name, seed in (("train", 0), ("held_out", 1)):
        write_rows(tmp_path, name, 40, seed)
        found.append({path.read_bytes() for path in (tmp_path / "pictures").glob(f"{name}_*")})
    assert [len(each) for each in found] == [40, 40]
    assert not found[0] & found[1]


def test_accuracy_is_the_share_of_right_answers_by_kind() -> None:
    given = [("color", "red", "red"), ("color", "blue", "red"), ("all", "one red ring", "one red ring")]
    assert accuracy(given) == {"color": 0.5, "shape": 0.0, "count": 0.0, "all": 1.0}
