from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.contract.errors import ErrorList, LlmtuneError, RecipeError
from llmtune.contract.extension_points import EXTENSION_POINTS
from llmtune.contract.schema import Ge
from llmtune.recipe import text as recipe_text
from llmtune.recipe.blocks import decode_block
from llmtune.recipe.foreign_keys import foreign_keys
from llmtune.recipe.recipe import Recipe, load_recipe, parse_overrides

GOOD = """\
# a recipe
model: owner/model
quant_config: four
peft_config: {name: adapter, r: 16}
kernel_config:
  - fast
  - {name: faster, ids: [a, b]}
dataset: data/x.jsonl
learning_rate: 1e-4
num_train_epochs: 2
val_size: 0.1
eval_strategy: epoch
output_dir: runs/${seed}
"""


def write(folder: Path, text: str, name: str = "my.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def errors(call: Any, *arguments: Any) -> list[str]:
    with pytest.raises(LlmtuneError) as caught:
        call(*arguments)
    found = caught.value.errors if isinstance(caught.value, ErrorList) else [caught.value]
    assert all(isinstance(error, RecipeError) for error in found)
    return [str(error) for error in found]


def refused(folder: Path, text: str, *overrides: str) -> list[str]:
    return [e.replace(f"{folder}/", "") for e in errors(load_recipe, write(folder, text), overrides)]


def test_a_recipe_becomes_typed_values(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.model.model == "owner/model"
    assert recipe.train.learning_rate == 1e-4
    assert recipe.train.num_train_epochs == 2.0 and isinstance(recipe.train.num_train_epochs, float)
    assert recipe.train.output_dir == "runs/42"
    assert recipe.data.val_size == 0.1
    assert recipe.blocks == {
        "quant_config": [("four", {})],
        "peft_config": [("adapter", {"r": 16})],
        "kernel_config": [("fast", {}), ("faster", {"ids": ["a", "b"]})],
    }
    assert recipe.text == GOOD and recipe.name == "my"


def test_the_output_folder_follows_the_recipe_not_the_process(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "model: a/b", "llama 8b.yaml")).train.output_dir == "runs/llama-8b"
    assert load_recipe({"model": "owner/Some-Model"}).train.output_dir == "runs/Some-Model"


def test_json_is_read_with_tabs_and_escapes(tmp_path: Path) -> None:
    values = {
        "model": "m",
        "learning_rate": 1e-5,
        "sample_prompts": ["Wer? \U0001f600"],
        "peft_config": {"name": "x", "r": 2},
    }
    path = write(tmp_path, json.dumps(values, indent="\t"), "r.json")
    recipe = load_recipe(path)
    assert recipe.train.learning_rate == 1e-5
    assert recipe.train.sample_prompts == ("Wer? \U0001f600",)
    assert recipe.blocks["peft_config"] == [("x", {"r": 2})]
    (message,) = errors(load_recipe, write(tmp_path, '{"model": "m",\n "modle": 1}', "r.json"))
    assert "r.json:2:2  modle: no such key" in message
    (message,) = errors(load_recipe, write(tmp_path, '{"model": "m",\n "model": "n"}', "r.json"))
    assert "model: given twice" in message


@pytest.mark.parametrize("text", ["null", "false"])
def test_null_and_false_mean_none(tmp_path: Path, text: str) -> None:
    assert load_recipe(write(tmp_path, f"model: m\npeft_config: {text}\n")).blocks == {}


def test_overrides_win_and_lead_into_blocks(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    given = ["peft_config.r=32", "quant_config.bits=8", "kernel_config[1].ids=[c]", "learning_rate=3e-4", "dataset=a,b"]
    recipe = load_recipe(path, [*given, "kernel_config.0.more=1"])
    assert recipe.blocks["peft_config"] == [("adapter", {"r": 32})]
    assert recipe.blocks["quant_config"] == [("four", {"bits": 8})]
    assert recipe.blocks["kernel_config"] == [("fast", {"more": 1}), ("faster", {"ids": ["c"]})]
    assert (recipe.train.learning_rate, recipe.data.dataset) == (3e-4, "a,b")
    recipe = load_recipe(path, {"peft_config": {"name": "other"}, "quant_config": None, "kernel_config.0": "third"})
    assert recipe.blocks["peft_config"] == [("other", {})]
    assert "quant_config" not in recipe.blocks
    assert recipe.blocks["kernel_config"][0] == ("third", {})


def test_a_block_of_a_point_with_a_default_may_leave_the_name_out() -> None:
    assert load_recipe({"model": "m"}, ["optim_config.weight_decay=0.1"]).blocks["optim_config"][0][1] == {
        "weight_decay": 0.1
    }
    (message,) = errors(load_recipe, {"model": "m"}, ["peft_config.r=3"])
    assert message.startswith("command line peft_config: found no name")


def test_overrides_are_read_like_the_file() -> None:
    texts = ["a.b=1e-4", "c=[1, x]", "d=", "e=package:m==1.0", "f='12'", "c=yes", "g=12:30:45"]
    assert parse_overrides(texts) == {
        "a.b": 1e-4,
        "c": True,
        "d": None,
        "e": "package:m==1.0",
        "f": "12",
        "g": "12:30:45",
    }
    assert 'found "train"' in errors(parse_overrides, ["train"])[0]
    assert errors(parse_overrides, ["a=[1"])[0].startswith("command line a: ")


def test_all_mistakes_come_at_once_with_their_places(tmp_path: Path) -> None:
    text = (
        "modle: x\nlearning_rate: -1\npacking: 3\nseed: 1.5\non: 3\nlora_rank: 8\npet_config: lora\nmax_steps: .inf\n"
    )
    found = refused(tmp_path, text, "logging_steps=often")
    assert [tuple(re.split("  |(?<=command line) ", message)) for message in sorted(found)] == sorted(
        [
            ("my.yaml:1:1", 'modle: no such key. Did you mean "model"?'),
            ("my.yaml:2:1", "learning_rate: found -1, allowed is a number > 0"),
            ("my.yaml:3:1", "packing: found 3, allowed is true or false or null"),
            ("my.yaml:4:1", "seed: found 1.5, allowed is a whole number >= 0"),
            ("my.yaml:5:1", "on: YAML reads this key as true, not as text; put it in quotes"),
            ("my.yaml:6:1", "lora_rank: no such key; here it is peft_config.r"),
            ("my.yaml:7:1", next(m for m in found if "pet_config" in m).partition("  ")[2]),
            ("my.yaml:8:1", "max_steps: found a number that is not finite"),
            ("command line", 'logging_steps: found "often", allowed is a whole number >= 1'),
        ]
    )
    assert any('no such extension point. Did you mean "peft_config"?' in message for message in found)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("revision: 1.10", "found 1.1, allowed is text or null; put it in quotes"),
        ("revision: no", "found false, allowed is text or null; put it in quotes"),
        ("revision: on", "found true, allowed is text or null; put it in quotes"),
        ("seed: 12:30:45", 'found "12:30:45", allowed is a whole number'),
        ("seed: 010", 'found "010", allowed is a whole number'),
        ("seed: true", "found true, allowed is a whole number"),
        ("cutoff_len: 0", "found 0, allowed is a whole number >= 1"),
        ("flash_attn: fa5", 'found "fa5", allowed is one of'),
        ("seed: 1\nseed: 2", "seed: given twice, first in line 2"),
        ("peft_config: {name: lora, r: 1, r: 2}", "peft_config.r: given twice"),
        ("dataset: !!python/object/apply:os.system [ls]", "the tag !!python/object/apply:os.system is not allowed"),
        ("dataset: !!python/name:os.system", "recipes are plain data"),
        ("seed: !!int x", 'found "x" tagged as int'),
        ("dataset: [a", "not valid YAML"),
        ("\tdataset: a", "not valid YAML"),
        ("dataset: *nobody", "undefined alias"),
        ("<<: {seed: 1}", "merge keys are not read"),
        ("3: x", "YAML reads this key as 3"),
        ("template_kwargs: {on: 1}", "template_kwargs.on: YAML reads this key as true"),
        ("? [a]\n: b", "a key must be plain text"),
        ("--- \nmodel: other", "expected a single document"),
        ("peft_config: [a, b]", "found a list, allowed is one plugin"),
        ("peft_config: 3", "found 3, allowed is a plugin's name"),
        ("kernel_config: [auto, 3]", "kernel_config[1]: found 3"),
        ("peft_config: {r: 3}", "found no name"),
        ("eval_strategy: steps", "nothing to evaluate on; set val_size or eval_dataset"),
        ("output_dir: ${nobody}", "Interpolation key 'nobody' not found"),
        ("output_dir: ${oc.env:LLMTUNE_NOT_SET}", "'LLMTUNE_NOT_SET' not found; set it"),
        ("default_system: costs ${10", r"write \${ for these two signs themselves"),
        ("token: 123", "not shown"),
    ],
)
def test_refused_with_the_line(tmp_path: Path, line: str, part: str) -> None:
    found = refused(tmp_path, f"model: m\n{line}\n")
    assert [message for message in found if part in message], found
    assert all(message.startswith("my.yaml:") for message in found)


def test_times_and_dates_are_text() -> None:
    found = recipe_text.parse("a: 12:30:45\nb: 2026-01-31\nc: 1_000\nd: 1E5\ne: 0x1f\nf: .5\ng: 1.\nh: -3", "x").tree
    assert found == {"a": "12:30:45", "b": "2026-01-31", "c": 1000, "d": 1e5, "e": 31, "f": 0.5, "g": 1.0, "h": -3}


def test_eval_strategy_no_is_no(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "model: m\neval_strategy: no\n")).train.eval_strategy == "no"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "the recipe is empty"),
        ("# only a comment\n", "the recipe is empty"),
        ("- a\n- b\n", "found a list"),
        ("hello", "found text"),
        ("a: " + "[" * 40 + "]" * 40, "nested deeper than 32"),
        ("a: " + "[" * 20_000, "nested deeper than 32"),
        ("a: " + "x" * 300_000, "a recipe at most 256,000"),
        ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ), "more than 10,000 values"),
        ("a: &a [*a]", "nested deeper than 32"),
    ],
)  # fmt: skip
def test_texts_that_are_no_recipes(tmp_path: Path, text: str, part: str) -> None:
    (message,) = refused(tmp_path, text)
    assert part in message


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    assert (
        'found nothing, allowed is a recipe file. Did you mean "my.yaml"?'
        in errors(load_recipe, tmp_path / "mi.yaml")[0]
    )
    assert "found a folder" in errors(load_recipe, tmp_path)[0]
    (tmp_path / "b.yaml").write_bytes(b"model: \xff\xfe")
    assert "not UTF-8" in errors(load_recipe, tmp_path / "b.yaml")[0]
    assert "nested deeper" in errors(load_recipe, write(tmp_path, "[" * 200_000, "deep.json"))[0]


def test_mappings_hold_plain_values_only() -> None:
    assert load_recipe({"model": Path("a/b"), "sample_prompts": ("x",)}).model.model == os.fspath(Path("a/b"))
    assert "found a object" in errors(load_recipe, {"model": object()})[0]
    assert "`save_to_disk`) and name it" in errors(load_recipe, {"model": "a", "dataset": object()})[0]
    assert "is not text" in errors(load_recipe, {"model": "m", "template_kwargs": {1: 2}})[0]


def test_several_contradictions_are_all_named() -> None:
    values = {"model": "m", "warmup_steps": 3, "warmup_ratio": 0.1, "bf16": True, "fp16": True, "eval_steps": 5}
    found = errors(load_recipe, values, {"early_stopping_patience": 2, "load_best_model_at_end": True})
    keys = ("warmup_ratio", "fp16", "eval_steps", "load_best_model_at_end", "early_stopping_patience")
    assert [re.split("  |(?<=argument) ", message)[1].partition(":")[0] for message in found] == list(keys)
    assert found[4].startswith("keyword argument ") and found[0].startswith("recipe  ")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    r: Annotated[int, Ge(1)] = 8
    target_modules: str = "all"

    def __post_init__(self) -> None:
        if self.r == 13:
            raise ValueError("r: found 13, allowed is any other number")


def test_blocks_are_decoded_with_their_places(tmp_path: Path) -> None:
    def decoded(text: str, *overrides: str) -> tuple[Any, list[str]]:
        recipe = load_recipe(write(tmp_path, text), overrides)
        made, wrong = decode_block(recipe.blocks, recipe.places, "peft_config", 0, AdapterConfig)
        return made, [str(error).replace(f"{tmp_path}/", "") for error in wrong]

    assert decoded("model: m\npeft_config: {name: ad, r: 3}") == (AdapterConfig(r=3), [])
    made, wrong = decoded(
        "model: m\npeft_config:\n  name: ad\n  rnak: 3\n  r: 0\n  lora_target: x\n", "peft_config.q=1"
    )
    assert made is None
    assert wrong[0] == 'my.yaml:4:3  peft_config.rnak: no such key for "ad". Known: r, target_modules'
    assert "my.yaml:5:3  peft_config.r: found 0, allowed is a whole number >= 1" in wrong
    assert any(
        'my.yaml:6:3  peft_config.lora_target: no such key for "ad" (write target_modules)' in text for text in wrong
    )
    assert any(message.startswith("command line peft_config.q: no such key") for message in wrong)
    assert decoded("model: m\npeft_config: {name: ad, r: 13}")[1] == [
        "my.yaml:2:25  peft_config.r: found 13, allowed is any other number"
    ]


def test_resolved_is_read_back_to_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, GOOD), [r"default_system=costs \${10} and \\\${a}", "template_kwargs={d: '1e-4', n: 'no'}"]
    )
    assert recipe.data.default_system == "costs ${10} and \\${a}"
    again = load_recipe(write(tmp_path, recipe.to_yaml(), "resolved.yaml"))
    for part in ("model", "data", "train", "resolved"):
        assert getattr(again, part) == getattr(recipe, part)
    assert {point: again.blocks[point] for point in recipe.blocks} == recipe.blocks
    assert set(EXTENSION_POINTS) <= set(recipe.resolved)
    assert json.loads(json.dumps(recipe.resolved)) == recipe.resolved


def test_secrets_are_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTUNE_TEST_DIR", "hunter3")
    text = 'model: m\ntoken: hunter2 # mine\nlogger_config: {name: w, api_key: "hunter2", dir: x}\n'
    texts = [write(tmp_path, text), {"model": "m", "token": "hunter2"}]
    values = {"model": "m", "token": "hunter2", "logger_config": {"name": "w", "api_key": "hunter2"}}
    texts.append(write(tmp_path, json.dumps(values, indent="\t"), "r.json"))
    for source in texts:
        recipe = load_recipe(source, ["output_dir=${oc.env:LLMTUNE_TEST_DIR}"])
        assert recipe.model.token == "hunter2" and recipe.train.output_dir == "hunter3"
        for shown in (recipe.text, recipe.to_yaml(), repr(recipe), json.dumps(recipe.resolved)):
            assert "hunter2" not in shown
        assert "hunter3" not in recipe.to_yaml() and recipe.resolved["output_dir"] == "${oc.env:LLMTUNE_TEST_DIR}"
        assert load_recipe(dict(recipe.tree)).model.token == "hunter2"
    assert load_recipe(texts[0]).text == text.replace("hunter2 # mine", "null # mine").replace('"hunter2"', "null")


def test_every_hint_names_a_key_that_exists() -> None:
    schema = set(load_recipe({"model": "m"}).resolved)
    for old, key in foreign_keys().items():
        assert old not in schema, f"{old} is a key of llmtune"
        first = key.here.replace("(", " ").partition(" ")[0].strip(":,").partition(".")[0]
        assert first in schema or " " in key.here or key.reason, f"{old}: {key}"


plain_text = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=20)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), plain_text
)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain_text, inner, max_size=3)
)


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(plain_text, trees, max_size=4))
def test_what_is_dumped_is_read_back(tree: dict[str, Any]) -> None:
    found = recipe_text.parse(recipe_text.dump(tree), "x")
    assert not found.problems
    assert found.tree == tree
    assert json.dumps(found.tree) == json.dumps(tree)  # 1 is not 1.0


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=60))
def test_any_text_is_a_recipe_or_a_sentence(text: str) -> None:
    try:
        found = recipe_text.parse(text, "x")
    except RecipeError as error:
        assert str(error).startswith("x")
    else:
        json.dumps(found.tree)


def test_reading_a_recipe_loads_no_torch(tmp_path: Path) -> None:
    code = "import sys; from llmtune.recipe.recipe import load_recipe; load_recipe(sys.argv[1])\n"
    code += "print([name for name in ('torch', 'transformers', 'numpy', 'pyarrow') if name in sys.modules])"
    path = write(tmp_path, GOOD)
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_the_type_is_exported() -> None:
    assert isinstance(load_recipe({"model": "m"}), Recipe)
