"""Write the package of a new plugin from the templates of its extension point."""

from __future__ import annotations

import keyword
import re
from importlib import metadata, resources
from pathlib import Path

from llmtune import __version__
from llmtune.contract.errors import RecipeError, did_you_mean, listed
from llmtune.contract.extension_points import EXTENSION_POINTS, POINTS

_CUT = re.compile(r"^# ---- (\w+)\n", re.M)
_LAWS = 'LAWS = laws("@point@", "@name@")'


def new_plugin(name: str, point: str, folder: Path | None = None) -> Path:
    """Write the package `llmtune-NAME` below `folder` (the current one where None), which is made; returns its folder.

    It does something small and real at `point`, and its tests are the contract. Raises RecipeError for a name that no
    module can have or an installed package has, a point that does not exist, and a folder that is not empty.
    """
    if point not in EXTENSION_POINTS:
        near = did_you_mean(point, EXTENSION_POINTS)
        raise RecipeError(f'--point: found "{point}", allowed is one of {listed(EXTENSION_POINTS, 20)}.{near}')
    name = name.removeprefix("llmtune-").removeprefix("llmtune_").replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        said = f'NAME: found "{name}", allowed are small letters, digits and _, beginning with a letter'
        raise RecipeError(said + (", and no word of Python" if keyword.iskeyword(name) else ""))
    target = (folder or Path()) / f"llmtune-{name.replace('_', '-')}"
    if taken := _taken(name, target.name):
        raise RecipeError(f'NAME: "{name}" is taken by the installed package {taken}; choose another name')
    if target.exists() and any(target.iterdir()):
        raise RecipeError(f"{target}: exists and is not empty; choose another name, or remove it")
    minor = ".".join(__version__.split(".")[:2])
    after = f"{__version__.split('.')[0]}.{int(__version__.split('.')[1]) + 1}"
    words = {
        "name": name, "package": f"llmtune_{name}", "project": target.name, "point": point,
        "Name": "".join(part.capitalize() for part in name.split("_")),
        "llmtune": f"llmtune>={minor},<{after}", "question": POINTS[point].question,
    }  # fmt: skip
    try:
        for path, text in _files(point).items():
            file = target / _filled(path, words)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(_filled(text, words), encoding="utf-8")
    except OSError as error:
        what = f"--folder: {target} cannot be written ({error.strerror})"
        raise RecipeError(f"{what}; name another folder") from None
    return target


def _taken(name: str, project: str) -> str | None:
    """The installed package that has this plugin's name or its package's: installing the new one would replace it."""
    offering = [found.dist.name for found in metadata.entry_points(group="llmtune", name=name) if found.dist]
    same = [project] if any(metadata.distributions(name=project)) else []
    return next(iter([*offering, *same]), None)


def _files(point: str) -> dict[str, str]:
    """Path and text of each file, with `@words@` to fill in."""
    parts = {**_parts("package.txt"), **_parts(f"points/{point}.txt")}
    inner = {"SUMMARY": parts["summary"], "MORE": parts.get("more", ""), "RECIPE": parts["recipe"], "LAWS": _LAWS}
    inner |= {"LAWS": parts["laws"]} if "laws" in parts else {}
    for name in ("offer", "readme", "test"):
        parts[name] = re.sub(r"@([A-Z]+)@", lambda found: inner[found[1]].strip(), parts[name])
    return {
        "pyproject.toml": parts["project"],
        "README.md": parts["readme"],
        "@package@/__init__.py": parts["keys"].rstrip() + "\n\n\n" + parts["offer"],
        "@package@/part.py": parts["part"],
        "@package@/py.typed": "",
        "tests/test_@name@.py": parts["test"],
    }


def _parts(path: str) -> dict[str, str]:
    """The sections of a template file by name."""
    text = resources.files("llmtune.testing.scaffold").joinpath(path).read_text(encoding="utf-8")
    _, *found = _CUT.split(text)
    return {name: section.strip("\n") + "\n" for name, section in zip(found[::2], found[1::2], strict=True)}


def _filled(text: str, words: dict[str, str]) -> str:
    return re.sub(r"@(\w+)@", lambda found: words[found[1]], text)
