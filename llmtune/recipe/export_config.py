"""The keys of a recipe that say how a trained model is used and written out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from llmtune.contract.schema import Ge


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """How the trained model is exported, and in which type it is used."""

    export_dir: str | None = None
    """Where `llmtune export` writes the merged model."""
    export_format: Literal["safetensors", "gguf", "adapter"] = "safetensors"
    """What is written: the merged model as transformers stores it, as one file for llama.cpp and ollama, or the adapter
    alone as PEFT stores it."""
    export_gguf_type: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] = "q8_0"
    """How a GGUF file stores matrices: 32, 16, 8.5 or 4.5 bits a weight."""
    export_quantization_bit: Literal[2, 3, 4, 8] | None = None
    """Bits a weight of safetensors that GPTQModel rounds, in a Python of its own; null rounds nothing."""
    export_quantization_dataset: str | None = None
    """Rows or texts that the rounding of `export_quantization_bit` is fitted to; null takes the recipe's data."""
    export_quantization_nsamples: Annotated[int, Ge(1)] = 128
    """How many of those rows."""
    export_quantization_maxlen: Annotated[int, Ge(1)] = 1024
    """Most tokens of such a row."""
    export_size: Annotated[int, Ge(1)] = 5
    """Largest exported file in GB, of safetensors and of `export_legacy_format` alike."""
    infer_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Type of exported weights, and of a model opened for chatting. `auto` is the type that the base's files have; in
    chat, bfloat16 instead of float32 on a GPU that has it."""
    export_device: Literal["cpu", "auto"] = "cpu"
    """Where the adapter is merged: `cpu` leaves GPUs free and takes models that no GPU holds, `auto` is the GPU where
    there is one."""
    export_legacy_format: bool = False
    """Export as PyTorch pickles instead of safetensors, for readers that know nothing else."""
    export_hub_model_id: str | None = None
    """Repository (`owner/name`) of the Hugging Face hub that the export is uploaded to; of others it is refused."""
