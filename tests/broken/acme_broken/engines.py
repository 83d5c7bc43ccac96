"""Engines that are wrong in one way each."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from llmtune import Answer, GenerateConfig, generate


class _Engine:
    def generate(self, model: Any, tokenizer: Any, prompts: Any, config: GenerateConfig, **more: Any) -> list[Answer]:
        return generate(model, tokenizer, prompts, config, **more)


class TakesChances(_Engine):
    def generate(self, model: Any, tokenizer: Any, prompts: Any, config: GenerateConfig, **more: Any) -> list[Answer]:
        return super().generate(model, tokenizer, prompts, replace(config, do_sample=True, temperature=5.0), **more)


class SeesItsNeighbours(_Engine):
    def generate(self, model: Any, tokenizer: Any, prompts: Any, config: GenerateConfig, **more: Any) -> list[Answer]:
        beside = [] if len(prompts) == 1 else prompts[0]
        return super().generate(model, tokenizer, [[*beside, *prompt] for prompt in prompts], config, **more)


class IgnoresSeeds(_Engine):
    def generate(self, model: Any, tokenizer: Any, prompts: Any, config: GenerateConfig, **more: Any) -> list[Answer]:
        return super().generate(model, tokenizer, prompts, config, **{**more, "seeds": [7] * len(prompts)})


class NeverEnds(_Engine):
    def generate(self, model: Any, tokenizer: Any, prompts: Any, config: GenerateConfig, **more: Any) -> list[Answer]:
        return super().generate(model, tokenizer, prompts, config, **{**more, "stop": ()})


class KeepsSilent(_Engine):
    def generate(self, model: Any, tokenizer: Any, prompts: Any, config: GenerateConfig, **more: Any) -> list[Answer]:
        return super().generate(model, tokenizer, prompts, config, **{**more, "watch": None})


class StaysInEval(_Engine):
    def generate(self, model: Any, tokenizer: Any, prompts: Any, config: GenerateConfig, **more: Any) -> list[Answer]:
        return super().generate(model.eval(), tokenizer, prompts, config, **more)


class DrawsByRank(_Engine):
    def generate(self, model: Any, tokenizer: Any, prompts: Any, config: GenerateConfig, **more: Any) -> list[Answer]:
        seeds = [seed + int(os.environ.get("WORLD_SIZE", 1)) for seed in more["seeds"]]
        return super().generate(model, tokenizer, prompts, config, **{**more, "seeds": seeds})
