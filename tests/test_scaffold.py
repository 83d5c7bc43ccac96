"""The package that `llmtune plugins new` writes works and keeps the contract as it is, whatever it extends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmtune.cli import main
from llmtune.contract.extension_points import EXTENSION_POINTS
from llmtune.testing.scaffold.new import new_plugin

ROOT = Path(__file__).parent.parent
TRIED = ("data", "engine", "eval", "init", "kernel", "logger", "lr_scheduler", "reward")
"""What stands nowhere else; the other templates are those that tests/stranger and the README show, tried there."""


def installed(site: Path, packages: list[Path]) -> None:
    """As pip would leave them in a folder of packages, from their pyproject.toml."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    try:
        subprocess.run([*command, str(site), *map(str, packages)], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise AssertionError(error.stderr) from None


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package for each extension point, and all of them installed in `site` beside them."""
    root = tmp_path_factory.mktemp("packages")
    made = [new_plugin(f"new_{point.removesuffix('_config')}", point, root) for point in EXTENSION_POINTS]
    installed(root / "site", made)
    return root


def test_each_is_listed_and_keeps_the_laws_of_a_single_rank(packages: Path) -> None:
    """In one process for all of them."""
    program = f"""
import sys
sys.path.insert(0, {str(packages / "site")!r})
from llmtune.recipe.registry import Registry
listed = {{(row.point, row.name): row for row in Registry().listing() if row.name.startswith("new_")}}
from pathlib import Path
from llmtune.testing import laws
import runpy
kept = 0
for (point, name), row in sorted(listed.items()):
    assert row.state == "ok", row
    test = runpy.run_path(str(next(Path({str(packages)!r}).glob(f"llmtune-*/tests/test_{{name}}.py"))))
    for law in test["LAWS"]:
        if name.removeprefix("new_") in {TRIED} and "ranks" not in law.__name__:
            law(Path({str(packages)!r}) / "laws" / f"{{name}}-{{law.__name__}}")
            kept += 1
print(len(listed), kept)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    number, kept = map(int, done.stdout.split()[-2:])
    assert number == len(EXTENSION_POINTS) and kept > 5 * len(TRIED)


def test_a_package_is_checked_by_name(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = [sys.executable, "-m", "llmtune", "plugins", "check", "llmtune-new-lr-scheduler"]
    environment = {"PYTHONPATH": f"{packages / 'site'}:{ROOT}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([*checked], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and "All laws are kept." in done.stdout, done.stderr
    assert "lr_scheduler_config new_lr_scheduler" in done.stdout and "  kept    " in done.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["new", "mine", "--point", "peft"], '--point: found "peft", allowed is one of '),
        (["new", "Mine!", "--point", "peft_config"], 'NAME: found "Mine!", allowed are small letters, digits and _'),
        (["new", "class", "--point", "peft_config"], "beginning with a letter, and no word of Python"),
        (["new", "lora", "--point", "peft_config"], 'NAME: "lora" is taken by the installed package llmtune-lora;'),
        (["new", "optim", "--point", "optim_config"], '"optim" is taken by the installed package llmtune-optim;'),
        (["check", "llmtune-nothing"], "llmtune-nothing: offers no plugin here, installed are "),
        (["check", "llmtune", "drops=2"], "drops: which plugin is meant? Write NAME.drops=VALUE"),
    ],
)
def test_mistakes_are_told(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["plugins", "new", "mine", "--point", "reward_config", "--folder", str(tmp_path / "file")]) == 2
    assert "cannot be written (Not a directory); name another folder" in capsys.readouterr().err


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plugins", "new", "mine", "--point", "reward_config", "--folder", str(tmp_path)]
    assert main(words) == 0
    assert (tmp_path / "llmtune-mine" / "llmtune_mine" / "part.py").exists()
    assert "Try: pip install -e" in capsys.readouterr().out
    assert main(words) == 2
    assert "exists and is not empty" in capsys.readouterr().err
