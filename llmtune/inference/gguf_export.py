"""A merged model as one GGUF file, which llama.cpp, ollama and their like read; it is opened again and compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    LlamaFileType,
    dequantize,
    get_tensor_name_map,
    quantize,
)
from transformers import AutoConfig

from llmtune.contract.errors import PlanError, listed
from llmtune.inference.gguf_vocabulary import check_vocabulary, write_vocabulary
from llmtune.model.skeleton import config_value
from llmtune.training.save import untied

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3", "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}  # fmt: skip
"""transformers' kinds of models, and what a GGUF file calls them: those that transformers reads from one, too."""
TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
BLOCK = 32
"""Values that share a scale in q8_0 and q4_0."""
_NOT_OF_THE_MODEL = (
    "_name_or_path", "architectures", "dtype", "transformers_version", "model_type", "bos_token_id", "eos_token_id",
    "pad_token_id", "use_cache", "initializer_range", "tie_word_embeddings", "max_position_embeddings",
    "original_max_position_embeddings", "max_window_layers", "id2label", "label2id", "_attn_implementation_internal",
    "pretraining_tp", "embd_pdrop", "resid_pdrop", "cache_implementation",
)  # fmt: skip
"""Values of a config that no answer depends on, or that are read from elsewhere in the file."""


def architecture_of(config: Any) -> str:
    """What a GGUF file calls the kind of model. Raises PlanError where the file could not hold it."""
    kind, rope = config.model_type, _rope(config)
    if kind not in ARCHITECTURES:
        raise PlanError(
            f'export_format: gguf is written for {listed(ARCHITECTURES)}, and this model is "{kind}", whose names and '
            "layouts are not known; export safetensors and use the converter of llama.cpp"
        )
    scaled = rope.get("rope_type", "default")
    if scaled != "default" and not (ARCHITECTURES[kind] == "llama" and scaled in ("llama3", "linear")):
        raise PlanError(
            f'export_format: the model stretches its positions in the way "{scaled}", which gguf is not written for '
            f"(of {kind}); export safetensors and use the converter of llama.cpp"
        )
    return ARCHITECTURES[kind]


def write_gguf(
    model: Any, tokenizer: Any, file: Path, kind: str, turn_ends: Sequence[int], about: Mapping[str, str]
) -> None:
    """Write weights as `kind`, tokenizer and chat template; tensors pass through memory one at a time.

    `turn_ends` are the tokens that end a turn of the chat, `about` holds a name and perhaps a license. Raises PlanError
    where the file, read again, is not the model.
    """
    config, names = model.config, tensor_names(model)
    writer = GGUFWriter(file, architecture_of(config))
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_name(about["name"])
    if about.get("license"):
        writer.add_license(about["license"])
    _write_config(writer, config)
    write_vocabulary(writer, tokenizer, config.vocab_size, turn_ends)
    tensors: dict[str, Tensor] = untied(model, model.state_dict())
    if (factors := _rope_factors(model)) is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for name, tensor in tensors.items():
        stored = stored_as(names[name], tensor, kind)
        packed = quantize(np.zeros((1, tensor.shape[-1]), np.float32), stored)
        shape = (*tensor.shape[:-1], packed.shape[-1])
        size = math.prod(shape) * packed.itemsize
        writer.add_tensor_info(names[name], shape, packed.dtype, size, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name, tensor in tensors.items():
        values = laid_out(names[name], tensor.detach().float().cpu().numpy(), config)
        writer.write_tensor_data(quantize(np.ascontiguousarray(values), stored_as(names[name], tensor, kind)))
    writer.close()
    check(file, model, tokenizer)


def tensor_names(model: Any) -> dict[str, str]:
    """The name in the file of each tensor of the model. Raises PlanError where one has none."""
    config, found = model.config, {}
    (architecture,) = (key for key, name in MODEL_ARCH_NAMES.items() if name == architecture_of(config))
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    for name in untied(model, model.state_dict()):
        path, _, kind = name.rpartition(".")
        found[name] = f"{names.get_name(path)}.{kind}"
    if unknown := [name for name, there in found.items() if there.startswith("None.")]:
        raise PlanError(
            f"export_format: gguf has no place for {listed(unknown[:3])} in a {config.model_type} model; export "
            "safetensors"
        )
    return found


def stored_as(name: str, tensor: Tensor, kind: str) -> GGMLQuantizationType:
    """How a tensor is stored: vectors in float32, rows that blocks do not fill in float16, and the words of a 4-bit
    model, on which it depends most, in 8 bits."""
    wanted = TYPES[kind][0]
    if tensor.dim() == 1:
        return GGMLQuantizationType.F32
    if kind.startswith("q") and tensor.shape[-1] % BLOCK:
        return GGMLQuantizationType.F16
    if kind == "q4_0" and name in ("token_embd.weight", "output.weight"):
        return GGMLQuantizationType.Q8_0
    return wanted


def laid_out(name: str, values: NDArray[np.float32], config: Any, *, back: bool = False) -> NDArray[np.float32]:
    """A tensor's values as the file has them, or `back`: llama's heads turn pairs of neighbours, and gemma's norms are
    stored with the one that is added to them."""
    kind = ARCHITECTURES[config.model_type]
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return values - 1 if back else values + 1
    part = name.rpartition(".")[0].rpartition(".")[2]
    if kind != "llama" or part not in ("attn_q", "attn_k"):
        return values
    heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
    half = len(values) // heads // 2
    pairs = (half, 2) if back else (2, half)
    return values.reshape(heads, *pairs, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _write_config(writer: GGUFWriter, config: Any) -> None:
    kind, heads = config.model_type, config.num_attention_heads
    head_dim = config_value(config, "head_dim") or config.hidden_size // heads
    window, length = config_value(config, "sliding_window"), config.max_position_embeddings
    rope = _rope(config)
    # Files of this architecture know no window; within its length there is no difference.
    writer.add_context_length(min(length, window) if kind == "mistral" and window else length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if kind in ("phi3", "gemma2", "gemma3_text"):
        writer.add_sliding_window(window or 0)
    if kind == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings or length)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _rope(config: Any) -> dict[str, Any]:
    """How the model's positions are written; of models with two ways, that of whole attention."""
    rope = config_value(config, "rope_parameters") or {}
    return rope.get("full_attention", rope)


def _rope_factors(model: Any) -> NDArray[np.float32] | None:
    """What each frequency of stretched positions is divided by, as the file's `rope_freqs`; None where by nothing."""
    rope = _rope(model.config)
    if rope.get("rope_type", "default") == "default":
        return None
    stretched = model.model.rotary_emb.inv_freq.float().cpu()
    plain = rope["rope_theta"] ** -(torch.arange(len(stretched)) / len(stretched))
    return cast("NDArray[np.float32]", (plain / stretched).float().numpy())


def check(file: Path, model: Any, tokenizer: Any) -> None:
    """Read the file again. Raises PlanError where its config, its tokenizer or a weight is not the model's, by more
    than rounding."""
    read = AutoConfig.from_pretrained(file.parent, gguf_file=file.name).to_dict()
    if lost := [key for key, value in model.config.to_dict().items() if not _kept(key, value, read, model.config)]:
        raise PlanError(
            f"export_format: a gguf file of a {model.config.model_type} model cannot say its {listed(lost)}; export "
            "safetensors"
        )
    check_vocabulary(file, tokenizer)
    names = {there: name for name, there in tensor_names(model).items()}
    tensors = model.state_dict()
    for found in GGUFReader(file).tensors:
        if found.name not in names:
            continue
        source = tensors[names.pop(found.name)].detach().float().cpu().numpy()
        values = laid_out(found.name, source, model.config)  # errors are bounded by blocks, which are the file's
        stored = dequantize(found.data, found.tensor_type).reshape(values.shape)
        off = np.abs(stored - values) - allowed_error(values, found.tensor_type)
        if not bool((off <= 0).all()):
            raise PlanError(
                f"export_format: {found.name} of the gguf file is off by {off.max():.2e} more than rounding"
            )
    if names:
        raise PlanError(f"export_format: the gguf file lacks {listed(sorted(names)[:3])}")


def allowed_error(values: NDArray[np.float32], stored: GGMLQuantizationType) -> NDArray[np.float32]:
    """The most by which rounding moves each value of a tensor."""
    size = np.abs(values)
    if stored == GGMLQuantizationType.F32:
        return np.zeros_like(size)
    if stored in (GGMLQuantizationType.F16, GGMLQuantizationType.BF16):
        bits = 11 if stored == GGMLQuantizationType.F16 else 8
        return size * np.float32(2.0**-bits) + np.float32(2.0**-25)
    blocks = size.reshape(-1, BLOCK).max(-1, keepdims=True)
    # Half a step of 1/127; in four bits up to a whole step of 1/8, on the side that has one step less. The scale is a
    # float16.
    share, steps = (0.5 / 127, 127) if stored == GGMLQuantizationType.Q8_0 else (1 / 8, 8)
    most = blocks * (share + 2.0**-10) + np.float32(steps * 2.0**-25)
    return np.broadcast_to(most, (len(blocks), BLOCK)).reshape(values.shape)


def _kept(key: str, value: Any, read: dict[str, Any], config: Any) -> bool:
    """Whether the file's config has a value of the model's config."""
    llama = ARCHITECTURES[config.model_type] == "llama"
    if key in _NOT_OF_THE_MODEL or "dropout" in key or (key == "sliding_window" and llama):
        return True
    now = read.get(key)
    if key == "rope_parameters" and llama:  # the rest is in rope_freqs
        value, now = ((each or {}).get("rope_theta") for each in (value, now))
    if key in ("attn_logit_softcapping", "final_logit_softcapping") and config.model_type == "gemma2":
        return True
    if key == "head_dim":  # some are not written down, as they follow from the others
        usual = config.hidden_size // config.num_attention_heads
        return (value or usual) == (now or usual)
    return _alike(value, now)


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_alike(one.get(key), other.get(key)) for key in {*one, *other})
    if isinstance(one, float | int) and isinstance(other, float | int):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other or (not one and not other)
