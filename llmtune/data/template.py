"""Which chat template a run uses."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

from llmtune.contract.errors import DataError, did_you_mean, listed

_TOKEN = re.compile(r"<[|\uff5c][\w\u2581-]+[|\uff5c]>|<(?:start|end)_of_turn>|<reserved_\d+>|\[gMASK\]|<sop>")
"""How models spell the tokens that divide turns."""


_OTHER_NAMES = {
    "cohere": "command_r", "deepseek2": "deepseek", "deepseek3": "deepseek", "deepseekr1": "deepseek_r1",
    "gemma2": "gemma", "gemma3": "gemma", "granite3": "granite", "intern2": "internlm2", "llama3.1": "llama3_1",
    "llama3.2": "llama3_1", "mistral_small": "mistral_v7", "phi3": "phi", "phi_small": "phi", "qwen2": "qwen",
    "qwen2.5": "qwen", "smollm": "smollm2",
}  # fmt: skip
"""Other names of models that write their turns alike."""


def template_names() -> list[str]:
    """Templates that ship with llmtune, by the name a recipe writes."""
    folder = resources.files("llmtune") / "data" / "templates"
    return sorted(file.name.removesuffix(".jinja") for file in folder.iterdir() if file.name.endswith(".jinja"))


def template_of(name: str) -> str:
    """The shipped template that a model's own name means, else the name as it is."""
    return _OTHER_NAMES.get(name, name)


def choose_template(template: str | None, tokenizer: Any, base_dir: Path | None = None) -> None:
    """Give `tokenizer` the template a recipe names, so that saving it and chatting with it use what was trained.

    Raises:
        DataError: the template is unknown, unreadable or empty, or none is named and the tokenizer has none.
    """
    if template is None:
        require_template(tokenizer)
        return
    template = template_of(template)
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
    """Special tokens that the template writes and the tokenizer does not have: it would read them as plain text.

    They are looked for in the template, and in what it makes of a short conversation, as many are put together from
    parts (`'<|' + role + '|>'`).
    """
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else "".join((template or {}).values())
    known = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return [found for found in dict.fromkeys(_TOKEN.findall(text) + _written(tokenizer)) if found not in known]


def _written(tokenizer: Any) -> list[str]:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for messages in ([{"role": "system", "content": "c"}, *said], said):
        try:
            return _TOKEN.findall(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception:  # a template raises whatever it likes; that is told where rows are rendered
            continue
    return []
