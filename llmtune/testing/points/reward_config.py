"""Laws of rewards: every answer has its number, which depends on it alone, and asking for it changes nothing."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmtune.contract.generation import Completion
from llmtune.distributed.fsdp2 import reshard
from llmtune.testing import running
from llmtune.testing.contract import Broken, Check, Subject
from llmtune.testing.ranks import in_ranks

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan

Scores = Sequence[float | None]


def laws(subject: Subject) -> list[Check]:
    """All; the one on several ranks where they can be started."""
    found = [scores_every_answer, scores_an_answer_alone_as_among_others, says_the_same_again, changes_nothing]
    return found + ([scores_alike_on_ranks] if subject.spreads else [])


def scores_every_answer(subject: Subject, folder: Path) -> None:
    """Each answer has a finite number, or None where there is nothing to say, and no answers have none."""
    judge = Judge(subject.keys(folder))
    for answers in (judge.answers, []):
        scores = judge.raw(answers)
        if not isinstance(scores, Sequence) or len(scores) != len(answers):
            raise Broken(f"{len(answers)} answers got {scores!r:.200}", "Return a list with one entry for each answer")
        for score, answer in zip(scores, answers, strict=True):
            number = isinstance(score, int | float) and math.isfinite(score)
            if score is not None and not number:
                raise Broken(
                    f"the answer {answer.answer!r} got {score!r}",
                    "Return a finite number, or None where the reward says nothing of an answer",
                )


def scores_an_answer_alone_as_among_others(subject: Subject, folder: Path) -> None:
    """An answer's number does not depend on the answers beside it, nor on where it stands among them."""
    judge = Judge(subject.keys(folder))
    together, reverse = judge.scores(judge.answers), judge.scores(judge.answers[::-1])[::-1]
    for answer, *found in zip(judge.answers, together, reverse, strict=True):
        (alone,) = judge.scores([answer])
        if odd := [score for score in found if not alike(subject, score, alone)]:
            raise Broken(
                f"the answer {answer.answer!r} is worth {alone} alone and {odd[0]} among others",
                "Score each answer by itself; what compares answers is the stage's affair",
            )


def says_the_same_again(subject: Subject, folder: Path) -> None:
    """The same answers have the same numbers the second time."""
    judge = Judge(subject.keys(folder))
    first = judge.scores(judge.answers)
    for answer, before, after in zip(judge.answers, first, judge.scores(judge.answers), strict=True):
        if not alike(subject, before, after):
            raise Broken(
                f"the answer {answer.answer!r} was worth {before} and then {after}",
                "Keep nothing from call to call, and draw no random numbers",
            )


def changes_nothing(subject: Subject, folder: Path) -> None:
    """Scoring draws from no global random state and leaves answers, their columns and the model as they were."""
    judge = Judge(subject.keys(folder))
    model = judge.plan.model.module
    before = torch.get_rng_state(), random.getstate(), [module.training for module in model.modules()]
    answers, weights = copy.deepcopy(judge.answers), {n: t.clone() for n, t in model.state_dict().items()}
    judge.scores(judge.answers)
    if not torch.equal(before[0], torch.get_rng_state()) or before[1] != random.getstate():
        raise Broken("a global random state changed", "Draw from a generator of your own, or better not at all")
    if answers != judge.answers:
        raise Broken("an answer or its columns changed", "Work on copies")
    if before[2] != [module.training for module in model.modules()]:
        raise Broken("modules of the trained model are in another mode than before", "Leave the trained model alone")
    if odd := [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])]:
        raise Broken(f"{odd[0]} changed", "Leave the trained model alone")


def scores_alike_on_ranks(subject: Subject, folder: Path) -> None:
    """Two ranks, one with one answer and then with none, give the numbers that one process gives."""
    keys = subject.keys(folder, per_device_train_batch_size=1)
    (alone,) = in_ranks(1, folder / "one", _on_rank, keys)
    first, second = in_ranks(2, folder / "two", _on_rank, keys)
    for at, (one, shared) in enumerate(zip(alone, [*first, *second], strict=True)):
        if not alike(subject, one, shared):
            raise Broken(
                f"answer {at + 1} is worth {one} on 1 rank and {shared} on 2",
                "Depend on the answer alone, and let all ranks call what is collective equally often",
            )


def _on_rank(keys: dict[str, Any]) -> list[float | None]:
    judge = Judge(keys)
    rows = slice(None)
    if judge.plan.ranks.size > 1:
        rows = slice(1) if judge.plan.ranks.first else slice(1, None)
    found = list(judge.scores(judge.answers[rows]))
    judge.scores([] if judge.plan.ranks.first else judge.answers[:3])
    return found


def alike(subject: Subject, one: float | None, other: float | None) -> bool:
    """Whether two numbers differ by no more than rounding in another batch may change."""
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=subject.tolerance, abs_tol=subject.tolerance)


class Judge:
    """A reward within a run on a tiny model, and answers to ask it about."""

    def __init__(self, keys: dict[str, Any]) -> None:
        self.plan, self.objective = running.start(keys)
        (part,) = self.plan.parts.at("reward_config")
        self.reward = part.built
        outer = self.objective.context
        self.context = outer.asking(*outer.rollouts.further)
        self.answers = made_up(self.plan)

    def raw(self, answers: Sequence[Completion]) -> Any:
        """What the reward returns, within the model's forward as in a run. Collective."""
        with torch.no_grad():
            found = self.objective(lambda: self.reward.score(answers, self.context))
        reshard(self.objective)
        return found

    def scores(self, answers: Sequence[Completion]) -> Scores:
        """The same, where every answer has its entry. Raises Broken."""
        found = self.raw(answers)
        if len(found) != len(answers):
            raise Broken(f"{len(answers)} answers got {len(found)} numbers", "Return one entry for each answer")
        return found


def made_up(plan: Plan) -> list[Completion]:
    """Answers to the first prompts of the data: right, wrong, long, empty and cut ones."""
    samples, tokenizer = plan.data.batches.samples, plan.model.tokenizer
    found = []
    for at in range(6):
        number = at % len(samples)
        prompt, columns = samples.sample(number)[0].tolist(), samples.columns_of(number)
        right = str(columns.get("answer", at))
        texts = (f"It is {right}.", "No.", right, "", f"I say {right}, and what I say is true." * 2, f"It is {right}")
        ids, cut = tokenizer(texts[at], add_special_tokens=False)["input_ids"], at == 5
        found.append(
            Completion(
                prompt=tokenizer.decode(prompt), answer=texts[at], prompt_ids=tuple(prompt), cut=cut, columns=columns,
                ids=tuple(ids) if cut else (*ids, tokenizer.eos_token_id),
            )
        )  # fmt: skip
    return found
