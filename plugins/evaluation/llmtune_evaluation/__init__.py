"""What is measured besides the loss: `eval_config: accuracy`, `generate` and `benchmark`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from llmtune import Ge, Plugin, hookimpl


@dataclass(frozen=True, kw_only=True)
class AccuracyConfig:
    """Token accuracy has no keys."""


@dataclass(frozen=True, kw_only=True)
class GenerateEvalConfig:
    """How generated answers are measured."""

    eval_num_beams: Annotated[int, Ge(1)] | None = None
    """Beams of the answers that evaluations in training generate; null is the recipe's `num_beams`."""
    use_stemmer: bool = False
    """Let ROUGE take English words of one stem for the same."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Which questions of lm-evaluation-harness are asked, and how."""

    task: str
    """A task of the harness (`mmlu`, `ceval-valid`, `cmmlu`, `gsm8k`, ...), its name in other trainers' documents
    (`mmlu_test`, `ceval_validation`, `cmmlu_test`), or the path of a task's YAML file."""
    task_dir: str | None = None
    """Folder with the YAML files of more tasks."""
    lang: Literal["en", "zh"] | None = None
    """Language of the questions; null takes the task's own, and another than that is refused."""
    n_shot: Annotated[int, Ge(0)] | None = None
    """Worked examples before each question; null takes the task's own number."""
    batch_size: Annotated[int, Ge(1)] = 4
    """Questions that a rank is asked at a time."""
    limit: Annotated[int, Ge(1)] | None = None
    """Ask only so many questions of each task, for a first look."""
    seed: int = 42
    """What examples are drawn by."""
    apply_chat_template: bool = False
    """Write questions with the chat template, as in training, instead of as plain text."""
    save_dir: str | None = None
    """Folder for the results of `llmtune eval`; null is `benchmarks` in the run's folder."""
    download_mode: Literal["reuse_dataset_if_exists", "reuse_cache_if_exists", "force_redownload"] | None = None
    """Whether the task's data are fetched again; null fetches what is not there."""


def build_accuracy(config: AccuracyConfig) -> Any:
    """The evaluator of tokens."""
    from .accuracy import Accuracy

    return Accuracy()


def build_generate(config: GenerateEvalConfig) -> Any:
    """The evaluator of answers."""
    from .answers import AnswerMetrics

    generation = {} if config.eval_num_beams is None else {"num_beams": config.eval_num_beams}
    return AnswerMetrics(generation=generation, use_stemmer=config.use_stemmer)


def build_benchmark(config: BenchmarkConfig) -> Any:
    """The evaluator with questions of its own."""
    from .benchmark import Benchmark

    keys: dict[str, Any] = {key: value for key, value in asdict(config).items() if key != "save_dir"}
    return Benchmark(**keys, settings=keys)


@hookimpl
def eval_config() -> list[Plugin]:
    """`accuracy`, `generate` and `benchmark`."""
    return [
        Plugin(
            name="accuracy", config=AccuracyConfig, build=build_accuracy,
            summary="The share of trained tokens that the model finds likeliest",
        ),
        Plugin(
            name="generate", config=GenerateEvalConfig, build=build_generate,
            summary="Answers are generated and compared with the rows': BLEU-4, ROUGE-1, ROUGE-2, ROUGE-L, exact match",
            requires=("sacrebleu>=2.4", "rouge-score>=0.1.2", "jieba>=0.42"),
        ),
        Plugin(
            name="benchmark", config=BenchmarkConfig, build=build_benchmark,
            summary="Questions of lm-evaluation-harness: MMLU, C-Eval, CMMLU and any other of its tasks",
            requires=("lm-eval>=0.4.13",),
        ),
    ]  # fmt: skip
