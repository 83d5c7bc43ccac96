"""Exports of 2 to 8 bits, by GPTQModel in a Python of its own: its dependencies seldom go with those of training."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import PlanError
from llmtune.data import prepare
from llmtune.planning.data_plan import access_of
from llmtune.recipe.parts import formats_to_read

if TYPE_CHECKING:
    from llmtune.recipe.recipe import Recipe

PYTHON = "LLMTUNE_GPTQ_PYTHON"
"""The environment variable that names the Python with gptqmodel."""
_WORK = """
import json, sys
from gptqmodel import GPTQModel, QuantizeConfig
source, target, bits, rows = sys.argv[1:]
rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in map(json.loads, open(rows))]
model = GPTQModel.load(source, QuantizeConfig(bits=int(bits), group_size=128))
model.quantize(rows)
model.save(target)
"""


def gptq_python() -> str:
    """The Python that has gptqmodel. Raises PlanError where there is none."""
    if named := os.environ.get(PYTHON):
        return named
    if importlib.util.find_spec("gptqmodel"):
        return sys.executable
    raise PlanError(
        "export_quantization_bit: needs gptqmodel, best in an environment of its own: `python -m venv gptq && "
        f"gptq/bin/pip install gptqmodel`, then set {PYTHON}=gptq/bin/python and run the same command again"
    )


def calibration(recipe: Recipe, tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of `export_quantization_nsamples` rows, on which the rounding is fitted: each written with the chat
    template, at most `export_quantization_maxlen` long. Raises DataError where they cannot be read."""
    keys = recipe.export
    dataset = keys.export_quantization_dataset or recipe.data.dataset
    if dataset is None:
        raise PlanError(
            "export_quantization_dataset: not given, and the model's recipe names no data; name a file of rows or texts"
        )
    data = replace(
        recipe.data, dataset=dataset, eval_dataset=None, val_size=0, streaming=False, tokenized_path=None,
        max_samples=keys.export_quantization_nsamples,
        cutoff_len=keys.export_quantization_maxlen, train_on_prompt=True, mask_history=False, packing=False,
    )  # fmt: skip
    samples = prepare(
        data, tokenizer, seed=0, base_dir=Path.cwd(), formats=formats_to_read(recipe),
        learns=("conversation", "text", "tokens"), stage="calibration", access=access_of(recipe),
    ).train  # fmt: skip
    for index in range(min(len(samples), keys.export_quantization_nsamples)):
        yield samples.sample(index)[0].tolist()


def quantise(source: Path, target: Path, bits: int, calibrated: Sequence[list[int]]) -> None:
    """Write the model in `source` to `target` with `bits` a weight, fitted to these rows of token ids."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".calibration-") as scratch:
        rows = Path(scratch) / "rows.jsonl"
        rows.write_text("".join(json.dumps(ids) + "\n" for ids in calibrated))
        # Without our own packages: it is another environment.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [gptq_python(), "-c", _WORK, str(source), str(target), str(bits), str(rows)]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise PlanError(f"export_quantization_bit: gptqmodel failed: {said[-1] if said else done.returncode}")
