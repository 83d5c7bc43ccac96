"""Tiny models of kinds that read pictures, of 2025 and 2026, of their real classes with random weights, and their
processors, some of which need torchvision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtune.media.loading import without_video
from tests.tiny_families import ROPE, SIGLIP
from tests.tiny_media import _ids, _qwen, _saved, _sees_video, _text, template, tokenizer

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "patch_size": 4}  # fmt: skip
GRID_VISION = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
               "patch_size": 4}  # fmt: skip
GRID_SIZES = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 1024}}


def qwen3_vl_moe(folder: Path) -> Path:
    vision = {**GRID_VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return _qwen(folder, "Qwen3VLMoe", vision, processor="Qwen3VL", **EXPERTS, head_dim=8)


def glm4v_moe(folder: Path) -> Path:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return _glm(folder, "Glm4vMoe", "Glm4v", **experts)


def glm46v(folder: Path) -> Path:
    return _glm(folder, "Glm46V", "Glm46V", model_type="glm4v_text")


def glm_ocr(folder: Path) -> Path:
    return _glm(folder, "GlmOcr", "Glm46V", head_dim=8)


def _glm(folder: Path, name: str, processor: str, **text: Any) -> Path:
    import transformers
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
    from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

    marks = {f"{kind}_{place}_token_id": f"<|{end}_of_{kind}|>"
             for kind in ("image", "video") for place, end in (("start", "begin"), ("end", "end"))}  # fmt: skip
    held = tokenizer((*marks.values(), "<|image|>", "<|video|>"))
    images = {"Glm4v": Glm4vImageProcessorPil, "Glm46V": Glm46VImageProcessorPil}[processor]
    made = without_video(getattr(transformers, f"{processor}Processor"))(
        image_processor=images(**GRID_SIZES), tokenizer=held, video_processor=None,
        chat_template=template(
            "<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>"
        ),
    )  # fmt: skip
    rope = {**ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    vision = {**GRID_VISION, "image_size": 32}
    if name == "Glm46V":
        vision["model_type"] = "glm4v_vision"
    config = getattr(transformers, f"{name}Config")(
        text_config={**_text(held), "rope_parameters": rope, **text}, vision_config=vision, tie_word_embeddings=False,
        **_ids(held, image_token_id="<|image|>", video_token_id="<|video|>", **marks),
    )  # fmt: skip
    _saved(folder, config, f"{name}ForConditionalGeneration", made)
    _sees_video(folder, f"{processor}VideoProcessor", **GRID_SIZES)
    return folder


def lfm2_vl(folder: Path) -> Path:
    from transformers import Lfm2VlConfig, Lfm2VlImageProcessor, Lfm2VlProcessor

    rows = [f"<|img_row_{row}_col_{col}|>" for row in range(1, 5) for col in range(1, 5)]
    held = tokenizer((*rows, "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"), image_token="<image>")
    images = Lfm2VlImageProcessor(
        encoder_patch_size=4, tile_size=16, min_image_tokens=1, max_image_tokens=8, max_tiles=4, min_tiles=2
    )
    processor = Lfm2VlProcessor(images, held, chat_template=template("<image>"))
    text = {"model_type": "lfm2", **_text(held), "layer_types": ["conv", "full_attention"]}
    vision = {"model_type": "siglip2_vision_model", **VISION, "num_patches": 16, "vision_use_head": False}
    config = Lfm2VlConfig(
        text_config=text, vision_config=vision, projector_hidden_size=32, **_ids(held, image_token_id="<image>")
    )
    return _saved(folder, config, "Lfm2VlForConditionalGeneration", processor)


def aria(folder: Path) -> Path:
    from transformers import AriaConfig, AriaProcessor
    from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil

    held = tokenizer(image_token="<image>")
    images = AriaImageProcessorPil(max_image_size=490)
    processor = AriaProcessor(images, held, chat_template=template("<image>"), size_conversion={490: 4, 980: 8})
    text = _text(held, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
    vision = {"model_type": "idefics3_vision", **VISION, "image_size": 490, "patch_size": 98}
    config = AriaConfig(
        text_config=text, vision_config=vision, projector_patch_to_query_dict={25: 4, 100: 8},
        image_token_index=held.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return _saved(folder, config, "AriaForConditionalGeneration", processor)


def cohere2_vision(folder: Path) -> Path:
    from transformers import Cohere2VisionConfig, Cohere2VisionImageProcessor, Cohere2VisionProcessor

    held = tokenizer(
        ("<image>",), boi_token="<|START_OF_IMG|>", eoi_token="<|END_OF_IMG|>", image_token="<|IMG_PATCH|>",
        img_line_break_token="<|IMG_LINE_BREAK|>",
    )  # fmt: skip
    images = Cohere2VisionImageProcessor(
        size={"height": 16, "width": 16}, patch_size=2, max_patches=3, downsample_factor=2, crop_to_patches=True
    )
    processor = Cohere2VisionProcessor(images, held, chat_template=template("<|IMG_PATCH|>"))
    config = Cohere2VisionConfig(
        vision_config=SIGLIP, text_config={"model_type": "cohere2", **_text(held, sliding_window=16)},
        alignment_intermediate_size=64, **_ids(held, image_token_id="<|IMG_PATCH|>"),
    )  # fmt: skip
    return _saved(folder, config, "Cohere2VisionForConditionalGeneration", processor)


def paddleocr_vl(folder: Path) -> Path:
    from transformers import PaddleOCRVLConfig, PaddleOCRVLProcessor
    from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

    held = tokenizer(("<|IMAGE_START|>", "<|IMAGE_END|>", "<|video|>"), image_token="<|IMAGE_PLACEHOLDER|>")
    processor = PaddleOCRVLProcessor(
        PaddleOCRVLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024), held,
        chat_template=template("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"),
    )  # fmt: skip
    text = {**_text(held, head_dim=8), "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}
    config = PaddleOCRVLConfig(
        text_config=text, vision_config={**VISION, "image_size": 16}, tie_word_embeddings=False,
        **_ids(held, image_token_id="<|IMAGE_PLACEHOLDER|>", video_token_id="<|video|>",
               vision_start_token_id="<|IMAGE_START|>", vision_end_token_id="<|IMAGE_END|>"),
    )  # fmt: skip
    return _saved(folder, config, "PaddleOCRVLForConditionalGeneration", processor)


def llama4(folder: Path) -> Path:
    from transformers import Llama4Config, Llama4ImageProcessor, Llama4Processor

    held = tokenizer(("<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>",
                      "<|image|>"))  # fmt: skip
    processor = Llama4Processor(
        Llama4ImageProcessor(size={"height": 16, "width": 16}, max_patches=4),
        held,
        patch_size=4,
        chat_template=template("<|image|>"),
    )
    text = {**_text(held, head_dim=8), "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2, "attention_chunk_size": 32, "no_rope_layer_interval": 2}  # fmt: skip
    vision = {**VISION, "image_size": 16, "vision_output_dim": 24, "projector_input_dim": 24,
              "projector_output_dim": 24, "intermediate_size": 64}  # fmt: skip
    config = Llama4Config(
        text_config=text,
        vision_config=vision,
        image_token_index=held.convert_tokens_to_ids("<|patch|>"),
        boi_token_index=held.convert_tokens_to_ids("<|image_start|>"),
        eoi_token_index=held.convert_tokens_to_ids("<|image_end|>"),
    )
    return _saved(folder, config, "Llama4ForConditionalGeneration", processor)


def qwen3_5_moe(folder: Path) -> Path:
    rope = {**ROPE, "mrope_section": [1, 1, 2], "mrope_interleaved": True, "partial_rotary_factor": 1.0}
    text = {"rope_parameters": rope, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, **EXPERTS, "shared_expert_intermediate_size": 16}  # fmt: skip
    vision = {**GRID_VISION, "num_position_embeddings": 64}
    return _qwen(folder, "Qwen3_5Moe", vision, processor="Qwen3VL", **text)


def ernie(folder: Path) -> Path:
    import transformers
    from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil

    held = tokenizer(
        image_token="<|IMAGE_PLACEHOLDER|>", image_start_token="<|IMAGE_START|>", image_end_token="<|IMAGE_END|>",
        video_token="<|VIDEO_PLACEHOLDER|>", video_start_token="<|VIDEO_START|>", video_end_token="<|VIDEO_END|>",
    )  # fmt: skip
    kind: Any = without_video(transformers.Ernie4_5_VLMoeProcessor)
    kind.save_pretrained = transformers.ProcessorMixin.save_pretrained  # its own copies the font of its part for video
    processor = kind(
        image_processor=Ernie4_5_VLMoeImageProcessorPil(**GRID_SIZES), tokenizer=held, video_processor=None,
        chat_template=template("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"),
    )  # fmt: skip
    text = {**_text(held), "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}, "moe_num_experts": 4, "moe_k": 2,
            "moe_intermediate_size": [16, 16], "mlp_layer_types": ["dense", "sparse"]}  # fmt: skip
    vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "patch_size": 4}
    config = transformers.Ernie4_5_VLMoeConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False,
        **_ids(held, image_token_id="<|IMAGE_PLACEHOLDER|>", image_start_token_id="<|IMAGE_START|>",
               image_end_token_id="<|IMAGE_END|>", video_token_id="<|VIDEO_PLACEHOLDER|>",
               video_start_token_id="<|VIDEO_START|>", video_end_token_id="<|VIDEO_END|>"),
    )  # fmt: skip
    _saved(folder, config, "Ernie4_5_VLMoeForConditionalGeneration", processor)
    _sees_video(folder, "Ernie4_5_VLMoeVideoProcessor", **GRID_SIZES, draw_on_frames=False)
    return folder


def kimi(folder: Path) -> Path:
    from transformers import Kimi_K25Config, Kimi_K25ImageProcessor, Kimi_K25Processor, Kimi_K25VideoProcessor

    held = tokenizer(
        ("<|media_begin|>", "<|media_content|>", "<|media_end|>"),
        image_token="<|media_pad|>",
        video_token="<|kimi_k25_video_placeholder|>",
    )
    sizes = {"patch_size": 4, "size": {"max_height": 32, "max_width": 32}, "max_patches": 64}
    processor = Kimi_K25Processor(
        Kimi_K25ImageProcessor(**sizes), held, Kimi_K25VideoProcessor(**sizes),
        chat_template=template("<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n"),
    )  # fmt: skip
    text = {
        "model_type": "deepseek_v3",
        **_text(held, num_key_value_heads=4),
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "qk_nope_head_dim": 8,
        "first_k_dense_replace": 1,
        "num_mtp_layers": 0,
    }
    vision = {**VISION, "pos_emb_height": 8, "pos_emb_width": 8}
    config = Kimi_K25Config(
        text_config=text,
        vision_config=vision,
        projection_hidden_size=16,
        tie_word_embeddings=False,
        **_ids(held, image_token_id="<|media_pad|>", video_token_id="<|kimi_k25_video_placeholder|>"),
    )
    return _saved(folder, config, "Kimi_K25ForConditionalGeneration", processor)


def minicpmv(folder: Path) -> Path:
    from transformers import MiniCPMV4_6Config, MiniCPMV4_6Processor, MiniCPMV4_6VideoProcessor
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    held = tokenizer(
        image_token="<|image_pad|>", video_token="<|video_pad|>", image_start_token="<image>",
        image_end_token="</image>", slice_start_token="<slice>", slice_end_token="</slice>",
        image_id_start_token="<image_id>", image_id_end_token="</image_id>",
    )  # fmt: skip
    sizes = {"scale_resolution": 32, "patch_size": 4, "max_slice_nums": 4}
    processor = MiniCPMV4_6Processor(
        MiniCPMV4_6ImageProcessorPil(**sizes), MiniCPMV4_6VideoProcessor(**sizes), held,
        chat_template=template("<|image_pad|>", "<|video_pad|>"),
    )  # fmt: skip
    rope = {**ROPE, "mrope_section": [1, 1, 2], "mrope_interleaved": True, "partial_rotary_factor": 1.0}
    text = {**_text(held), "rope_parameters": rope, "head_dim": 8, "model_type": "qwen3_5_text",
            "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}  # fmt: skip
    vision = {**VISION, "image_size": 32, "insert_layer_id": 0}
    config = MiniCPMV4_6Config(
        text_config=text,
        vision_config=vision,
        insert_layer_id=0,
        image_size=32,
        **_ids(held, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    )
    return _saved(folder, config, "MiniCPMV4_6ForConditionalGeneration", processor)


def lighton_ocr(folder: Path) -> Path:
    from transformers import LightOnOcrConfig, LightOnOcrProcessor
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    held = tokenizer(image_token="<|image_pad|>", image_break_token="<|vision_pad|>", image_end_token="<|vision_end|>")
    images = PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})
    processor = LightOnOcrProcessor(
        images, held, patch_size=4, spatial_merge_size=2, chat_template=template("<|image_pad|>")
    )
    config = LightOnOcrConfig(
        text_config={"model_type": "qwen3", **_text(held, head_dim=8)},
        spatial_merge_size=2,
        vision_config={"model_type": "pixtral", **VISION, "image_size": 32, "head_dim": 8},
        **_ids(held, image_token_id="<|image_pad|>"),
    )
    return _saved(folder, config, "LightOnOcrForConditionalGeneration", processor)


def granite_docling(folder: Path) -> Path:
    from transformers import GraniteDoclingConfig, GraniteDoclingProcessor
    from transformers.models.granite_docling.image_processing_pil_granite_docling import GraniteDoclingImageProcessorPil

    rows = tuple(f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5))
    held = tokenizer(("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *rows))
    processor = GraniteDoclingProcessor(
        GraniteDoclingImageProcessorPil(size={"height": 16, "width": 16}, max_patches=3),
        held,
        image_seq_len=4,
        chat_template=template("<image>"),
    )
    config = GraniteDoclingConfig(
        text_config=_text(held),
        vision_config={
            **VISION,
            "image_size": 16,
            "out_hidden_size": 32,
            "scale_factor": 2,
            "deepstack_visual_indexes": [0],
        },
        **_ids(held, image_token_id="<image>"),
        pad_token_id=held.pad_token_id,
    )
    return _saved(folder, config, "GraniteDoclingForConditionalGeneration", processor)


def exaone4_5(folder: Path) -> Path:
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    held = tokenizer(("<|image_pad|>", "<|video_pad|>", "<vision>", "</vision>"))
    processor = without_video(transformers.Exaone4_5_Processor)(
        image_processor=Qwen2VLImageProcessorPil(**GRID_SIZES),
        tokenizer=held,
        video_processor=None,
        chat_template=template("<vision><|image_pad|></vision>"),
    )
    vision = {**GRID_VISION, "window_size": 16, "fullatt_block_indexes": [1], "num_key_value_heads": 1}
    config = transformers.Exaone4_5_Config(
        text_config={"model_type": "exaone4", **_text(held, head_dim=8, sliding_window=16)},
        vision_config=vision,
        tie_word_embeddings=False,
        **_ids(held, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    )
    _saved(folder, config, "Exaone4_5_ForConditionalGeneration", processor)
    _sees_video(folder, "Qwen2VLVideoProcessor", **GRID_SIZES)
    return folder


def gemma3n(folder: Path) -> Path:
    """Here with another tower of timm's than its own, which has 300 million numbers."""
    from transformers import Gemma3nAudioFeatureExtractor, Gemma3nConfig, Gemma3nProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    marks = {f"{end}_token": f"<{place}_of_{kind}>" for end, place, kind in
             (("boi", "start", "image"), ("eoi", "end", "image"), ("boa", "start", "audio"), ("eoa", "end", "audio"))
             }  # fmt: skip
    held = tokenizer(**marks, image_token="<image_soft_token>", audio_token="<audio_soft_token>")
    processor = Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(feature_size=8), SiglipImageProcessorPil(size={"height": 64, "width": 64}), held,
        image_seq_length=4, audio_seq_length=6,
        chat_template=template("<image_soft_token>", audio="<audio_soft_token>"),
    )  # fmt: skip
    text = {**_text(held, head_dim=8), "num_hidden_layers": 4, "sliding_window": 16, "hidden_size_per_layer_input": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": 440,
            "num_kv_shared_layers": 1, "laurel_rank": 4, "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]}  # fmt: skip
    vision = {"architecture": "test_convnext2", "hidden_size": 128, "vocab_size": 4, "vocab_offset": 440}
    audio = {"input_feat_size": 8, "hidden_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1,
             "sscp_conv_channel_size": [8, 4], "vocab_size": 4, "vocab_offset": 444}  # fmt: skip
    config = Gemma3nConfig(
        text_config=text, vision_config=vision, audio_config=audio, vision_soft_tokens_per_image=4,
        audio_soft_tokens_per_image=6, **_ids(held, **{f"{name}_id": token for name, token in marks.items()}),
        **_ids(held, image_token_id="<image_soft_token>", audio_token_id="<audio_soft_token>"),
    )  # fmt: skip
    return _saved(folder, config, "Gemma3nForConditionalGeneration", processor)


def phi4(folder: Path) -> Path:
    """Its towers stand in its language model, and its processor keeps no chat template."""
    import transformers

    held = tokenizer(image_token="<|image|>", audio_token="<|audio|>")
    held.chat_template = template("<|image|>", audio="<|audio|>")
    images = transformers.Phi4MultimodalImageProcessor(size={"height": 32, "width": 32}, patch_size=1, dynamic_hd=1)
    processor = transformers.Phi4MultimodalProcessor(images, transformers.Phi4MultimodalFeatureExtractor(), held)
    vision = {**VISION, "num_hidden_layers": 3, "image_size": 32, "crop_size": 32, "patch_size": 1}
    audio = {"hidden_size": 16, "intermediate_size": 32, "num_blocks": 2, "num_attention_heads": 2,
             "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 8}  # fmt: skip
    config = transformers.Phi4MultimodalConfig(
        **_text(held), vision_config={**vision, **_ids(held, image_token_id="<|image|>")},
        audio_config={**audio, **_ids(held, audio_token_id="<|audio|>")},
    )  # fmt: skip
    return _saved(folder, config, "Phi4MultimodalForCausalLM", processor)


MODELS: dict[str, Callable[[Path], Path]] = {
    "qwen3_vl_moe": qwen3_vl_moe, "qwen3_5_moe": qwen3_5_moe, "glm4v_moe": glm4v_moe, "glm46v": glm46v,
    "glm_ocr": glm_ocr, "aria": aria, "paddleocr_vl": paddleocr_vl, "ernie": ernie, "lighton_ocr": lighton_ocr,
    "granite_docling": granite_docling, "exaone4_5": exaone4_5, "lfm2_vl": lfm2_vl, "cohere2_vision": cohere2_vision,
    "kimi": kimi, "minicpmv": minicpmv, "gemma3n": gemma3n,
    "phi4": phi4,
}  # fmt: skip
