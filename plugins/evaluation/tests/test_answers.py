"""BLEU, ROUGE and exact match are the packages' own numbers; Chinese text is read as words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jieba
import pytest
import sacrebleu
from llmtune_evaluation.answers import AnswerMetrics, Words
from rouge_score.rouge_scorer import RougeScorer

import llmtune
from llmtune import PlanError, Prediction
from llmtune.testing import tiny_recipe

ENGLISH = [
    ("The cat sat on the mat today.", "The cat sat on the mat."),
    ("It is 12 o'clock now, I think.", "It is 12 o'clock."),
    ("Yes.", "Yes."),
    ("", "Nothing was said."),
]
CHINESE = [
    ("\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002", "\u4eca\u5929\u7684\u5929\u6c14\u975e\u5e38\u597d\u3002"),
    ("\u6211\u7231\u5317\u4eac\u5929\u5b89\u95e8", "\u6211\u7231\u5317\u4eac\u5929\u5b89\u95e8"),
    ("\u6a21\u578b GPT-4 \u5f88\u5f3a", "GPT-4 \u662f\u5f3a\u6a21\u578b"),
]


def measured(pairs: list[tuple[str, str]], **keys: Any) -> dict[str, float]:
    rows = [Prediction(row=f"r:{at}", prompt="", predict=a, label=b, cut=False) for at, (a, b) in enumerate(pairs)]
    return dict(AnswerMetrics(**keys).measure_answers(rows))


def test_bleu_is_sacrebleus_of_the_corpus() -> None:
    said, labels = [a for a, _ in ENGLISH], [b for _, b in ENGLISH]
    assert measured(ENGLISH)["bleu-4"] == sacrebleu.corpus_bleu(said, [labels]).score
    said, labels = [a for a, _ in CHINESE], [b for _, b in CHINESE]
    assert measured(CHINESE)["bleu-4"] == sacrebleu.corpus_bleu(said, [labels], tokenize="zh").score
    assert 20 < measured(CHINESE)["bleu-4"] < 100


@pytest.mark.parametrize("use_stemmer", [False, True])
def test_rouge_is_rouge_scores_own_mean(use_stemmer: bool) -> None:
    pairs = [*ENGLISH, ("He walks dogs", "He walked a dog")]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=use_stemmer)
    found = measured(pairs, use_stemmer=use_stemmer)
    for theirs, ours in (("rouge1", "rouge-1"), ("rouge2", "rouge-2"), ("rougeL", "rouge-l")):
        scores = [scorer.score(label, said)[theirs].fmeasure for said, label in pairs]
        assert found[ours] == pytest.approx(100 * sum(scores) / len(scores), abs=1e-12)


def test_chinese_is_split_by_jieba_and_compared_by_words() -> None:
    said, label = CHINESE[0]
    words = [[word for word in jieba.cut(text) if word != "\u3002"] for text in (said, label)]
    assert [Words(False).tokenize(text) for text in (said, label)] == words
    same = len(set(words[0]) & set(words[1]))  # no word comes twice
    precision, recall = same / len(words[0]), same / len(words[1])
    by_hand = 100 * 2 * precision * recall / (precision + recall)
    assert measured(CHINESE[:1])["rouge-1"] == pytest.approx(by_hand)
    assert measured(CHINESE[1:2]) == pytest.approx(
        {"bleu-4": 100, "rouge-1": 100, "rouge-2": 100, "rouge-l": 100, "exact_match": 100}
    )
    assert RougeScorer(["rouge1"]).score(said, said)["rouge1"].fmeasure == 0  # what its own words would say
    assert "gpt" in Words(False).tokenize(CHINESE[2][0])


def test_exact_match_is_a_share_of_the_rows() -> None:
    assert measured(ENGLISH)["exact_match"] == 25
    assert measured([(" Yes.\n", "Yes.")])["exact_match"] == 100
    assert measured([]) == {}


def test_evaluations_and_predictions_report_what_the_answers_say(tmp_path: Path) -> None:
    keys = tiny_recipe(
        tmp_path, max_steps=2, val_size=4, eval_config={"name": "generate", "eval_num_beams": 2}, do_sample=False,
        max_new_tokens=6, do_predict=True, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="eval_rouge-l", greater_is_better=True, load_best_model_at_end=True, save_steps=1,
    )  # fmt: skip
    run = llmtune.train(keys)
    evaluations = [row for row in run.metrics if "eval_loss" in row]
    assert len(evaluations) == 2
    assert all(0 <= row[f"eval_{name}"] <= 100 for row in evaluations for name in AnswerMetrics.metrics)
    found = llmtune.predict(tmp_path / "run", tmp_path / "chats.jsonl", output_dir=str(tmp_path / "again"))
    pairs = [(row["predict"], row["label"]) for row in found.rows]
    assert found.metrics == {**{f"predict_{n}": v for n, v in measured(pairs).items()},
                             "predict_rows": 24, "predict_cut": sum(row["cut"] for row in found.rows)}  # fmt: skip
    own = json.loads((tmp_path / "run" / "predict_results.json").read_text())
    assert set(own) == {*(f"predict_{name}" for name in AnswerMetrics.metrics), "predict_rows", "predict_cut"}
    assert own["predict_rows"] == 4


def test_rows_without_answers_have_nothing_to_compare(tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text('{"messages": [{"role": "user", "content": "Hello?"}]}\n')
    keys = tiny_recipe(tmp_path)
    with pytest.raises(PlanError, match="eval_config: generate compares answers .* none of the 1 row has one"):
        llmtune.predict(
            keys["model"], {"path": str(tmp_path / "questions.jsonl"), "format": "prompt"}, eval_config="generate"
        )
