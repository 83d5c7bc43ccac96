"""Answers to a whole data set: what is asked, what is answered on how many ranks, and what a kill leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune import DataError, LlmtuneError, PlanError, RecipeError
from llmtune.cli import main
from llmtune.distributed.launch import LaunchError
from llmtune.inference.reopen import open_model
from llmtune.testing.running import tiny_recipe
from llmtune.testing.tiny import tiny_chats, tiny_labelled, tiny_model_folder, tiny_preferences
from tests.spawn import in_ranks

NAME = "generated_predictions.jsonl"
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "per_device_eval_batch_size": 3}
LORA = {"name": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Weights large enough for earlier tokens to decide the answer.
    return tiny_model_folder(tmp_path_factory.mktemp("model"), initializer_range=0.5)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chats(tmp_path_factory.mktemp("chats"), rows=10)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of LoRA, whose base is a random model."""
    folder = tmp_path_factory.mktemp("run")
    llmtune.train(tiny_recipe(folder, sizes={"initializer_range": 0.5}, peft_config=LORA, save_steps=4))
    return folder / "run"


def lines(folder: Path) -> list[dict[str, Any]]:
    with (folder / NAME).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def raw(chats: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in chats.read_text().splitlines()]


def test_answers_are_those_of_transformers_to_the_last_question_of_each_row(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    found = llmtune.predict(model, chats, output_dir=str(tmp_path), **{**GREEDY, "seed": 3}).rows
    own, tokenizer = open_model(model)
    assert [row["row"] for row in found] == [f"{chats}:{number}" for number in range(1, 11)]
    for row, data in zip(found, raw(chats), strict=True):
        *asked, answer = data["messages"]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            said = own.generate(**ids, do_sample=False, max_new_tokens=12, eos_token_id=tokenizer.eos_token_id)
        text = tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert (row["prompt"], row["label"], row["predict"]) == (prompt, answer["content"], text)
    assert any(len(data["messages"]) > 2 for data in raw(chats))  # earlier answers are part of the prompt
    assert lines(tmp_path) == found


def test_the_rows_of_every_kind_that_asks_something_are_answered(model: Path, tmp_path: Path) -> None:
    chosen = llmtune.predict(model, tiny_preferences(tmp_path, 4), output_dir=str(tmp_path / "a"), **GREEDY).rows
    assert [row["label"] for row in chosen] == [
        data["chosen"][0]["content"] for data in raw(tmp_path / "preferences.jsonl")
    ]
    labelled = llmtune.predict(model, tiny_labelled(tmp_path, 4), output_dir=str(tmp_path / "b"), **GREEDY).rows
    assert [row["label"] is None for row in labelled] == [not row["label"] for row in raw(tmp_path / "labelled.jsonl")]
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"messages": [{"role": "user", "content": "Hello?"}]}\n')
    (row,) = llmtune.predict(
        model, {"path": str(questions), "format": "prompt"}, output_dir=str(tmp_path / "c"), **GREEDY
    ).rows
    assert row["label"] is None and "Hello?" in row["prompt"]


def predict_in_rank(model: str, data: str, folder: str, keys: dict[str, Any]) -> None:
    llmtune.predict(model, data, output_dir=folder, device="cpu", **keys)


@pytest.mark.parametrize("keys", [GREEDY, {**GREEDY, "do_sample": True, "temperature": 1.5, "top_p": 1.0}])
def test_two_ranks_write_what_one_does(keys: dict[str, Any], run: Path, chats: Path, tmp_path: Path) -> None:
    for ranks in (1, 2):
        in_ranks(ranks, tmp_path / f"{ranks}", predict_in_rank, str(run), str(chats), str(tmp_path / f"o{ranks}"), keys)
    assert (tmp_path / "o1" / NAME).read_bytes() == (tmp_path / "o2" / NAME).read_bytes()
    other = llmtune.predict(run, chats, output_dir=str(tmp_path / "other"), **{**keys, "per_device_eval_batch_size": 1})
    assert other.rows == lines(tmp_path / "o1")


@pytest.mark.parametrize("way", [{"tp_size": 2}, {"dp_replicate_size": 2}], ids=str)
def test_ranks_that_share_a_batch_or_hold_copies_write_the_same(
    way: dict[str, int], run: Path, chats: Path, tmp_path: Path
) -> None:
    whole = llmtune.predict(run, chats, output_dir=str(tmp_path / "one"), **GREEDY).rows
    keys = {**GREEDY, "dist_config": {"name": "fsdp2", **way}}
    in_ranks(2, tmp_path / "two", predict_in_rank, str(run), str(chats), str(tmp_path / "o"), keys)
    assert lines(tmp_path / "o") == whole


def test_ranks_are_started_where_they_are_asked_for(model: Path, chats: Path, tmp_path: Path) -> None:
    entry = {"path": str(chats), "name": "small talk"}
    keys = {**GREEDY, "max_samples": 4, "device": "cpu"}
    found = llmtune.predict(model, entry, nproc=2, output_dir=str(tmp_path / "two"), **keys)
    assert found.rows == llmtune.predict(model, entry, output_dir=str(tmp_path / "one"), **keys).rows
    with pytest.raises(LaunchError, match="a rank failed with exit code"):
        llmtune.predict(model, tmp_path / "missing.jsonl", nproc=2, device="cpu")


def test_a_quantised_run_is_asked_on_one_rank_and_on_two(tmp_path: Path) -> None:
    keys = tiny_recipe(tmp_path, sizes={"hidden_size": 64, "intermediate_size": 128}, peft_config=LORA, max_steps=1,
                       quant_config={"name": "bnb", "compute_dtype": "float32"})  # fmt: skip
    llmtune.train(keys)
    more = {**GREEDY, "infer_dtype": "float32", "max_samples": 5}
    for ranks in (1, 2):
        out = str(tmp_path / f"o{ranks}")
        in_ranks(ranks, tmp_path / f"{ranks}", predict_in_rank, keys["output_dir"], keys["dataset"], out, more)
    assert len(lines(tmp_path / "o1")) == 5
    assert lines(tmp_path / "o1") == lines(tmp_path / "o2")


def test_what_a_kill_left_is_kept_and_the_rest_is_as_if_there_had_been_none(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    keys = {**GREEDY, "do_sample": True, "max_new_tokens": 60, "per_device_eval_batch_size": 1}
    whole = llmtune.predict(model, chats, output_dir=str(tmp_path / "whole"), **keys).folder / NAME
    words = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    command = [sys.executable, "-m", "llmtune", "predict", str(model), f"dataset={chats}", *words]
    process = subprocess.Popen([*command, f"output_dir={tmp_path / 'killed'}"], stderr=subprocess.DEVNULL)
    file = tmp_path / "killed" / NAME
    while not (file.exists() and file.stat().st_size) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = file.read_bytes()
    assert whole.read_bytes().startswith(left)
    # A line may be torn, too.
    file.write_bytes(whole.read_bytes()[: len(left) + 20])
    before = os.stat(file).st_ino
    llmtune.predict(model, chats, output_dir=str(tmp_path / "killed"), **keys)
    assert file.read_bytes() == whole.read_bytes()
    assert os.stat(file).st_ino == before


def test_rows_that_are_written_are_not_answered_again(model: Path, chats: Path, tmp_path: Path) -> None:
    from llmtune.training.predict import Predictor

    llmtune.predict(model, chats, output_dir=str(tmp_path), **GREEDY)
    answered: list[int] = []
    generate = Predictor._generate

    def noted(self: Predictor, questions: Any, numbers: Any, stop: Any) -> Any:
        answered.extend(numbers)
        return generate(self, questions, numbers, stop)

    text = (tmp_path / NAME).read_bytes().splitlines(keepends=True)
    (tmp_path / NAME).write_bytes(b"".join(text[:7]))  # two batches, and one of the third's lines
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Predictor, "_generate", noted)
        llmtune.predict(model, chats, output_dir=str(tmp_path), **GREEDY)
    assert answered == [6, 7, 8, 9]
    assert (tmp_path / NAME).read_bytes() == b"".join(text)


def test_other_predictions_are_neither_mixed_nor_lost(model: Path, chats: Path, tmp_path: Path) -> None:
    llmtune.predict(model, chats, output_dir=str(tmp_path), **GREEDY)
    before = (tmp_path / NAME).read_bytes()
    with pytest.raises(PlanError, match="max_new_tokens was 12, now 5") as caught:
        llmtune.predict(model, chats, output_dir=str(tmp_path), **{**GREEDY, "max_new_tokens": 5})
    assert "overwrite_output_dir=true" in str(caught.value)
    assert (tmp_path / NAME).read_bytes() == before
    llmtune.predict(
        model, chats, output_dir=str(tmp_path), overwrite_output_dir=True, **{**GREEDY, "max_new_tokens": 5}
    )
    assert (tmp_path / NAME).read_bytes() != before
    (tmp_path / "predict_settings.json").unlink()
    with pytest.raises(PlanError, match="predict_settings.json"):
        llmtune.predict(model, chats, output_dir=str(tmp_path), **{**GREEDY, "max_new_tokens": 5})


def test_a_run_its_checkpoint_its_export_and_its_base_are_asked_alike(run: Path, chats: Path, tmp_path: Path) -> None:
    adapted = llmtune.predict(run, chats, **GREEDY)
    assert adapted.folder == run / "predictions" / "chats"
    checkpoint = next((run / "checkpoints").iterdir())
    assert llmtune.predict(checkpoint, chats, **GREEDY).rows == adapted.rows
    merged = llmtune.load(run).export(tmp_path / "merged")
    assert llmtune.predict(merged, chats, output_dir=str(tmp_path / "m"), **GREEDY).rows == adapted.rows
    base = llmtune.predict(run.parent / "tiny-llama", chats, output_dir=str(tmp_path / "b"), **GREEDY)
    assert base.rows != adapted.rows
    assert str(base) == f"Wrote 10 predictions to {tmp_path / 'b' / NAME}"
    assert llmtune.load(run).predict(chats, **GREEDY).rows == adapted.rows


def test_the_command_says_where_it_wrote(
    model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["do_sample=false", "max_new_tokens=3", "max_length=400", "max_samples=4", f"output_dir={tmp_path}"]
    assert main(["predict", str(model), f"dataset={chats}", *words]) == 0
    assert f"Wrote 4 predictions to {tmp_path / NAME}" in capsys.readouterr().out


def test_rows_are_taken_as_an_entry_of_dataset_says(model: Path, chats: Path, tmp_path: Path) -> None:
    entry = {"path": str(chats), "num_samples": 13}
    found = llmtune.predict(model, [entry], output_dir=str(tmp_path), **GREEDY).rows
    assert len(found) == 13
    assert [row["row"] for row in found[:10]] == [f"{chats}:{number}" for number in range(1, 11)]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "dataset: not given, needed is what to answer: dataset=FILE"),
        ({"dataset": 7}, "dataset: found 7"),
        ({"dataset": "missing.jsonl"}, "missing.jsonl"),
        ({"dataset": "{folder}/texts.jsonl"}, "holds texts, which ask nothing"),
        ({"dataset": "{folder}/broken.jsonl"}, "broken.jsonl:2"),
        ({"dataset": "{folder}/long.jsonl"}, r"the prompt has [\d,]+ tokens, and the model has room for"),
        ({"dataset": "{folder}/chats.jsonl", "temperature": 0}, "temperature: found 0"),
        ({"dataset": "{folder}/chats.jsonl", "temprature": 1}, 'Did you mean "temperature"'),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_said_before_a_weight_is_read(
    keys: dict[str, Any], said: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_chats(tmp_path, 2)
    (tmp_path / "texts.jsonl").write_text('{"text": "Once upon a time."}\n')
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    (tmp_path / "broken.jsonl").write_text(good + '{"messages": 7}\n')
    (tmp_path / "long.jsonl").write_text(good.replace('"a"', f'"{"word " * 5000}"') + good)
    keys = {key: value.format(folder=tmp_path) if isinstance(value, str) else value for key, value in keys.items()}
    monkeypatch.setattr("llmtune.inference.predict.filled_for", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(LlmtuneError, match=said) as caught:
        llmtune.predict(model, **keys)
    assert isinstance(caught.value, DataError | RecipeError)
    assert not (tmp_path / "predictions").exists()


def test_rows_that_do_not_fit_are_left_out_on_request(model: Path, tmp_path: Path) -> None:
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    data = tmp_path / "rows.jsonl"
    data.write_text(good + '{"messages": 7}\n' + good.replace('"a"', f'"{"word " * 5000}"') + good)
    found = llmtune.predict(model, data, output_dir=str(tmp_path / "o"), on_bad_record="skip", **GREEDY).rows
    assert [row["row"] for row in found] == [f"{data}:1", f"{data}:4"]


def test_a_model_that_cannot_be_had_or_cannot_answer_is_said(chats: Path, tmp_path: Path) -> None:
    with pytest.raises(LlmtuneError, match="nowhere"):
        llmtune.predict(tmp_path / "nowhere", chats)
    keys = tiny_recipe(tmp_path, kind="preference", stage_config="rm", max_steps=1)
    llmtune.train(keys)
    with pytest.raises(PlanError, match="no head over a vocabulary"):
        llmtune.predict(tmp_path / "run", chats)


def do_predict(folder: Path, **keys: Any) -> dict[str, Any]:
    return tiny_recipe(
        folder, sizes={"initializer_range": 0.5}, peft_config=LORA, do_predict=True, max_steps=2, **{**GREEDY, **keys}
    )


def test_a_run_answers_the_rows_that_it_held_out(tmp_path: Path) -> None:
    llmtune.train(do_predict(tmp_path, val_size=5))
    found = lines(tmp_path / "run")
    rows = {f"{tmp_path / 'chats.jsonl'}:{number}": row for number, row in enumerate(raw(tmp_path / "chats.jsonl"), 1)}
    assert len(found) == 5
    assert [row["row"] for row in found] == [row for row in rows if row in {each["row"] for each in found}]
    for row in found:
        assert row["label"] == rows[row["row"]]["messages"][-1]["content"]
    data = tmp_path / "held.jsonl"
    data.write_text("".join(json.dumps(rows[row["row"]]) + "\n" for row in found))
    again = llmtune.predict(tmp_path / "run", data, output_dir=str(tmp_path / "again")).rows
    assert [row["predict"] for row in again] == [row["predict"] for row in found]


def test_a_run_answers_its_eval_dataset_on_two_ranks_as_on_one(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    keys = do_predict(tmp_path, eval_dataset=str(tiny_chats(tmp_path / "eval", 7)), eval_strategy="no")
    for ranks in (1, 2):
        in_ranks(ranks, tmp_path / f"{ranks}", train_in_rank, {**keys, "output_dir": str(tmp_path / f"run{ranks}"),
                 "gradient_accumulation_steps": 3 - ranks})  # fmt: skip
    assert len(lines(tmp_path / "run1")) == 7
    assert lines(tmp_path / "run1") == lines(tmp_path / "run2")


def train_in_rank(keys: dict[str, Any]) -> None:
    llmtune.train(keys)


def test_predictions_of_a_run_that_was_killed_go_on_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmtune.training.predict import PredictionFile

    keys = do_predict(tmp_path, val_size=5, per_device_eval_batch_size=2)
    llmtune.train({**keys, "output_dir": str(tmp_path / "whole")})
    append = PredictionFile.append

    def kill(self: PredictionFile, some: Any) -> None:
        append(self, some)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PredictionFile, "append", kill)
        with pytest.raises(KeyboardInterrupt):
            llmtune.train(keys)
    assert len(lines(tmp_path / "run")) == 2
    monkeypatch.setattr("llmtune.training.loop.forward_backward", lambda *_: pytest.fail("trained again"))
    llmtune.train(keys)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_predictions_need_rows_to_answer(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="do_predict: there is nothing to evaluate on; set val_size or eval_dataset"):
        llmtune.plan(do_predict(tmp_path))
    with pytest.raises(DataError, match="ask nothing"):
        (tmp_path / "texts.jsonl").write_text('{"text": "Once upon a time."}\n' * 4)
        llmtune.plan(do_predict(tmp_path, eval_dataset=str(tmp_path / "texts.jsonl")))


def test_beams_are_asked_for_in_evaluations_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtune_generation.transformers_engine import TransformersEngine

    beams, generate = [], TransformersEngine.generate

    def noted(self: Any, model: Any, tokenizer: Any, prompts: Any, config: Any, **more: Any) -> Any:
        beams.append(config.num_beams)
        return generate(self, model, tokenizer, prompts, config, **more)

    monkeypatch.setattr(TransformersEngine, "generate", noted)
    keys = {"name": "generate", "eval_num_beams": 3}
    llmtune.train(tiny_recipe(tmp_path, max_steps=1, val_size=1, eval_config=keys, max_new_tokens=2, do_predict=True))
    assert beams == [3, 1]


def test_an_evaluation_that_is_left_while_it_answers_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmtune.training.predict import Predictor

    keys = tiny_recipe(
        tmp_path, sizes={"initializer_range": 0.5}, max_steps=3, val_size=4, eval_strategy="steps", eval_steps=2,
        eval_config="generate", **{**GREEDY, "per_device_eval_batch_size": 1},
    )  # fmt: skip
    whole = llmtune.train({**keys, "output_dir": str(tmp_path / "whole")}).metrics
    evaluations = [row for row in whole if "eval_loss" in row]
    generate, asked = Predictor._generate, []

    def stop(self: Predictor, *arguments: Any) -> Any:
        asked.append(1)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(self, *arguments)

    monkeypatch.setattr(Predictor, "_generate", stop)
    assert llmtune.train(keys).status == "interrupted"
    assert len(asked) == 2
    run = llmtune.train(keys)
    assert run.status == "done"
    found = [row for row in run.metrics if "eval_loss" in row]
    assert [(row["step"], row["eval_rouge-l"]) for row in found] == [
        (row["step"], row["eval_rouge-l"]) for row in evaluations
    ]
