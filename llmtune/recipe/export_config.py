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
