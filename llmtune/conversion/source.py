"""What is converted: a file or a command line of another trainer, as plain values with the comments beside them."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmtune.contract.errors import RecipeError, did_you_mean, raise_all
from llmtune.recipe import text as recipe_text
from llmtune.recipe.text import KeyPath, RecipeText, split

_PROGRAMS = {
    "llamafactory-cli": "LLaMA-Factory", "lmf": "LLaMA-Factory", "trl": "TRL", "axolotl": "Axolotl",
    "tune": "torchtune", "accelerate": "", "torchrun": "", "deepspeed": "", "python": "", "python3": "",
}  # fmt: skip
"""Programs that a command line of another trainer begins with, and whose they are."""
_RANKS = ("nproc_per_node", "num_processes", "num_gpus")
_SET = re.compile(r"(?:^|\s)(NPROC_PER_NODE|NNODES)=(\d+)(?=\s)")
"""What LLaMA-Factory's command reads in the environment as options of torchrun."""


@dataclass(frozen=True)
class ForeignSource:
    """A file or a command line of another trainer."""

    origin: str
    tree: dict[str, Any]
    above: dict[KeyPath, list[str]] = field(default_factory=dict)
    """Whole lines of comments before a key; those at the end of the file are before `()`."""
    beside: dict[KeyPath, str] = field(default_factory=dict)
    """The comment in a key's line."""
    trainer: str = ""
    """Whose command it is, where it is one."""
    verb: str = ""
    """The subcommand or the script: `train`, `chat`, `sft`."""
    ranks: int | None = None
    """Processes on a machine that the command line starts."""
    launcher: dict[str, Any] = field(default_factory=dict)
    """Options of the program that starts the processes (accelerate's, torchrun's), and keys of accelerate's file."""
    machines: int = 1
    """Machines that the processes run on."""


def read(source: str | os.PathLike[str]) -> ForeignSource:
    """Read a YAML or JSON file, a file with a command line in it, or a command line itself.

    Raises RecipeError where it is none of them.
    """
    text = os.fspath(source)
    if not (path := Path(text).expanduser()).is_file():
        if " " in text.strip() and _command_lines(text):
            return _command(text, "command line")
        near = did_you_mean(path.name, [file.name for file in path.parent.iterdir()]) if path.parent.is_dir() else ""
        found = "is a folder" if path.is_dir() else "there is no such file"
        raise RecipeError(f"{text}: {found}; name a file of another trainer, or write its command in quotes.{near}")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{text}: not UTF-8 text (byte {error.start}); is this a file of a trainer?") from error
    if path.suffix.lower() not in (".yaml", ".yml", ".json") and _command_lines(content):
        return _command(content, text)
    return _file(content, text, path.suffix.lower() == ".json")


def _file(content: str, origin: str, as_json: bool) -> ForeignSource:
    found = recipe_text.parse(content, origin, as_json=as_json)
    raise_all(found.problems)
    if not isinstance(found.tree, dict) or not found.tree:
        raise RecipeError(f"{origin}: found no keys, allowed is a file of LLaMA-Factory, Axolotl, torchtune or TRL")
    above, beside = ({}, {}) if as_json else _comments(found)
    return ForeignSource(origin, found.tree, above, beside)


def _comments(found: RecipeText) -> tuple[dict[KeyPath, list[str]], dict[KeyPath, str]]:
    """The comments of a YAML text, by the keys that they stand before or beside."""
    by_line: dict[int, KeyPath] = {}
    for path, (line, _) in found.places.items():
        by_line.setdefault(line, path)
    inside = [range(start, stop) for start, stop in found.spans.values()]
    above: dict[KeyPath, list[str]] = {}
    beside: dict[KeyPath, str] = {}
    waiting: list[str] = []
    last: KeyPath = ()
    at = 0
    for number, line in enumerate(found.text.splitlines(keepends=True), 1):
        marks = [at + match.start(1) for match in re.finditer(r"(?:^|\s)(#)", line)]
        mark = next((each for each in marks if not any(each in span for span in inside)), None)
        comment = line[mark - at :].strip() if mark is not None else ""
        if key := by_line.get(number):
            above[key], waiting, last = waiting, [], key
        if comment and mark is not None:
            if not found.text[at:mark].strip():
                waiting.append(comment)
            else:
                beside[last] = f"{beside[last]} {comment}" if last in beside else comment
        at += len(line)
    above[()] = waiting
    return {key: lines for key, lines in above.items() if lines}, beside


def _command_lines(text: str) -> list[list[str]]:
    """The words of each command of a trainer, or of what starts one, in a shell's text."""
    found = []
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        while words and re.match(r"\w+=", words[0]):
            words.pop(0)
        if words and Path(words[0]).name in _PROGRAMS:
            found.append(words)
    return found


def _command(text: str, origin: str) -> ForeignSource:
    commands = _command_lines(text)
    if len(commands) > 1:
        raise RecipeError(
            f"{origin}: found {len(commands)} commands of trainers, allowed is one; convert each by itself"
        )
    program, *words = commands[0]
    program = Path(program).name
    trainer, verb, launcher = _PROGRAMS[program], "", {}
    if program in ("llamafactory-cli", "lmf", "trl", "axolotl"):
        verb, words = (words[0], words[1:]) if words else ("", [])
    else:
        launcher, verb, words = _launched(program, words)
        inner = Path(verb).stem
        if "axolotl" in verb:
            trainer, verb = "Axolotl", verb.rpartition(".")[2]
        elif verb in ("llamafactory-cli", "trl", "axolotl"):
            trainer, verb, words = _PROGRAMS[verb], words[0], words[1:]
        elif inner in ("sft", "dpo", "kto", "reward", "grpo", "orpo", "cpo", "rloo"):
            trainer, verb = "TRL", inner
    launcher |= {name.lower(): int(number) for name, number in _SET.findall(text)}
    tree, files = _flags(words)
    if "config" in tree and trainer in ("TRL", "torchtune"):
        files.append(str(tree.pop("config")))
    made = ForeignSource(origin, tree, trainer=trainer, verb=verb)
    for name in files:
        file = _named(name, origin)
        made = replace(file, tree=_merged(file.tree, made.tree), trainer=trainer, verb=verb)
    if Path(str(launcher.get("config_file", ""))).expanduser().is_file():
        launcher = {**_named(str(launcher["config_file"]), origin).tree, **launcher}
    machines = next((launcher[key] for key in ("nnodes", "num_machines") if isinstance(launcher.get(key), int)), 1)
    ranks = next((launcher[key] for key in _RANKS if isinstance(launcher.get(key), int)), None)
    if ranks and "num_processes" in launcher:  # of all machines
        ranks = max(1, ranks // machines)
    return replace(made, ranks=ranks, launcher=launcher, machines=machines)


def _named(name: str, origin: str) -> ForeignSource:
    """A file that a command names. Raises RecipeError where it is not there."""
    if not (path := Path(name).expanduser()).is_file():
        raise RecipeError(f"{origin}: names the file {name}, which is not there; start in the folder of the command")
    return _file(path.read_text(encoding="utf-8-sig"), name, name.endswith(".json"))


def _launched(program: str, words: list[str]) -> tuple[dict[str, Any], str, list[str]]:
    """The options of what starts processes, the script or module that it starts, and that one's words."""
    words = words[1:] if program == "accelerate" and words[:1] == ["launch"] else words
    words = words[1:] if program == "tune" and words[:1] == ["run"] else words
    options: dict[str, Any] = {}
    while words and words[0].startswith("-"):
        name, sign, value = words.pop(0).lstrip("-").partition("=")
        name = name.replace("-", "_")
        if name in ("m", "module") and words:
            return options, words[0], words[1:]
        if sign:
            options[name] = _value(value)
        elif words and not words[0].startswith("-") and not re.search(r"\.py$", words[0]):
            options[name] = _value(words.pop(0))
        else:
            options[name] = True
    return options, words[0] if words else "", words[1:]


def _flags(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """`--key value`, `--key=value`, `--switch` and `key=value` as a mapping, and the files among the words."""
    tree: dict[str, Any] = {}
    files: list[str] = []
    while words:
        word, words = words[0], words[1:]
        if word.startswith("--"):
            key, sign, value = word[2:].partition("=")
            values = [value] if sign else []
            while not sign and words and not re.match(r"--?[A-Za-z]|[\w.]+=", words[0]):
                values.append(words[0])
                words = words[1:]
            read = [_value(each) for each in values]
            key = key.replace("-", "_")
            if key.startswith("no_") and not read and key != "no_cuda":
                tree[key.removeprefix("no_")] = False
            else:
                tree[key] = read[0] if len(read) == 1 else read or True
        elif "=" in word:
            key, _, value = word.partition("=")
            tree = _merged(tree, _nested(split(key.lstrip("-")), _value(value)))
        else:
            files.append(word)
    return tree, files


def _nested(path: KeyPath, value: Any) -> dict[str, Any]:
    for part in reversed(path[1:]):
        value = {str(part): value}
    return {str(path[0]): value}


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `under`, block by block."""
    both = {key: _merged(under[key], over[key]) for key in under.keys() & over.keys()
            if isinstance(under[key], dict) and isinstance(over[key], dict)}  # fmt: skip
    return {**under, **over, **both}


def _value(text: str) -> Any:
    try:
        return {"True": True, "False": False, "None": None}.get(text, recipe_text.parse_value(text, "value"))
    except RecipeError:
        return text
