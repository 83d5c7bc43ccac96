"""The engine that needs nothing but the model in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmtune import Answer, ContinuousServing, GenerateConfig, ServedModel, Serving, ShownPrompt, generate


class TransformersEngine:
    """An `Engine`: the batched `generate` of llmtune, which is transformers' with a seed for each row."""

    takes_media = True

    def __init__(self, max_cache_tokens: int | None = None) -> None:
        self.max_cache_tokens = max_cache_tokens

    def generate(
        self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int] | ShownPrompt], config: GenerateConfig, *,
        seeds: Sequence[int] | None = None, stop: Sequence[int] | None = None,
        watch: Callable[[Sequence[int | None]], bool] | None = None, media: Any = None,
    ) -> list[Answer]:  # fmt: skip
        return generate(model, tokenizer, prompts, config, seeds=seeds, stop=stop, watch=watch, media=media)

    def serve(self, models: Sequence[ServedModel]) -> Serving:
        return ContinuousServing(models, self.max_cache_tokens)
