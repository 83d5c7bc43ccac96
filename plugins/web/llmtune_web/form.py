"""A recipe as a form: every key of the JSON schema with what the YAML text says of it, as HTML."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import yaml

from llmtune_web.yaml_text import Values, quoted, with_value, without

SECTIONS = {
    "model": "Model",
    "dataset": "Data",
    "output_dir": "Training",
    "do_sample": "Generation",
    "export_dir": "Export",
}
"""The first key of each part of the schema, which keeps the order of the reference."""
USUAL = (
    "model", "peft_config", "quant_config", "dataset", "eval_dataset", "template", "cutoff_len", "val_size", "packing",
    "stage_config", "output_dir", "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "optim_config", "lr_scheduler_config", "warmup_ratio", "logging_steps", "save_steps",
    "sample_prompts", "temperature", "top_p", "max_new_tokens",
)  # fmt: skip
"""Keys that stand above the fold of their section; others too where the recipe gives them."""
PLACES = {
    "hub_config": "Model", "quant_config": "Model", "peft_config": "Model", "init_config": "Model",
    "data_config": "Data", "engine_config": "Generation",
}  # fmt: skip
"""The sections of extension points; of the others, and of those to come, it is Training."""


@dataclass(frozen=True)
class FormField:
    """One key of the form."""

    path: tuple[str, ...]
    schema: Mapping[str, Any]

    @property
    def key(self) -> str:
        return ".".join(self.path)

    def choices(self) -> list[str]:
        """The words that it allows, where it allows nothing else."""
        forms = [form for form in _forms(self.schema) if form.get("type") != "null"]
        found = [_shown(word) for form in forms for word in form.get("enum", [])]
        found += ["true", "false"] if any(form.get("type") == "boolean" for form in forms) else []
        closed = all("enum" in form or form.get("type") == "boolean" for form in forms)
        return list(dict.fromkeys(found)) if closed else []

    def yaml(self, typed: str) -> str:
        """What was typed, as YAML for the recipe: text where the key takes text, else read as it stands."""
        kinds = {str(form.get("type", "string")) for form in _forms(self.schema)}
        kinds |= {"boolean" for form in _forms(self.schema) for word in form.get("enum", []) if isinstance(word, bool)}
        try:
            read = yaml.safe_load(typed)
            yaml.safe_load(f"[{typed}]" if "{" not in typed else f"- {typed}")
        except yaml.YAMLError:
            return quoted(typed)
        number = bool(re.fullmatch(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?", typed))
        fits = (
            (read is None and typed.strip().lower() in ("null", "~"))
            or (isinstance(read, bool) and "boolean" in kinds)
            or (number and kinds & {"integer", "number"})
            or (isinstance(read, list) and "array" in kinds and typed.lstrip().startswith("["))
            or (isinstance(read, dict) and "object" in kinds and typed.lstrip().startswith("{"))
        )
        return typed if fits and "\n" not in typed else quoted(typed)


class Form:
    """The form of a schema."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.properties: Mapping[str, Any] = schema["properties"]

    def changed(self, text: str, key: str, typed: str) -> str:
        """The text with what was typed for a key; without the key where nothing was."""
        field = self._field(text, tuple(key.split(".")))
        if field is None or not typed.strip():
            return without(text, key.split("."))
        return with_value(text, field.path, field.yaml(typed.strip()))

    def html(self, text: str, problems: Sequence[str] = ()) -> str:
        """The form with the values of a text; keys that `problems` speak of are marked."""
        try:
            values = Values(text)
        except yaml.YAMLError:
            return '<p class="lt-note">The form is back as soon as the YAML can be read.</p>'
        top = values.keys()
        wrong = {found[1] for problem in problems if (found := re.search(r"  ([\w.\[\]]+): ", problem))}
        parts = []
        for section, names in self._sections().items():
            first = [name for name in USUAL if name in names] + [
                name for name in names if name not in USUAL and name in top
            ]
            rest = [name for name in names if name not in first]
            usual = "".join(self._key(values, name, wrong) for name in first)
            more = "".join(self._key(values, name, wrong) for name in rest)
            parts.append(
                f'<section data-section="{section}"><h3>{section}</h3>{usual}'
                f'<details data-open="{section}"><summary>{len(rest)} more</summary>{more}</details></section>'
            )
        search = '<input class="lt-search" type="search" placeholder="Find a setting" aria-label="Find a setting">'
        none = '<p class="lt-none" hidden>No setting is called that.</p>'
        return f'<div class="lt-form">{search}{"".join(parts)}{none}</div>'

    def _sections(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {title: [] for title in SECTIONS.values()}
        here = "Model"
        for name in self.properties:
            here = SECTIONS.get(name, here)
            found[PLACES.get(name, "Training") if name.endswith("_config") else here].append(name)
        return found

    def _field(self, text: str, path: tuple[str, ...]) -> FormField | None:
        schema = self.properties.get(path[0])
        if schema is None or len(path) == 1:
            return FormField(path, schema) if schema else None
        block = self._block(path[0], self._plugin(Values(text), path[0]))
        inner = block.get(path[1]) if len(path) == 2 else None
        return FormField(path, inner) if inner is not None else None

    def _plugin(self, values: Values, point: str) -> str | None:
        """The plugin that a block is of: the one it names, else the default."""
        value = values.at(point)
        bare = value is not None and not value.startswith("{")
        return values.at(point, "name") or (value if bare else self.properties[point].get("default"))

    def _plugins(self, point: str) -> dict[str, str]:
        """The plugins of an extension point, with their summaries."""
        found = {}
        for form in _choices(self.properties[point]):
            name = form.get("const") or form["properties"]["name"]["const"]
            found.setdefault(name, form.get("description", ""))
        return found

    def _block(self, point: str, plugin: str | None) -> Mapping[str, Any]:
        """The keys of a plugin."""
        for form in _choices(self.properties[point]):
            if form.get("properties", {}).get("name", {}).get("const", "") == plugin:
                return {key: value for key, value in form["properties"].items() if key != "name"}
        return {}

    def _key(self, values: Values, name: str, wrong: Iterable[str]) -> str:
        if not name.endswith("_config"):
            return _field_html(FormField((name,), self.properties[name]), values.at(name), wrong)
        value = values.at(name)
        if value is not None and value.startswith("["):  # a list of plugins is written as text
            return _field_html(FormField((name,), {"type": "array", **self._about(name)}), value, wrong)
        plugin = self._plugin(values, name) if value not in ("null", "false", "") else None
        select = _select(name, self._plugins(name), plugin if value is not None else None, self._about(name))
        keys = self._block(name, plugin)
        inner = "".join(
            _field_html(FormField((name, key), schema), values.at(name, key), wrong) for key, schema in keys.items()
        )
        below = (
            f'<details class="lt-block" data-open="{name}"><summary>{len(keys)} settings of {escape(str(plugin))}'
            f"</summary>{inner}</details>"
            if inner
            else ""
        )
        about = self._plugins(name).get(plugin or "", "")
        return _row(FormField((name,), self._about(name)), select, value is not None, wrong, about, below)

    def _about(self, name: str) -> dict[str, Any]:
        return {key: self.properties[name][key] for key in ("description", "default") if key in self.properties[name]}


def _choices(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The forms of one block, among those of a list of blocks and of none."""
    for form in schema.get("anyOf", []):
        yield from form.get("oneOf", [])


def _forms(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The alternatives of a schema, those within alternatives too."""
    if "anyOf" in schema:
        for form in schema["anyOf"]:
            yield from _forms(form)
    else:
        yield schema


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _field_html(field: FormField, value: str | None, wrong: Iterable[str]) -> str:
    if words := field.choices():
        control = _select(field.key, dict.fromkeys(words, ""), value, field.schema)
    else:
        default = field.schema.get("default")
        placeholder = "" if default is None else _shown(default)
        control = (
            f'<input id="lt-{field.key}" data-key="{field.key}" value="{escape(value or "")}" '
            f'placeholder="{escape(placeholder)}" autocomplete="off" spellcheck="false">'
        )
    return _row(field, control, value is not None, wrong, field.schema.get("description", ""))


def _select(key: str, words: Mapping[str, str], value: str | None, schema: Mapping[str, Any]) -> str:
    default = schema.get("default")
    absent = "none" if key.endswith("_config") else "not set"
    options = [f'<option value="">{escape(absent if default is None else f"{_shown(default)} (default)")}</option>']
    if value is not None and value not in words:
        known = value if not value.startswith("{") else str(default)
        options.append(f'<option value="{escape(known)}" selected>{escape(known)}</option>')
    options += [
        f'<option value="{escape(word)}" title="{escape(text)}"{" selected" if word == value else ""}>'
        f"{escape(word)}</option>"
        for word, text in words.items()
    ]
    return f'<select id="lt-{key}" data-key="{key}">{"".join(options)}</select>'


def _row(field: FormField, control: str, given: bool, wrong: Iterable[str], about: str, below: str = "") -> str:
    plain = about.replace("`", "")
    classes = "lt-field" + (" lt-given" if given else "") + (" lt-wrong" if field.key in wrong else "")
    reset = (
        f'<button type="button" data-unset="{field.key}" title="Back to the default" aria-label="Unset {field.key}">'
        "\u00d7</button>"
    )
    return (
        f'<div class="{classes}" data-name="{field.key}" data-about="{escape(plain.lower())}">'
        f'<label for="lt-{field.key}">{escape(field.path[-1])}</label><div class="lt-control">{control}'
        f'{reset if given else ""}</div><p title="{escape(plain)}">{escape(plain)}</p>{below}</div>'
    )
