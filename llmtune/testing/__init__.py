"""For authors of plugins: the contract as tests, and small models, data and processes to test with.

    from llmtune.testing import laws

    @pytest.mark.parametrize("law", laws("peft_config", "ia3"))
    def test_contract(law, tmp_path):
        law(tmp_path)

Importing this loads neither torch nor pytest; nothing in here needs pytest.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {
    name: module
    for module, names in {
        "llmtune.testing.contract": ("Law", "LawError", "check_plugin", "laws"),
        "llmtune.testing.optimizers": ("create_for", "learning_rates"),
        "llmtune.testing.ranks": ("in_ranks",),
        "llmtune.testing.running": ("read_keys", "tiny_recipe"),
        "llmtune.testing.tiny": (
            "CHATML", "CHATML_MARKED", "tiny_chats", "tiny_config", "tiny_model", "tiny_model_folder", "tiny_tokenizer",
        ),
    }.items()
    for name in names
}  # fmt: skip

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'llmtune.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
