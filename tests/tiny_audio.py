"""Tiny models that hear, of their real classes with random weights, and the processors that go with them; and rows of
sounds to train them on."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llmtune.media.loading import without_video
from tests.tiny_media import _ids, _saved, _sees_video, _text, gemma4, template, tokenizer

RATE = 16000
"""Samples a second of all sounds."""
TOWER = {"num_mel_bins": 8, "max_source_positions": 100}


def ears() -> Any:
    """Whisper's features of at most two seconds of sound, with eight bands."""
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=8, chunk_length=2, sampling_rate=RATE)


def qwen2_audio(folder: Path) -> Path:
    from transformers import Qwen2AudioConfig, Qwen2AudioProcessor

    held = tokenizer(("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"))
    mark = "Audio: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    processor = Qwen2AudioProcessor(ears(), held, chat_template=template(audio=mark))
    tower = {**TOWER, "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    config = Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", **tower},
        text_config={"model_type": "qwen2", **_text(held)}, audio_token_index=held.convert_tokens_to_ids("<|AUDIO|>"),
    )  # fmt: skip
    return _saved(folder, config, "Qwen2AudioForConditionalGeneration", processor)


def audio_flamingo(folder: Path) -> Path:
    from transformers import AudioFlamingo3Config, AudioFlamingo3Processor

    held = tokenizer(("<sound>",))
    processor = AudioFlamingo3Processor(ears(), held, chat_template=template(audio="<sound>"))
    tower = {**TOWER, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = AudioFlamingo3Config(
        audio_config={"model_type": "audioflamingo3_encoder", **tower},
        text_config={"model_type": "qwen2", **_text(held)}, **_ids(held, audio_token_id="<sound>"),
    )  # fmt: skip
    return _saved(folder, config, "AudioFlamingo3ForConditionalGeneration", processor)


def _omni_sizes(patch: int) -> dict[str, Any]:
    """Of pictures; of video the processors of Qwen-Omni have sizes of their own, which make 32 tokens of two pictures
    with patches of 28, and 1,600 with those of 4."""
    return {"patch_size": patch, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 1024}}


def _reads_all(kind: Any, patch: int) -> tuple[Any, Any]:
    """The tokenizer and the processor, of this class, of a Qwen-Omni."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    marks = {f"{kind}_token": f"<|{kind.upper()}|>" for kind in ("image", "audio", "video")}
    ends = {f"{kind}_{end}_token": f"<|{kind}_{end}|>" for kind in ("vision", "audio") for end in ("bos", "eos")}
    held = tokenizer(**marks, **ends)
    return held, without_video(kind)(
        image_processor=Qwen2VLImageProcessorPil(**_omni_sizes(patch)), feature_extractor=ears(), tokenizer=held,
        chat_template=template(
            *(f"<|{kind}_bos|><|{what}|><|{kind}_eos|>" for kind, what in
              (("vision", "IMAGE"), ("vision", "VIDEO"), ("audio", "AUDIO")))
        ),
    )  # fmt: skip


def omni(folder: Path, patch: int = 4) -> Path:
    """The whole of Qwen2.5-Omni: the thinker, which reads and answers, and what speaks."""
    from transformers import Qwen2_5OmniConfig, Qwen2_5OmniProcessor

    held, processor = _reads_all(Qwen2_5OmniProcessor, patch)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    audio = {**TOWER, "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
             "n_window": 20, "output_dim": 32}  # fmt: skip
    vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
              "window_size": 4 * patch, "fullatt_block_indexes": [1], "patch_size": patch}  # fmt: skip
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2_5OmniConfig(
        thinker_config={
            "text_config": {**_text(held), "rope_parameters": rope}, "audio_config": audio, "vision_config": vision,
            **_ids(held, audio_token_index="<|AUDIO|>", image_token_index="<|IMAGE|>", video_token_index="<|VIDEO|>",
                   audio_start_token_id="<|audio_bos|>", audio_end_token_id="<|audio_eos|>",
                   vision_start_token_id="<|vision_bos|>", vision_end_token_id="<|vision_eos|>"),
        },
        talker_config={**small, "num_key_value_heads": 1, "vocab_size": 64, "head_dim": 8, "embedding_size": 32,
                       "rope_parameters": rope},
        token2wav_config={
            "dit_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
                           "emb_dim": 16, "num_embeds": 65, "enc_emb_dim": 8, "enc_dim": 8,
                           "enc_channels": [8, 8, 8, 8, 24], "enc_attention_channels": 8, "enc_res2net_scale": 2,
                           "enc_se_channels": 8, "look_ahead_layers": [0], "look_backward_layers": [0]},
            "bigvgan_config": {"upsample_initial_channel": 64},
        },
    )  # fmt: skip
    _saved(folder, config, "Qwen2_5OmniForConditionalGeneration", processor)
    _sees_video(folder, "Qwen2VLVideoProcessor", **_omni_sizes(patch))
    return folder


def omni3(folder: Path, patch: int = 4) -> Path:
    """The thinker of Qwen3-Omni, which is a mixture of experts."""
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeProcessor

    held, processor = _reads_all(Qwen3OmniMoeProcessor, patch)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    audio = {**TOWER, "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
             "output_dim": 32, "downsample_hidden_size": 8}  # fmt: skip
    vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
              "num_position_embeddings": 64, "deepstack_visual_indexes": [0], "patch_size": patch}  # fmt: skip
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
    config = Qwen3OmniMoeConfig(
        thinker_config={
            "text_config": {**_text(held), "rope_parameters": rope, **experts}, "audio_config": audio,
            "vision_config": vision,
            **_ids(held, audio_token_id="<|AUDIO|>", image_token_id="<|IMAGE|>", video_token_id="<|VIDEO|>",
                   audio_start_token_id="<|audio_bos|>", vision_start_token_id="<|vision_bos|>"),
        },
        talker_config={
            "text_config": {**small, **experts, "vocab_size": 64, "rope_parameters": rope,
                            "shared_expert_intermediate_size": 16},
            "code_predictor_config": {**small, "vocab_size": 64}, "thinker_hidden_size": 32, "accept_hidden_layer": 1,
            "spatial_merge_size": 2,
        },
        code2wav_config={**small, "codebook_size": 16, "num_quantizers": 2, "decoder_dim": 16, "upsample_rates": [2, 2],
                         "upsampling_ratios": [2]},
    )  # fmt: skip
    _saved(folder, config, "Qwen3OmniMoeForConditionalGeneration", processor)
    _sees_video(folder, "Qwen2VLVideoProcessor", **_omni_sizes(patch))
    return folder


def glm_asr(folder: Path) -> Path:
    from transformers import GlmAsrConfig, GlmAsrProcessor

    held = tokenizer(("<|pad|>", "<|begin_of_audio|>", "<|end_of_audio|>"))
    processor = GlmAsrProcessor(ears(), held, chat_template=template(audio="<|begin_of_audio|><|pad|><|end_of_audio|>"))
    tower = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_mel_bins": 8,
    }
    config = GlmAsrConfig(
        audio_config=tower, text_config={"model_type": "llama", **_text(held)}, **_ids(held, audio_token_id="<|pad|>")
    )
    return _saved(folder, config, "GlmAsrForConditionalGeneration", processor)


def qwen3_asr(folder: Path) -> Path:
    from transformers import Qwen3ASRConfig, Qwen3ASRFeatureExtractor, Qwen3ASRProcessor

    held = tokenizer(
        ("<asr_text>",),
        audio_token="<|audio_pad|>",
        audio_bos_token="<|audio_start|>",
        audio_eos_token="<|audio_end|>",
        timestamp_token="<timestamp>",
    )
    processor = Qwen3ASRProcessor(
        Qwen3ASRFeatureExtractor(feature_size=8, chunk_length=2),
        held,
        chat_template=template(audio="<|audio_start|><|audio_pad|><|audio_end|>"),
    )
    tower = {
        "num_mel_bins": 8,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "d_model": 16,
        "output_dim": 32,
        "downsample_hidden_size": 8,
        "n_window": 50,
        "n_window_infer": 100,
        "max_source_positions": 100,
    }
    config = Qwen3ASRConfig(
        audio_config=tower,
        text_config={"model_type": "qwen3", **_text(held, head_dim=8)},
        **_ids(held, audio_token_id="<|audio_pad|>"),
    )
    return _saved(folder, config, "Qwen3ASRForConditionalGeneration", processor)


MODELS: dict[str, Callable[[Path], Path]] = {
    "qwen2_audio": qwen2_audio, "audio_flamingo": audio_flamingo, "omni": omni, "omni3": omni3, "gemma4": gemma4,
    "glm_asr": glm_asr, "qwen3_asr": qwen3_asr,
}  # fmt: skip


def tone(path: Path, hertz: float, seconds: float) -> Path:
    """A sound of one pitch."""
    wanted = 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(RATE * seconds)) / RATE)
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1), sound.setsampwidth(2), sound.setframerate(RATE)
        sound.writeframes((wanted * 32767).astype("<i2").tobytes())
    return path


def heard(path: Path) -> np.ndarray:
    """(samples,) float32 of such a file."""
    with wave.open(str(path)) as sound:
        return np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(np.float32) / 32768


def rows(folder: Path, count: int = 6) -> Path:
    """Rows of sounds of several lengths with questions, each third of text alone."""
    found: list[dict[str, Any]] = []
    for at in range(count):
        tone(folder / f"{at}.wav", (220, 880)[at % 2], 0.3 + 0.25 * at)
        messages = [
            {"role": "user", "content": "<audio>what is in the picture"},
            {"role": "assistant", "content": ("red", "blue")[at % 2]},
        ]
        if at % 3 == 2:
            messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
        found.append({"messages": messages, **({"audios": [f"{at}.wav"]} if at % 3 != 2 else {})})
    place = folder / "rows.json"
    place.write_text(json.dumps(found))
    return place
