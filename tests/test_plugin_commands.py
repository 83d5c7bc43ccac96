"""Commands of packages that llmtune has never heard of: found by metadata, told by help, checked like recipes' keys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import llmtune
from llmtune.cli import main
from llmtune.cli.commands import parser

ROOT = Path(__file__).parent.parent


def install(site: Path, name: str, entries: str, summary: str = "Counts lines") -> None:
    """What pip leaves of a package, without its modules."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nSummary: {summary}\n")
    (info / "entry_points.txt").write_text(f"[llmtune.commands]\n{entries}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages; one offers `tally`, one a command whose module breaks."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "stranger"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install(tmp_path / "site", "acme-tuning", "tally = acme_tuning.tally:Tally")
    install(tmp_path / "site", "acme-broken", "smash = acme_nowhere:Smash\nlist = builtins:list")
    return tmp_path / "site"


def test_a_command_gets_its_keys_checked(site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("llm\nother\nllm tuned\n")
    assert main(["tally", f"path={tmp_path / 'a.txt'}"]) == 0
    assert capsys.readouterr().out == "2 lines hold llm\n"
    assert main(["tally", f"path={tmp_path / 'a.txt'}", "least=3"]) == 1
    assert main(["tally", "least=-1", "wrod=x"]) == 2
    said = capsys.readouterr().err
    assert "command line least: found -1, allowed is a whole number >= 0" in said
    assert 'wrod: no such key. Did you mean "word"?' in said and "path: required" in said
    assert main(["tally", "a.txt"]) == 2 and 'found "a.txt", allowed is key=value' in capsys.readouterr().err
    assert main(["tally", "path=nowhere"]) == 3 and "found nothing at nowhere" in capsys.readouterr().err


def test_help_tells_of_it_without_importing_it(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "tally Counts lines (acme-tuning)" in shown and "smash Counts lines (acme-broken)" in shown
    with pytest.raises(SystemExit):
        main(["tally", "--help"])
    shown = capsys.readouterr().out
    assert "Count the lines of a file that hold a word." in shown
    assert "  least=0: With fewer lines than this, the exit code is 1. It is a whole number >= 0." in shown
    assert "  path: The file. It is" in shown


def test_what_is_wrong_with_a_package_disturbs_nobody_who_does_not_name_its_command(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["smash"]) == 2 and "the command smash of acme-broken" in capsys.readouterr().err
    assert main(["list"]) == 2 and "list: builtins:list of acme-broken is no dataclass" in capsys.readouterr().err
    install(site, "acme-more", "tally = acme_tuning.tally:Tally\ntrain = acme_nowhere:Train")
    assert main(["tally"]) == 2
    said = capsys.readouterr().err
    assert "tally: is a command of " in said and "acme-tuning" in said and "acme-more" in said
    monkeypatch.setenv("LLMTUNE_BLOCK_PLUGINS", "acme-more")
    assert main(["tally"]) == 2 and "path: required" in capsys.readouterr().err
    assert parser(["train", "x.yaml"]).parse_args(["train", "x.yaml"]).recipe == "x.yaml"  # the core's own goes first


def test_without_its_package_a_first_party_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMTUNE_BLOCK_PLUGINS", "web")
    assert main(["web"]) == 2
    said = capsys.readouterr().err
    assert "web: is a command of llmtune-web, not installed: pip install ./plugins/web" in said


def test_the_cores_own_commands_read_no_packages() -> None:
    code = (
        "import sys, importlib.metadata as metadata\nmetadata.entry_points = None\n"
        "from llmtune.cli.commands import parser\nparser(['train', 'x']); parser(['--version'])\n"
        "print([name for name in ('torch', 'omegaconf', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ}, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def test_a_recipes_errors_are_a_list(tmp_path: Path) -> None:
    wrong = {"model": "x", "learning_rate": 0, "peft_config": {"name": "lora", "rank": 8}}
    assert [str(error).split(":")[0] for error in llmtune.recipe_errors(wrong)] == [
        "recipe  learning_rate",
        "recipe  peft_config.rank",
    ]
    (only,) = llmtune.recipe_errors({"model": "x", "peft_config": "lroa"})
    assert 'no plugin "lroa" is installed. Did you mean "lora"?' in str(only)
    assert llmtune.recipe_errors({"model": "x", "dataset": "nowhere.jsonl"}) == []
    assert next(map(str, llmtune.recipe_errors(tmp_path / "no.yaml"))).endswith("allowed is a recipe file.")
