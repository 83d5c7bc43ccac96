"""Which format a data set's rows have: named by the recipe, or recognised. Never a guess between two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from llmtune.contract.errors import DataError, did_you_mean, listed
from llmtune.contract.examples import BadRow, DataFormat, Example, SaysWhatItNeeds
from llmtune.contract.records import Plugin
from llmtune.contract.schema import decode
from llmtune.data.formats.row import Chosen, read_row
from llmtune.data.hashes import code_hash
from llmtune.data.misspelt import as_names, is_like, misspelt
from llmtune.data.reading import Dataset

LOOKED_AT = 100
"""Rows of a data set that its format is detected from."""
NOUNS = {
    "conversation": "conversations", "preference": "preferences", "labelled": "labelled answers", "prompt": "prompts",
    "text": "texts", "tokens": "tokenised rows",
}  # fmt: skip


class Auto:
    """`data_config: auto`: each data set has the format that recognises its first rows. It is no format itself."""

    kind = "conversation"
    columns: Sequence[str] = ()
    required: Sequence[str] = ()

    def recognise(self, row: Mapping[str, Any]) -> str | None:
        return None

    def convert(self, row: Mapping[str, Any]) -> Example:
        raise BadRow("no format", "the format of this data set is still to be detected")


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
    default_config: Any = None
    """What `default` was built from."""
    default_facts: Any = None
    """The parameters and the package of `default`."""
    stages: Callable[[str], Sequence[str]] = lambda kind: ()
    """The names of the stages that learn from rows of a kind."""

    def of(self, dataset: Dataset, rows: Sequence[Any], learns: Sequence[str] = ()) -> Chosen:
        """The format of a data set whose first readable rows are `rows`, for a stage that learns from such kinds.

        Raises:
            DataError: nothing or several recognise the rows, or what the recipe says of the format is wrong.
        """
        block = dataset.format
        if block is None and self.default is not None and not isinstance(self.default, Auto):
            name, form = self.default_name, self.default
            if dataset.tags:
                form = self._made(dataset, name, self.default_config)
            return _chosen(dataset, form, name, "as named", rows)
        name = block if isinstance(block, str) or block is None else block.get("name")
        config = self._config(dataset, name, block) if block is not None else None
        if block is not None and name != "auto":
            return _chosen(dataset, self._made(dataset, str(name), config), str(name), "as named", rows)
        name, why = detect(_renamed_rows(dataset, rows), dataset.spelling, self._tagged(dataset), learns)
        form = self._made(dataset, name, None) if dataset.tags else self.known[name]
        return _chosen(dataset, form, name, why, rows)

    def facts(self, dataset: Dataset) -> Any:
        """What the tokens of a data set depend on here, besides what `dataset` says itself: the format's parameters,
        its package, and the code of a package other than llmtune."""
        block = dataset.format
        if block is None:
            return [self.default_name, self.default_facts, _code(self.default)]
        name = str(block if isinstance(block, str) else block.get("name"))
        form = self.default if name == "auto" else self._made(dataset, name, self._config(dataset, name, block))
        return [self.find(name)[1], _code(form)]

    def _plugin(self, dataset: Dataset, name: Any) -> Plugin:
        if not isinstance(name, str):
            raise DataError(f"{dataset.spelling}: format has no name; write {{name: ..., parameters}}")
        try:
            return self.find(name)[0]
        except DataError as error:
            raise DataError(f"{dataset.spelling}: {error}") from None

    def _config(self, dataset: Dataset, name: Any, block: str | Mapping[str, Any]) -> Any:
        """The parameters that an entry gives its format."""
        given = {} if isinstance(block, str) else {key: value for key, value in block.items() if key != "name"}
        config, problems = decode(self._plugin(dataset, name).config, given, "format")
        if problems:
            raise DataError(f"{dataset.spelling}: " + "; ".join(f"{each.key}: {each.message}" for each in problems))
        return config

    def _made(self, dataset: Dataset, name: str, config: Any) -> DataFormat:
        """A format with these parameters (None: its own) and the tags of the data set."""
        plugin = self._plugin(dataset, name)
        own = plugin.config() if config is None else config
        known = [field.name for field in fields(own)]
        if strange := [tag for tag in dataset.tags if tag not in known]:
            near, allowed = did_you_mean(strange[0], known), listed(known, 12) or "none"
            raise DataError(
                f'{dataset.spelling}: tags names "{strange[0]}", which {name} has not.{near} Allowed: {allowed}'
            )
        try:
            return plugin.build(replace(own, **dataset.tags))
        except ValueError as error:
            raise DataError(f"{dataset.spelling}: tags: {error}") from None

    def _tagged(self, dataset: Dataset) -> Mapping[str, DataFormat]:
        """The formats that detection asks, knowing how keys and roles are called here."""
        if not dataset.tags:
            return self.known
        takes = {name: {field.name for field in fields(self.find(name)[0].config)} for name in self.known}
        return {
            name: self._made(dataset, name, None) if set(dataset.tags) <= takes[name] else form
            for name, form in self.known.items()
        }


def _chosen(dataset: Dataset, form: DataFormat, name: str, why: str, rows: Sequence[Any]) -> Chosen:
    """The format with the data set's columns, once these are what both have."""
    media, taken = ("images", "videos", "audios"), [theirs for _, theirs in dataset.columns.items()]
    strange = [column for column in dataset.columns if column not in form.columns and column not in media]
    if strange:
        near = did_you_mean(strange[0], form.columns)
        raise DataError(
            f'{dataset.spelling}: columns names "{strange[0]}", which {name} has not.{near} '
            f"Allowed: {listed(form.columns, 20)}"
        )
    if twice := [column for column in taken if taken.count(column) > 1]:
        both = listed(ours for ours, theirs in dataset.columns.items() if theirs == twice[0])
        raise DataError(f'{dataset.spelling}: columns reads {both} from "{twice[0]}", allowed is one column for each')
    there = list(dict.fromkeys(str(column) for row in rows if isinstance(row, Mapping) for column in row))
    lost = {ours: theirs for ours, theirs in dataset.columns.items() if theirs not in there and ours not in media}
    for ours, theirs in lost.items():
        near = [column for column in there if column not in taken and is_like(column, theirs)]
        if near or ours in form.required:
            what = f'columns reads {ours} from "{theirs}", which no row has'
            end = f'Did you mean "{near[0]}"?' if near else f"They have {listed(there)}"
            raise DataError(f"{dataset.spelling}: {what}. {end}")
    if lost and there:
        why += f"; none of the first {len(rows)} rows has {listed(lost.values())}"
    return Chosen(format=form, name=name, why=why, columns=dataset.columns, exclusive=dataset.exclusive)


def _code(form: Any) -> str:
    """A hash of the code that a format is of, as its version stays the same while it is developed; empty for what ships
    with llmtune, whose own code counts for all data."""
    module = type(form).__module__
    return "" if module.startswith("llmtune.") else code_hash(module)


def facts_of(config: Any, package: str) -> Any:
    """A format's parameters and package, for a cache to compare."""
    return [asdict(config), package]


def detectable(plugins: Any) -> dict[str, DataFormat]:
    """The formats among `plugins`, by name, as they are without parameters."""
    built = {plugin.name: plugin.build(plugin.config()) for plugin in plugins}
    return {name: form for name, form in built.items() if not isinstance(form, Auto)}


def _renamed_rows(dataset: Dataset, rows: Sequence[Any]) -> list[Any]:
    """`rows` under the names that the recipe maps columns to, without columns that hold nothing."""
    taken = {theirs: ours for ours, theirs in dataset.columns.items()}
    return [
        {taken.get(c, c): v for c, v in row.items() if v is not None} if isinstance(row, Mapping) else row
        for row in rows
    ]


def detect(
    rows: Sequence[Any], name: str, known: Mapping[str, DataFormat], learns: Sequence[str] = ()
) -> tuple[str, str]:
    """The name of the format that alone recognises rows of data set `name`, and what made it out.

    Rows that differ from it are then reported one by one.
    """
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for each, form in known.items():
            if isinstance(row, Mapping) and (why := form.recognise(row)):
                counts[each, why] = counts.get((each, why), 0) + 1
    named = "name it with data_config, or with `format` in the entry of dataset"
    formats = {format for format, _ in counts}
    if len(formats) == 1:
        return max(counts, key=lambda recognised: counts[recognised])
    if formats:
        raise DataError(f"{name}: rows fit several formats ({listed(sorted(formats))}); {named}")
    if "prompt" in learns and (asked := [each for each, form in known.items() if _asks(form, rows)]):
        return asked[0], "prompts, with other columns"
    columns = dict.fromkeys(str(column) for row in rows if isinstance(row, Mapping) for column in row)
    wanted = "; ".join(f"{each}: {_needs(form)}" for each, form in known.items())
    raise DataError(
        f"{name}: the format could not be detected, found the columns {listed(columns) or 'none'}."
        f"{_nearest(rows, columns, known)} Known formats need: {wanted}. "
        f"Map them with `columns` in the entry of dataset, or {named}"
    )


def _asks(form: DataFormat, rows: Sequence[Any]) -> bool:
    """Whether a format makes prompts of all rows, whatever else stands in them, such as an answer to compare with."""
    try:
        return form.kind == "prompt" and bool([form.convert(row) for row in rows])
    except BadRow:
        return False


def _needs(form: DataFormat) -> str:
    return form.needs if isinstance(form, SaysWhatItNeeds) else listed(form.required or form.columns)


def _nearest(rows: Sequence[Any], columns: Iterable[str], known: Mapping[str, DataFormat]) -> str:
    """What keeps the first row from being what it is nearest to, as a sentence after a space."""
    spelled = as_names(dict.fromkeys(column for form in known.values() for column in form.columns))
    for column in columns:
        if wrong := misspelt((column,), spelled):
            return f' Did you mean "{wrong[1]}"?'
    row = next((row for row in rows if isinstance(row, Mapping)), {})
    name, form = max(known.items(), key=lambda item: sum(column in row for column in item[1].columns))
    if not any(column in row for column in form.columns):
        return ""
    try:
        read_row(Chosen(format=form, name=name, why=""), row)
    except BadRow as bad:
        return f" Read as {name}, the first row cannot be used: {bad}."
    return ""


def answers_prompts(learns: Sequence[str]) -> bool:
    """Whether a stage learns from prompts alone, so that of a conversation it wants the prompt of the last answer."""
    return set(learns) == {"prompt"}


def kind_for(learns: Sequence[str], kind: str) -> str:
    """What rows of a kind are to a stage that learns from the kinds `learns`."""
    return "prompt" if kind == "conversation" and answers_prompts(learns) else kind


def check_kind(kind: str, learns: Sequence[str], stage: str, source: str, formats: Formats) -> None:
    """DataError if a stage cannot learn from rows of this kind; it names the stages that can."""
    if kind not in learns:
        allowed = listed([NOUNS.get(each, each) for each in learns])
        others = formats.stages(kind)
        fix = f"choose stage_config {' or '.join(others)} for these rows, or " if others else ""
        raise DataError(
            f"{source}: holds {NOUNS.get(kind, kind)}, and {stage} takes {allowed}; {fix}name the format with "
            "data_config if they were read wrongly"
        )
