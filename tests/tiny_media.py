"""Tiny models that read pictures and sound, of their real classes with random weights, and the processors that go with
them; and rows to train them on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmtune.media.loading import without_video

WORDS = "hello world what is in the picture red blue circle square how many user assistant system"
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 448, "max_position_embeddings": 2048,
}  # fmt: skip


def tokenizer(special: tuple[str, ...] = (), **named: str) -> Any:
    """A tokenizer that reads all texts; `named` are special tokens that have a name of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made: Any = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokens = ["<pad>", "<|im_start|>", "<|im_end|>", *special, *named.values()]
    made.train_from_iterator(
        [WORDS] * 3,
        trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=tokens
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<|im_end|>", extra_special_tokens=named
    )


def template(image: str = "", video: str = "", audio: str = "", only_parts: bool = False) -> str:
    """A chat template that writes these for a medium; `only_parts`: it reads no content that is one text."""
    parts = (
        "{% for c in m.content %}{% if c.type == 'image' %}" + image + "{% elif c.type == 'video' %}" + video
        + "{% elif c.type == 'audio' %}" + audio + "{% elif c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"
    )  # fmt: skip
    content = parts if only_parts else "{% if m.content is string %}{{ m.content }}{% else %}" + parts + "{% endif %}"
    turn = "{% for m in messages %}<|im_start|>{{ m.role }}\n" + content + "<|im_end|>\n{% endfor %}"
    return turn + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def _ids(found: Any, **names: str) -> dict[str, int]:
    return {key: found.convert_tokens_to_ids(token) for key, token in names.items()}


def _saved(folder: Path, config: Any, model_class: str, processor: Any) -> Path:
    import torch
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).float()
    for parameter in model.parameters():  # some kinds start with zeros, which would hide what is not attended to
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _sees_video(folder: Path, video: str, **options: Any) -> None:
    """Write the part that needs torchvision to a processor that was saved without it."""
    place = folder / "processor_config.json"
    options = {"video_processor_type": video, **options}
    place.write_text(json.dumps({**json.loads(place.read_text()), "video_processor": options}))


def _qwen(
    folder: Path, name: str, vision: Mapping[str, Any], patch: int = 4, processor: str | None = None, **more: Any
) -> Path:
    """A kind of Qwen-VL, with the processor of another one where it has none of its own; `more` is of its text."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    held = tokenizer(("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"))
    sizes = {"patch_size": patch, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 1024}}
    mark = "<|vision_start|>{}<|vision_end|>"
    made = without_video(getattr(transformers, f"{processor or name}Processor"))(
        image_processor=Qwen2VLImageProcessorPil(**sizes), tokenizer=held, video_processor=None,
        chat_template=template(mark.format("<|image_pad|>"), mark.format("<|video_pad|>")),
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {**TEXT, "rope_parameters": rope, "bos_token_id": None, "eos_token_id": held.eos_token_id,
            "pad_token_id": held.pad_token_id, **more}  # fmt: skip
    marks = _ids(
        held, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>",
    )  # fmt: skip
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config={**vision, "patch_size": patch}, tie_word_embeddings=False, **marks
    )
    _saved(folder, config, f"{name}ForConditionalGeneration", made)
    _sees_video(folder, "Qwen3VLVideoProcessor" if name.startswith("Qwen3VL") else "Qwen2VLVideoProcessor", **sizes)
    return folder


def qwen2_vl(folder: Path) -> Path:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return _qwen(folder, "Qwen2VL", vision)


def qwen2_5_vl(folder: Path) -> Path:
    vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
              "window_size": 16, "fullatt_block_indexes": [1]}  # fmt: skip
    return _qwen(folder, "Qwen2_5_VL", vision)


def qwen3_vl(folder: Path) -> Path:
    vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
              "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}  # fmt: skip
    return _qwen(folder, "Qwen3VL", vision)


def _clip(size: int = 16) -> dict[str, Any]:
    return {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": size, "patch_size": 4, "projection_dim": 16}  # fmt: skip


def _text(held: Any, **more: Any) -> dict[str, Any]:
    ends = {"bos_token_id": None, "eos_token_id": held.eos_token_id, "pad_token_id": held.pad_token_id}
    return {**TEXT, **ends, **more}


def llava(folder: Path) -> Path:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    held = tokenizer(("<image>",))
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        image_processor=images, tokenizer=held, patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template("<image>\n", only_parts=True),
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_clip()), text_config=LlamaConfig(**_text(held)),
        image_token_id=held.convert_tokens_to_ids("<image>"), vision_feature_select_strategy="default",
    )  # fmt: skip
    return _saved(folder, config, "LlavaForConditionalGeneration", processor)


def llava_next(folder: Path) -> Path:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    held, pinpoints = tokenizer(("<image>",)), [[16, 32], [32, 16], [32, 32]]
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=pinpoints
    )
    processor = LlavaNextProcessor(
        image_processor=images, tokenizer=held, patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template("<image>\n"),
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_clip()), text_config=LlamaConfig(**_text(held)),
        image_token_id=held.convert_tokens_to_ids("<image>"), vision_feature_select_strategy="default",
        image_grid_pinpoints=pinpoints,
    )  # fmt: skip
    return _saved(folder, config, "LlavaNextForConditionalGeneration", processor)


def gemma3(folder: Path) -> Path:
    from transformers import Gemma3Config, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    held = tokenizer(boi_token="<start_of_image>", image_token="<image_soft_token>", eoi_token="<end_of_image>")
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16}, do_pan_and_scan=False)
    processor = Gemma3Processor(
        image_processor=images, tokenizer=held, image_seq_length=4, chat_template=template("<start_of_image>")
    )
    text = _text(held, head_dim=8, sliding_window=16, query_pre_attn_scalar=8)
    vision = {**_clip(), "vision_use_head": False}
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4,
        **_ids(held, boi_token_index="<start_of_image>", eoi_token_index="<end_of_image>",
               image_token_id="<image_soft_token>"),
    )  # fmt: skip
    return _saved(folder, config, "Gemma3ForConditionalGeneration", processor)


def idefics3(folder: Path) -> Path:
    from transformers import Idefics3Config, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    rows = tuple(f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5))
    held = tokenizer(("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *rows))
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = Idefics3Processor(
        image_processor=images, tokenizer=held, image_seq_len=4, chat_template=template("<image>")
    )
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 4}  # fmt: skip
    config = Idefics3Config(
        text_config={"model_type": "llama", **_text(held)}, vision_config=vision, scale_factor=2,
        image_token_id=held.convert_tokens_to_ids("<image>"), pad_token_id=held.pad_token_id,
    )  # fmt: skip
    return _saved(folder, config, "Idefics3ForConditionalGeneration", processor)


def smolvlm(folder: Path) -> Path:
    from transformers import SmolVLMConfig, SmolVLMProcessor
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    rows = tuple(f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5))
    held = tokenizer(("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<video>", *rows))
    sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    processor = without_video(SmolVLMProcessor)(
        image_processor=SmolVLMImageProcessorPil(**sizes), tokenizer=held, video_processor=None,
        image_seq_len=4, chat_template=template("<image>", "<video>"),
    )  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 4}  # fmt: skip
    config = SmolVLMConfig(
        text_config={"model_type": "llama", **_text(held)}, vision_config=vision, scale_factor=2,
        image_token_id=held.convert_tokens_to_ids("<image>"), pad_token_id=held.pad_token_id,
    )  # fmt: skip
    _saved(folder, config, "SmolVLMForConditionalGeneration", processor)
    sampled = {"max_frames": 4, "fps": 1, "skip_secs": 0}
    _sees_video(folder, "SmolVLMVideoProcessor", **sizes, video_sampling={**sampled, "video_size": sizes["size"]})
    return folder


def internvl(folder: Path) -> Path:
    from transformers import InternVLConfig, InternVLProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    held = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )  # fmt: skip
    sizes = {"size": {"height": 16, "width": 16}}
    processor = without_video(InternVLProcessor)(
        image_processor=GotOcr2ImageProcessorPil(**sizes, crop_to_patches=True, max_patches=3), tokenizer=held,
        video_processor=None, image_seq_length=4, chat_template=template("<IMG_CONTEXT>\n", "<video>\n"),
    )  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 4}  # fmt: skip
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **_text(held)}, vision_config=vision, image_seq_length=4,
        image_token_id=held.convert_tokens_to_ids("<IMG_CONTEXT>"), tie_word_embeddings=False,
    )  # fmt: skip
    _saved(folder, config, "InternVLForConditionalGeneration", processor)
    _sees_video(folder, "InternVLVideoProcessor", **sizes)
    return folder


def mllama(folder: Path) -> Path:
    from transformers import MllamaConfig, MllamaProcessor
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    held = tokenizer(("<|python_tag|>", "<|begin|>"), image_token="<|image|>")
    held.bos_token = "<|begin|>"
    images = MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=2)
    turns = template("<|image|>")
    processor = MllamaProcessor(image_processor=images, tokenizer=held, chat_template="<|begin|>" + turns)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1,
              "attention_heads": 2, "vision_output_dim": 32, "image_size": 16, "patch_size": 4, "max_num_tiles": 2,
              "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = _text(held, num_hidden_layers=3, cross_attention_layers=[1], rope_parameters=rope)
    marks = _ids(held, image_token_index="<|image|>")
    config = MllamaConfig(vision_config=vision, text_config={**text, "bos_token_id": held.bos_token_id}, **marks)
    return _saved(folder, config, "MllamaForConditionalGeneration", processor)


def pixtral(folder: Path) -> Path:
    """What Mistral calls Pixtral: LLaVA with a tower of its own, which takes pictures of any size."""
    from transformers import LlavaConfig, PixtralProcessor, PixtralVisionConfig
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    held = tokenizer(("[IMG]", "[IMG_BREAK]", "[IMG_END]"))
    images = PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})
    processor = PixtralProcessor(image_processor=images, tokenizer=held, patch_size=8, chat_template=template("[IMG]"))
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(**vision), text_config={"model_type": "mistral", **_text(held, head_dim=8)},
        image_token_id=held.convert_tokens_to_ids("[IMG]"), vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )  # fmt: skip
    return _saved(folder, config, "LlavaForConditionalGeneration", processor)


def gemma4_tokenizer() -> Any:
    """With the tokens around pictures and sounds that Gemma 4 has."""
    return tokenizer(
        ("<|video|>",), boi_token="<|image>", image_token="<|image|>", eoi_token="<image|>", boa_token="<|audio>",
        audio_token="<|audio|>", eoa_token="<audio|>",
    )  # fmt: skip


def gemma4(folder: Path) -> Path:
    """The kind with a tower of sound, too, and embeddings for each layer."""
    from transformers import Gemma4AudioFeatureExtractor, Gemma4Config, Gemma4Processor
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    held = gemma4_tokenizer()
    images = Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2)
    processor = without_video(Gemma4Processor)(
        feature_extractor=Gemma4AudioFeatureExtractor(feature_size=8), image_processor=images, tokenizer=held,
        video_processor=None, image_seq_length=70, chat_template=template("<|image|>", "<|video|>", "<|audio|>"),
    )  # fmt: skip
    text = {**_text(held), "head_dim": 8, "global_head_dim": 16, "sliding_window": 16,
            "vocab_size_per_layer_input": 448, "hidden_size_per_layer_input": 4,
            "layer_types": ["sliding_attention", "full_attention"], "use_bidirectional_attention": "vision",
            }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2,
              "position_embedding_size": 128}  # fmt: skip
    audio = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 24,
             "subsampling_conv_channels": [8, 4]}  # fmt: skip
    config = Gemma4Config(
        text_config=text, vision_config=vision, audio_config=audio,
        **_ids(held, boi_token_id="<|image>", eoi_token_id="<image|>", image_token_id="<|image|>",
               video_token_id="<|video|>", boa_token_id="<|audio>", eoa_token_index="<audio|>",
               audio_token_id="<|audio|>"),
    )  # fmt: skip
    _saved(folder, config, "Gemma4ForConditionalGeneration", processor)
    _sees_video(folder, "Gemma4VideoProcessor", patch_size=4, pooling_kernel_size=2)
    return folder


MODELS: dict[str, Callable[[Path], Path]] = {
    "qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl, "llava": llava, "llava_next": llava_next,
    "gemma3": gemma3, "idefics3": idefics3, "smolvlm": smolvlm, "internvl": internvl, "mllama": mllama,
    "pixtral": pixtral, "gemma4": gemma4,
}  # fmt: skip


def draw(path: Path, color: str, shape: str, size: tuple[int, int]) -> Path:
    """A picture of a coloured shape."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "circle" else pen.rectangle)((4, 4, 16, 16), fill=color)
    image.save(path)
    return path


def rows(folder: Path, count: int = 8) -> Path:
    """Rows of pictures of several sizes with questions, some of two pictures, some of text alone."""
    found: list[dict[str, Any]] = []
    for at in range(count):
        color, shape = ("red", "blue")[at % 2], ("circle", "square")[at % 3 == 0]
        draw(folder / f"{at}.png", color, shape, (24 + 8 * (at % 3), 20 + 4 * (at % 4)))
        messages = [
            {"role": "user", "content": "<image>what is in the picture"},
            {"role": "assistant", "content": f"{color} {shape}"},
        ]
        images = [f"{at}.png"]
        if at % 4 == 3:
            messages, images = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}], []
        elif at % 3 == 0:
            messages += [{"role": "user", "content": "and <image> here"}, {"role": "assistant", "content": "blue"}]
            images *= 2
        found.append({"messages": messages, **({"images": images} if images else {})})
    place = folder / "rows.json"
    place.write_text(json.dumps(found))
    return place
