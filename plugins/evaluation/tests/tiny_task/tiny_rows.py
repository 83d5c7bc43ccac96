from __future__ import annotations

from typing import Any

from datasets import Dataset


def rows(**metadata: Any) -> dict[str, Dataset]:
    asked = ["Who are you?", "Is it raining?", "Is the capital of France Paris?"]
    return {"test": Dataset.from_list([{"question": text, "answer": at % 2} for at, text in enumerate(asked)])}
