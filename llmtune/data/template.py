"""Which chat template a run uses."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

from llmtune.errors import DataError, did_you_mean, listed

_TOKEN = re.compile(r"<[|\uff5c][\w\u2581-]+[|\uff5c]>|<(?:start|end)_of_turn>|<reserved_\d+>")
"""How models spell the tokens that divide turns."""


def template_names() -> list[str]:
    """Templates that ship with llmtune, by the name a recipe writes."""
    folder = resources.files("llmtune") / "data" / "templates"
    return sorted(file.name.removesuffix(".jinja") for file in folder.iterdir() if file.name.endswith(".jinja"))


def choose_template(template: str | None, tokenizer: Any, base_dir: Path | None = None) -> None:
    """Give `tokenizer` the template a recipe names, so that saving it and chatting with it use what was trained.

    Raises:
        DataError: the template is unknown, unreadable or empty, or none is named and the tokenizer has none.
    """
    if template is None:
        require_template(tokenizer)
        return
    if template in template_names():
        text = (resources.files("llmtune") / "data" / "templates" / f"{template}.jinja").read_text("utf-8")
    elif template.endswith((".jinja", ".jinja2", ".j2")) or "/" in template:
        path = (base_dir or Path.cwd()) / Path(template).expanduser()
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"template: {path} cannot be read ({error}); check the path") from None
    else:
        near, known = did_you_mean(template, template_names()), listed(template_names())
        raise DataError(f'template: no template "{template}".{near} Known: {known}, or a path to a .jinja file')
    if not text.strip():
        raise DataError(f"template: {template} is empty")
    tokenizer.chat_template = text


def require_template(tokenizer: Any) -> None:
    """DataError if there is none."""
    if not tokenizer.chat_template:
        raise DataError(
            "template: the tokenizer has no chat template, as base models do; name one, such as `template: chatml` "
            f"or `template: alpaca`. Known: {listed(template_names())}, or a path to a .jinja file"
        )


def missing_tokens(tokenizer: Any) -> list[str]:
    """Special tokens that the template spells and the tokenizer does not have: it would read them as plain text."""
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else "".join((template or {}).values())
    known = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return [found for found in dict.fromkeys(_TOKEN.findall(text)) if found not in known]
