"""The Modelfile from which ollama makes a model: the files, the chat template in its language, where answers end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_TURNS = (
    "{{- range .Messages }}{{ if eq .Role \"user\" }}%s{{ .Content }}%s{{ else if eq .Role \"assistant\" }}%s"
    "{{ .Content }}%s{{ else if eq .Role \"system\" }}%s{{ .Content }}%s{{ end }}{{ end }}%s"
)  # fmt: skip
SYSTEM, USER, ANSWER = "llmtunesystem", "llmtuneuser", "llmtuneanswer"
"""Messages that occur in no template."""


def modelfile(
    source: str, tokenizer: Any, variables: Mapping[str, Any], stops: Sequence[int], context_tokens: int
) -> str:
    """The text of a Modelfile for the weights at `source`. A template that is no plain sequence of turns is left out,
    with a comment: ollama then takes what it finds in the weights."""
    lines = [f"FROM {source}"]
    found = go_template(tokenizer, variables)
    if found is None:
        lines.append(
            "# The chat template is not a plain sequence of turns; write it here in Go's language if ollama asks."
        )
    else:
        template, system = found
        lines.append(f'TEMPLATE """{template}"""')
        if system:
            lines.append(f'SYSTEM """{system}"""')
    words = (tokenizer.decode([index]) for index in stops)
    lines += [f'PARAMETER stop "{word}"' for word in words if '"' not in word and word.strip()]
    lines.append(f"PARAMETER num_ctx {context_tokens}")
    return "\n".join(lines) + "\n"


def go_template(tokenizer: Any, variables: Mapping[str, Any]) -> tuple[str, str] | None:
    """The chat template in ollama's language, and the system message that it adds where there is none; None where it
    writes anything but its messages between fixed words."""
    if not (tokenizer.chat_template or variables.get("chat_template")):
        return None

    def write(*messages: tuple[str, str], ask: bool = False) -> str:
        turns = [{"role": role, "content": text} for role, text in messages]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask, **variables)
        return str(text).removeprefix(tokenizer.bos_token or "" if begins else "")

    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]  # readers of the weights add it themselves
    system, user, answer = ("system", SYSTEM), ("user", USER), ("assistant", ANSWER)
    try:
        one, two, three = write(user), write(user, answer), write(user, answer, user)
        asked = write(user, ask=True).removeprefix(one)
        before_answer, after_answer = two.removeprefix(one).split(ANSWER)
        before_user, after_user = three.removeprefix(two).split(USER)
        before_system, after_system = write(system, user).removesuffix(before_user + USER + after_user).split(SYSTEM)
    except Exception:  # a template may refuse roles, or leave out earlier answers
        return None
    implied = one.removesuffix(before_user + USER + after_user)
    given = implied.removeprefix(before_system)
    own = given.removesuffix(after_system) if implied else ""
    words = (before_user, after_user, before_answer, after_answer, before_system, after_system, asked)
    said = {"system": (before_system, after_system), "user": (before_user, after_user),
            "assistant": (before_answer, after_answer)}  # fmt: skip
    talk = (system, user, answer, user)
    by_hand = "".join(said[role][0] + text + said[role][1] for role, text in talk) + asked
    plain = by_hand == write(*talk, ask=True) and implied == (before_system + own + after_system if own else "")
    return (_TURNS % words, own) if plain and not any("{{" in word or '"""' in word for word in (*words, own)) else None
