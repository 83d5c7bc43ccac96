"""Where a model comes from: a Python package, a GGUF file, a local folder or a hub, asked in this order.

Each source but the last is one function `(config) -> ModelFiles | None`, None meaning "not mine".
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmtune.contract.errors import LoadError, PlanError
from llmtune.contract.hubs import Hub, HubUnreachable, Repository
from llmtune.folders import cache_root
from llmtune.model import gguf, prequantised
from llmtune.model.config import ModelConfig
from llmtune.model.hub import fetch
from llmtune.model.huggingface import HuggingFace
from llmtune.model.skeleton import config_value
from llmtune.model.vocabulary import add_tokens
from llmtune.model.weight_files import holds_no_weights, read_index

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_BARE_ROPE_FACTOR = 2.0


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A folder with config.json and tokenizer files; with safetensors where weights were asked for."""

    folder: Path
    name: str
    """The recipe's `model`; a mirror keeps the name of what it stands in for."""
    origin: Literal["folder", "hub", "gguf", "package"]
    revision: str | None = None
    """Commit on the hub, if the files come from there."""
    note: str = ""
    """One sentence to show the user, if there is something to know."""


def resolve_model(
    config: ModelConfig, hub: Hub | None = None, *, weights: bool, described: bool = False, check: bool = True
) -> ModelFiles:
    """Find the model's files, fetching and converting what is not here yet; `hub` is the recipe's.

    With `weights` false only small files are fetched from the hub; a GGUF is converted whole, once. Weight files that
    are here are checked by their headers, unless another rank does that (`check`). `described`: a folder may do without
    any, for a plan that is never trained.
    Raises LoadError: no such model, no network, no safetensors, damaged files.
    """
    scratch = config.train_from_scratch is not False
    files = from_package(config) or from_gguf(config) or from_folder(config)
    files = files or from_hub(config, hub or HuggingFace(), weights and not scratch)
    _check_config_file(files.folder)
    if scratch:
        return from_scratch(files, config) if weights else replace(files, note="Its weights start from random numbers.")
    if described and files.origin == "folder" and holds_no_weights(files.folder):
        return replace(files, note="The folder holds no weights: it can be planned, not trained.")
    if check and (weights or files.origin != "hub"):
        read_index(files.folder)
    kind = prequantised.kind_of(files.folder)
    return files if kind is None else plain(files, config, kind, weights)


def from_package(config: ModelConfig) -> ModelFiles | None:
    """`package:NAME==VERSION`."""
    if not config.model.startswith("package:"):
        return None
    package = gguf.parse_package(config.model.removeprefix("package:"))
    folder = gguf.package_folder(package, converted_cache(config))
    note = f"{config.model}: the weights are {package.rounding}." if package.rounding else ""
    return ModelFiles(folder=folder, name=config.model, origin="package", note=note)


def from_gguf(config: ModelConfig) -> ModelFiles | None:
    """A `.gguf` file on this machine."""
    if not config.model.endswith(".gguf"):
        return None
    file = Path(config.model).expanduser()
    if not file.is_file():
        raise LoadError(f"model: there is no file {file}; give the path of a GGUF file on this machine")
    return ModelFiles(folder=gguf.gguf_folder(file, converted_cache(config)), name=config.model, origin="gguf")


def from_folder(config: ModelConfig) -> ModelFiles | None:
    """A folder on this machine, or a text that can only be meant as one."""
    folder = Path(config.model).expanduser()
    if folder.is_dir():
        if config.revision is not None:
            raise LoadError(
                f'revision: found "{config.revision}", but model is the local folder {folder}, which has no revisions; '
                "remove revision"
            )
        return ModelFiles(folder=folder.resolve(), name=config.model, origin="folder")
    if folder.is_file():
        raise LoadError(
            f"model: {folder} is a file; allowed are a folder with config.json and safetensors, or a .gguf file"
        )
    if config.model.startswith((".", "/", "~", os.sep)) or config.model.count("/") > 1 or "\\" in config.model:
        raise LoadError(f"model: there is no folder {folder}; give an existing folder, or a hub id such as owner/name")
    return None


def from_hub(config: ModelConfig, hub: Hub, weights: bool) -> ModelFiles:
    """A hub id; where the hub cannot be reached, the mirror of it that is a Python package."""
    mirror = gguf.MIRRORS.get(config.model) if config.revision in (None, "main") else None
    repository = Repository(
        name=config.model, revision=config.revision, cache_dir=config.cache_dir, token=config.token,
        patience_s=4.0 if mirror else 10.0,
    )  # fmt: skip
    try:
        folder, commit, note = fetch(repository, hub, weights=weights, code=config.trust_remote_code)
    except HubUnreachable as error:
        if mirror is None:
            raise
        return _from_mirror(config, mirror, error)
    return ModelFiles(folder=folder, name=config.model, origin="hub", revision=commit, note=note)


def _from_mirror(config: ModelConfig, mirror: str, error: LoadError) -> ModelFiles:
    package = gguf.KNOWN_PACKAGES[mirror]
    try:
        files = from_package(replace(config, model=f"package:{mirror}"))
    except LoadError as second:
        raise LoadError(f"{error}. Its mirror failed, too: {second}") from second
    assert files is not None
    note = (
        f"{config.model} could not be fetched from the hub, so it comes from the Python package {package.project} "
        f"{package.version}, whose weights are {package.rounding}."
    )
    return replace(files, name=config.model, note=note)


def from_scratch(files: ModelFiles, config: ModelConfig) -> ModelFiles:
    """The files with random weights of their own. Raises PlanError where transformers has no such model."""
    from llmtune.model.scratch import random_weights

    model_config = load_model_config(files, replace(config, rope_scaling=None))
    kwargs = {"trust_remote_code": True} if config.trust_remote_code else {}
    seed, kind = int(config.train_from_scratch), auto_class(config, model_config)
    return replace(
        files, folder=random_weights(files.folder, model_config, kind, seed, converted_cache(config), **kwargs)
    )


def plain(files: ModelFiles, config: ModelConfig, kind: str, weights: bool) -> ModelFiles:
    """The files of a model that is stored quantised, dequantised where `weights` are asked for. Raises LoadError where
    that cannot be done here."""
    if sentence := prequantised.objection(config.model, files.folder, kind):
        raise LoadError(sentence)
    note = f"Its weights are stored quantised ({kind}), and dequantised once into the cache; quant_config packs them."
    files = replace(files, note=note)
    if not weights:
        return files
    model_config = load_model_config(files, replace(config, rope_scaling=None))
    kwargs = {"trust_remote_code": True} if config.trust_remote_code else {}
    class_ = auto_class(config, model_config)
    return replace(
        files, folder=prequantised.dequantised(files.folder, model_config, class_, converted_cache(config), **kwargs)
    )


def converted_cache(config: ModelConfig) -> Path:
    """Where converted models are kept."""
    return Path(config.cache_dir or cache_root()).expanduser()


def _check_config_file(folder: Path) -> None:
    file = folder / "config.json"
    if not file.is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"; to use the GGUF file in it, write model: {ggufs[0]}" if ggufs else ""
        raise LoadError(f"model: {folder} has no config.json, so it is no model folder{hint}")
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoadError(f"{file} is no JSON ({error}); fetch it again") from error
    if not isinstance(tree, dict):
        raise LoadError(f"{file} holds no mapping; fetch it again")


def load_model_config(files: ModelFiles, config: ModelConfig) -> PretrainedConfig:
    """transformers' configuration of the model, with `rope_scaling` applied. Reads no weights."""
    from transformers import AutoConfig

    try:
        model_config = AutoConfig.from_pretrained(
            files.folder, trust_remote_code=config.trust_remote_code, local_files_only=True
        )
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise LoadError(f"{files.folder / 'config.json'}: {_first_line(error, config)}") from error
    # What reads and answers of models that also speak (Qwen-Omni); transformers finds its weights among the others.
    model_config = config_value(model_config, "thinker_config") or model_config
    prequantised.make_plain(model_config)
    if config.rope_scaling is not None:
        scale_rope(model_config, config.rope_scaling)
    return model_config


def _first_line(error: Exception, config: ModelConfig) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if "trust_remote_code" in text and not config.trust_remote_code:
        return (
            "the model needs Python code from its repository; read that code, and if you trust it set "
            "trust_remote_code: true"
        )
    return text.strip().split("\n")[0]


def scale_rope(model_config: Any, scaling: str | dict[str, Any]) -> None:
    """Write `scaling` into `model_config.rope_parameters` in place. PlanError where the model has no place for it."""
    wanted = {"rope_type": scaling, "factor": _BARE_ROPE_FACTOR} if isinstance(scaling, str) else dict(scaling)
    present, length = (config_value(model_config, name) for name in ("rope_parameters", "max_position_embeddings"))
    if not present or not length:
        raise PlanError(f"rope_scaling: {model_config.model_type} models have no rotary positions; remove rope_scaling")
    if all(isinstance(value, dict) or value is None for value in present.values()):
        raise PlanError(
            f"rope_scaling: {model_config.model_type} has rotary positions of its own for each kind of layer "
            f"({', '.join(present)}), which llmtune does not scale; remove rope_scaling"
        )
    if present.get("rope_type", "default") != "default":
        raise PlanError(
            f'rope_scaling: found "{wanted["rope_type"]}", but the model\'s positions are already scaled '
            f"({present['rope_type']}, factor {present.get('factor')}); remove rope_scaling"
        )
    if wanted_length := wanted.pop("length", None):
        wanted["factor"] = float(math.ceil(wanted_length / length))
        if wanted["factor"] <= 1:
            return
    if wanted["rope_type"] in ("yarn", "llama3"):
        wanted.setdefault("original_max_position_embeddings", length)
    if wanted["rope_type"] == "llama3":  # the values of Llama 3.1
        wanted = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | wanted
    model_config.rope_parameters = {**present, **wanted}
    if wanted["rope_type"] != "dynamic":  # which stretches at run time, measured against the trained length
        model_config.max_position_embeddings = int(length * wanted["factor"])


def scaled_rope(model_config: Any) -> bool:
    """Whether its rotary positions are stretched."""
    parameters = config_value(model_config.get_text_config(), "rope_parameters") or {}
    return parameters.get("rope_type", "default") != "default"


def load_tokenizer(files: ModelFiles, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the recipe's new tokens. LoadError if the folder has none, PlanError if it takes no
    new tokens."""
    tokenizer = read_tokenizer(files, config)
    add_tokens(tokenizer, config.new_special_tokens)
    return tokenizer


def read_tokenizer(files: ModelFiles, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's own tokenizer. LoadError if the folder has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            files.folder, trust_remote_code=config.trust_remote_code, local_files_only=True
        )
    except (ValueError, KeyError, OSError, TypeError, ImportError) as error:
        raise LoadError(f"{files.folder} has no usable tokenizer: {_first_line(error, config)}") from error
    if template := _processor_template(files.folder):
        tokenizer.chat_template = template
    return tokenizer


def _processor_template(folder: Path) -> str | None:
    """The chat template that stands in a file which a processor reads and a tokenizer does not, as of most models that
    read media and were published before 2025."""
    for name in ("processor_config.json", "chat_template.json"):
        place = folder / name
        template = json.loads(place.read_text("utf-8")).get("chat_template") if place.is_file() else None
        if isinstance(template, str):
            return template
    return None


def auto_class(config: ModelConfig, model_config: PretrainedConfig) -> Any:
    """The class of transformers whose `from_config` makes this kind of model. PlanError where it has none.

    A model that reads pictures or sound too, and that transformers does not count among the causal ones, is made as a
    whole; text trains its text part.
    """
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
    )

    # Among the last are models that hear and have no encoder of text, such as Audio Flamingo.
    hearing = [AutoModelForSeq2SeqLM] if config_value(model_config, "audio_config") else []
    kinds: list[Any] = {
        "llm": [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM, *hearing],
        "cls": [AutoModelForSequenceClassification],
        "other": [AutoModel],
    }[config.model_class]
    if config_value(model_config, "auto_map"):  # the model brings its own code
        return kinds[0]
    able = [kind for kind in kinds if type(model_config) in kind._model_mapping]
    if able:  # of Mllama the causal one is its text part alone
        saved = config_value(model_config, "architectures") or ()
        chosen = next((kind for kind in able if kind._model_mapping[type(model_config)].__name__ in saved), able[0])
        if config.model_class == "llm" and chosen is not AutoModelForCausalLM and model_config.is_encoder_decoder:
            raise PlanError(
                f"model: {model_config.model_type} models answer by a decoder that reads another text than their "
                "encoder does; allowed are models that go on with the text that they read"
            )
        return chosen
    raise PlanError(
        f"model: transformers has no {kinds[0].__name__} for {model_config.model_type} models; use a model "
        "of another architecture, or another model_class"
    )


def attention_name(config: ModelConfig) -> str | None:
    """transformers' name for `flash_attn`; None where the choice is left open."""
    return {
        "auto": None,
        "disabled": "eager",
        "sdpa": "sdpa",
        "fa2": "flash_attention_2",
        "fa3": "flash_attention_3",
        "fa4": "flash_attention_4",
    }[config.flash_attn]
