"""A package that llmtune has never heard of is built, installed and used, without a line changed in llmtune.

`tests/stranger` holds it. It is on the path of the processes started here, never of this one, which checks what they
did against loops in plain torch.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import llmtune
from llmtune.testing import tiny_model_folder
from tests.by_hand import encode

ROOT = Path(__file__).parent.parent
STRANGER = ROOT / "tests" / "stranger"
GAINED = ("k_proj", "v_proj", "down_proj")
BETA = 0.2
QUESTION, PROBE = "How much is 3 and 3?", [1, *range(20, 60, 3)]
STEPS = 6
TOGETHER = {
    "quant_config": "int8_rows",
    "peft_config": {"name": "ia3", "target_modules": ",".join(GAINED)},
    "stage_config": {"name": "smoothed", "beta": BETA},
    "save_steps": 4,
}
MIXED: dict[str, dict[str, Any]] = {
    "lora": {"quant_config": "int8_rows", "peft_config": {"name": "lora", "r": 4, "lora_dropout": 0.0}},
    "bnb": {"quant_config": {"name": "bnb", "double_quantization": False}, "peft_config": "ia3"},
    "polyak": {
        "quant_config": "int8_rows",
        "peft_config": "ia3",
        "optim_config": {"name": "polyak", "momentum": 0.8},
        "learning_rate": 0.5,
    },
    "alone": {"quant_config": {"name": "int8_rows", "skip_modules": ["o_proj"]}},
}
"""The stranger's parts beside llmtune's own."""

TRAIN = """
import json, sys, torch.distributed, llmtune
# One group for all runs: gloo may find the addresses of the last group if a second one is made under torchrun.
torch.distributed.init_process_group("gloo")
for keys in json.load(open(sys.argv[1])):
    llmtune.train(keys)
torch.distributed.destroy_process_group()
"""
USE = """
import json, sys, torch, llmtune
from llmtune.cli import main
job = json.load(open(sys.argv[1]))
for keys in job["recipes"]:
    llmtune.train(keys)
model, _ = llmtune.load(job["run"]).model()
with torch.no_grad():
    torch.save(model(input_ids=torch.tensor([job["ids"]])).logits, job["logits"])
print("=====")
assert main(["chat", job["run"], "do_sample=false", "max_new_tokens=8", "--prompt", job["question"]]) == 0
print("=====")
assert main(["export", job["run"], "export_dir=" + job["export"]]) == 0
"""


@dataclass(frozen=True)
class Place:
    """Where things are for these tests."""

    folder: Path
    site: Path
    model: str
    chats: str

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """`python ARGUMENTS` with the stranger's package on its path."""
        path = os.pathsep.join([str(self.site), str(ROOT)])
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip

    def keys(self, name: str, ranks: int = 1, **changes: Any) -> dict[str, Any]:
        """A recipe whose run is `NAME-RANKS`; a step has 8 rows for either number of ranks."""
        return {
            "model": self.model, "dataset": self.chats, "output_dir": str(self.folder / f"{name}-{ranks}"),
            "device": "cpu", "max_steps": STEPS, "learning_rate": 0.02, "lr_scheduler_config": "constant",
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2 // ranks, "logging_steps": 1, **changes,
        }  # fmt: skip

    def write(self, name: str, content: Any) -> str:
        """A JSON file, which as YAML is a recipe, too."""
        path = self.folder / name
        path.write_text(json.dumps(content, indent=1))
        return str(path)


def finish(process: subprocess.Popen[str]) -> str:
    """What the process printed; its errors where it failed."""
    out, errors = process.communicate(timeout=500)
    assert process.returncode == 0, out + errors
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, chats: str) -> Place:
    folder = tmp_path_factory.mktemp("stranger")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*pip, "--target", str(folder / "site"), str(STRANGER)], check=True)
    # Weights large enough that bytes and gains change the answers visibly.
    model = tiny_model_folder(folder, initializer_range=0.3)
    return Place(folder, folder / "site", str(model), chats)


@pytest.fixture(scope="module")
def trained(place: Place) -> Place:
    """The three parts together by the command line, on one rank and on two; the mixed recipes on two."""
    recipe = place.write("together.yaml", place.keys("together", **TOGETHER))
    changes = f"output_dir={place.folder / 'together-2'} gradient_accumulation_steps=1 launch_config=posse --nproc 2"
    mixed = place.write("two.json", [place.keys(name, 2, **keys) for name, keys in MIXED.items()])
    script = place.folder / "train.py"
    script.write_text(TRAIN)
    train = ["-m", "llmtune", "train", recipe]
    started = [
        place.start(*train, ACME_EVENTS="events-1"),
        place.start(*train, *changes.split(), ACME_EVENTS="events-2"),
        place.start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), mixed),
    ]
    try:
        for process in started:
            finish(process)
    finally:
        for process in started:
            process.terminate()  # where one failed, the others must not go on alone
    return place


@pytest.fixture(scope="module")
def used(trained: Place) -> dict[str, Any]:
    """One process that trains the mixed recipes on one rank, then reopens, chats with and exports the first run."""
    folder = trained.folder
    job = {
        "recipes": [trained.keys(name, **keys) for name, keys in MIXED.items()], "ids": PROBE,
        "question": QUESTION, "run": str(folder / "together-1"), "logits": str(folder / "logits.pt"),
        "export": str(folder / "merged"),
    }  # fmt: skip
    _, said, _ = finish(trained.start("-c", USE, trained.write("job.json", job))).split("=====\n")
    return {"logits": torch.load(job["logits"]), "said": said.strip(), "merged": Path(job["export"])}


def rows(weight: Tensor) -> Tensor:
    """What is left of a weight stored as int8 rows."""
    steps = weight.abs().max(dim=1, keepdim=True).values / 127
    return torch.round(weight / steps) * steps


def four_bits(weight: Tensor) -> Tensor:
    """What is left of a weight stored as nf4."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    # As one row: bitsandbytes' CPU kernel takes each row for the beginning of a block, which these are not.
    return dequantize_4bit(*quantize_4bit(weight.reshape(1, -1), blocksize=64, quant_type="nf4")).view_as(weight)


def base(place: Place, stored: Callable[[Tensor], Tensor]) -> Any:
    """transformers' model with every linear layer but the head passed through `stored`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32).requires_grad_(False)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.weight.copy_(stored(layer.weight))
    return model


@contextmanager
def gained(model: Any, gains: Mapping[str, Tensor]) -> Iterator[Any]:
    """The model with the outputs of some layers multiplied."""
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda layer, inputs, output, gain=gain: output * gain)
        for name, gain in gains.items()
    ]
    yield model
    for hook in hooks:
        hook.remove()


def ones(model: Any) -> dict[str, Tensor]:
    layers = [(name, layer) for name, layer in model.named_modules() if name.endswith(GAINED)]
    return {name: torch.ones(layer.out_features, requires_grad=True) for name, layer in layers}


def adamw(gains: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(gains, lr=0.02, weight_decay=0.0)


def by_hand(
    place: Place, stored: Callable[[Tensor], Tensor], beta: float, make: Callable[..., Any] = adamw
) -> tuple[list[dict[str, float]], Any]:
    """The same training in plain torch, a row at a time: (loss, grad_norm, plain_loss, accuracy) of each step."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place.model)
    texts = [json.loads(line)["messages"] for line in Path(place.chats).read_text().splitlines()]
    order = llmtune.plan(place.keys("order")).data.batches.order
    model = base(place, stored)
    gains = ones(model)
    optimizer = make(list(gains.values()))
    numbers = []
    with gained(model, gains):
        for step in range(STEPS):
            loss = plain = right = torch.zeros(())
            count = 0
            for row in order.step_units(step):
                ids, labels = map(torch.tensor, encode(tokenizer, texts[row]))
                logits, targets = model(input_ids=ids[None]).logits[0, :-1], labels[1:]
                kept = targets != -100
                logits, targets = logits[kept], targets[kept]
                loss = loss + nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=beta)
                plain = plain + nn.functional.cross_entropy(logits.detach(), targets, reduction="sum")
                right = right + (logits.argmax(-1) == targets).sum()
                count += len(targets)
            (loss / count).backward()
            norm = nn.utils.clip_grad_norm_(gains.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            values = {"loss": loss, "plain_loss": plain, "accuracy": right}
            numbers.append({name: value.item() / count for name, value in values.items()} | {"grad_norm": norm.item()})
    return numbers, {name: gain.detach() for name, gain in gains.items()}


def metrics(place: Place, name: str, ranks: int, *names: str) -> list[dict[str, float]]:
    logged = [row for row in llmtune.load(place.folder / f"{name}-{ranks}").metrics if "loss" in row]
    assert len(logged) == STEPS
    return [{name: row[name] for name in names or ("loss", "grad_norm")} for row in logged]


def assert_close(found: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float = 1e-5) -> None:
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours == pytest.approx({name: theirs[name] for name in ours}, rel=tolerance), f"step {step + 1}"


def test_it_imports_only_public_names() -> None:
    for path in STRANGER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmtune"):
                assert node.module in ("llmtune", "llmtune.testing")
                public = import_module(node.module).__all__
                assert {alias.name for alias in node.names} <= set(public)
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("llmtune") for alias in node.names)


def test_its_own_tests_find_it_keeps_the_contract(place: Place) -> None:
    """The laws of `llmtune.testing`, as its author runs them."""
    out = finish(place.start("-m", "pytest", str(STRANGER / "tests"), "-q", "-p", "no:cacheprovider", "-c", os.devnull))
    assert re.search(r"\b[89]\d passed", out) and "failed" not in out and "skipped" not in out


@pytest.mark.parametrize("ranks", [1, 2])
def test_its_three_parts_train_as_a_loop_in_plain_torch(trained: Place, ranks: int) -> None:
    expected, gains = by_hand(trained, rows, BETA)
    found = metrics(trained, "together", ranks, "loss", "grad_norm", "plain_loss", "accuracy")
    assert_close(found, expected)
    assert_close(found, metrics(trained, "together", 1, *found[0]))
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.05
    saved = load_file(trained.folder / f"together-{ranks}" / "trained.safetensors")
    assert saved.keys() == {f"{name}.gain" for name in gains}
    for name, gain in gains.items():
        torch.testing.assert_close(saved[f"{name}.gain"], gain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MIXED)
def test_its_parts_mix_with_llmtunes_own_on_any_number_of_ranks(
    used: dict[str, Any], trained: Place, name: str
) -> None:
    one = metrics(trained, name, 1)
    assert_close(metrics(trained, name, 2), one)
    assert one[-1]["loss"] < one[0]["loss"]


def test_its_adapter_trains_on_a_4_bit_base_as_a_loop_in_plain_torch(used: dict[str, Any], trained: Place) -> None:
    assert_close(metrics(trained, "bnb", 1), by_hand(trained, four_bits, 0.0)[0])


def test_its_optimizer_steps_as_torchs(used: dict[str, Any], trained: Place) -> None:
    expected, _ = by_hand(trained, rows, 0.0, lambda gains: torch.optim.SGD(gains, lr=0.5, momentum=0.8))
    assert_close(metrics(trained, "polyak", 1), expected)


def test_lora_starts_from_its_quantised_base(used: dict[str, Any], trained: Place) -> None:
    first, _ = by_hand(trained, rows, 0.0)[0][:2]
    assert metrics(trained, "lora", 1)[0]["loss"] == pytest.approx(first["loss"], rel=1e-5)


def test_a_whole_model_on_its_base_is_saved_with_the_weights_it_had(used: dict[str, Any], trained: Place) -> None:
    original = load_file(Path(trained.model) / "model.safetensors")
    for ranks in (1, 2):
        saved = load_file(trained.folder / f"alone-{ranks}" / "model" / "model.safetensors")
        assert saved.keys() == original.keys()
        for name, weight in original.items():
            if name.endswith("o_proj.weight"):
                assert not torch.equal(saved[name], weight)  # left out by skip_modules, so it trained
            elif name.endswith("_proj.weight"):
                torch.testing.assert_close(saved[name], rows(weight))


def test_the_run_reopens_and_answers_as_trained(used: dict[str, Any], trained: Place) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained.model)
    with gained(base(trained, rows), by_hand(trained, rows, BETA)[1]) as model, torch.no_grad():
        logits = model(input_ids=torch.tensor([PROBE])).logits
        torch.testing.assert_close(used["logits"], logits, rtol=1e-4, atol=1e-4)
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        answer = model.generate(asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=8)
    assert used["said"] == tokenizer.decode(answer[0, asked.shape[1] :], skip_special_tokens=True).strip()


def test_export_folds_the_gains_into_a_plain_model(used: dict[str, Any], trained: Place) -> None:
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(used["merged"], dtype=torch.float32)
    gains = {
        name.removesuffix(".gain"): gain
        for name, gain in load_file(trained.folder / "together-1" / "model" / "adapter.safetensors").items()
    }
    ids = torch.tensor([PROBE])
    whole = base(trained, lambda weight: weight)
    with torch.no_grad():
        before = whole(input_ids=ids).logits
        with gained(whole, gains):
            expected = whole(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - before).abs().max() > 0.1
    with safe_open(trained.folder / "together-2" / "model" / "adapter.safetensors", "pt") as file:
        assert file.metadata() == {"base_model": trained.model}


def test_it_watches_the_run_from_the_first_rank(trained: Place) -> None:
    expected = [f"step {step}" for step in range(1, STEPS + 1)]
    expected.insert(4, "saved 4")
    expected.append(f"saved {STEPS}")
    for name in ("events-1", "events-2"):
        assert (trained.folder / name).read_text().splitlines() == expected


def test_the_run_says_which_package_it_used(trained: Place) -> None:
    record = json.loads((trained.folder / "together-1" / "run.json").read_text())
    ours = {label: package for label, package in record["plugins"].items() if "acme" in package}
    labels = ("quant_config int8_rows", "peft_config ia3", "stage_config smoothed")
    assert ours == dict.fromkeys(labels, "acme-tuning 1.4.2")
    assert '"launch_config posse": "acme-tuning 1.4.2"' in (trained.folder / "together-2" / "run.json").read_text()


def test_mistakes_in_its_keys_are_reported_with_their_lines(place: Place) -> None:
    recipe = place.folder / "wrong.yaml"
    recipe.write_text(
        f"model: {place.model}\ndataset: {place.chats}\n"
        "stage_config:\n  name: smoothed\n  beta: 1.5\n"
        "quant_config: {name: int8_rows, skip_module: lm_head}\n"
        "peft_config:\n  name: ia3\n  start: high\n"
    )
    process = place.start("-m", "llmtune", "plan", str(recipe))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    lines = errors.splitlines()
    for number, key, words in (
        (5, "stage_config.beta", "found 1.5, allowed is a number >= 0 and < 1"),
        (6, "quant_config.skip_module", 'Did you mean "skip_modules"?'),
        (9, "peft_config.start", 'found "high", allowed is a number'),
    ):
        assert any(f"wrong.yaml:{number}:" in line and key in line and words in line for line in lines), errors


def test_without_the_package_a_recipe_says_what_is_missing(trained: Place) -> None:
    with pytest.raises(llmtune.PluginError, match='peft_config: no plugin "ia3" is installed'):
        llmtune.plan(trained.keys("missing", peft_config="ia3"))
    with pytest.raises(llmtune.LlmtuneError) as error:
        llmtune.load(trained.folder / "together-1").model()
    for name in ("int8_rows", "ia3", "smoothed"):
        assert f'no plugin "{name}" is installed' in str(error.value)
