"""More tiny models that read pictures, of their real classes with random weights, and their processors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtune.media.loading import without_video
from tests.tiny_media import _clip, _ids, _saved, _sees_video, _text, template, tokenizer

SIGLIP = {**_clip(), "vision_use_head": False, "model_type": "siglip_vision_model"}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def paligemma(folder: Path) -> Path:
    """Reads its prompt in both directions, and has to be told where it ends."""
    from transformers import PaliGemmaConfig, PaliGemmaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    held = tokenizer(("<begin>",), image_token="<image>")
    held.bos_token = "<begin>"
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(image_processor=images, tokenizer=held, chat_template=template("<image>"))
    config = PaliGemmaConfig(
        vision_config={**SIGLIP, "projection_dim": 32}, text_config={"model_type": "gemma", **_text(held, head_dim=8)},
        image_token_index=held.convert_tokens_to_ids("<image>"), projection_dim=32, hidden_size=32,
    )  # fmt: skip
    return _saved(folder, config, "PaliGemmaForConditionalGeneration", processor)


def pixtral_processor() -> Any:
    """What reads pictures for Mistral's newer models."""
    from transformers import PixtralProcessor
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    held = tokenizer(("[IMG]", "[IMG_BREAK]", "[IMG_END]"))
    images = PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})
    return PixtralProcessor(
        image_processor=images, tokenizer=held, patch_size=4, spatial_merge_size=2, chat_template=template("[IMG]")
    )


def mistral3(folder: Path) -> Path:
    from transformers import Mistral3Config

    processor = pixtral_processor()
    held = processor.tokenizer
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 4}  # fmt: skip
    config = Mistral3Config(
        vision_config=vision, text_config={"model_type": "mistral", **_text(held, head_dim=8)}, spatial_merge_size=2,
        image_token_index=held.convert_tokens_to_ids("[IMG]"), vision_feature_layer=-1,
    )  # fmt: skip
    return _saved(folder, config, "Mistral3ForConditionalGeneration", processor)


def qwen3_5(folder: Path) -> Path:
    """Three layers of linear attention to each of full attention; here one to one."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    held = tokenizer(("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"))
    sizes = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 1024}}
    mark = "<|vision_start|>{}<|vision_end|>"
    processor = without_video(transformers.Qwen3VLProcessor)(
        image_processor=Qwen2VLImageProcessorPil(**sizes), tokenizer=held, video_processor=None,
        chat_template=template(mark.format("<|image_pad|>"), mark.format("<|video_pad|>")),
    )  # fmt: skip
    rope = {**ROPE, "mrope_section": [1, 1, 2], "mrope_interleaved": True, "partial_rotary_factor": 1.0}
    text = {**_text(held), "rope_parameters": rope, "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}  # fmt: skip
    vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
              "num_position_embeddings": 64, "patch_size": 4}  # fmt: skip
    config = transformers.Qwen3_5Config(
        text_config=text, vision_config=vision, tie_word_embeddings=False,
        **_ids(held, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
               vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>"),
    )  # fmt: skip
    _saved(folder, config, "Qwen3_5ForConditionalGeneration", processor)
    _sees_video(folder, "Qwen3VLVideoProcessor", **sizes)
    return folder


def glm4v(folder: Path) -> Path:
    import transformers
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    marks = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>")
    held = tokenizer((*marks, "<|video|>"))
    sizes = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 1024}}
    processor = without_video(transformers.Glm4vProcessor)(
        image_processor=Glm4vImageProcessorPil(**sizes), tokenizer=held, video_processor=None,
        chat_template=template(
            "<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>"
        ),
    )  # fmt: skip
    rope = {**ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
              "patch_size": 4, "image_size": 32}  # fmt: skip
    config = transformers.Glm4vConfig(
        text_config={**_text(held), "rope_parameters": rope}, vision_config=vision, tie_word_embeddings=False,
        **_ids(held, image_token_id="<|image|>", video_token_id="<|video|>", image_start_token_id="<|begin_of_image|>",
               image_end_token_id="<|end_of_image|>", video_start_token_id="<|begin_of_video|>",
               video_end_token_id="<|end_of_video|>"),
    )  # fmt: skip
    _saved(folder, config, "Glm4vForConditionalGeneration", processor)
    _sees_video(folder, "Glm4vVideoProcessor", **sizes)
    return folder


def llava_onevision(folder: Path) -> Path:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    held, pinpoints = tokenizer(("<image>", "<video>")), [[16, 32], [32, 16], [32, 32]]
    processor = without_video(LlavaOnevisionProcessor)(
        image_processor=LlavaOnevisionImageProcessorPil(
            size={"height": 16, "width": 16}, image_grid_pinpoints=pinpoints
        ),
        tokenizer=held, video_processor=None, num_image_tokens=16, vision_feature_select_strategy="full",
        chat_template=template("<image>\n", "<video>\n"),
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=SIGLIP, text_config={"model_type": "qwen2", **_text(held)}, image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy="full", vision_feature_layer=-1, tie_word_embeddings=False,
        **_ids(held, image_token_id="<image>", video_token_id="<video>"),
    )  # fmt: skip
    _saved(folder, config, "LlavaOnevisionForConditionalGeneration", processor)
    _sees_video(folder, "LlavaOnevisionVideoProcessor", size={"height": 16, "width": 16})
    return folder


def idefics2(folder: Path) -> Path:
    from transformers import Idefics2Config, Idefics2Processor
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    held = tokenizer(("<end_of_utterance>",), image_boundary_token="<fake_token_around_image>", image_token="<image>")
    images = Idefics2ImageProcessorPil(size={"longest_edge": 32, "shortest_edge": 16}, do_image_splitting=False)
    processor = Idefics2Processor(
        image_processor=images, tokenizer=held, image_seq_len=4, chat_template=template("<image>")
    )
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 4}  # fmt: skip
    config = Idefics2Config(
        text_config={"model_type": "mistral", **_text(held, head_dim=8)}, vision_config=vision,
        perceiver_config={"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
                          "num_key_value_heads": 1, "resampler_head_dim": 8},
        image_token_id=held.convert_tokens_to_ids("<image>"), tie_word_embeddings=False,
    )  # fmt: skip
    return _saved(folder, config, "Idefics2ForConditionalGeneration", processor)


def aya_vision(folder: Path) -> Path:
    from transformers import AyaVisionConfig, AyaVisionProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    tiles = (*(f"TILE_{number}" for number in range(1, 5)), "TILE_GLOBAL", "<|IMG_LINE_BREAK|>", "TILE")
    held = tokenizer(("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", *tiles))
    processor = AyaVisionProcessor(
        image_processor=GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=3),
        tokenizer=held, patch_size=4, img_size=16, downsample_factor=2, chat_template=template("<image>"),
    )  # fmt: skip
    config = AyaVisionConfig(
        vision_config=SIGLIP, text_config={"model_type": "cohere2", **_text(held, sliding_window=16)},
        downsample_factor=2, image_token_index=held.convert_tokens_to_ids("<|IMG_PATCH|>"),
        vision_feature_select_strategy="full", vision_feature_layer=-1, adapter_layer_norm_eps=1e-6,
        alignment_intermediate_size=64,
    )  # fmt: skip
    return _saved(folder, config, "AyaVisionForConditionalGeneration", processor)


def ovis2(folder: Path) -> Path:
    from transformers import Ovis2Config, Ovis2Processor
    from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

    marks = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    held = tokenizer(("<image>", "<IMG_ATOM>", *marks))
    images = Ovis2ImageProcessorPil(size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=3)
    processor = Ovis2Processor(
        image_processor=images, tokenizer=held, image_seq_length=4, chat_template=template("<image>")
    )
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 4, "vocab_size": 24, "hidden_stride": 2,
              "num_visual_indicator_tokens": 5}  # fmt: skip
    config = Ovis2Config(
        vision_config=vision, text_config={"model_type": "qwen2", **_text(held)}, hidden_size=32, vocab_size=448,
        image_token_id=held.convert_tokens_to_ids("<IMG_ATOM>"), tie_word_embeddings=False,
        visual_indicator_token_ids=held.convert_tokens_to_ids([*marks]),
    )  # fmt: skip
    return _saved(folder, config, "Ovis2ForConditionalGeneration", processor)


def video_llama3(folder: Path) -> Path:
    from transformers import VideoLlama3Config, VideoLlama3Processor
    from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

    held = tokenizer(image_token="<image>", video_token="<video>")
    images = VideoLlama3ImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=1024)
    processor = without_video(VideoLlama3Processor)(
        image_processor=images, tokenizer=held, video_processor=None, chat_template=template("<image>", "<video>")
    )
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "patch_size": 4}  # fmt: skip
    config = VideoLlama3Config(
        vision_config=vision, text_config={"model_type": "qwen2", **_text(held)}, tie_word_embeddings=False,
        **_ids(held, image_token_id="<image>", video_token_id="<video>"),
    )  # fmt: skip
    _saved(folder, config, "VideoLlama3ForConditionalGeneration", processor)
    _sees_video(folder, "VideoLlama3VideoProcessor", patch_size=4, min_pixels=64, max_pixels=1024)
    return folder


def deepseek_vl(folder: Path) -> Path:
    from transformers import DeepseekVLConfig, DeepseekVLProcessor
    from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil

    held = tokenizer(image_token="<image_placeholder>")
    images = DeepseekVLImageProcessorPil(size={"height": 16, "width": 16}, min_size=4)
    processor = DeepseekVLProcessor(images, held, num_image_tokens=16, chat_template=template("<image_placeholder>"))
    config = DeepseekVLConfig(
        vision_config=SIGLIP, text_config={"model_type": "llama", **_text(held)}, tie_word_embeddings=False,
        image_token_id=held.convert_tokens_to_ids("<image_placeholder>"),
    )  # fmt: skip
    return _saved(folder, config, "DeepseekVLForConditionalGeneration", processor)


MODELS: dict[str, Callable[[Path], Path]] = {
    "mistral3": mistral3, "qwen3_5": qwen3_5, "glm4v": glm4v, "llava_onevision": llava_onevision,
    "idefics2": idefics2, "aya_vision": aya_vision, "ovis2": ovis2, "video_llama3": video_llama3,
    "deepseek_vl": deepseek_vl,
}  # fmt: skip
