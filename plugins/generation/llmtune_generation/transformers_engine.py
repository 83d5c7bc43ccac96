"""The engine that needs nothing but the model in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmtune import Answer, ContinuousServing, GenerateConfig, ServedModel, Serving, generate


class TransformersEngine:
    """An `Engine`: the batched `generate` of llmtune, which is transformers' with a seed for each row."""

    def generate(
        self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], config: GenerateConfig, *,
        seeds: Sequence[int] | None = None, stop: Sequence[int] | None = None,
        watch: Callable[[Sequence[int | None]], bool] | None = None,
    ) -> list[Answer]:  # fmt: skip
        return generate(model, tokenizer, prompts, config, seeds=seeds, stop=stop, watch=watch)

    def serve(self, models: Sequence[ServedModel]) -> Serving:
        return ContinuousServing(models)
