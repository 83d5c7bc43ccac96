"""A recipe in the making: where each key of another trainer's file went, and why."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmtune.contract.extension_points import POINTS
from llmtune.contract.schema import field_types
from llmtune.recipe.blocks import SEVERAL
from llmtune.recipe.foreign_keys import ForeignKey, asks_nothing, foreign_keys
from llmtune.recipe.keys import top_level_keys
from llmtune.recipe.registry import Registry

_BLOCK_KEY = re.compile(r"(\w+_config)(?:\.(\w+)$|: {name: (\w+), (\w+): \.\.\.}$)")
_SWITCH = re.compile(r"(\w+_config): (\w+)(?:$| \()")
_PLAIN = re.compile(r"(\w+)(?:$|[ ,(])")


@dataclass
class Draft:
    """Every key of `given` ends in one of `came`, `idle` and `lost`; what is not taken yet is in `left`."""

    given: Mapping[str, Any]
    trainer: str
    script: str = ""
    """The subcommand of a command line: `sft`, `train`."""
    recipe: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    """Dotted keys of the recipe, and what is said of each."""
    came: dict[str, str] = field(default_factory=dict)
    """Keys there, and the dotted keys that they are here."""
    idle: dict[str, str] = field(default_factory=dict)
    """Keys there that ask for nothing that has to be asked for here, and why."""
    lost: dict[str, str] = field(default_factory=dict)
    """Keys there that have no counterpart: the reason, and what to use instead."""
    check: list[str] = field(default_factory=list)
    """What the user should look at."""
    registry: Registry = field(default_factory=Registry)
    left: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.left = dict(self.given)

    def keys_of(self, point: str, name: str | None) -> Collection[str]:
        """The keys of a plugin; none where no package offers it, or none is named."""
        plugin = self.registry.offered(point, name) if name else None
        return field_types(plugin.config) if plugin else ()

    def has(self, key: str) -> bool:
        """Whether the file gives the key a value that is not null."""
        return self.given.get(key) is not None

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key there, which the caller now accounts for; `default` where it is absent or null."""
        self.left.pop(key, None)
        value = self.given.get(key)
        return default if value is None else value

    def set(self, here: str, value: Any, *sources: str, note: str = "") -> None:
        """Write a dotted key of the recipe, because of these keys there (none: because of a default there)."""
        point, _, inner = here.partition(".")
        if inner:
            self.recipe.setdefault(point, {})[inner] = value
        else:
            self.recipe[here] = value
        for source in sources:
            self.left.pop(source, None)
            if source in self.given:
                self.came[source] = here
                self.idle.pop(source, None)
        if note:
            self.notes.setdefault(here, []).append(note)

    def default(self, here: str, value: Any, note: str = "") -> None:
        """Write a default of the other trainer, where nothing else says this key."""
        point, _, inner = here.partition(".")
        if (inner or point) not in (self.recipe.get(point) or {} if inner else self.recipe):
            self.set(here, value, note=f"the default of {self.trainer}" + (f": {note}" if note else ""))

    def name(self, point: str, name: str, *sources: str, note: str = "") -> None:
        """Choose the plugin of an extension point; of those that take several, one more."""
        blocks = self.recipe.get(point)
        if point in SEVERAL and blocks:
            several = blocks if isinstance(blocks, list) else [blocks]
            if not any(block["name"] == name for block in several):
                several = [*several, {"name": name}]
            self.set(point, several if len(several) > 1 else several[0], *sources, note=note)
            return
        rest = {key: value for key, value in (blocks or {}).items() if key != "name"}
        self.set(point, {"name": name, **rest}, *sources, note=note)
        if sources and sources[0] in self.given:
            self.came[sources[0]] = f"{point}.name"

    def chosen(self, point: str) -> str | None:
        """The plugin that is named so far."""
        block = self.recipe.get(point)
        return block.get("name") if isinstance(block, dict) else None

    def set_in_blocks(self, point: str, keys: Mapping[str, str], source: str) -> bool:
        """Write a key there into each chosen plugin that has it: `keys` are plugins and what they call it. Whether one
        of them is chosen."""
        value = self.given[source]
        blocks = self.recipe.get(point) or []
        several = [block for block in (blocks if isinstance(blocks, list) else [blocks]) if block["name"] in keys]
        for block in several:
            block[keys[block["name"]]] = value
        if several:
            self.left.pop(source, None)
            self.came[source] = point if isinstance(blocks, list) else f"{point}.{keys[several[0]['name']]}"
        return bool(several)

    def ask_nothing(self, *keys: str, why: str) -> None:
        """These keys ask for nothing here, as far as they are not accounted for otherwise."""
        for key in keys:
            self.left.pop(key, None)
            if key in self.given and key not in self.came and key not in self.lost:
                self.idle.setdefault(key, why)

    def lose(self, *keys: str, why: str) -> None:
        """These keys have no counterpart."""
        for key in keys:
            self.left.pop(key, None)
            if key in self.given:
                self.lost[key] = why

    def rename(self, names: Mapping[str, str]) -> None:
        """Take keys under other names, as they are; null means what leaving them out does."""
        for there, here in names.items():
            if there not in self.left:
                continue
            if (value := self.take(there)) is None:
                self.ask_nothing(there, why="null is the default")
            else:
                self.set(here, value, there)

    def take_remote_code(self) -> None:
        """Take `trust_remote_code` where it is on."""
        if self.given.get("trust_remote_code"):
            note = "as it says there; remove it unless it is needed"
            self.set("trust_remote_code", True, "trust_remote_code", note=note)

    def take_family(self, prefix: str, point: str) -> None:
        """Take the keys of a plugin that is named: `galore_rank` as `optim_config.rank`."""
        known = self.keys_of(point, self.chosen(point))
        self.rename(
            {
                key: f"{point}.{key.removeprefix(prefix)}"
                for key in list(self.left)
                if key.startswith(prefix) and key.removeprefix(prefix) in known
            }
        )

    def take_rest(self, defaults: Mapping[str, Any]) -> None:
        """Place what no rule has taken: by its name, by the table of other trainers' keys, or among what is lost.
        `defaults` are those of the other trainer, which ask for nothing."""
        # Switches first: they name the plugins whose keys follow.
        for key in sorted(self.left, key=lambda key: not _is_switch(key)):
            value = self.left[key]
            foreign = foreign_keys().get(key) or foreign_keys().get(key.partition(".")[0])
            if key in top_level_keys():
                if value is None:
                    self.ask_nothing(key, why="null is the default")
                else:
                    self.set(key, value, key)
            elif foreign is None:
                unset = value is None or value is False or value in ("", [], {})
                place = self.ask_nothing if unset else self.lose
                place(key, why="it is not set" if unset else f"llmtune knows no such key of {self.trainer}")
            elif not (foreign.here and self._place(key, foreign, value)):
                same = key in defaults and value == defaults[key]
                nothing = same or asks_nothing(foreign, value) or foreign.reason.endswith("remove the key")
                why = foreign.reason or f"here it is {foreign.here}"
                (self.ask_nothing if nothing else self.lose)(key, why=why)

    def _place(self, key: str, foreign: ForeignKey, value: Any) -> bool:
        """Write a key where the table says, if it says it in words that a program reads."""
        if switch := _SWITCH.match(foreign.here):
            if value is True:
                self.name(switch[1], switch[2], key)
            elif value is False or value is None:
                self.ask_nothing(key, why="it is off")
            else:
                return False
            return True
        if block := _BLOCK_KEY.match(foreign.here):
            point, inner, named, own = block[1], block[2] or block[4], block[3], self.chosen(block[1])
            if value is None:
                self.ask_nothing(key, why="null is the default")
            elif named and self.set_in_blocks(point, {named: inner}, key):
                pass
            elif own is None or (named and named != own) or inner not in (self.keys_of(point, own) or [inner]):
                self.ask_nothing(key, why=f"counts only with {point}: {named or 'a plugin that has it'}")
            else:
                self.set(f"{point}.{inner}", value, key)
            return True
        if (plain := _PLAIN.match(foreign.here)) and plain[1] in top_level_keys() and plain[1] not in POINTS:
            if value is None:
                self.ask_nothing(key, why="null is the default")
            elif plain[1] in self.recipe:
                self.ask_nothing(key, why=f"{plain[1]} is set by another key")
            else:
                self.set(plain[1], value, key)
            return True
        return False

    def follow_references(self) -> None:
        """Let `${key}` in the recipe's texts name the key under which that value stands now."""
        self.recipe = {key: self._followed(value) for key, value in self.recipe.items()}

    def _followed(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._followed(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._followed(item) for item in value]
        return re.sub(r"\$\{([\w.]+)\}", self._reference, value) if isinstance(value, str) else value

    def _reference(self, found: re.Match[str]) -> str:
        key = found[1]
        if key in self.came:
            return f"${{{self.came[key]}}}"
        return str(self.given[key]) if key in self.given and key not in self.recipe else found[0]


def _is_switch(key: str) -> bool:
    return key in foreign_keys() and _SWITCH.match(foreign_keys()[key].here) is not None
