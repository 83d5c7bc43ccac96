"""The README.md of an export: what it is, what it was made of and how it is used, without secrets and local paths."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCardData

from llmtune.contract.errors import listed
from llmtune.contract.schema import defaults
from llmtune.data.config import sources
from llmtune.recipe import text as recipe_text
from llmtune.recipe.keys import CONFIGS
from llmtune.recipe.secrets import blank
from llmtune.training.log import read_metrics
from llmtune.training.run_folder import read_record

if TYPE_CHECKING:
    from llmtune.recipe.recipe import Recipe

_USE = {
    "transformers": """from transformers import pipeline

chat = pipeline("text-generation", "{place}")
print(chat([{{"role": "user", "content": "Who are you?"}}])[0]["generated_text"][-1]["content"])""",
    "peft": """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model, tokenizer = AutoPeftModelForCausalLM.from_pretrained("{place}"), AutoTokenizer.from_pretrained("{place}")""",
    "gguf": """from llama_cpp import Llama

model = {opened}
print(model.create_chat_completion([{{"role": "user", "content": "Who are you?"}}]))""",
}
_NOT_SAID = (
    "output_dir", "cache_dir", "tokenized_path", "token", "export_", "adapter_name_or_path", "overwrite_",
    "logger_config", "launch_config",
)  # fmt: skip
"""Beginnings of keys that say nothing of how a model was made, or only where something lies."""


def model_card(recipe: Recipe, run: Path | None, base: Path, library: str, name: str) -> str:
    """The text of a card. `run` is the folder of the run, if it was trained here, `base` that of the base's files."""
    adapter, model = library == "peft", hub_name(recipe, run)
    trained = run is not None or bool(recipe.blocks.get("peft_config"))
    relation = "adapter" if adapter else "finetune" if trained else "quantized"
    data = [each.path.removeprefix("hub:") for each in sources(recipe.data.dataset)] if run else []
    on_hub = [each.path.removeprefix("hub:") for each in sources(recipe.data.dataset) if each.path.startswith("hub:")]
    stage, methods = recipe.blocks.get("stage_config"), recipe.blocks.get("peft_config") or []
    words = [block[0] for block in [*(stage or []), *methods]] if run else []
    front = ModelCardData(
        base_model=model, base_model_relation=relation if model else None, library_name=library,
        datasets=on_hub if run and on_hub else None, license=license_of(base), pipeline_tag="text-generation",
        tags=["llmtune", *words], ignore_metadata_errors=True,
    )  # fmt: skip
    on_its_hub = recipe.export.export_hub_model_id
    place, file = on_its_hub or name, f"{name}/model-{recipe.export.export_gguf_type}.gguf"
    opened = f'Llama.from_pretrained("{place}", filename="*.gguf")' if on_its_hub else f'Llama("{file}")'
    parts = [
        f"---\n{front.to_yaml()}\n---\n\n# {place.rpartition('/')[2]}",
        f"{'An adapter for' if adapter else 'Made of'} {_named(recipe.model.model)} with llmtune"
        + (f" ({', '.join(words)})." if words else "."),
        f"## Use\n\n```python\n{_USE[library].format(place=place, opened=opened)}\n```",
    ]
    if run is not None:
        parts.append("## Training\n\nData: " + listed([_named(each) for each in data]) + ".")
        parts.append("```yaml\n" + recipe_text.dump(told(recipe)) + "```")
        if found := metrics_of(run):
            rows = "\n".join(f"| {key} | {value:.4g} |" for key, value in found.items())
            parts.append(f"## Metrics\n\n| metric | value |\n|---|---|\n{rows}")
    if license_of(base):
        parts.append(f"## License\n\nThe base model has the license `{license_of(base)}`; data may have others.")
    return "\n\n".join(parts) + "\n"


def hub_name(recipe: Recipe, run: Path | None) -> str | None:
    """The base's name on the hub; None for a local folder or file."""
    name = recipe.model.model
    from_hub = run is None or read_record(run).get("model_origin") == "hub"
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and (from_hub or not Path(name).exists()) else None


def license_of(folder: Path) -> str | None:
    """The license that the card in a model's folder names; None without one."""
    card = folder / "README.md"
    front = re.match(r"---\n(.*?)\n---", card.read_text("utf-8", "replace"), re.DOTALL) if card.is_file() else None
    try:
        found = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return None
    return str(found["license"]) if isinstance(found, dict) and found.get("license") else None


def told(recipe: Recipe) -> dict[str, Any]:
    """The keys of the recipe that are not as they would be anyway, without secrets; of local paths the names."""
    usual = {name: value for config in CONFIGS for name, value in defaults(config).items()}
    plain = {
        key: value
        for key, value in blank(dict(recipe.resolved)).items()
        if not key.startswith(_NOT_SAID) and value is not None and value != usual.get(key)
    }
    return _without_paths(plain)


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items() if not str(key).startswith(_NOT_SAID)}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return _named(value) if isinstance(value, str) else value


def _named(text: str) -> str:
    """Places by their names alone, if they are on this machine, and addresses without who asks there."""
    return ",".join(_place(part) for part in re.sub(r"(://)[^/@\s]+@", r"\1", text).split(","))


def _place(text: str) -> str:
    local = text.startswith(("/", "~", "./", "../")) or ("/" in text and Path(text).exists())
    return Path(text.rstrip("/")).name if local else text


def metrics_of(run: Path) -> dict[str, float]:
    """The last loss and what the last evaluation found, then what benchmarks did."""
    rows = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    found = {key: row[key] for row in rows for key in row if key == "loss" or key.startswith("eval_")}
    for file in sorted((run / "benchmarks").glob("*.json")):
        metrics = json.loads(file.read_text(encoding="utf-8"))["metrics"]
        found |= {f"{file.stem} {name}": value for name, value in metrics.items()}
    return {key: value for key, value in found.items() if isinstance(value, int | float)}
