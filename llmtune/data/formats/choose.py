"""Which format a data set's rows have: named by the recipe, or recognised. Never a guess between two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmtune.data.formats.row import Chosen
from llmtune.data.reading import Found
from llmtune.errors import DataError, did_you_mean, listed
from llmtune.examples import DataFormat
from llmtune.records import Plugin
from llmtune.schema import decode

NOUNS = {
    "conversation": "conversations", "preference": "preferences", "labelled": "labelled answers", "prompt": "prompts",
    "text": "texts", "tokens": "tokenised rows",
}  # fmt: skip


class Auto:
    """`data_config: auto`: each data set has the format that recognises its first rows."""


@dataclass(frozen=True, kw_only=True)
class Formats:
    """The formats that a run knows, and the one it takes by default."""

    known: Mapping[str, DataFormat]
    """Those that detection asks, by name, without parameters."""
    find: Callable[[str], tuple[Plugin, str]]
    """A plugin by its name, with its package and version; DataError or PluginError if there is none."""
    default: Any = None
    """The built `data_config` of the recipe; None or `Auto` detects."""
    default_name: str = "auto"
    default_facts: Any = None
    """The parameters and the package of `default`."""

    @staticmethod
    def builtin() -> Formats:
        """What ships with llmtune, detecting."""
        from llmtune.builtin import data_config

        plugins = {plugin.name: plugin for plugin in data_config()}

        def find(name: str) -> tuple[Plugin, str]:
            if name not in plugins:
                raise DataError(f'no format "{name}".{did_you_mean(name, plugins)} Known: {listed(plugins, 12)}')
            return plugins[name], "llmtune"

        return Formats(known=detectable(plugins.values()), find=find)

    def of(self, found: Found, rows: Sequence[Any]) -> Chosen:
        """The format of a data set whose first readable rows are `rows`.

        Raises:
            DataError: nothing or several recognise the rows, or what the recipe says of the format is wrong.
        """
        block = found.format
        if block is None and self.default is not None and not isinstance(self.default, Auto):
            return self._chosen(found, self.default, self.default_name, "as named")
        name = block if isinstance(block, str) or block is None else block.get("name")
        if block is not None and name != "auto":
            return self._chosen(found, self._made(found, name, block), str(name), "as named")
        renamed = _renamed_rows(found, rows)
        name, why = detect(renamed, found.spelling, self.known)
        form = self._made(found, name, {}) if found.tags else self.known[name]
        return self._chosen(found, form, name, why)

    def facts(self, found: Found) -> Any:
        """What the tokens of a data set depend on here, besides what `found` says itself."""
        name = found.format if isinstance(found.format, str | None) else found.format.get("name")
        return [self.default_name, self.default_facts] if name is None else self.find(str(name))[1]

    def _made(self, found: Found, name: Any, block: str | Mapping[str, Any]) -> DataFormat:
        if not isinstance(name, str):
            raise DataError(f"{found.spelling}: format has no name; write {{name: ..., parameters}}")
        try:
            plugin, _ = self.find(name)
        except DataError as error:
            raise DataError(f"{found.spelling}: {error}") from None
        given = {} if isinstance(block, str) else {key: value for key, value in block.items() if key != "name"}
        config, problems = decode(plugin.config, {**given, **found.tags}, "format")
        if problems:
            raise DataError(f"{found.spelling}: " + "; ".join(f"{each.key}: {each.message}" for each in problems))
        return plugin.build(config)

    def _chosen(self, found: Found, form: DataFormat, name: str, why: str) -> Chosen:
        media = ("images", "videos", "audios")
        strange = [column for column in found.columns if column not in form.columns and column not in media]
        if strange:
            near = did_you_mean(strange[0], form.columns)
            raise DataError(
                f'{found.spelling}: columns names "{strange[0]}", which {name} has not.{near} '
                f"Allowed: {listed(form.columns, 20)}"
            )
        return Chosen(format=form, name=name, why=why, columns=found.columns, exclusive=found.exclusive)


def facts_of(config: Any, package: str) -> Any:
    """A format's parameters and package, for a cache to compare."""
    return [asdict(config), package]


def detectable(plugins: Any) -> dict[str, DataFormat]:
    """The formats among `plugins`, by name, as they are without parameters."""
    built = {plugin.name: plugin.build(plugin.config()) for plugin in plugins}
    return {name: form for name, form in built.items() if not isinstance(form, Auto)}


def _renamed_rows(found: Found, rows: Sequence[Any]) -> list[Any]:
    """`rows` under the names that the recipe maps columns to."""
    taken = {theirs: ours for ours, theirs in found.columns.items()}
    return [{taken.get(c, c): v for c, v in row.items()} if isinstance(row, Mapping) else row for row in rows]


def detect(rows: Sequence[Any], name: str, known: Mapping[str, DataFormat]) -> tuple[str, str]:
    """The name of the format that alone recognises rows of data set `name`, and what made it out.

    Rows that differ from it are then reported one by one.
    """
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for each, form in known.items():
            if isinstance(row, Mapping) and (why := form.recognise(row)):
                counts[each, why] = counts.get((each, why), 0) + 1
    named = "name it with data_config, or with `format` in the entry of dataset"
    formats = {found for found, _ in counts}
    if len(formats) == 1:
        return max(counts, key=lambda found: counts[found])
    if formats:
        raise DataError(f"{name}: rows fit several formats ({listed(sorted(formats))}); {named}")
    columns = dict.fromkeys(str(column) for row in rows if isinstance(row, Mapping) for column in row)
    wanted = "; ".join(f"{each}: {listed(form.required or form.columns[:2])}" for each, form in known.items())
    spelled = [column for form in known.values() for column in form.columns]
    near = next((hint for column in columns if (hint := did_you_mean(column, spelled))), "")
    raise DataError(
        f"{name}: the format could not be detected, found the columns {listed(columns) or 'none'}.{near} "
        f"Known formats need: {wanted}. Map them with `columns` in the entry of dataset, or {named}"
    )


def check_kind(kind: str, learns: Sequence[str], stage: str, source: str) -> None:
    """DataError if a stage cannot learn from rows of this kind."""
    if kind not in learns:
        allowed = listed([NOUNS.get(each, each) for each in learns])
        raise DataError(
            f"{source}: holds {NOUNS.get(kind, kind)}, and {stage} learns from {allowed}; choose another stage_config, "
            "or name the format with data_config if they were read wrongly"
        )
