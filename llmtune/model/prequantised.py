"""Checkpoints that are stored quantised: their weights are written in full once, as a plain folder, and cached.

A plain model composes with everything: it is sharded, adapted, quantised again by `quant_config`, exported. The numbers
are those of `from_pretrained` with `dequantize=True`; GPTQ and AWQ, and FP8 whose blocks are cut at the end, are
unpacked by `packed_integers`.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmtune.contract.errors import LoadError, listed
from llmtune.folders import publish
from llmtune.model.fingerprint import fingerprint
from llmtune.model.gguf import converting
from llmtune.model.packed_integers import ALLOWED, cut_blocks, unreadable, write_unpacked
from llmtune.model.weight_files import read_index

PACKAGES = {"fp8": "accelerate", "mxfp4": "accelerate", "compressed-tensors": "compressed-tensors"}
"""The kinds that transformers dequantises on any device, and the package that it needs for each."""
FORMAT = 1
"""Of a cached model: raised where what is written changes, so that older ones are not taken. transformers' version is
part of the name for the same reason."""
WITHOUT = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".index.json", "config.json")
"""Ends of names of files that the dequantised model has of its own, or none of; generation_config.json is copied."""
_CODES = {"F8_E4M3", "F8_E5M2", "I8", "U8", "I32"}
_BESIDE = ("_zero_point", "_shape", "_g_idx")
"""Ends of names of whole numbers that are no weights."""


def kind_of(folder: Path) -> str | None:
    """How a model folder's weights are quantised, as its config.json says; None for plain weights."""
    return (_settings(folder) or {}).get("quant_method")


def _settings(folder: Path) -> dict[str, Any] | None:
    tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = tree.get("text_config") or {}
    found = tree.get("quantization_config") or tree.get("compression_config") or text.get("quantization_config")
    if found and "quant_method" not in found:  # as bitsandbytes' first versions wrote it
        found = {**found, "quant_method": "bitsandbytes" if "load_in_4bit" in found else "unknown"}
    return found


def objection(name: str, folder: Path, kind: str) -> str | None:
    """Why the model `name` in `folder`, quantised as `kind`, cannot be used here, in a sentence."""
    instead = "use the model it was made from, with quant_config"
    if kind in ALLOWED:
        odd = unreadable(_settings(folder) or {})
        return f"model: {name} is stored quantised ({kind}) with {odd}; {instead}" if odd else None
    if kind not in PACKAGES:
        return (
            f"model: {name} is stored quantised ({kind}), and only {listed([*PACKAGES, *ALLOWED])} can be turned back "
            f"into plain weights; {instead}"
        )
    if find_spec(PACKAGES[kind].replace("-", "_")) is None:
        return (
            f"model: {name} is stored quantised ({kind}), and transformers needs the package {PACKAGES[kind]} to read "
            f"it: pip install {PACKAGES[kind]}"
        )
    return None


def dequantised(files: Path, config: Any, auto_class: Any, cache: Path, **kwargs: Any) -> Path:
    """A folder with the small `files` of a quantised model and its weights in the type that its `config` declares.

    The whole model is in the memory of the process that converts it, but for GPTQ and AWQ. Raises LoadError where it
    cannot be read, or a weight is missing or left over.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", files.name)
    made_by = f"{FORMAT}-{version('transformers')}"
    target = cache / "dequantised" / f"{name}-{fingerprint(files)[:16]}-{made_by}"
    with converting(target) as ready:
        if ready:
            return target
        folder = Path(tempfile.mkdtemp(dir=target.parent))
        try:
            _fill(folder, files, config, auto_class, **kwargs)
            publish(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return target


def _fill(folder: Path, files: Path, config: Any, auto_class: Any, **kwargs: Any) -> None:
    """Write all that `dequantised` promises into an empty folder."""
    settings = _settings(files) or {}
    if (kind := settings["quant_method"]) not in ALLOWED:
        _require_scales(files)
    if kind in ALLOWED or (kind == "fp8" and cut_blocks(read_index(files))):
        import torch

        write_unpacked(files, settings, config.dtype or torch.bfloat16, folder)
        config.save_pretrained(folder)
    else:
        config.quantization_config = {**settings, "dequantize": True}
        try:
            model, report = auto_class.from_pretrained(
                files, config=config, dtype="auto", local_files_only=True, use_safetensors=True,
                output_loading_info=True, **kwargs,
            )  # fmt: skip
        except (ImportError, ValueError, RuntimeError, KeyError, OSError) as error:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            raise LoadError(f"{files}: transformers cannot dequantise it: {text}") from error
        if odd := sorted(name for kind in ("missing_keys", "unexpected_keys") for name in report[kind]):
            raise LoadError(f"{files}: transformers finds no place or no value for {listed(odd)}; fetch it again")
        make_plain(model.config)
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(folder)
    for file in files.iterdir():
        if file.is_file() and (file.name == "generation_config.json" or not file.name.endswith(WITHOUT)):
            shutil.copyfile(file, folder / file.name)


def _require_scales(files: Path) -> None:
    """LoadError where codes have no scales: transformers would take them for the weight."""
    index = read_index(files)
    scaled = {key.partition("_scale")[0] for key in index if "_scale" in key}
    bare = [
        key
        for key, tensor in index.items()
        if tensor.dtype in _CODES and "_scale" not in key and not key.endswith(_BESIDE)
        if key.removesuffix("_packed").removesuffix("_blocks") not in scaled
    ]
    if bare:
        raise LoadError(f"{files}: {listed(bare)} has no scales; fetch the model again")


def make_plain(config: Any) -> None:
    """Take what says that weights are quantised out of a transformers config, in place."""
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)
