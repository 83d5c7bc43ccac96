"""The Python API: `train`, `plan`, `build`, `load`, `predict`, and the `Run` they give."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llmtune.contract.errors import CheckpointError, PlanError
from llmtune.contract.schema import Ge, checks_arguments
from llmtune.terminal import in_notebook, preformatted, quiet_imports, show_doing
from llmtune.training import run_folder

if TYPE_CHECKING:
    from llmtune.contract.launching import Launcher, LaunchRequest, Machines
    from llmtune.cost.priced import PricedPlan
    from llmtune.inference.predict import Predictions
    from llmtune.recipe.recipe import Recipe
    from llmtune.recipe.registry import Registry


Count = Annotated[int, Ge(1)]


class Run:
    """A run on disk: its metrics, its model, what can be made of it."""

    def __init__(
        self,
        folder: str | Path,
        *,
        answers: list[tuple[str, str, str]] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.output_dir = Path(folder)
        # Given only where true, as the key is not one that a run may decide.
        self._trust: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
        self._answers = answers
        self._conversation: Any = None
        self._generation: dict[str, Any] = {}
        self._plan: Any = None

    @property
    def status(self) -> str:
        """`done`, `interrupted`, `running` or `failed`."""
        return str(run_folder.read_record(self.output_dir).get("status", "unknown"))

    @property
    def answers(self) -> list[tuple[str, str, str]]:
        """(question, answer before, answer after) of the recipe's `sample_prompts`."""
        if self._answers is None:
            recorded = run_folder.read_record(self.output_dir).get("answers") or []
            self._answers = [(question, before, after) for question, before, after in recorded]
        return self._answers

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One dict per line: step, epoch, loss, grad_norm, learning_rate, tokens, tokens_per_second,
        peak_memory_bytes, and of an evaluation eval_loss."""
        from llmtune.training.log import read_metrics

        return read_metrics(self.output_dir)

    @checks_arguments
    def plot(self, path: str | Path | None = None) -> Any:
        """Curves of loss, learning rate, gradient norm and speed; a matplotlib Figure, saved if `path` is given."""
        from llmtune.training.plot import plot_metrics

        return plot_metrics(self.metrics, Path(path) if path else None)

    def model(self) -> tuple[Any, Any]:
        """The trained model (adapter in place) and its tokenizer, loaded once, on the best device here."""
        plan = self._opened()
        return plan.module, plan.tokenizer

    def _opened(self) -> Any:
        if self._plan is None:
            from llmtune.inference.reopen import fill, open_plan

            plan = open_plan(self.output_dir, **self._trust)
            fill(plan, self.output_dir)
            self._plan = plan
        return self._plan

    @checks_arguments
    def chat(
        self, text: str | Sequence[Mapping[str, Any]], *, images: Sequence[Any] = (), videos: Sequence[Any] = (),
        audios: Sequence[Any] = (), **generation: Any,
    ) -> str:  # fmt: skip
        """Answer `text`, continuing the conversation, or a list of messages, which begins another.

        `images`, `videos` and `audios` (files, data URLs, bytes, or pictures of Pillow) are shown where `<image>`,
        `<video>` and `<audio>` stand in `text`, else before it; contents of messages may have parts that show them, in
        OpenAI's shape. Other keywords are generation parameters (`temperature=0.2`), from this answer on. Raises
        RecipeError for a wrong one, and DataError for what cannot be shown.
        """
        if self._conversation is None or generation:
            from llmtune.inference.chat import conversation_for, generate_config
            from llmtune.inference.reopen import recipe_of

            recipe, given = recipe_of(self.output_dir, **self._trust), {**self._generation, **generation}
            config = generate_config(recipe, given)
            if self._conversation is None:
                self._conversation = conversation_for(recipe, self._opened(), config)
            self._conversation.config, self._generation = config, given
        from llmtune.inference.chat import asked

        return asked(self._conversation, text, image=images, video=videos, audio=audios)

    @checks_arguments
    def reward(
        self, answer: str | Sequence[Mapping[str, Any]], question: str | None = None, *, images: Sequence[Any] = (),
        videos: Sequence[Any] = (), audios: Sequence[Any] = (),
    ) -> float:  # fmt: skip
        """What a trained reward model (stage_config rm) gives an `answer` to a `question`, or messages that end with an
        answer; `images`, `videos` and `audios` are shown as in `chat`. Raises PlanError where the run trained no reward
        model."""
        from llmtune.inference.prompts import prompt_writer
        from llmtune.inference.reopen import recipe_of
        from llmtune.inference.reward import reward_of

        asked = [] if question is None else [{"role": "user", "content": question}]
        messages = [*asked, {"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        plan = self._opened()
        recipe = recipe_of(self.output_dir, **self._trust)
        writer = prompt_writer(recipe, plan, default_system=recipe.data.default_system)
        return reward_of(plan.module, writer, messages, image=images, video=videos, audio=audios)

    @checks_arguments
    def predict(self, dataset: Any = None, *, nproc: Count | None = None, **keys: Any) -> Predictions:
        """Answer the rows of `dataset` (left out: of the recipe's `eval_dataset`); see `llmtune.predict`."""
        return predict(self.output_dir, dataset, nproc=nproc, **{**self._trust, **keys})

    @checks_arguments
    def export(self, export_dir: str | Path, **keys: Any) -> Path:
        """Merge the adapter into its base and write a plain model; keys as `llmtune export` takes them."""
        from llmtune.inference.export import export

        return export(self.output_dir, export_dir=str(export_dir), **{**self._trust, **keys})

    def __repr__(self) -> str:
        losses = [row["loss"] for row in self.metrics if row.get("loss") is not None]
        curve = f", loss {losses[0]:.4f} -> {losses[-1]:.4f}" if losses else ""
        return f"Run({str(self.output_dir)!r}, {self.status}{curve})"

    def _repr_html_(self) -> str:
        from html import escape

        from llmtune.training.loss_table import loss_table

        # Notebooks put what is in cells, mostly numbers, to the right.
        rows = [
            "".join(f'<{cell} style="text-align: left; vertical-align: top">{escape(text)}</{cell}>' for text in texts)
            for cell, texts in [("th", ("question", "before", "after")), *(("td", texts) for texts in self.answers)]
        ]
        table = f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>" if self.answers else ""
        return f"<b>{escape(repr(self))}</b>{table}{preformatted(loss_table(self.metrics))}"


def _recipe_and_registry(recipe: Any, overrides: Mapping[str, Any]) -> tuple[Any, Any]:
    from llmtune.recipe.recipe import load_recipe
    from llmtune.recipe.registry import Registry

    quiet_imports()
    if in_notebook():
        show_doing()
    return load_recipe(recipe, overrides), Registry()


@checks_arguments
def train(
    recipe: str | Path | Mapping[str, Any], *, nproc: Count | None = None, fresh: bool = False, **overrides: Any
) -> Run:
    """Train as the recipe says (a file or a mapping; keywords override keys) and return the run.

    `nproc` starts that many ranks on this machine; by default one per GPU. `fresh` starts over where `output_dir` holds
    a run, finished or not, and deletes what that one wrote. Raises subclasses of `LlmtuneError`.
    """
    from llmtune.distributed.launch import under_launcher
    from llmtune.recipe.parts import launcher_of

    loaded, registry = _recipe_and_registry(recipe, overrides)
    loaded = replace(loaded, fresh=fresh)
    if not under_launcher():
        launcher = launcher_of(loaded, registry)
        if launcher.starts(launch_request(loaded, ranks=nproc)):
            return _train_in_processes(loaded, launcher, nproc)
    from llmtune.cost import estimate
    from llmtune.training.report import print_outcome
    from llmtune.training.run import train_here

    outcome = train_here(loaded, registry, estimate)
    print_outcome(outcome)
    trust = loaded.model.trust_remote_code
    return Run(outcome.plan.output_dir, answers=outcome.answers, trust_remote_code=trust)


def launch_request(recipe: Recipe, words: Sequence[str] = (), **options: Any) -> LaunchRequest:
    """What a launcher is asked for a run of `recipe`, whose ranks run `llmtune train <words>`."""
    import sys

    from llmtune.contract.launching import LaunchRequest

    return LaunchRequest(
        command=(sys.executable, "-m", "llmtune", "train", *words), name=recipe.name, device=recipe.train.device,
        output_dir=Path(recipe.train.output_dir or ""), **options,
    )  # fmt: skip


def _train_in_processes(recipe: Recipe, launcher: Launcher, nproc: int | None) -> Run:
    import tempfile

    from llmtune.distributed.launch import LaunchError, write_temporary_recipe
    from llmtune.distributed.stopping import EXIT_INTERRUPTED
    from llmtune.training.follow import growing_curve

    if not launcher.waits:
        name = recipe.blocks["launch_config"][0][0]
        raise PlanError(
            f"launch_config: {name} hands a run over to run later, and a recipe in Python may be gone by then; "
            "write it to a file and run `llmtune train FILE`"
        )
    folder = Path(recipe.train.output_dir or "")
    with tempfile.TemporaryDirectory() as scratch:
        path = write_temporary_recipe({**recipe.tree, "output_dir": str(folder)}, Path(scratch))
        words = [str(path), *(["--fresh"] if recipe.fresh else [])]
        with growing_curve(folder):
            code = launcher.launch(launch_request(recipe, words, ranks=nproc))
    if code not in (0, EXIT_INTERRUPTED):
        raise LaunchError(f"a rank of the run failed with exit code {code}; its message is above")
    return Run(folder, trust_remote_code=recipe.model.trust_remote_code)


@checks_arguments
def plan(
    recipe: str | Path | Mapping[str, Any],
    *,
    nproc: Count | None = None,
    ranks: Count | None = None,
    device: str | None = None,
    **overrides: Any,
) -> PricedPlan:
    """Resolve everything without reading weights or touching a device; print the result to see it.

    `nproc` plans for so many ranks of this machine. `ranks` and `device` (`h100`, `24GB`) describe a machine that need
    not be this one; the plan's `cost` says what a step takes there. `auto`, `cpu` and `cuda` are the recipe's key.
    """
    from llmtune.planning.devices import DEVICE_KEY

    if device in DEVICE_KEY:
        overrides, device = {**overrides, "device": device}, None
    loaded, registry = _recipe_and_registry(recipe, overrides)
    return plan_for(loaded, registry, nproc=nproc, ranks=ranks, described=device)


def plan_for(
    recipe: Recipe, registry: Registry, *, nproc: int | None, ranks: int | None, described: str | None,
    machines: Machines | None = None,
) -> PricedPlan:  # fmt: skip
    """The plan of a recipe for this machine and others like it, or for `ranks` of a described device, with its cost."""
    from llmtune.contract.launching import Machines
    from llmtune.cost.priced import PricedPlan
    from llmtune.distributed.launch import default_ranks
    from llmtune.distributed.ranks import Ranks
    from llmtune.planning.decisions import as_decided
    from llmtune.planning.devices import chosen_device
    from llmtune.planning.make import make_plan
    from llmtune.recipe.parts import launcher_of
    from llmtune.training.resume import decided_before, previewed

    device, target = chosen_device(recipe.train.device, described, ranks is not None)
    request = launch_request(recipe, ranks=nproc, machines=machines or Machines())
    size = ranks or launcher_of(recipe, registry).ranks(request)
    size = size or (1 if described else default_ranks(recipe.train.device))
    if target is None:
        recipe = as_decided(recipe, decided_before(recipe))
    made = make_plan(recipe, registry, Ranks(size=size), device, target=target)
    return PricedPlan(**vars(previewed(made)))


@checks_arguments
def build(recipe: str | Path | Mapping[str, Any], **overrides: Any) -> tuple[Any, Any]:
    """The composed model, with weights, and its tokenizer: for notebooks and own loops. One process."""
    from llmtune.distributed.ranks import Ranks, pick_device
    from llmtune.planning.make import make_model_plan, make_plan
    from llmtune.training.building import build_objective

    loaded, registry = _recipe_and_registry(recipe, overrides)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise PlanError("llmtune.build makes a model in one process; under torchrun use llmtune.train")
    # One process: there is nothing to arrange.
    loaded = replace(loaded, blocks={point: found for point, found in loaded.blocks.items() if point != "dist_config"})
    device = pick_device(loaded.train.device)
    if loaded.data.dataset is not None:
        made = make_plan(loaded, registry, Ranks(), device).model
    else:
        made = make_model_plan(loaded, registry, Ranks(), device, "build")
    return build_objective(made).model, made.tokenizer


@checks_arguments
def predict(model: str | Path, dataset: Any = None, *, nproc: Count | None = None, **keys: Any) -> Predictions:
    """Answer every row of `dataset` with a run, a checkpoint, a model folder or a hub id.

    The answers go to a file, which a second call continues; `rows` of the result has them in the order of the data.

    `keys` are keys of a recipe (`max_new_tokens=64`, `per_device_eval_batch_size=8`), and `output_dir`, the folder that
    is written to. `nproc` starts that many ranks on this machine; by default one per GPU. Raises subclasses of
    `LlmtuneError`.
    """
    import json

    from llmtune.distributed.launch import LaunchError, default_ranks, launch, under_launcher
    from llmtune.inference.predict import Predictions, Request
    from llmtune.inference.predict import predict as predict_here
    from llmtune.recipe.text import plain

    quiet_imports()
    if in_notebook():
        show_doing()
    keys |= {} if dataset is None else {"dataset": dataset}
    ranks = nproc or default_ranks(keys.get("device", "auto"))
    if ranks == 1 or under_launcher():
        return predict_here(model, **keys)
    words = [f"{key}={json.dumps(plain(value, key))}" for key, value in keys.items()]
    code = launch(["predict", str(model), *words], ranks)
    if code:
        raise LaunchError(f"a rank failed with exit code {code}; its message is above")
    return Predictions(Request.of(model, keys).folder)


@checks_arguments
def load(run_dir: str | Path, *, trust_remote_code: bool = False) -> Run:
    """Reopen a run; `trust_remote_code` lets its model's own code run. Raises CheckpointError if there is none."""
    if not (Path(run_dir) / "run.json").exists():
        raise CheckpointError(f"{run_dir}: holds no run of llmtune (no run.json)")
    return Run(run_dir, trust_remote_code=trust_remote_code)
