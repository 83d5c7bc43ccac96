"""Laws of engines: answers depend on prompt and seed, end where they should, and leave the model as it was."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmtune.contract.generation import Answer, GenerateConfig, ReadsFiles, ServedModel
from llmtune.distributed.fsdp2 import reshard
from llmtune.testing import running
from llmtune.testing.contract import Broken, Check, Subject
from llmtune.testing.ranks import in_ranks
from llmtune.testing.tiny import tiny_model, tiny_tokenizer

PROMPTS = [[5, 6, 7], [9], [40, 41, 42, 43, 44, 45, 46, 47], [100, 7]]
SEEDS = [11, 12, 13, 14]
GREEDY = GenerateConfig(do_sample=False, max_new_tokens=8)
SAMPLED = GenerateConfig(max_new_tokens=8, temperature=1.5, top_p=1.0)


def laws(subject: Subject) -> list[Check]:
    """All; the one on several ranks where they can be started."""
    found = [
        takes_the_likeliest_token, answers_alone_as_in_a_batch, draws_by_its_seed, ends_where_it_should,
        tells_each_token, leaves_the_model_as_it_was,
    ]  # fmt: skip
    return found + ([answers_alike_on_ranks] if subject.spreads else [])


def takes_the_likeliest_token(subject: Subject, folder: Path) -> None:
    """Without sampling each token is the likeliest one after all that stand before it."""
    model, tokenizer = _model(subject, folder)
    model.eval()
    for prompt, answer in zip(PROMPTS, _answers(subject, model, tokenizer, GREEDY, PROMPTS, SEEDS), strict=True):
        ids = list(prompt)
        for token in answer.ids:
            with torch.no_grad():
                likeliest = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token != likeliest:
                raise Broken(
                    f"the token {token} follows {ids}, where {likeliest} is the likeliest", "Take the largest logit"
                )
            ids.append(token)


def answers_alone_as_in_a_batch(subject: Subject, folder: Path) -> None:
    """A prompt with its seed has one answer, whatever prompts stand beside it and wherever it stands."""
    model, tokenizer = _model(subject, folder)
    for config in (GREEDY, SAMPLED, replace(SAMPLED, repetition_penalty=1.5)):
        alone = [
            _answers(subject, model, tokenizer, config, [prompt], [seed])[0]
            for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
        ]
        together = _answers(subject, model, tokenizer, config, PROMPTS, SEEDS)
        reverse = _answers(subject, model, tokenizer, config, PROMPTS[::-1], SEEDS[::-1])[::-1]
        for one, *others in zip(alone, together, reverse, strict=True):
            if odd := [other for other in others if other != one]:
                raise Broken(
                    f"{list(one.prompt_ids)} is answered {list(one.ids)} alone and {list(odd[0].ids)} in a batch",
                    "Mask padding, penalise no padding, and draw each row's tokens from its own seed",
                )


def draws_by_its_seed(subject: Subject, folder: Path) -> None:
    """The same seed draws the same tokens, other seeds draw others, and torch's generator is not used."""
    model, tokenizer = _model(subject, folder)
    before = torch.get_rng_state()
    first, again = (_answers(subject, model, tokenizer, SAMPLED, [PROMPTS[0]] * 8, range(8)) for _ in range(2))
    if not torch.equal(before, torch.get_rng_state()):
        raise Broken("torch's random state changed", "Draw from generators made of `seeds`")
    if first != again:
        raise Broken("the same seeds draw other tokens the second time", "Draw from generators made of `seeds`")
    if len({answer.ids for answer in first}) == 1:
        raise Broken("eight seeds draw the same tokens", "Draw from generators made of `seeds`")


def ends_where_it_should(subject: Subject, folder: Path) -> None:
    """A stop token is the answer's last, and otherwise the answer is cut at its limit; prompt and text are told."""
    model, tokenizer = _model(subject, folder)
    whole = _answers(subject, model, tokenizer, GREEDY, PROMPTS, SEEDS, stop=())
    for answer in whole:
        if len(answer.ids) != 8 or not answer.cut:
            raise Broken(f"without stop tokens an answer has {len(answer.ids)} tokens of 8", "Go on to the limit")
    stop = whole[0].ids[2]
    for answer, longer in zip(_answers(subject, model, tokenizer, GREEDY, PROMPTS, SEEDS, [stop]), whole, strict=True):
        ids = longer.ids[: longer.ids.index(stop) + 1] if stop in longer.ids else longer.ids
        if (answer.ids, answer.cut) != (ids, stop not in ids):
            raise Broken(f"with the stop token {stop}, {longer.ids} became {answer.ids}", "End with the stop token")
        if answer.text != tokenizer.decode(ids, skip_special_tokens=True).strip():
            raise Broken(f"the text of {ids} is {answer.text!r}", "Decode the answer's tokens and strip the text")
    if [list(answer.prompt_ids) for answer in whole] != PROMPTS:
        raise Broken("`prompt_ids` are not the prompts in their order", "Give each prompt without padding")


def tells_each_token(subject: Subject, folder: Path) -> None:
    """`watch` gets the new token of every answer after each step, None for one that has ended, and True ends all."""
    model, tokenizer = _model(subject, folder)
    seen: list[Sequence[int | None]] = []
    stop = [_answers(subject, model, tokenizer, GREEDY, PROMPTS[:1], SEEDS[:1], stop=())[0].ids[1]]
    made = _answers(subject, model, tokenizer, GREEDY, PROMPTS, SEEDS, stop, lambda new: bool(seen.append(new)))
    for row, answer in enumerate(made):
        if (told := tuple(step[row] for step in seen if step[row] is not None)) != answer.ids:
            raise Broken(f"the watcher saw {told}, and the answer is {answer.ids}", "Call `watch` after each step")
    ended = _answers(subject, model, tokenizer, GREEDY, PROMPTS, SEEDS, (), lambda new: True)
    if odd := [answer for answer in ended if len(answer.ids) > 1]:
        raise Broken(f"`watch` said True and {len(odd[0].ids)} tokens came", "End all answers where it does")


def leaves_the_model_as_it_was(subject: Subject, folder: Path) -> None:
    """Weights, and whether each module trains, are what they were; no gradient is recorded."""
    model, tokenizer = _model(subject, folder)
    model.train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _answers(subject, model, tokenizer, SAMPLED, PROMPTS, SEEDS)
    if [module.training for module in model.modules()] != modes:
        raise Broken("modules are in another mode than before", "Put each module's `training` back")
    if odd := [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])]:
        raise Broken(f"{odd[0]} changed", "Read weights, write none")


def answers_alike_on_ranks(subject: Subject, folder: Path) -> None:
    """Two ranks that a model is spread over, one with one prompt and one with the rest, answer as one process does."""
    keys = subject.keys(folder, per_device_train_batch_size=1)
    (alone,) = in_ranks(1, folder / "one", _on_rank, subject, keys)
    first, second = in_ranks(2, folder / "two", _on_rank, subject, keys)
    for one, shared in zip(alone, [*first, *second], strict=True):
        if one != shared:
            raise Broken(
                f"{list(one.prompt_ids)} is answered {list(one.ids)} on 1 rank and {list(shared.ids)} on 2",
                "Let a rank that is done compute along, and draw from the seeds that are given",
            )


def _on_rank(subject: Subject, keys: dict[str, Any]) -> list[Answer]:
    plan, objective = running.build(keys)
    rows = slice(None)
    if plan.ranks.size > 1:
        rows = slice(1) if plan.ranks.first else slice(1, None)
    found = objective(lambda: _answers(subject, plan.module, plan.tokenizer, SAMPLED, PROMPTS[rows], SEEDS[rows]))
    reshard(objective)
    return found


def _model(subject: Subject, folder: Path) -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer()
    # Weights large enough for earlier tokens to decide the answer.
    values: dict[str, Any] = {"vocab_size": len(tokenizer), "initializer_range": 0.5, **subject.sizes}
    model = tiny_model(subject.family, **values)
    if isinstance(subject.built(), ReadsFiles):
        model.name_or_path = str(folder / "model")
        if not (folder / "model").exists():
            model.save_pretrained(folder / "model")
    return model, tokenizer


def _answers(
    subject: Subject, model: Any, tokenizer: Any, config: GenerateConfig, prompts: Any, seeds: Any, stop: Any = None,
    watch: Any = None,
) -> list[Answer]:  # fmt: skip
    engine = subject.built()
    if not isinstance(engine, ReadsFiles):
        return engine.generate(model, tokenizer, prompts, config, seeds=list(seeds), stop=stop, watch=watch)
    engine.open(ServedModel(name="model", folder=model.name_or_path, load=lambda: (model, nullcontext)))
    with closing(engine):
        return engine.generate(model, tokenizer, prompts, config, seeds=list(seeds), stop=stop, watch=watch)
