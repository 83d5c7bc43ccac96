"""What rows become, as one number: it changes where `VERSION` of the tokens has to."""

from __future__ import annotations

import hashlib
from itertools import groupby
from pathlib import Path

from llmtune.data.making import VERSION
from llmtune.testing import running

ROWS = (
    ("conversation", {}),
    ("conversation", {"train_on_prompt": True, "default_system": "Be brief."}),
    ("conversation", {"mask_history": True}),
    ("conversation", {"stage_config": "pt"}),
    ("preference", {"stage_config": "dpo"}),
    ("labelled", {"stage_config": "kto"}),
    ("prompt", {"stage_config": "grpo", "reward_config": {"name": "rule", "match": "exact"}}),
)
MEANING = (2, "624bb9afa3e5b8a8936d9ace5f21828fbaa86898bcadd77b9d198c203944090d")


def test_the_version_counts_up_when_rows_become_other_tokens(tmp_path: Path) -> None:
    digest = hashlib.sha256()
    for kind, keys in ROWS:
        plan = running.plan(running.tiny_recipe(tmp_path, kind=kind, **keys))
        samples, decode = plan.data.prepared.train, plan.model.tokenizer.decode
        for start, stop in zip(samples.starts, samples.stops, strict=True):
            tokens = zip(samples.ids[start:stop].tolist(), samples.mask[start:stop].tolist(), strict=True)
            for trained, run in groupby(tokens, lambda pair: pair[1]):  # as text, whatever the tokenizer's merges
                digest.update(f"{trained} {decode([token for token, _ in run])}\n".encode())
    assert (VERSION, digest.hexdigest()) == MEANING, (
        "rows become other tokens than before: count VERSION in llmtune/data/making.py up, and write both here"
    )
