"""What newcomers do wrong first: each is told in a sentence with the way out, all mistakes of a recipe at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.cli import main
from llmtune.contract.errors import LlmtuneError
from llmtune.contract.examples import Text
from llmtune.data.formats.row import Chosen, read_row
from llmtune.inference.talk import chat_loop
from llmtune.recipe.recipe import load_recipe
from llmtune.testing import running
from llmtune.training.out_of_memory import explain_out_of_memory


def said(**keys: object) -> str:
    with pytest.raises(LlmtuneError) as caught:
        load_recipe({"model": "m", "dataset": "d", **keys})
    return str(caught.value)


def test_a_misspelt_name_of_a_block_is_told_with_the_other_mistakes_in_it() -> None:
    message = said(peft_config={"nam": "lora", "r": 16, "lora_alfa": 32})
    assert 'peft_config.nam: no such key. Did you mean "name"?' in message and 'Did you mean "lora_alpha"?' in message
    assert 'data_config.nam: no such key. Did you mean "name"?' in said(data_config={"nam": "alpaca"})


def test_a_key_of_another_library_in_a_block(tmp_path: Path) -> None:
    with pytest.raises(LlmtuneError, match=r'peft_config.rank: no such key for "lora" \(write r\)'):
        llmtune.plan(running.tiny_recipe(tmp_path, peft_config={"name": "lora", "rank": 8}))


@pytest.mark.parametrize(
    ("stage", "key", "answer"),
    [
        ("dpo", "beta", '"dpo" (write pref_beta)'),
        ("kto", "desirable_weight", '"kto" (write kto_chosen_weight)'),
        ("dpo", "loss_type", '"dpo" (write pref_loss)'),
        ("dpo", "label_smoothing", '"dpo" (write dpo_label_smoothing)'),
        ("grpo", "max_completion_length", '"grpo" (write max_new_tokens)'),
        ("dpo", "max_prompt_length", '"dpo"; here it is cutoff_len, which'),
        ("sft", "neftune_noise_alpha", '"sft": noise on embeddings is not here'),
    ],
)
def test_a_key_of_trl_in_a_block_of_a_stage(stage: str, key: str, answer: str, tmp_path: Path) -> None:
    with pytest.raises(LlmtuneError) as caught:
        llmtune.plan(running.tiny_recipe(tmp_path, stage_config={"name": stage, key: 1}))
    assert f"stage_config.{key}: no such key for {answer}" in str(caught.value)
    with pytest.raises(LlmtuneError, match="no such key(;|:) "):
        load_recipe({"model": "m", "dataset": "d", key: 1})


def test_what_shards_elsewhere_is_told_what_shards_here(tmp_path: Path) -> None:
    with pytest.raises(LlmtuneError, match='no plugin "deepspeed" is installed. Here it is dist_config: fsdp2'):
        llmtune.plan(running.tiny_recipe(tmp_path, dist_config="deepspeed"))


def test_no_plugin_and_the_same_plugin_twice() -> None:
    assert 'logger_config: found "none"; for no plugin, write logger_config: null' in said(logger_config="none")
    assert 'names "tensorboard" twice, allowed is once' in said(logger_config=["tensorboard", "tensorboard"])


@pytest.mark.parametrize("key", ["modle", "model_name_or_path"])
def test_a_key_that_is_given_under_another_name_is_not_missing_too(key: str) -> None:
    with pytest.raises(LlmtuneError) as caught:
        load_recipe({key: "m", "dataset": "d"})
    assert "required" not in str(caught.value) and "model" in str(caught.value)


def test_keys_with_dashes_and_a_missing_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "recipe.yaml", "--learning-rate", "1e-3"])
    assert "keys of a recipe have no dashes: write learning_rate=..." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["chat"])
    assert capsys.readouterr().err.strip().endswith("the following arguments are required: RUN_OR_MODEL")


def test_a_run_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    assert main(["chat", "runs/quickstrat", "--prompt", "hi"]) == 4
    assert 'there is no folder runs/quickstrat here. Did you mean "quickstart"?' in capsys.readouterr().err


def test_a_finished_run_is_told_before_libraries_are_imported(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"status": "done", "packages": {"llmtune": "0.1.0"}}')
    (tmp_path / "recipe.yaml").write_text("{model: m, dataset: d, device: cpu, output_dir: run}")
    code = "import sys; from llmtune.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "train", "recipe.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "output_dir: run holds a finished run; name another folder" in " ".join(done.stderr.split())
    assert done.stdout.split() == ["2", "False"]


def test_columns_that_no_row_has(tmp_path: Path) -> None:
    (tmp_path / "faq.csv").write_text("question,answer\nWho?,Me.\n")
    entry = {
        "path": str(tmp_path / "faq.csv"),
        "format": "alpaca",
        "columns": {"instruction": "frage", "output": "antwort"},
    }
    with pytest.raises(LlmtuneError, match=r'columns reads \w+ from "\w+", which no row has. They have'):
        llmtune.preview(running.tiny_recipe(tmp_path, dataset=[entry]))


def test_a_registry_that_names_a_file_which_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "mine.json"}}')
    keys = running.tiny_recipe(tmp_path, dataset="mine", dataset_dir=str(tmp_path))
    with pytest.raises(LlmtuneError, match="mine, of dataset_info.json in .*: ./mine.json: read as a local path"):
        llmtune.preview(keys)


def test_a_misspelt_generation_key_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "somewhere", "--prompt", "hi", "temprature=0.1"]) == 2
    assert 'temprature: no such key. Did you mean "temperature"?' in capsys.readouterr().err
    assert main(["chat", "somewhere", "--prompt", "hi", "learning_rate=-1"]) == 2
    assert "llmtune: command line learning_rate: found -1," in " ".join(capsys.readouterr().err.split())


def test_results_can_be_read_by_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        run = llmtune.train(running.tiny_recipe(tmp_path, max_steps=1, save_steps=1, peft_config="lora"))
        merged = run.export(tmp_path / "merged", infer_dtype="float32")
    finally:
        os.umask(before)
    files = [file for folder in (run.output_dir, merged) for file in folder.rglob("*.safetensors")]
    assert len(files) > 3 and {file.stat().st_mode & 0o777 for file in files} == {0o644}


def test_a_format_that_fails_on_a_row_is_told_with_the_row() -> None:
    class Counts:
        kind, columns, required = "text", ("text", "count"), ("text",)

        def recognise(self, row: Mapping[str, Any]) -> None: ...

        def convert(self, row: Mapping[str, Any]) -> Text:
            return Text(text=row["text"] * int(row["count"]))

    with pytest.raises(LlmtuneError, match="counts failed in convert of text, count: ValueError: invalid literal"):
        read_row(Chosen(format=Counts(), name="counts", why=""), {"text": "a", "count": "many"})


def test_memory_that_runs_out_while_files_are_written_is_explained() -> None:
    panic = type("PanicException", (BaseException,), {})("PyObject pointer is null")
    explained = [(panic, llmtune.OutOfMemoryError), (KeyboardInterrupt(), KeyboardInterrupt)]
    for raised, told in explained:
        with pytest.raises(told), explain_out_of_memory(torch.device("cpu"), lambda: "step 3", list):
            raise raised


def test_answers_to_a_pipe_stand_alone() -> None:
    said: list[str] = []
    lines = iter(["hello", "again"])

    class Echo:
        completes, tools, open_calls = False, None, ()

        def stream(self, text: str) -> Iterator[str]:
            yield text.upper()

    def read(prompt: str) -> str:
        assert prompt == ""
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    chat_loop(Echo(), read, said.append, guides=False)  # type: ignore[arg-type]
    assert "".join(said) == "HELLO\nAGAIN\n"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"device": "gpu"}, 'device: found "gpu", .* Did you mean "cuda"'),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_scaling: its key type is called rope_type"),
        ({"optim_config": {"name": "adamw", "betas": "0.9"}}, r'betas: found "0.9", .*number >= 0 and < 1$'),
        ({"optim_config": {"name": "badam", "start_block": 9}}, "start_block: found 9, allowed is 0 to 1"),
        ({"optim_config": {"name": "adamw_8bit", "paged": True}}, "paged: found true, but parameters are on cpu"),
        ({"stage_config": {"name": "dpo", "simpo_gamma": 1.0}}, "simpo_gamma: found 1.0, which pref_loss sigmoid"),
        ({"reward_config": {"name": "rule", "match": "length"}}, "max_tokens: match length calls every answer right"),
        ({"launch_config": {"name": "slurm", "time": "12h"}}, 'time: found "12h", allowed is what sbatch takes'),
        ({"peft_config": {"name": "lora", "layers_to_transform": [9]}}, r"found layers_to_transform \[9\].*: 0 to 1"),
        ({"flash_attn": "fa3"}, "flash_attn: transformers cannot build .*; leave flash_attn out, or install that"),
        (
            {"peft_config": {"name": "peft", "tuner": "LoHaConfig", "options": {"rank": 4}}},
            "options.rank: PEFT's LOHA has no such option; it has .*alpha",
        ),
    ],
)
def test_a_wrong_value_is_told_before_a_run(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(LlmtuneError, match=sentence):
        llmtune.plan(running.tiny_recipe(tmp_path, max_steps=2, **changes))


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        (
            {"warmup_steps": 9},
            "warmup_steps: the rate rises for 9 steps and the run has 5, so that learning_rate is ne",
        ),
        (
            {"lr_scheduler_config": {"name": "warmup_stable_decay", "num_stable_steps": 1, "num_decay_steps": 2}},
            "lr_scheduler_config: the learning rate of warmup_stable_decay is 0 from step 4 to 5, which learn nothing",
        ),
        ({"eval_config": "accuracy"}, "eval_config: accuracy measures nothing, as nothing is evaluated"),
        (
            {"train_from_scratch": True, "peft_config": "lora"},
            "train_from_scratch: the random weights stay as they are",
        ),
        ({"peft_config": {"name": "lora", "use_rslora": True, "use_dora": True}}, "rsLoRA and DoRA r=8"),
        ({"peft_config": {"name": "lora", "loraplus_lr_ratio": 16}}, "learning rate of adapters' B is 16 times"),
        ({"peft_config": {"name": "lora", "rank_pattern": {"down_proj": 4}}}, "r=8 alpha=16 (r=4 on down_proj) on 14"),
        (
            {"peft_config": {"name": "oft", "oft_block_size": 7, "oft_target": "q_proj"}},
            "7 inputs a block do not divide the inputs of q_proj (32); PEFT takes 8 there",
        ),
        (
            {"optim_config": {"name": "galore", "rank": 99, "target": "q_proj,k_proj"}},
            "optim_config.rank: 99 is no less than the shorter side of 4 of 4 matrices (k_proj 16, q_proj 32)",
        ),
        (
            {"lr_scheduler_config": {"name": "warmup_stable_decay", "num_decay_steps": 10}},
            "num_decay_steps: 10 are more than the 5 after warm-up, over which it falls then",
        ),
        (
            {"lr_scheduler_config": {"name": "warmup_stable_decay", "num_stable_steps": 4, "num_decay_steps": 3}},
            "num_decay_steps: the run ends after 1 of 3 steps, before the rate has come down",
        ),
    ],
)
def test_what_means_less_than_one_might_think_is_told(changes: dict[str, Any], note: str, tmp_path: Path) -> None:
    assert note in str(llmtune.plan(running.tiny_recipe(tmp_path, max_steps=5, **changes)))


def test_a_plain_recipe_is_told_nothing(tmp_path: Path) -> None:
    decay = {"name": "warmup_stable_decay", "num_decay_steps": 4}
    for schedule in ("linear", "cosine", "cosine_with_restarts", "inverse_sqrt", "constant", "polynomial", decay):
        keys = running.tiny_recipe(tmp_path, max_steps=5, warmup_steps=1, lr_scheduler_config=schedule)
        assert "Note:" not in str(llmtune.plan(keys))
