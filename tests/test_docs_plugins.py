"""The small plugins that docs/plugins.md prints keep their laws, as they stand there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtune.testing import check_plugin, laws

GUIDE = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text(encoding="utf-8")
MODULES = dict(re.findall(r"`(acme_\w+)\.py`[^\n]*\n```python\n(.*?)^```", GUIDE, re.M | re.S))
PLUGINS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "acme_csv": ("logger_config", "csv", {}),
    "acme_sgd": ("optim_config", "plain_sgd", {"ranks": False}),
    "acme_tickets": ("data_config", "tickets", {"rows": [{"subject": "Help", "body": "How?", "answer": "So."}]}),
    "acme_wsd": ("lr_scheduler_config", "wsd", {}),
}


@pytest.fixture(scope="module", autouse=True)
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The modules, as pip leaves them: on the path, with entry points."""
    folder = tmp_path_factory.mktemp("site")
    for module, code in MODULES.items():
        (folder / f"{module}.py").write_text(code, encoding="utf-8")
    info = folder / "acme_docs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-docs\nVersion: 1.0\n")
    entries = [f"{name} = {module}" for module, (_, name, _) in PLUGINS.items()]
    (info / "entry_points.txt").write_text("\n".join(["[llmtune]", *entries]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield
    for module in MODULES:
        sys.modules.pop(module, None)


def test_there_is_one_for_each_small_hook() -> None:
    assert sorted(MODULES) == sorted(PLUGINS)


@pytest.mark.parametrize("module", PLUGINS)
def test_it_keeps_every_law(module: str, tmp_path: Path) -> None:
    point, name, options = PLUGINS[module]
    assert laws(point, name, **options)
    check_plugin(point, name, tmp_path, **options)
