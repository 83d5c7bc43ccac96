from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmtune import __version__
from llmtune.contract.errors import ErrorList, PluginError
from llmtune.contract.events import StepDone
from llmtune.contract.extension_points import EXTENSION_POINTS
from llmtune.contract.records import API_VERSION
from llmtune.recipe.listing import listing_text
from llmtune.recipe.registry import Registry

ROOT = Path(__file__).parent.parent
OFFER = """
from dataclasses import dataclass
from llmtune import Plugin, hookimpl

@dataclass(frozen=True, kw_only=True)
class Config:
    r: int = 8
    '''Width.'''

@hookimpl
def {point}():
    return [Plugin(name={name!r}, config=Config, build=lambda config: config, summary="Made up", {more})]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Lays a package and its metadata on the path, as pip would; returns the module's name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("LLMTUNE_BLOCK_PLUGINS", raising=False)
    others = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(("acme", "other"))}

    def make(
        distribution: str, code: str = "", names: tuple[str, ...] = ("strange",), *, version: str = "1.0",
        requires: str = "", point: str = "peft_config", offers: str | None = None, more: str = "",
    ) -> str:  # fmt: skip
        module = distribution.replace("-", "_")
        code = code or OFFER.format(point=point, name=offers or names[0], more=more)
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{module}-{version}.dist-info"
        info.mkdir()
        wanted = f"Requires-Dist: {requires}\n" if requires else ""
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n{wanted}")
        (info / "entry_points.txt").write_text("[llmtune]\n" + "".join(f"{name} = {module}\n" for name in names))
        return module

    yield make
    for name in [name for name in sys.modules if name.startswith(("acme", "other"))]:
        del sys.modules[name]
    sys.modules.update(others)


def refused(point: str, name: str) -> str:
    with pytest.raises(PluginError) as caught:
        Registry().find(point, name)
    return str(caught.value)


def states(name: str) -> list[tuple[str, str, str]]:
    return [(row.point, row.state, row.reason) for row in Registry().listing() if row.name == name]


def test_only_the_named_plugin_is_imported(install: Callable[..., str]) -> None:
    wanted, not_wanted = (
        install("acme-one", names=("first",)),
        install("acme-two", "raise OSError('never')", ("second",)),
    )
    registry = Registry()
    assert wanted not in sys.modules
    offer = registry.find("peft_config", "first")
    assert (offer.plugin.name, offer.source.label, offer.source.module) == ("first", "acme-one 1.0", wanted)
    assert offer.plugin.build(offer.plugin.config(r=3)).r == 3
    assert wanted in sys.modules and not_wanted not in sys.modules
    assert registry.find("peft_config", "first") == offer


def test_what_ships_with_the_core_is_a_plugin_of_llmtune(
    install: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row for row in Registry().listing() if row.package == "llmtune"]
    assert rows and all(row.version == __version__ and row.state == "ok" for row in rows)
    (row, *_) = rows
    assert Registry().find(row.point, row.name).source.module == "llmtune.recipe.builtin"
    install("acme-clash", names=(row.name,), point=row.point)
    message = refused(row.point, row.name)
    assert f"llmtune {__version__}" in message and "acme-clash 1.0" in message
    monkeypatch.setenv("LLMTUNE_BLOCK_PLUGINS", "acme-clash")
    assert Registry().find(row.point, row.name).source.distribution == "llmtune"


def test_one_name_may_mean_different_things_for_different_points(install: Callable[..., str]) -> None:
    install("acme-quant", names=("best",), point="quant_config")
    install("acme-kernel", names=("best", "fast"), point="kernel_config")
    install("acme-broken", "import nothing_of_this_name", ("best",))
    assert Registry().find("quant_config", "best").source.distribution == "acme-quant"
    assert Registry().find("kernel_config", "best").source.distribution == "acme-kernel"
    assert "acme-broken 1.0 cannot be imported" in refused("peft_config", "best")


def test_an_unknown_name_gets_the_nearest_and_what_is_installed(install: Callable[..., str]) -> None:
    install("acme-one", names=("strange",))
    message = refused("peft_config", "strnage")
    assert 'peft_config: no plugin "strnage" is installed. Did you mean "strange"?' in message
    assert "Installed: " in message and "pip install" in message
    assert "There is a plugin of this name for peft_config" in refused("quant_config", "strange")


def test_a_broken_import_is_fatal_to_who_names_it_only(install: Callable[..., str]) -> None:
    install("acme-one", names=("fine",))
    install("acme-two", "import nothing_of_this_name", ("strange",), version="2.3")
    assert Registry().find("peft_config", "fine")
    with pytest.raises(
        PluginError, match=r"acme-two 2\.3 cannot be imported: ModuleNotFoundError: No module named"
    ) as caught:
        Registry().find("peft_config", "strange")
    assert "nothing_of_this_name" in str(caught.value)
    assert [(point, state) for point, state, _ in states("strange")] == [("", "broken")]


def test_the_original_error_is_the_cause(install: Callable[..., str]) -> None:
    install("acme-two", "1 / 0", ("strange",))
    with pytest.raises(PluginError) as caught:
        Registry().find("peft_config", "strange")
    causes, error = [], caught.value
    while error is not None:
        causes.append(type(error))
        error = error.__cause__
    assert ZeroDivisionError in causes


def test_a_module_that_exits_is_broken_not_the_end(install: Callable[..., str]) -> None:
    install("acme-two", "raise SystemExit(3)", ("strange",))
    assert "SystemExit: 3" in refused("peft_config", "strange")


def test_two_packages_with_one_name_are_an_error_naming_both(install: Callable[..., str]) -> None:
    install("acme-one")
    install("other-one", version="2.3")
    message = refused("peft_config", "strange")
    assert message == (
        'peft_config: "strange" is offered by acme-one 1.0 and by other-one 2.3; '
        "uninstall one, or name it in LLMTUNE_BLOCK_PLUGINS"
    )
    assert {state for _, state, _ in states("strange")} == {"duplicate"}


@pytest.mark.parametrize("blocked", ["strange", "Acme_One", "x, acme-one"])
def test_blocked_by_plugin_or_package(
    install: Callable[..., str], monkeypatch: pytest.MonkeyPatch, blocked: str
) -> None:
    module = install("acme-one")
    monkeypatch.setenv("LLMTUNE_BLOCK_PLUGINS", blocked)
    assert '"strange" of acme-one 1.0 is blocked by LLMTUNE_BLOCK_PLUGINS' in refused("peft_config", "strange")
    assert module not in sys.modules
    assert states("strange") == [("", "blocked", "by LLMTUNE_BLOCK_PLUGINS")]


def test_made_for_another_llmtune_is_seen_without_importing(install: Callable[..., str]) -> None:
    module = install("acme-one", requires="llmtune<0.1,>=0.0.1")
    message = refused("peft_config", "strange")
    assert "acme-one 1.0 is made for llmtune <0.1,>=0.0.1" in message and __version__ in message
    assert module not in sys.modules
    assert [state for _, state, _ in states("strange")] == ["incompatible"]


def test_requirements_with_markers_and_prereleases_are_understood(install: Callable[..., str]) -> None:
    install("acme-one", requires='llmtune<0.0.1; python_version < "3"')
    assert Registry().find("peft_config", "strange")


def test_made_for_another_interface(install: Callable[..., str]) -> None:
    install("acme-one", more=f"api={API_VERSION + 1}")
    assert f"made for version {API_VERSION + 1} of the plugin interface" in refused("peft_config", "strange")
    assert [state for _, state, _ in states("strange")] == ["incompatible"]


def test_python_requirements_are_checked_with_the_command_to_mend_them(install: Callable[..., str]) -> None:
    install(
        "acme-one", more='requires=("pluggy>=1000", "no-such-package-x", "packaging>=1", "x; python_version<\'3\'")'
    )
    message = refused("peft_config", "strange")
    assert "needs pluggy>=1000 (found " in message and "no-such-package-x (not installed)" in message
    assert message.endswith('run: pip install "pluggy>=1000" "no-such-package-x"')
    (row,) = [row for row in Registry().listing() if row.name == "strange"]
    assert [met for _, met in row.requires] == [False, False, True, True]


@pytest.mark.parametrize(
    ("code", "part"),
    [
        ("from llmtune import hookimpl\n@hookimpl\ndef peft_confg(): return []", "does not keep to llmtune's hooks"),
        (
            "from llmtune import hookimpl\n@hookimpl\ndef peft_config(model): return []",
            "does not keep to llmtune's hooks",
        ),
        (
            "from llmtune import hookimpl\n@hookimpl\ndef peft_config(): 1 / 0",
            "the hook peft_config of acme-one 1.0 failed",
        ),
        ("from llmtune import hookimpl\n@hookimpl\ndef peft_config(): return 3", "returned int, allowed is a list"),
        (
            "from llmtune import hookimpl\n@hookimpl\ndef peft_config(): return ['strange']",
            "returned list, allowed is a list of",
        ),
        (
            OFFER.format(point="peft_config", name="strange", more="").replace("config=Config", "config=dict"),
            "not a dataclass",
        ),
    ],
)
def test_hooks_are_checked(install: Callable[..., str], code: str, part: str) -> None:
    install("acme-one", code)
    assert part in refused("peft_config", "strange")
    assert [(state, part in reason) for _, state, reason in states("strange")] == [("broken", True)]


def test_a_plugin_needs_an_entry_point_of_its_name(install: Callable[..., str]) -> None:
    install("acme-one", names=("strange",), offers="other")
    assert "acme-one 1.0 has an entry point of this name, but acme_one offers no such plugin" in refused(
        "peft_config", "strange"
    )
    assert [(state, "no entry point of this name" in why) for _, state, why in states("other")] == [("broken", True)]
    assert [(state, "offers no plugin of this name" in why) for _, state, why in states("strange")] == [
        ("broken", True)
    ]


def test_a_module_that_offers_a_name_twice(install: Callable[..., str]) -> None:
    code = OFFER.format(point="peft_config", name="strange", more="").replace("return [", "return 2 * [")
    install("acme-one", code)
    assert "is offered by acme-one 1.0; its module offers the name twice" in refused("peft_config", "strange")


def test_several_reasons_are_told_together(install: Callable[..., str]) -> None:
    install("acme-one", "1 / 0")
    install("acme-two", "import nothing_of_this_name")
    with pytest.raises(ErrorList) as caught:
        Registry().find("peft_config", "strange")
    assert "ZeroDivisionError" in str(caught.value) and "nothing_of_this_name" in str(caught.value)


WATCH = "\nseen = []\n@hookimpl\ndef observe(event):\n    seen.append(event)\n"


def test_observers_are_those_of_named_plugins(install: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    named = install("acme-one", OFFER.format(point="peft_config", name="strange", more="") + WATCH)
    install("acme-two", OFFER.format(point="peft_config", name="second", more="") + WATCH, ("second",))
    alone = install("acme-three", "from llmtune import hookimpl" + WATCH, ("alerts",))
    registry = Registry()
    assert registry.observers() == []
    registry.find("peft_config", "strange")
    (observer,) = registry.observers()
    event = StepDone(step=1, metrics={})
    observer(event)
    assert sys.modules[named].seen == [event]
    monkeypatch.setenv("LLMTUNE_OBSERVERS", "alerts")
    assert len(registry.observers()) == 2
    registry.observers()[1](event)
    assert sys.modules[alone].seen == [event]
    assert "acme_two" not in sys.modules
    assert [(point, state) for point, state, _ in states("alerts")] == [("observe", "ok")]
    monkeypatch.setenv("LLMTUNE_OBSERVERS", "alrets")
    with pytest.raises(PluginError, match='Did you mean "alerts"'):
        registry.observers()


def test_the_listing_shows_every_point_and_every_failure(install: Callable[..., str]) -> None:
    install("acme-one", more='requires=("no-such-package-x",)')
    install("acme-two", "1 / 0", ("shattered",))
    text = listing_text(Registry().listing())
    for point in EXTENSION_POINTS:
        assert f"{point}: " in text
    assert "How weights arrive on the ranks." in text and "Where metrics go besides `metrics.jsonl`." in text
    assert "acme-one 1.0" in text and "Made up" in text and "[needs no-such-package-x]" in text
    assert "Not usable:" in text and "ZeroDivisionError" in text
    found = json.loads(listing_text(Registry().listing(), as_json=True))
    assert [entry["name"] for entry in found["extension_points"]] == list(EXTENSION_POINTS)
    (row,) = [row for row in found["plugins"] if row["name"] == "strange"]
    assert row["state"] == "ok" and row["requires"] == [{"requirement": "no-such-package-x", "met": False}]


def test_a_package_built_and_installed_by_pip_is_found(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    source, site = tmp_path / "source", tmp_path / "site"
    (source / "acme_ia3").mkdir(parents=True)
    (source / "acme_ia3" / "__init__.py").write_text(OFFER.format(point="peft_config", name="acme_ia3", more=""))
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "acme-ia3"\nversion = "0.3"\ndependencies = ["llmtune>=0.1,<0.2"]\n'
        '[project.entry-points.llmtune]\nacme_ia3 = "acme_ia3"\n'
    )
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", site, source], check=True, capture_output=True)
    code = (
        "import sys; from llmtune.recipe.registry import Registry; registry = Registry()\n"
        "assert 'acme_ia3' not in sys.modules\n"
        "offer = registry.find('peft_config', 'acme_ia3'); rows = registry.listing()\n"
        "print(offer.source.distribution, offer.source.version, offer.plugin.config().r)\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'bitsandbytes', 'numpy') if name in sys.modules])\n"
    )
    environment = {"PYTHONPATH": f"{ROOT}:{site}", "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout.splitlines() == ["acme-ia3 0.3 8", "[]"], done.stderr
    shutil.rmtree(site)
