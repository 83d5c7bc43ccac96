"""`llmtune doctor` reports what is here and what is wrong with it, also where torch is missing or broken."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from llmtune.cli import main
from llmtune.doctor import machine, packages, report
from llmtune.doctor.probe import probe
from llmtune.recipe.packages import PackageSource
from llmtune.recipe.registry import Registry


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library is imported."""
    monkeypatch.setattr(report, "_modules", list)


def write_module(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_the_report_has_everything_and_no_secrets(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "abcdef")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:word@proxy:3128")
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    code = main(["doctor", "--json"])
    text = capsys.readouterr().out
    found = json.loads(text)
    assert code == (1 if found["problems"] else 0)
    assert found["packages"]["torch"].startswith(version("torch"))
    assert found["disks"]["llmtune's cache"].startswith("~/cache: ")
    assert "cores for this process" in found["machine"]["processor"] and "GiB free" in found["machine"]["memory"]
    assert found["plugins"]["llmtune-lora"].endswith(": lora")
    assert found["environment"]["HF_TOKEN"] == found["environment"]["WANDB_API_KEY"] == "<set, not shown>"
    assert found["environment"]["HTTPS_PROXY"] == "http://<hidden>@proxy:3128"
    assert not any(secret in text for secret in ("hf_secret", "abcdef", "word@", str(tmp_path)))
    assert main(["doctor"]) == code
    shown = capsys.readouterr().out
    assert "packages\n" in shown and ("No problems found." in shown or "problem" in shown)


def test_libraries_that_break_are_told_and_the_report_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_module(
        tmp_path, "bad_library", "raise OSError('libcudart.so.13: cannot open\\n  shared object')", monkeypatch
    )
    write_module(
        tmp_path, "deadly", "print('noise'); import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", monkeypatch
    )
    found = probe(["json", "bad_library", "deadly", "wave"])
    assert found["json"] == {"facts": {}} and "wave" not in found
    assert found["bad_library"]["error"] == "OSError: libcudart.so.13: cannot open shared object"
    assert "ended with code -11" in found["deadly"]["error"]
    monkeypatch.setattr(report, "_modules", lambda: ["bad_library"])
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "1. bad_library cannot be imported (OSError: libcudart" in shown
    assert "pip install --force-reinstall bad_library" in " ".join(shown.split())


def test_a_torch_that_breaks_ends_the_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_module(tmp_path, "torch", "raise ImportError('undefined symbol')", monkeypatch)
    assert probe(["torch", "json"]) == {"torch": {"error": "ImportError: undefined symbol"}}


def test_torch_tells_of_its_build_and_devices() -> None:
    import torch

    facts = probe(["torch"])["torch"]["facts"]
    assert facts["cuda build"] == torch.version.cuda and facts["threads"] >= 1
    assert len(facts["devices"]) == torch.cuda.device_count()


def test_without_torch() -> None:
    code = (
        "import sys\nfor name in ('torch', 'transformers', 'numpy'): sys.modules[name] = None\n"
        "from llmtune.doctor import packages\nhave = packages.version\n"
        "def version(name):\n"
        "    if name in ('torch', 'transformers'): raise packages.PackageNotFoundError(name)\n"
        "    return have(name)\n"
        "packages.version = version\n"
        "assert packages.found('torch') is None\n"
        "from llmtune.cli import main\nsys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "torch is not installed, which llmtune cannot do without" in done.stdout
    assert "selector on pytorch.org" in done.stdout


def test_versions_that_do_not_fit_and_packages_that_are_there_twice(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have = packages.found
    monkeypatch.setattr(packages, "found", lambda name: "1.0" if name == "transformers" else have(name))
    for number in ("1.0", "2.0"):
        folder = tmp_path / f"twice-{number}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: twice\nVersion: {number}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {finding.what: finding.to_do for finding in packages.package_findings()}
    (wrong,) = (fix for what, fix in found.items() if what.startswith("transformers 1.0 is installed, and >=5"))
    assert wrong.startswith('run: pip install "transformers>=5')
    assert [fix for what, fix in found.items() if "2 versions of twice" in what and str(tmp_path) in what]
    newer = packages.PackageVersion(name="torch", version="99.1+cu130", wanted=">=2.11")
    assert newer.is_newer and "this one is newer" in newer.remark


def test_plugins_that_cannot_be_used_are_problems(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = PackageSource(module="not_there_at_all", distribution="llmtune-gone", version="1", names=("gone",))
    old = PackageSource(
        module="json", distribution="llmtune-old", version="2", names=("old",), requires=("llmtune<0.0.1",)
    )
    monkeypatch.setattr(report, "Registry", lambda: Registry([gone, old]))
    told = "\n".join(f"{what}; {fix}" for what, fix in report.examine().problems)
    assert "plugin gone of llmtune-gone is broken" in told and "not_there_at_all" in told
    assert "plugin old of llmtune-old is incompatible" in told and "update the package, or llmtune" in told
    monkeypatch.setattr(report, "Registry", lambda: Registry([]))
    assert any("no plugins are installed" in what for what, _ in report.examine().problems)


def test_a_full_disk_and_one_that_cannot_be_written_to_are_problems(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "ENOUGH_DISK", 2**60)
    told = [finding.what for _, _, finding in machine.disks() if finding]
    assert len(told) == 4 and all("GiB left" in what for what in told)
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    assert all("cannot be written to" in finding.what for _, _, finding in machine.disks() if finding)


def test_a_gpu_that_torch_does_not_see_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    blind = {"torch": {"facts": {"cuda build": "13.0", "threads": 1, "devices": [], "no device": "driver too old"}}}
    (finding,) = report._load_findings(blind)
    assert "sees no GPU (driver too old)" in finding.what
    monkeypatch.setattr(machine, "driver", lambda: "580.65")
    (finding,) = report._load_findings({"torch": {"facts": {"cuda build": None, "threads": 1, "devices": []}}})
    assert finding.what == "NVIDIA's driver 580.65 is here, and this torch is built for the CPU only"
    gpu = {"name": "H100", "memory": 80 * 2**30, "free": 79 * 2**30, "capability": "9.0", "bf16": True}
    rows = report._devices({"cuda build": "13.0", "threads": 8, "devices": [gpu]})
    assert rows["GPU 0"] == "H100, 79.0 GiB free of 80.0 GiB, compute capability 9.0, bf16"


def test_the_tested_window_holds_what_these_tests_run_on() -> None:
    for name, newest in packages.NEWEST_TESTED.items():
        assert Version(version(name)).release[:2] <= Version(newest).release, f"{name}: raise NEWEST_TESTED"
