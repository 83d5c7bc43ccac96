"""Generated answers beside those of the rows. Each figure is what its package gives, in per cent."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llmtune import Prediction

CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
ROUGE = {"rouge1": "rouge-1", "rouge2": "rouge-2", "rougeL": "rouge-l"}
"""rouge-score's names and ours, which are those of LLaMA-Factory."""


@dataclass(frozen=True, kw_only=True)
class AnswerMetrics:
    """An evaluator of answers."""

    generation: Mapping[str, Any] = field(default_factory=dict)
    use_stemmer: bool = False
    needs_labels = True
    metrics = ("bleu-4", *ROUGE.values(), "exact_match")

    def measure_answers(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        """BLEU-4 over the corpus; mean F1 of ROUGE and mean exact match over the rows. Nothing without rows."""
        if not predictions:
            return {}
        said, labels = [each.predict for each in predictions], [str(each.label).strip() for each in predictions]
        exact = sum(one.strip() == other for one, other in zip(said, labels, strict=True))
        return {"bleu-4": bleu(said, labels), **self._rouge(said, labels), "exact_match": 100 * exact / len(said)}

    def _rouge(self, said: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
        scores = [self._scorer.score(label, one) for one, label in zip(said, labels, strict=True)]
        return {ours: 100 * sum(each[name].fmeasure for each in scores) / len(scores) for name, ours in ROUGE.items()}

    @cached_property
    def _scorer(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer(list(ROUGE), tokenizer=Words(self.use_stemmer))


def bleu(said: Sequence[str], labels: Sequence[str]) -> float:
    """sacreBLEU of a corpus, whose tokenizer `zh` takes Chinese characters one by one and all else as `13a` does."""
    from sacrebleu import corpus_bleu

    chinese = any(CHINESE.search(text) for text in (*said, *labels))
    return float(corpus_bleu(list(said), [list(labels)], tokenize="zh" if chinese else "13a").score)


class Words:
    """A tokenizer of rouge-score, which by itself knows Latin letters and digits only."""

    def __init__(self, use_stemmer: bool) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._latin = DefaultTokenizer(use_stemmer)

    def tokenize(self, text: str) -> list[str]:
        """Words as rouge-score finds them; in Chinese text words as jieba does, without punctuation."""
        if not CHINESE.search(text):
            return self._latin.tokenize(text)
        import jieba

        jieba.setLogLevel(logging.WARNING)  # it reports the loading of its dictionary
        return [
            word
            for piece in jieba.cut(text)
            for word in ([piece] if CHINESE.search(piece) else self._latin.tokenize(piece))
        ]
