"""Whether data, batches and stage fit together: asked of a plan, answered in sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmtune.errors import listed

if TYPE_CHECKING:
    from llmtune.planning import Plan

CONVERSATIONS = ("conversation", "text", "tokens")
"""What a stage learns from that says nothing."""
NOUNS = {"preference": "preferences", "labelled": "labelled answers", "prompt": "prompts"}


def misfits(plan: Plan) -> Iterator[str]:
    """What speaks against training this stage on these data in these batches."""
    assert plan.data is not None
    kind, data = plan.data.train.kind, plan.recipe.data
    noun = NOUNS.get(kind, "conversations")
    for part in plan.parts.at("stage_config"):
        learns = tuple(getattr(part.built, "learns", CONVERSATIONS))
        if kind not in learns and not (kind in CONVERSATIONS and set(learns) & set(CONVERSATIONS)):
            allowed = listed(dict.fromkeys(NOUNS.get(each, "conversations") for each in learns))
            yield (
                f"stage_config: {part.plugin.name} learns from {allowed}, and the data are {noun}; choose a stage for "
                "them, or set data_config if they were read wrongly"
            )
    if data.packing and kind == "prompt":
        yield "packing: found true, but the data are prompts, which are answered one by one; set packing: false"
    if data.packing and not data.neat_packing and kind not in CONVERSATIONS:
        yield f"neat_packing: found false, but the data are {noun}, which must not see each other; set it true"
    if (size := plan.ranks.layout.context) > 1 and kind not in CONVERSATIONS:
        yield (
            f"dist_config: cp_size is {size}, but the loss of {noun} needs whole answers, and a rank has pieces; "
            "set cp_size: 1"
        )
