"""What a result depends on besides the recipe's text and the tokens: recorded as hashes, compared on resume."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmtune.contract.errors import CheckpointError, PlanError
from llmtune.distributed.ranks import from_all
from llmtune.model.fingerprint import base_fingerprint
from llmtune.model.loading import only_first_reads
from llmtune.model.source import resolve_model

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan

TEMPLATE = "chat template"
EVALUATION = "evaluation data"
WEIGHTS = "base weights"


def origins(plan: Plan) -> Mapping[str, str]:
    """Name to hash. Recipe keys whose values come from the environment go by their own names."""
    found = dict(plan.recipe.environment)
    if isinstance(plan.model.tokenizer.chat_template, str):
        found[TEMPLATE] = hashlib.sha256(plan.model.tokenizer.chat_template.encode()).hexdigest()
    if (evaluation := plan.data.prepared.evaluation) is not None:
        found[EVALUATION] = evaluation.digest or evaluation.hashed()
    return found


def base_weights(plan: Plan, before: Mapping[str, str]) -> Mapping[str, str]:
    """The origin that is known once the model's files are here. Collective.

    Raises PlanError where ranks have read other files, CheckpointError where the run was started on others. `before`
    are the origins that the checkpoint to continue from has recorded.
    """
    found = None
    if plan.ranks.first or not only_first_reads(plan.parts.one("init_config").built):
        folder = resolve_model(plan.recipe.model, plan.model.hub, weights=True).folder
        found = base_fingerprint(folder, plan.model.ledger)
    everyone = from_all(found)
    for rank, other in enumerate(everyone):
        if other not in (None, everyone[0]):
            error = PlanError(
                f"model: the files of {plan.recipe.model.model} on rank {rank} are not those on rank 0; use the same "
                "files on all machines"
            )
            error.everywhere = True
            raise error
    if before.get(WEIGHTS) not in (None, everyone[0]):
        raise CheckpointError(
            f"model: the files of {plan.recipe.model.model}, or of adapters that are merged into it, are not those "
            f"that the run in {plan.output_dir} was started on; restore them, or start over with --fresh or in another "
            "output_dir"
        )
    return {WEIGHTS: everyone[0]}


def judges(plan: Plan) -> bool:
    """Whether evaluations decide what the run saves or when it ends."""
    train = plan.recipe.train
    return train.load_best_model_at_end or train.early_stopping_patience is not None


def differences(plan: Plan, before: Mapping[str, str]) -> list[str]:
    """Names of what is not as it was when the run was started. `before` are the origins that were recorded then."""
    now, judged = origins(plan), judges(plan)
    skipped = {WEIGHTS} if judged else {WEIGHTS, EVALUATION}
    return [name for name in before if now.get(name) != before[name] and name not in skipped]
