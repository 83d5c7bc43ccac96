"""The launcher that ships with the core keeps every law; `--dry-run` prints what it would run."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtune.cli import main
from llmtune.testing import Law, laws, tiny_recipe


@pytest.mark.parametrize("law", laws("launch_config", "torchrun"), ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "-m llmtune train recipe.json"),
        (["--nproc", "2"], "-m torch.distributed.run --nnodes 1 --nproc-per-node 2 -m llmtune train recipe.json"),
        (
            ["--nnodes", "1:2", "--rdzv-endpoint", "head:29400", "--max-restarts", "3"],
            "--nnodes 1:2 --nproc-per-node 1 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint head:29400 "
            "--rdzv-id llmtune -m llmtune train recipe.json",
        ),
    ],
)
def test_a_dry_run_prints_what_would_run(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    (tmp_path / "recipe.json").write_text(json.dumps(tiny_recipe(tmp_path)))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["train", "recipe.json", "--dry-run", *options]) == 0
    assert words in " ".join(capsys.readouterr().out.split()) and sorted(tmp_path.iterdir()) == before
