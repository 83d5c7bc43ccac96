"""Benchmarks of lm-evaluation-harness, asked of the model that llmtune holds: sharded, quantised, with its adapter."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any, BinaryIO, cast
from unittest.mock import patch

import yaml
from lm_eval import evaluator, simple_evaluate, utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from llmtune import AskedModel, LoadError, PlanError, RunContext

NAMES = {
    "mmlu_test": "mmlu", "mmlu_validation": "mmlu", "ceval": "ceval-valid", "ceval_validation": "ceval-valid",
    "cmmlu_test": "cmmlu",
}  # fmt: skip
"""What documents of LLaMA-Factory call tasks, and what the harness does."""
LANGUAGES = {"mmlu": "en", "ceval-valid": "zh", "cmmlu": "zh"}
"""The language in which the harness puts the questions of a task."""
ANSWER_TOKENS = 256
"""Most tokens of an answer where the task does not say."""
GENERATION = ("do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty", "length_penalty")
"""Keys of generation that a task may have."""

_WORK = (
    "import pickle, sys; work, items = pickle.load(sys.stdin.buffer); "
    "pickle.dump([work(item) for item in items], sys.stdout.buffer)"
)
_MOST_PROGRAMS = 16


@cache
def tasks_of(folder: str | None, shipped: bool) -> TaskManager:
    """The tasks of a folder, and those that come with the harness, whose 13,000 files take a while to read."""
    return TaskManager(include_path=folder, include_defaults=shipped)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """An evaluator with the questions of a task."""

    task: str
    """A name of the harness, or the path of a task's YAML file."""
    settings: Mapping[str, Any]
    """The keys of the block."""
    n_shot: int | None = None
    batch_size: int = 4
    limit: int | None = None
    task_dir: str | None = None
    seed: int = 42
    apply_chat_template: bool = False
    lang: str | None = None
    download_mode: str | None = None

    @cached_property
    def name(self) -> str:
        """What the harness calls the task."""
        path = Path(self.task)
        if path.suffix not in (".yaml", ".yml"):
            return NAMES.get(self.task, self.task)
        told = yaml.load(path.read_text(encoding="utf-8"), Loader=_Lenient) if path.is_file() else None
        return str((told or {}).get("task") or path.stem)

    @property
    def metrics(self) -> Sequence[str]:
        return [self.name]

    def check(self, context: RunContext, model: Any) -> Iterator[str]:
        """Tasks that the harness has not, or asks in another language."""
        spoken = LANGUAGES.get(self.name)
        if spoken is None and self.lang not in (None, "en"):  # which LLaMA-Factory takes where a file says none
            yield f'lang: found "{self.lang}", but {self.name} has no language to choose; remove the key'
        elif spoken is not None and self.lang not in (None, spoken):
            yield f'lang: found "{self.lang}", but {self.name} is asked in "{spoken}"; write that or remove the key'
        if Path(self.task).suffix in (".yaml", ".yml"):
            if not Path(self.task).is_file():
                yield f"task: there is no file {self.task}"
        elif self.name not in self._tasks.all_tasks:
            yield (
                f'task: found "{self.task}", which the harness does not have; `lm-eval ls tasks` lists its names, '
                "task_dir names a folder with more, and a path to a YAML file is a task, too"
            )

    @property
    def _tasks(self) -> TaskManager:
        own = tasks_of(self.task_dir, False)
        file = Path(self.task).suffix in (".yaml", ".yml")
        return own if file or self.name in own.all_tasks else tasks_of(self.task_dir, True)

    def measure_model(self, model: AskedModel) -> Mapping[str, Mapping[str, float]]:
        file = Path(self.task).suffix in (".yaml", ".yml")
        task: Any = self.task if file else self.name
        if self.download_mode:
            task = {**_told(task), "dataset_kwargs": {"download_mode": self.download_mode}}
        with _quiet(), _reachable(self.task):
            found: Any = simple_evaluate(
                HarnessModel(model, self.batch_size), tasks=[task], num_fewshot=self.n_shot, limit=self.limit,
                task_manager=self._tasks, apply_chat_template=self.apply_chat_template, log_samples=False,
                random_seed=self.seed, numpy_random_seed=self.seed, torch_random_seed=self.seed,
                fewshot_random_seed=self.seed,
            )  # fmt: skip
        if found is None:  # the harness gives results to the first process of a machine
            return {}
        numbers = {name: _numbers(metrics) for name, metrics in found["results"].items()}
        chief = numbers.pop(self.name, None)
        if not chief:
            raise PlanError(f"task: {self.task} has no metric of its own; name one of {', '.join(sorted(numbers)[:6])}")
        return {self.name: chief, **numbers}


def _told(task: str) -> dict[str, Any]:
    return {"task": task} if Path(task).suffix not in (".yaml", ".yml") else {"include": task}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """`acc,none` as `acc`, and with a filter `exact_match,strict` as `exact_match (strict)`."""
    found = {}
    for key, value in metrics.items():
        name, _, way = key.partition(",")
        if isinstance(value, int | float) and name not in ("alias", "sample_len"):
            found[name if way in ("", "none") else f"{name} ({way})"] = float(value)
    return found


class HarnessModel(TemplateLM):
    """The model as the harness asks it. Each rank has all questions; the model shares them out."""

    def __init__(self, asked: AskedModel, batch_size: int) -> None:
        super().__init__()
        self.asked, self.batch_size, self.tokenizer = asked, batch_size, asked.tokenizer

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt, **self.asked.template_variables,
        ))  # fmt: skip

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        begun = has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        if add_special_tokens is None and begun:
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **given))

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        rows, most = [], self.asked.context_tokens
        for _, context, continuation in requests:
            if len(continuation) > most:
                raise PlanError(
                    f"task: asks for an answer of {len(continuation)} tokens, and the model takes {most}; choose "
                    "another task or model"
                )
            # Of what is too long the end is kept, as the harness does: the last token is asked and not read.
            rows.append(((context + continuation)[-most - 1 :], len(continuation)))
        return self.asked.continuation_logps(rows, self.batch_size)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        windows = [
            [
                (None, *utils.make_disjoint_window(window))
                for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(text), prefix_token=self.prefix_token_id,
                    max_seq_len=self.asked.context_tokens, context_len=1,
                )
            ]
            for (text,) in (request.args for request in requests)
        ]  # fmt: skip
        said = iter(self._loglikelihood_tokens([window for each in windows for window in each]))
        return [sum(next(said)[0] for _ in each) for each in windows]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for at, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(at)
        for group in groups.values():
            given: dict[str, Any] = dict(normalize_gen_kwargs(requests[group[0]].args[1], ANSWER_TOKENS))
            stop, most = given.pop("until"), int(given.pop("max_gen_toks"))
            keys = {key: value for key, value in given.items() if key in GENERATION}
            if not keys.get("do_sample"):
                keys.pop("temperature", None)
            room = self.asked.context_tokens - most
            if room < 1:
                raise PlanError(
                    f"task: asks for answers of {most} tokens, and the model takes {self.asked.context_tokens} with "
                    "the question; choose another task or model"
                )
            prompts = [self.tok_encode(requests[at].args[0])[-room:] for at in group]
            said = self.asked.complete(prompts, self.batch_size, stop=stop, max_new_tokens=most, **keys)
            answers |= zip(group, said, strict=True)
        return [answers[at] for at in range(len(requests))]


class _Lenient(yaml.SafeLoader):
    """Reads a task's file for its name, whatever functions it calls."""


_Lenient.add_multi_constructor("!", lambda loader, suffix, node: None)


@contextlib.contextmanager
def _reachable(task: str) -> Iterator[None]:
    """LoadError where the questions of a task cannot be had."""
    try:
        yield
    except OSError as error:  # what data sets raise of the hub, of files and of the connection
        said = " ".join(str(error).split())
        raise LoadError(
            f"task: the questions of {task} cannot be read ({said}); fetch them where there is a network and set "
            "HF_HUB_OFFLINE=1, or name a YAML file of a task on local data"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness's own lines stay out of the way. Nor does it fork, for standard errors that have no formula: this
    process has threads, of trackers for one, and a lock that one of them holds meanwhile is never let go in a fork,
    which ends no more."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # The harness asks git for the commit of the folder that it is called in; where there is none, git says so.
        commit = patch.object(evaluator, "get_git_commit_hash", lambda: None)
        with commit, patch.object(multiprocessing, "Pool", Programs):
            yield
    finally:
        logger.setLevel(level)


@dataclass
class Programs:
    """What the harness takes for a pool of `count` processes. Each is a Python of its own, which unlike those that
    multiprocessing spawns does not run the user's script again."""

    count: int

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def imap(self, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """The work of all items, in any order."""
        count = min(self.count, _MOST_PROGRAMS, len(items))
        with contextlib.ExitStack() as running:
            command = [sys.executable, "-c", _WORK]
            programs = [running.enter_context(Popen(command, stdin=PIPE, stdout=PIPE)) for _ in range(count)]
            for at, program in enumerate(programs):
                with cast(BinaryIO, program.stdin) as given:
                    pickle.dump((work, items[at::count]), given)
            for program in programs:
                yield from pickle.load(cast(BinaryIO, program.stdout))
