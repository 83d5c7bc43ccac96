"""Benchmarks are the harness's own numbers of the same weights, on one rank and on two, in training and afterwards."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import llmtune
from llmtune.cli import main
from llmtune.contract.errors import PlanError, RecipeError
from llmtune.inference.evaluate import _file, evaluate
from llmtune.testing import in_ranks, tiny_recipe

TASK = """
task: tiny_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: {kind}
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
"""
KINDS = {
    "multiple_choice": 'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\nfewshot_split: test\n',
    "generate_until": 'doc_to_target: "{{choices[answer]}}"\ngeneration_kwargs: {until: [o, "a "], max_gen_toks: 12}\n'
    "metric_list: [{metric: bleu}]\n",
    "loglikelihood": 'doc_to_target: " {{choices[1]}}"\nmetric_list: [{metric: perplexity}]\n',
    "loglikelihood_rolling": 'doc_to_target: "{{question * 90}}"\n',
}
"""Longer than the model takes, in the last."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of each kind over seven questions of different lengths."""
    made = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"What is {'the name of ' * at}{at}?", "answer": at % 3,
         "choices": [f"It is {at}.", f"Nobody knows number {at}, ever.", "Yes"]}
        for at in range(7)
    ]  # fmt: skip
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind, more in KINDS.items():
        (made / f"{kind}.yaml").write_text(TASK.format(rows=made / "rows.jsonl", kind=kind) + more)
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> llmtune.Run:
    """Of a model that has no position beyond its last."""
    made = tmp_path_factory.mktemp("trained")
    return llmtune.train(tiny_recipe(made, "gpt2", {"initializer_range": 0.5}, max_steps=2, learning_rate=1e-2))


def harness(run: llmtune.Run, folder: Path, kind: str, **keys: Any) -> dict[str, float]:
    """The numbers of the harness's own model."""
    model, tokenizer = run.model()
    with patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}):
        found: Any = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3), tasks=[f"tiny_{kind}"], log_samples=False,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False), **keys,
        )  # fmt: skip
    numbers = found["results"][f"tiny_{kind}"]
    return {key.removesuffix(",none"): value for key, value in numbers.items() if isinstance(value, float)}


def asked(path: str, folder: str, kind: str, **keys: Any) -> dict[str, float]:
    (metrics,) = evaluate(
        path, device="cpu", **{"task": f"tiny_{kind}", "task_dir": folder, "batch_size": 3, **keys}
    ).values()
    return metrics


@pytest.mark.parametrize(
    ("kind", "ours", "theirs"),
    [
        ("multiple_choice", {}, {}),
        ("multiple_choice", {"n_shot": 2}, {"num_fewshot": 2, "fewshot_random_seed": 42}),
        ("multiple_choice", {"apply_chat_template": True}, {"apply_chat_template": True}),
        ("generate_until", {}, {}),
        ("loglikelihood", {}, {}),
        ("loglikelihood_rolling", {}, {}),
    ],
    ids=["choice", "shots", "template", "answers", "likelihood", "rolling"],
)
def test_the_numbers_are_the_harness_own(
    kind: str,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    run: llmtune.Run,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And a process with threads is not forked for its standard errors, as a fork of one may never end."""
    expected = harness(run, folder, kind, **theirs)
    monkeypatch.delattr("os.fork")
    found = asked(str(run.output_dir), str(folder), kind, **ours)
    assert expected and {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-4)


def _on_ranks(path: str, folder: str) -> list[dict[str, float]]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    return [asked(path, folder, kind) for kind in KINDS]


def test_a_sharded_run_is_asked_sharded(run: llmtune.Run, folder: Path, tmp_path: Path) -> None:
    alone = _on_ranks(str(run.output_dir), str(folder))
    for found in in_ranks(2, tmp_path / "two", _on_ranks, str(run.output_dir), str(folder)):
        assert [pytest.approx(each, rel=1e-5) for each in alone] == found


def test_the_command_writes_beside_the_run(run: llmtune.Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"task={folder / 'multiple_choice.yaml'}", "limit=3", "device=cpu"]
    assert main(["eval", str(run.output_dir), *given]) == 0, capsys.readouterr().err
    file = run.output_dir / "benchmarks" / "tiny_multiple_choice.json"
    told = json.loads(file.read_text())
    assert f"Wrote {file}" in capsys.readouterr().out
    assert told["task"] == "tiny_multiple_choice" and 0 <= told["metrics"]["acc"] <= 1
    assert told["settings"]["limit"] == 3 and told["settings"]["n_shot"] is None
    results = llmtune.runs(run.output_dir)[0].results
    assert results.items() >= {f"tiny_multiple_choice {name}": value for name, value in told["metrics"].items()}.items()
    assert main(["runs", "show", str(run.output_dir)]) == 0
    assert f"tiny_multiple_choice acc {told['metrics']['acc']:.4g}" in " ".join(capsys.readouterr().out.split())


def test_an_evaluation_file_of_llama_factory_is_asked(
    run: llmtune.Run, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, results = tmp_path / "eval.yaml", tmp_path / "results"
    file.write_text(
        f"model_name_or_path: {run.output_dir}\ntask: {folder / 'multiple_choice.yaml'}\ntemplate: fewshot\n"
        f"n_shot: 2\nlang: en\nbatch_size: 3\nsave_dir: {results}\ntask_dir: elsewhere\n"
    )
    assert main(["eval", str(file), "device=cpu", "limit=4"]) == 0
    told = json.loads((results / "tiny_multiple_choice.json").read_text())
    assert told["metrics"] == asked(str(run.output_dir), str(folder), "multiple_choice", n_shot=2, limit=4, lang="en")
    assert "llmtune: task_dir: it has LLaMA-Factory's own files" in capsys.readouterr().err


def test_benchmarks_are_measured_during_training_and_change_nothing(folder: Path, tmp_path: Path) -> None:
    keys = tiny_recipe(tmp_path, max_steps=3, val_size=3, eval_strategy="steps", eval_steps=1)
    without = llmtune.train(keys)
    block = {"name": "benchmark", "task": str(folder / "multiple_choice.yaml"), "batch_size": 3}
    run = llmtune.train({**keys, "output_dir": str(tmp_path / "asked"), "eval_config": block})
    rows = [row for row in run.metrics if "eval_loss" in row]
    assert len(rows) == 3 and all(0 <= row["eval_tiny_multiple_choice"] <= 1 for row in rows)
    assert [row["loss"] for row in run.metrics if "loss" in row] == [r["loss"] for r in without.metrics if "loss" in r]
    metrics = asked(str(run.output_dir), str(folder), "multiple_choice")
    assert metrics["acc"] == rows[-1]["eval_tiny_multiple_choice"]


@pytest.mark.parametrize(
    ("keys", "error", "said"),
    [
        ({"task": "mmlu_tset"}, PlanError, 'task: found "mmlu_tset", which the harness does not have'),
        ({"task": "mmlu_test", "lang": "zh"}, PlanError, 'lang: found "zh", but mmlu is asked in "en"'),
        ({"task": "arc_easy", "lang": "zh"}, PlanError, 'lang: found "zh", but arc_easy has no language to choose'),
        ({"task": "nowhere.yaml"}, PlanError, "task: there is no file nowhere.yaml"),
        ({"lerning": 1}, RecipeError, r"lerning: no such key\. Known: .*task.*, and what `llmtune schema` lists"),
        ({"tsak": "mmlu"}, RecipeError, r"tsak: no such key\. Did you mean .task"),
        ({}, PlanError, "task: not given"),
    ],
)
def test_what_cannot_be_asked_is_said_before_weights_are_read(
    keys: dict[str, Any], error: type[Exception], said: str, run: llmtune.Run
) -> None:
    with pytest.raises(error, match=said):
        evaluate(run.output_dir, device="cpu", **keys)


def test_questions_that_cannot_be_had_are_told(run: llmtune.Run, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(TASK.format(rows=tmp_path / "nothere.jsonl", kind="loglikelihood_rolling"))
    with pytest.raises(llmtune.LoadError, match="task: the questions of .*t.yaml cannot be read"):
        evaluate(run.output_dir, device="cpu", task=str(tmp_path / "t.yaml"))


def test_each_benchmark_has_its_own_folder() -> None:
    places = [_file("no-run", SimpleNamespace(config=SimpleNamespace(save_dir=each)), "mmlu")  # type: ignore[arg-type]
              for each in ("one", "two", None)]  # fmt: skip
    assert [str(place) for place in places] == ["one/mmlu.json", "two/mmlu.json", "benchmarks/no-run/mmlu.json"]
