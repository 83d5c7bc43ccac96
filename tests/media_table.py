"""What becomes of each kind of model that transformers registers as one that reads pictures, video or sound.

python -m tests.media_table > docs/media-models.md
"""

from __future__ import annotations

from typing import Any

import torch

from llmtune.contract.errors import PlanError
from llmtune.model.config import ModelConfig
from llmtune.model.modalities import parts_of
from llmtune.model.skeleton import build_skeleton
from llmtune.model.source import auto_class

COMPARED = (
    "Aria", "AudioFlamingo3", "AyaVision", "Chameleon", "Cohere2Vision", "DeepseekOcr2", "DeepseekVL",
    "DeepseekVLHybrid", "Ernie4_5_VLMoe", "Exaone4_5_", "FastVlm", "Gemma3", "Gemma3n", "Gemma4", "Gemma4Unified",
    "Glm46V", "Glm4v", "Glm4vMoe", "GlmAsr", "GlmOcr", "GraniteDocling", "HunYuanVL", "Idefics2", "Idefics3",
    "InternVL", "Janus", "Kimi_K25", "Lfm2Vl", "LightOnOcr", "Llava", "LlavaNext", "LlavaNextVideo", "LlavaOnevision",
    "MiniCPMV4_6", "Mistral3", "MistralLarge4", "Mllama", "Ovis2", "PaddleOCRVL", "PerceptionLM",
    "Phi4MultimodalForCausalLM", "Qwen2Audio", "Qwen2VL", "Qwen2_5OmniThinker", "Qwen2_5_VL", "Qwen3ASR",
    "Qwen3OmniMoeThinker", "Qwen3VL", "Qwen3VLMoe", "Qwen3_5", "Qwen3_5Moe", "SmolVLM", "VideoLlama3", "VideoLlava",
    "VipLlava",
)  # fmt: skip
"""Classes, less `ForConditionalGeneration`, whose losses and gradients are compared with a loop in transformers."""
REFUSED_WHERE_SEEN = {
    "Llama4": "transformers 5.24 cannot run it: it asks its language model for pictures",
    "PaliGemma": "sees answers before it is to say them",
    "Voxtral": "on sounds: its processor does not say which characters a token stands for",
}
"""What is found with the model's own files, before training."""
HEAD = """# Models that read pictures, video and sound

All classes that transformers 5.24 registers for texts beside pictures, video or sound, and what becomes of them here.
This page is made by `python -m tests.media_table`, and a test holds it.

- **compared**: losses and gradient norms equal a loop in transformers, inputs the processor's own
  ([pictures](how-to/pictures.md)).
- **understood**: made with random weights, its towers and language model are found, and it is trained by the same code
  as the others; its numbers are not compared here.
- **untried**: transformers makes none from the class's own defaults, or needs a package for it.
- **refused**: a recipe is told so, before training.

Whatever the class, a run looks at a row that shows something before it trains: a model that cannot be given what its
processor makes of it, that takes nothing of it, or that sees tokens before it is to say them is refused; so is a
processor that writes texts in which answers cannot be found, and a packed row that is read otherwise than its documents
alone.

| class | what becomes of it |
|---|---|
"""


def registered() -> dict[str, str]:
    """The class of each type of model."""
    from transformers.models.auto import modeling_auto

    multimodal = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    return {**multimodal, **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}


def fate(kind: str, class_name: str) -> str:
    """What becomes of a type of model."""
    import transformers

    short = class_name.removesuffix("ForConditionalGeneration")
    if short in COMPARED:
        return "compared"
    if f"{short}Thinker" in COMPARED:
        return "compared: its thinker, which reads and answers"
    if short in REFUSED_WHERE_SEEN:
        return f"refused: {REFUSED_WHERE_SEEN[short]}"
    try:
        config: Any = transformers.AutoConfig.for_model(kind)
        config.architectures = [class_name]
        model = build_skeleton(auto_class(ModelConfig(model=kind), config), config, torch.float32, None)
    except PlanError as error:
        return f"refused: {str(error).partition(': ')[2].partition(';')[0]}"
    except ImportError as error:
        return f"untried: needs {str(error).partition('requires the ')[2].partition(' ')[0]}"
    except Exception:  # of defaults that are no model
        return "untried"
    parts = set(parts_of(model).values())
    return "understood" if "vision_tower" in parts else "understood: no tower of its own"


def page() -> str:
    """The page of the documentation."""
    found = {class_name: fate(kind, class_name) for kind, class_name in registered().items()}
    return HEAD + "".join(f"| {name} | {said} |\n" for name, said in sorted(found.items()))


if __name__ == "__main__":
    print(page(), end="")
