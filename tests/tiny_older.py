"""Still more tiny models that read pictures, of their real classes with random weights, and their processors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtune.media.loading import without_video
from tests.tiny_families import SIGLIP, pixtral_processor
from tests.tiny_media import _clip, _ids, _saved, _sees_video, _text, gemma4_tokenizer, template, tokenizer
from tests.tiny_newer import VISION


def perception_lm(folder: Path) -> Path:
    from transformers import (
        PerceptionLMConfig,
        PerceptionLMImageProcessor,
        PerceptionLMProcessor,
        PerceptionLMVideoProcessor,
    )

    held = tokenizer(image_token="<|image|>", video_token="<|video|>")
    processor = PerceptionLMProcessor(
        PerceptionLMVideoProcessor(size={"height": 16, "width": 16}),
        PerceptionLMImageProcessor(tile_size=16, max_num_tiles=2),
        held,
        patch_size=4,
        chat_template=template("<|image|>", "<|video|>"),
        pooling_ratio=2,
    )
    config = PerceptionLMConfig(
        vision_config={
            "architecture": "vit_pe_core_base_patch16_224",
            "do_pooling": False,
            "model_args": {
                "embed_dim": 32,
                "depth": 2,
                "num_heads": 2,
                "img_size": 16,
                "patch_size": 4,
                "ref_feat_shape": [4, 4],
                "global_pool": "",
                "use_post_transformer_norm": False,
                "init_values": 0.1,
            },
        },
        text_config={"model_type": "llama", **_text(held)},
        projector_pooling_ratio=2,
        vision_use_cls_token=True,
        **_ids(held, image_token_id="<|image|>", video_token_id="<|video|>"),
    )
    return _saved(folder, config, "PerceptionLMForConditionalGeneration", processor)


def _llava_processor(side: int, patch: int, selected: str, additional: int) -> Any:
    """LLaVA's, of square pictures, whose tower gives so many `additional` tokens besides those of patches."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer(("<image>",)), patch_size=patch,
        vision_feature_select_strategy=selected, num_additional_image_tokens=additional,
        chat_template=template("<image>\n"),
    )  # fmt: skip


def fast_vlm(folder: Path) -> Path:
    """Here with a tower that normalises over a batch, as its own does."""
    from transformers import FastVlmConfig

    processor = _llava_processor(64, 32, "full", 0)
    held = processor.tokenizer
    config = FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "test_resnet",
            "do_pooling": False,
            "model_args": {},
        },
        text_config={"model_type": "qwen2", **_text(held)},
        image_token_index=held.convert_tokens_to_ids("<image>"),
    )
    config.vision_config.hidden_size = 96
    return _saved(folder, config, "FastVlmForConditionalGeneration", processor)


def vipllava(folder: Path) -> Path:
    from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig

    processor = _llava_processor(16, 4, "default", 1)
    held = processor.tokenizer
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(**_clip()),
        text_config=LlamaConfig(**_text(held)),
        vision_feature_layer=[-1, -2],
        image_token_index=held.convert_tokens_to_ids("<image>"),
    )
    return _saved(folder, config, "VipLlavaForConditionalGeneration", processor)


def llava_next_video(folder: Path) -> Path:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig, LlavaNextVideoProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    held, pinpoints = tokenizer(("<image>", "<video>")), [[16, 32], [32, 16], [32, 32]]
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=pinpoints
    )
    processor = without_video(LlavaNextVideoProcessor)(
        image_processor=images,
        video_processor=None,
        tokenizer=held,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\n", "<video>\n"),
    )
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**_clip()),
        text_config=LlamaConfig(**_text(held)),
        image_token_index=held.convert_tokens_to_ids("<image>"),
        video_token_index=held.convert_tokens_to_ids("<video>"),
        vision_feature_select_strategy="default",
        image_grid_pinpoints=pinpoints,
    )
    _saved(folder, config, "LlavaNextVideoForConditionalGeneration", processor)
    _sees_video(
        folder, "LlavaNextVideoVideoProcessor", size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    return folder


def video_llava(folder: Path) -> Path:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        VideoLlavaConfig,
        VideoLlavaImageProcessor,
        VideoLlavaProcessor,
        VideoLlavaVideoProcessor,
    )

    held = tokenizer(("<image>", "<video>"))
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = VideoLlavaProcessor(
        VideoLlavaImageProcessor(**sizes),
        VideoLlavaVideoProcessor(**sizes),
        held,
        patch_size=4,
        chat_template=template("<image>\n", "<video>\n"),
    )
    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**_clip()),
        text_config=LlamaConfig(**_text(held)),
        image_token_index=held.convert_tokens_to_ids("<image>"),
        video_token_index=held.convert_tokens_to_ids("<video>"),
    )
    return _saved(folder, config, "VideoLlavaForConditionalGeneration", processor)


def janus(folder: Path) -> Path:
    from transformers import JanusConfig, JanusProcessor
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    held = tokenizer(boi_token="<begin_of_image>", image_token="<image_placeholder>", eoi_token="<end_of_image>")
    processor = JanusProcessor(
        JanusImageProcessorPil(size={"height": 16, "width": 16}, min_size=4),
        held,
        num_image_tokens=16,
        chat_template=template("<image_placeholder>"),
    )
    config = JanusConfig(
        vision_config={**VISION, "image_size": 16, "projection_dim": 32, "num_image_tokens": 16, "mlp_ratio": 2},
        text_config={"model_type": "llama", **_text(held)},
        vq_config={
            "embed_dim": 4,
            "num_embeddings": 16,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": 8,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
        **_ids(held, image_token_id="<image_placeholder>"),
    )
    return _saved(folder, config, "JanusForConditionalGeneration", processor)


def deepseek_vl_hybrid(folder: Path) -> Path:
    from transformers import DeepseekVLHybridConfig, DeepseekVLHybridProcessor
    from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
        DeepseekVLHybridImageProcessorPil,
    )

    held = tokenizer(image_token="<image_placeholder>")
    images = DeepseekVLHybridImageProcessorPil(
        size={"height": 16, "width": 16}, min_size=4, high_res_size={"height": 64, "width": 64}
    )
    processor = DeepseekVLHybridProcessor(
        images, held, num_image_tokens=16, chat_template=template("<image_placeholder>")
    )
    config = DeepseekVLHybridConfig(
        vision_config=SIGLIP,
        text_config={"model_type": "llama", **_text(held)},
        tie_word_embeddings=False,
        high_res_vision_config={
            "model_type": "sam_vision_model",
            "hidden_size": 16,
            "output_channels": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mlp_dim": 32,
            "image_size": 64,
            "patch_size": 4,
            "window_size": 2,
            "global_attn_indexes": [1],
        },
        **_ids(held, image_token_id="<image_placeholder>"),
    )
    return _saved(folder, config, "DeepseekVLHybridForConditionalGeneration", processor)


def hunyuan_vl(folder: Path) -> Path:
    from transformers import HunYuanVLConfig, HunYuanVLProcessor
    from transformers.models.hunyuan_vl.image_processing_pil_hunyuan_vl import HunYuanVLImageProcessorPil

    held = tokenizer(("<newline>",), image_token="<image>", image_start_token="<im>", image_end_token="</im>")
    processor = HunYuanVLProcessor(
        HunYuanVLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024}),
        held,
        chat_template=template("<im><image></im>"),
    )
    text = {
        **_text(held),
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "xdrope",
            "rope_theta": 10000.0,
            "xdrope_section": [1, 1, 1, 1],
            "mrope_section": [1, 1, 1, 1],
            "alpha": 1000.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    }
    vision = {**VISION, "out_hidden_size": 32, "text_hidden_size": 32, "max_image_size": 64, "min_image_size": 8,
              "img_max_token_num": 256}  # fmt: skip
    config = HunYuanVLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        **_ids(
            held,
            image_token_id="<image>",
            im_start_id="<im>",
            im_end_id="</im>",
            im_newline_id="<newline>",
            image_start_token_id="<im>",
            image_end_token_id="</im>",
        ),
    )
    return _saved(folder, config, "HunYuanVLForConditionalGeneration", processor)


def mistral_large4(folder: Path) -> Path:
    from transformers import MistralLarge4Config

    processor = pixtral_processor()
    held = processor.tokenizer
    text = {**_text(held, num_key_value_heads=4), "moe_intermediate_size": 16, "n_routed_experts": 4,
            "kv_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8,
            "num_experts_per_tok": 2, "index_topk": 512, "index_head_dim": 16, "index_n_heads": 2,
            "head_dim": 8}  # fmt: skip
    config = MistralLarge4Config(
        vision_config={"model_type": "pixtral", **VISION, "image_size": 32},
        text_config=text,
        spatial_merge_size=2,
        image_token_index=held.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
    )
    return _saved(folder, config, "MistralLarge4ForConditionalGeneration", processor)


def deepseek_ocr2(folder: Path) -> Path:
    from transformers import DeepseekOcr2Config, DeepseekOcr2Processor
    from transformers.models.deepseek_ocr2.image_processing_pil_deepseek_ocr2 import DeepseekOcr2ImageProcessorPil

    held = tokenizer(image_token="<image>")
    images = DeepseekOcr2ImageProcessorPil(size={"height": 96, "width": 96}, tile_size=96, max_patches=2)
    processor = DeepseekOcr2Processor(
        images, held, chat_template=template("<image>\n"), patch_size=2, downsample_ratio=4
    )
    sam = {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 32,
           "image_size": 96, "patch_size": 2, "window_size": 4, "global_attn_indexes": [],
           "downsample_channels": [16, 32]}  # fmt: skip
    encoder = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2}  # fmt: skip
    text = {**_text(held), "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
            "moe_intermediate_size": 16, "mlp_layer_types": ["dense", "sparse"], "topk_group": 1,
            "n_group": 1}  # fmt: skip
    config = DeepseekOcr2Config(
        text_config=text,
        vision_config={"sam_config": sam, "encoder_config": encoder},
        **_ids(held, image_token_id="<image>"),
    )
    return _saved(folder, config, "DeepseekOcr2ForConditionalGeneration", processor)


def gemma4_unified(folder: Path) -> Path:
    from transformers import (
        Gemma4UnifiedAudioFeatureExtractor,
        Gemma4UnifiedConfig,
        Gemma4UnifiedImageProcessor,
        Gemma4UnifiedProcessor,
    )

    held = gemma4_tokenizer()
    images = Gemma4UnifiedImageProcessor(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2)
    processor = without_video(Gemma4UnifiedProcessor)(
        feature_extractor=Gemma4UnifiedAudioFeatureExtractor(), image_processor=images, tokenizer=held,
        video_processor=None, image_seq_length=70, chat_template=template("<|image|>", "<|video|>", "<|audio|>"),
    )  # fmt: skip
    text = {**_text(held), "head_dim": 8, "global_head_dim": 16, "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "use_bidirectional_attention": "vision"}  # fmt: skip
    config = Gemma4UnifiedConfig(
        text_config=text,
        vision_config={
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 24,
            "mm_posemb_size": 64,
            "output_proj_dims": 24,
        },
        audio_config={},
        **_ids(
            held,
            boi_token_id="<|image>",
            eoi_token_id="<image|>",
            image_token_id="<|image|>",
            video_token_id="<|video|>",
            boa_token_id="<|audio>",
            eoa_token_index="<audio|>",
            audio_token_id="<|audio|>",
        ),
    )
    _saved(folder, config, "Gemma4UnifiedForConditionalGeneration", processor)
    _sees_video(folder, "Gemma4UnifiedVideoProcessor", patch_size=4, pooling_kernel_size=2)
    return folder


def chameleon(folder: Path) -> Path:
    """Its pictures become tokens of the vocabulary."""
    from transformers import ChameleonConfig, ChameleonProcessor
    from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

    names = (str(number).translate({ord(str(digit)): chr(65 + digit) for digit in range(10)}) for number in range(16))
    held = tokenizer(
        tuple(f"IMGIMG{name}Z" for name in names), image_token="<image>", boi_token="<racm3:break>", eoi_token="<eoss>"
    )
    held.sep_token, held.chat_template = "<|im_end|>", template("<image>")
    images = ChameleonImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    codes = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "resolution": 16, "base_channels": 32,
             "channel_multiplier": [1, 1, 1], "num_res_blocks": 1}  # fmt: skip
    config = ChameleonConfig(
        **_text(held) | {"num_key_value_heads": 4}, vocabulary_map=held.get_vocab(), vq_config=codes
    )
    return _saved(
        folder, config, "ChameleonForConditionalGeneration", ChameleonProcessor(images, held, image_seq_length=16)
    )


MODELS: dict[str, Callable[[Path], Path]] = {
    "vipllava": vipllava, "llava_next_video": llava_next_video, "janus": janus,
    "deepseek_vl_hybrid": deepseek_vl_hybrid, "hunyuan_vl": hunyuan_vl, "mistral_large4": mistral_large4,
    "video_llava": video_llava, "perception_lm": perception_lm, "fast_vlm": fast_vlm, "deepseek_ocr2": deepseek_ocr2,
    "gemma4_unified": gemma4_unified, "chameleon": chameleon,
}  # fmt: skip
