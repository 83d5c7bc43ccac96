"""What a chat template is given for the content of a message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "whatissaid"


def reads_only_parts(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> bool:
    """Whether the chat template writes nothing of a content that is one text, as of some models that read pictures."""
    try:
        turns = [{"role": "user", "content": _PROBE}]
        written = str(tokenizer.apply_chat_template(turns, tokenize=False, **variables))
    except Exception:  # it raises whatever it likes
        return True
    return _PROBE not in written


def for_template(
    tokenizer: PreTrainedTokenizerBase, messages: Iterable[Mapping[str, Any]], variables: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The messages, texts as lists of one part where the template reads nothing else."""
    if not reads_only_parts(tokenizer, variables):
        return [dict(each) for each in messages]
    return [
        {**each, "content": [{"type": "text", "text": each["content"]}]}
        if isinstance(each.get("content"), str)
        else dict(each)
        for each in messages
    ]
