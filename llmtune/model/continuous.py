"""Requests that come one by one are answered together: rows join and leave a batch between two of its steps.

B rows · T tokens · V vocabulary · H heads · D width of a head
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from llmtune.contract.errors import DivergedError, PlanError
from llmtune.contract.generation import AnswerRequest, Deliver, MediaReader, NewToken, ServedModel
from llmtune.model.generate import processors, suppressing
from llmtune.model.penalties import SaidPenalties, SaidPenalty, biased
from llmtune.model.prefill import CACHE
from llmtune.model.prompts import NOTHING, PromptBatch, positions, read_but_last

if TYPE_CHECKING:
    from torch import Tensor


READ_TOKENS = 16384
"""Most tokens of prompts, padding included, that are read at a time where there are several."""


@dataclass(eq=False)
class AnswerRow:
    """A request that is being answered."""

    request: AnswerRequest
    deliver: Deliver
    left: threading.Event = field(default_factory=threading.Event)
    """Set where nobody waits for the answer any more."""
    said: list[int] = field(default_factory=list)
    """The answer's tokens so far."""
    generator: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Make ready to go on after what is said."""
        self.generator = random.Random(self.request.seed)
        for _ in self.said:  # each has taken a number
            self.generator.random()

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens so far."""
        return (*self.request.prompt_ids, *self.said)

    @property
    def most_tokens(self) -> int:
        """Most tokens that there will be."""
        return len(self.request.prompt_ids) + self.request.room

    def tell(self, token: NewToken) -> bool:
        """Deliver a token; whether the answer ends with it."""
        self.said.append(token.id)
        self.deliver(token)
        ended = token.id in self.request.stop or len(self.said) >= self.request.room
        if ended:
            self.deliver(None)
        return ended


class _State(NamedTuple):
    """What a model has read of some rows, padded on the left: all but the last token is in the cache."""

    cache: DynamicCache
    ids_BT: Tensor
    real_BT: Tensor
    """1 where a token is none of padding."""
    moved_B: Tensor
    """By how much less than its number a later token's position is, see `read_but_last`."""


class RowBatch:
    """The rows that one model answers together, and those that wait to join them."""

    def __init__(
        self,
        model: Any,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        media: MediaReader | None = None,
        max_cache_tokens: int | None = None,
    ) -> None:
        """`around` gives a block in which the model answers; `media` reads what prompts show. Rows wait where those
        beside them could come to have more than `max_cache_tokens` together, with padding; one alone does not."""
        require_joinable(model)
        self.model, self.around, self.media, self.max_cache_tokens = model.eval(), around, media, max_cache_tokens
        self.device = next(model.parameters()).device
        self.never = [*suppressing(model.config)]
        self.rows: list[AnswerRow] = []
        self.waiting: deque[AnswerRow] = deque()
        self._state: _State | None = None
        self._most_rows: int | None = None
        """As many as are tried together after an error."""

    @property
    def busy(self) -> bool:
        """Whether there is anything to answer."""
        return bool(self.rows or self.waiting)

    def step(self) -> None:
        """Rows that wait join as far as there is room, and each gets its next token. Those that have come to their end,
        or that nobody waits for, leave.

        After an error rows are read again, half as many at a time, until all have left; one that fails alone ends.
        """
        try:
            self._keep([not row.left.is_set() for row in self.rows])
            self.waiting = deque(row for row in self.waiting if not row.left.is_set())
            while rows := self._portion():
                self._join(rows)
            if self._state is not None:
                self._say_next(self._state)
        except Exception as error:
            rows, self.rows, self._state = self.rows, [], None
            self._try_fewer(rows, error)
        if not self.busy:
            self._most_rows = None

    def _portion(self) -> list[AnswerRow]:
        """Of the rows that wait, those that are read next: as many as there is room for."""
        found: list[AnswerRow] = []
        while self.waiting:
            more = [*found, self.waiting[0]]
            if found and len(more) * max(len(row.ids) for row in more) > READ_TOKENS:
                break
            if more[0].request.shown != more[-1].request.shown:  # what shows something is read by itself
                break
            if not self._has_room([*self.rows, *more]):
                break
            found.append(self.waiting.popleft())
        return found

    def _has_room(self, rows: Sequence[AnswerRow]) -> bool:
        if len(rows) == 1:
            return True
        if self._most_rows is not None and len(rows) > self._most_rows:
            return False
        most = self.max_cache_tokens
        return most is None or len(rows) * max(row.most_tokens for row in rows) <= most

    def _join(self, rows: Sequence[AnswerRow]) -> None:
        """Read what further rows have so far. An error concerns these rows only."""
        try:
            with self.around():
                new = self._read(rows)
        except Exception as error:
            self._try_fewer(rows, error)
            return
        self.rows += rows
        self._state = new if self._state is None else _joined(self._state, new)

    def _try_fewer(self, rows: Sequence[AnswerRow], error: Exception) -> None:
        """Rows that failed together wait again. One that failed alone ends, unless memory lacks for those beside it."""
        if len(rows) == 1 and not (self.rows and isinstance(error, torch.OutOfMemoryError)):
            rows[0].deliver(error.with_traceback(None))  # which would keep tensors
            self._most_rows = None
            return
        self._most_rows = len(self.rows) + len(rows) // 2
        for row in rows:
            row.begin()
        self.waiting.extendleft(reversed(rows))

    def _say_next(self, state: _State) -> None:
        with self.around():
            logits_BV = self._forward(state)
        tokens_B, finite_B = self._chosen(logits_BV, state)
        ids, finite = tokens_B.tolist(), finite_B.tolist()
        told = list(self._told(ids, logits_BV))
        one_B1 = torch.ones_like(tokens_B[:, None])
        self._state = state._replace(
            ids_BT=torch.cat([state.ids_BT, tokens_B[:, None]], 1), real_BT=torch.cat([state.real_BT, one_B1], 1)
        )
        stays = []
        for row, token, sound in zip(self.rows, told, finite, strict=True):
            if not sound:
                row.deliver(DivergedError("the model's logits are not finite, so that it has no answer"))
            stays.append(sound and not row.tell(token))
        self._keep(stays)

    def fail(self, error: Exception) -> None:
        """All rows end with `error`."""
        for row in (*self.rows, *self.waiting):
            row.deliver(error)
        self.rows, self._state = [], None
        self.waiting.clear()

    def _read(self, rows: Sequence[AnswerRow]) -> _State:
        prompts = PromptBatch(
            ids=[row.ids for row in rows], shown=[row.request.shown or NOTHING for row in rows],
            width=max(2, *(len(row.ids) for row in rows)), pad=0, device=self.device, media=self.media,
            given=[len(row.request.prompt_ids) for row in rows],
        )  # fmt: skip
        # Without the model's config every layer keeps all tokens, so that rows can be padded; masks know the windows.
        cache = DynamicCache()
        once, number_B = prompts.distinct()
        _, moved_U = read_but_last(self.model, once, **{CACHE: cache})
        if len(once.ids) < len(rows):
            for layer in _layers(cache):
                layer.keys, layer.values = layer.keys[number_B], layer.values[number_B]
        return _State(cache, prompts.ids_BT, prompts.real_BT, moved_U[number_B])

    def _forward(self, state: _State) -> Tensor:
        """(B, V) float32: the logits after each row's last token, which then is in the cache, too."""
        found = self.model(
            input_ids=state.ids_BT[:, -1:], attention_mask=state.real_BT,
            position_ids=positions(state.real_BT, state.moved_B)[:, -1:], use_cache=True, **{CACHE: state.cache},
        )  # fmt: skip
        return found.logits[:, -1].float()

    def _chosen(self, logits_BV: Tensor, state: _State) -> tuple[Tensor, Tensor]:
        """(B,) the next token of each row, and whether there is one. Rows that are drawn alike are drawn together."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for at, row in enumerate(self.rows):
            c = row.request.config
            alike = (c.do_sample, c.temperature, c.top_p, c.top_k, c.repetition_penalty)
            groups.setdefault(alike, []).append(at)
        biased_BV = biased(logits_BV, [row.request.logit_bias for row in self.rows])
        said = [SaidPenalty(row.said, row.request.presence_penalty, row.request.frequency_penalty) for row in self.rows]
        tokens_B = torch.empty(len(self.rows), dtype=torch.long, device=self.device)
        pads = (state.real_BT.shape[1] - state.real_BT.sum(1)).tolist()
        for places in groups.values():
            at_G = torch.tensor(places, device=self.device)
            ids_GT, scores_GV = state.ids_BT[at_G], biased_BV[at_G]
            config, generators = self.rows[places[0]].request.config, [self.rows[at].generator for at in places]
            penalties = SaidPenalties([said[at] for at in places])
            for process in processors(config, [pads[at] for at in places], generators, [penalties, *self.never]):
                scores_GV = process(ids_GT, scores_GV)
            tokens_B[at_G] = scores_GV.argmax(-1)
        return tokens_B, torch.isfinite(logits_BV.amax(-1))

    def _told(self, ids: Sequence[int], logits_BV: Tensor) -> Iterator[NewToken]:
        for at, (row, token) in enumerate(zip(self.rows, ids, strict=True)):
            if (most := row.request.top_logprobs) is None:
                yield NewToken(token)
                continue
            logs_V = logits_BV[at].log_softmax(-1)
            top = logs_V.topk(most)
            yield NewToken(
                token, logs_V[token].item(), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            )

    def _keep(self, kept: Sequence[bool]) -> None:
        """Only those rows go on, without the padding that they have in common."""
        if all(kept):
            return
        places = [at for at, one in enumerate(kept) if one]
        self.rows = [self.rows[at] for at in places]
        if not places or self._state is None:
            self._state = None
            return
        cache, ids_BT, real_BT, moved_B = self._state
        at_B = torch.tensor(places, device=self.device)
        real_BT = real_BT[at_B]
        first = int(real_BT.argmax(1).min())  # before it, all rows are padding
        for layer in _layers(cache):
            layer.keys, layer.values = layer.keys[at_B, :, first:], layer.values[at_B, :, first:]
        self._state = _State(cache, ids_BT[at_B, first:], real_BT[:, first:], moved_B[at_B])


def require_joinable(model: Any) -> None:
    """PlanError where rows cannot join others between steps, as the model keeps more of them than keys and values."""
    config = model.config.get_text_config()
    plain = all(type(each) in (DynamicLayer, DynamicSlidingWindowLayer) for each in DynamicCache(config=config).layers)
    if not plain or model._is_stateful:
        raise PlanError(
            f"{type(model).__name__} keeps more of a text than keys and values, so that requests cannot be batched as "
            "they come; export it and serve it with vLLM"
        )


def _layers(cache: DynamicCache) -> list[Any]:
    return [layer for layer in cache.layers if isinstance(layer, DynamicLayer) and layer.keys is not None]


def _joined(one: _State, other: _State) -> _State:
    """The rows of both, padded to the same width."""
    width = max(one.ids_BT.shape[1], other.ids_BT.shape[1])
    more, others = (width - state.ids_BT.shape[1] for state in (one, other))
    for mine, theirs in zip(_layers(one.cache), _layers(other.cache), strict=True):
        sides = (0, 0, more, 0), (0, 0, others, 0)
        mine.keys = torch.cat([pad(mine.keys, sides[0]), pad(theirs.keys, sides[1])])
        mine.values = torch.cat([pad(mine.values, sides[0]), pad(theirs.values, sides[1])])
    ids_BT = torch.cat([pad(one.ids_BT, (more, 0)), pad(other.ids_BT, (others, 0))])
    real_BT = torch.cat([pad(one.real_BT, (more, 0)), pad(other.real_BT, (others, 0))])
    return _State(one.cache, ids_BT, real_BT, torch.cat([one.moved_B, other.moved_B]))


class ContinuousServing:
    """Models in this process that answer requests as they come, in a thread of their own: a `Serving`."""

    def __init__(self, models: Sequence[ServedModel], max_cache_tokens: int | None = None) -> None:
        self._batches = {model.name: RowBatch(*model.load(), model.media, max_cache_tokens) for model in models}
        self._arrived: SimpleQueue[AnswerRow | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True, name="llmtune-serve")
        self._thread.start()

    def submit(self, request: AnswerRequest, deliver: Deliver) -> Callable[[], None]:
        row = AnswerRow(request, deliver)
        self._arrived.put(row)
        return row.left.set

    def close(self) -> None:
        self._arrived.put(None)
        self._thread.join()

    @torch.no_grad()
    def _work(self) -> None:
        batches = self._batches.values()
        for device in {batch.device for batch in batches if batch.device.type == "cuda"}:
            torch.cuda.set_device(device)  # each thread starts out on device 0
        while (arrived := self._take(wait=not any(batch.busy for batch in batches))) is not None:
            for row in arrived:
                self._batches[row.request.model].waiting.append(row)
            for batch in batches:
                batch.step()
        for batch in batches:
            batch.fail(ConnectionError("the server is stopping"))

    def _take(self, wait: bool) -> list[AnswerRow] | None:
        """What has arrived, in its order; None where the work is over."""
        found: list[AnswerRow] = []
        while True:
            try:
                row = self._arrived.get(block=wait and not found)
            except Empty:
                return found
            if row is None:
                return None
            found.append(row)
