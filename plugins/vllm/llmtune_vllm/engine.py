"""The engine: prompts and sampling go to the server, tokens come back, and adapters follow the model that trains."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import torch

from llmtune import (
    Answer,
    AnswerRequest,
    ContextFull,
    Deliver,
    GenerateConfig,
    NewToken,
    PlanError,
    ServedModel,
    room_of,
    stop_tokens,
)

from .adapters import EXPORT, objections, require_readable
from .client import Client, require_known
from .ranks import on_first, other_ranks, shared, together
from .server import VllmLost, VllmServer, executable, further

if TYPE_CHECKING:
    from collections.abc import Iterable

    from . import VllmConfig

Watch = Callable[[Sequence[int | None]], bool]
Tokens = list[NewToken]
CERTAIN = 1e-6
"""How far the logarithm of a probability of 1 may be from 0."""


class VllmEngine:
    """An `Engine` that `Serves` and `ReadsFiles`. Where there are several ranks, the first one asks for all."""

    def __init__(self, config: VllmConfig) -> None:
        self.config = config
        self.client: Client | None = None
        self.most_tokens = 0
        self.trained: TrainedAdapter | None = None
        self._name = ""
        """What the server calls the model that answers."""
        self._base = ""

    def check(self, context: Any, model: Any) -> Iterator[str]:
        """What keeps vLLM from answering as a model that trains."""
        try:
            further(self.config.vllm_config)
            if self.config.vllm_server_base_url is None:
                executable(self.config.vllm_command)
        except PlanError as error:
            yield str(error).removeprefix("engine_config").lstrip(".: ")
        yield from objections(model, self.config.vllm_max_lora_rank)

    def open(self, model: ServedModel, write: Callable[[Path], object] | None = None) -> None:
        """Start the server, and load the adapter that does not change."""
        self.close()
        require_same_files(model)
        adapters = int(write is not None or model.adapter is not None)

        def begin() -> tuple[str, str, int]:
            if model.adapter is not None:
                require_readable(model.adapter, self._max_rank)
            server = VllmServer(self.config, model.folder, model.dtype, adapters=adapters, trains=write is not None)
            self.client = Client(server)
            if write is not None:
                require_processed(self.client, self.config.vllm_answer_timeout)
            name = server.base if model.adapter is None else server.load_adapter(model.adapter)
            return name, server.base, server.most_tokens

        try:
            self._name, self._base, self.most_tokens = on_first(begin)
        except BaseException:
            self.close()
            raise
        self.trained = None if write is None else TrainedAdapter(write, self._max_rank)

    @property
    def _max_rank(self) -> int:
        return self.config.vllm_max_lora_rank

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The server's base answers inside."""
        name, self._name = self._name, self._base
        try:
            yield
        finally:
            self._name = name

    def close(self) -> None:
        """End the server, if there is one."""
        if self.trained is not None:
            self.trained.close()
        if self.client is not None:
            self.client.close()
            self.client.server.close()
        self.client = self.trained = None
        self.most_tokens = 0

    def generate(
        self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], config: GenerateConfig, *,
        seeds: Sequence[int] | None = None, stop: Sequence[int] | None = None, watch: Watch | None = None,
    ) -> list[Answer]:  # fmt: skip
        """As `Engine` says. Raises VllmLost where the server is gone or refuses."""
        if not self.most_tokens:
            raise PlanError(
                "engine_config: vllm answers as models that lie on disk, and none was opened; use llmtune's commands, "
                "or engine_config: transformers for a model in memory"
            )
        if self.trained is not None:
            self._name = self.trained.name(model, self.client)
        ends = frozenset(stop_tokens(model, tokenizer) if stop is None else stop)
        if seeds is None:
            seeds = torch.randint(2**62, (len(prompts),)).tolist()

        def asked() -> list[AnswerRequest]:
            return [
                AnswerRequest(
                    model=self._name, prompt_ids=tuple(prompt), config=config, seed=seed, stop=ends,
                    room=self._room(model.config, len(prompt), config),
                    top_logprobs=None if self.trained is None else 0,
                )
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]  # fmt: skip

        said = self._said(together(asked), watch)
        return [
            Answer(
                prompt_ids=tuple(prompt), ids=ids, cut=not ids or ids[-1] not in ends,
                text=str(tokenizer.decode(ids, skip_special_tokens=config.skip_special_tokens)).strip(),
                logps=None if self.trained is None else logps,
            )
            for prompt, (ids, logps) in zip(prompts, map(unzipped, said), strict=True)
        ]  # fmt: skip

    def _room(self, model_config: Any, prompt_tokens: int, config: GenerateConfig) -> int:
        room = min(room_of(model_config, prompt_tokens, config), self.most_tokens - prompt_tokens)
        if room < 1:
            raise ContextFull(
                f"the prompt has {prompt_tokens} tokens, vLLM has room for {self.most_tokens} with its answer; "
                "raise engine_config.vllm_maxlen"
            )
        return room

    def _said(self, requests: list[AnswerRequest], watch: Watch | None) -> list[Tokens]:
        if not other_ranks():
            assert self.client is not None
            return asked_together(self.client, requests, self.config.vllm_answer_timeout, watch)
        # Ranks that share a batch give the same prompts and seeds, and must go on with the same answers.
        every = shared(requests)
        wanted = dict.fromkeys((each.prompt_ids, each.seed) for requests in every for each in requests)
        firsts = {(each.prompt_ids, each.seed): each for requests in reversed(every) for each in requests}

        def ask() -> list[Tokens]:
            assert self.client is not None
            return asked_together(self.client, [firsts[one] for one in wanted], self.config.vllm_answer_timeout)

        found = dict(zip(wanted, on_first(ask), strict=True))
        said = [found[each.prompt_ids, each.seed] for each in requests]
        return said if watch is None else list(watched(said, watch))

    def serve(self, models: Sequence[ServedModel]) -> VllmServing:
        """The models over one base, each by its name."""
        for model in models:
            require_same_files(model)
        first, adapters = models[0], [model.adapter for model in models if model.adapter is not None]
        if others := {model.folder for model in models} - {first.folder}:
            raise PlanError(f"adapters: vllm serves adapters over one base, found {first.folder} and {others.pop()}")
        for adapter in adapters:
            require_readable(adapter, self._max_rank)
        server = VllmServer(self.config, first.folder, first.dtype, adapters=len(adapters))
        names = {}
        try:
            for model in models:
                names[model.name] = server.base if model.adapter is None else server.load_adapter(model.adapter)
        except BaseException:
            server.close()
            raise
        return VllmServing(Client(server), names)


def require_same_files(model: ServedModel) -> None:
    """PlanError where the model's files are not all of it."""
    if model.differs is not None:
        raise PlanError(f"engine_config: vllm reads {model.folder}, but {model.differs}; {EXPORT}")


class VllmServing:
    """A `Serving`: requests go on to the server."""

    def __init__(self, client: Client, names: dict[str, str]) -> None:
        self.client, self.names = client, names

    def submit(self, request: AnswerRequest, deliver: Deliver) -> Callable[[], object]:
        """Begin an answer; calling the result ends it early."""
        require_known(request)
        room = self.client.server.most_tokens - len(request.prompt_ids)
        if room < 1:
            deliver(ContextFull(f"the prompt has {len(request.prompt_ids)} tokens, and vLLM room for fewer"))
            return lambda: None
        request = replace(request, room=min(room, request.room))
        return self.client.submit(request, self.names[request.model], deliver)

    def close(self) -> None:
        """End the answers and the server."""
        self.client.close()
        self.client.server.close()


def require_processed(client: Client, patience: float) -> None:
    """PlanError where the server tells log-probabilities before temperature and cuts: with one token to draw from, that
    of the drawn one is 0 after them."""
    config = GenerateConfig(temperature=1.0, top_k=1)
    probe = AnswerRequest(
        model=client.server.base, prompt_ids=(1, 2, 3), config=config, room=1, seed=0, stop=frozenset(), top_logprobs=0
    )  # some tokens: after one alone, such as that of padding, all may be alike
    ((token,),) = asked_together(client, [probe], patience)
    if token.logprob is None or not abs(token.logprob) <= CERTAIN:
        raise PlanError(
            f"engine_config: vLLM at {client.server.url} tells the probabilities of tokens as they were before "
            "temperature, top_p and top_k, and roll-outs are corrected by those that answers are drawn with; start it "
            "with --logprobs-mode processed_logprobs"
        )


def asked_together(
    client: Client, requests: Sequence[AnswerRequest], patience: float, watch: Watch | None = None
) -> list[Tokens]:
    """The tokens of the answers, in their order. Raises VllmLost where none comes in `patience` seconds."""
    for request in requests:
        require_known(request)
    came: SimpleQueue[tuple[int, NewToken | Exception | None]] = SimpleQueue()
    cancels = [
        client.submit(request, request.model, lambda item, at=at: came.put((at, item)), stream=watch is not None)
        for at, request in enumerate(requests)
    ]
    said: list[Tokens] = [[] for _ in requests]
    ended, step = [False] * len(requests), 0
    try:
        while not all(ended):
            try:
                at, item = came.get(timeout=patience)
            except Empty:
                raise VllmLost(
                    f"engine_config: vLLM at {client.server.url} answered none of {ended.count(False)} prompts in "
                    f"{patience:g} s; raise vllm_answer_timeout where it is only slow"
                ) from None
            if isinstance(item, Exception):
                raise item
            if item is None:
                ended[at] = True
            else:
                said[at].append(item)
            # A step is over when each answer has its token, or none any more.
            while watch and any(len(tokens) > step for tokens in said) and _whole(said, ended, step):
                step += 1
                if watch(_new(said, step)):
                    return [tokens[:step] for tokens in said]
        return said
    finally:
        for cancel in cancels:
            cancel()


def watched(said: Sequence[Tokens], watch: Watch) -> Iterable[Tokens]:
    """Finished answers as far as the watcher lets them go on."""
    for step in range(1, max(map(len, said), default=0) + 1):
        if watch(_new(said, step)):
            return [tokens[:step] for tokens in said]
    return said


def _whole(said: Sequence[Tokens], ended: Sequence[bool], step: int) -> bool:
    return all(over or len(tokens) > step for tokens, over in zip(said, ended, strict=True))


def _new(said: Sequence[Tokens], step: int) -> list[int | None]:
    return [tokens[step - 1].id if len(tokens) >= step else None for tokens in said]


def unzipped(tokens: Tokens) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The tokens of an answer, and the logarithms of their probabilities."""
    logps = (math.nan if token.logprob is None else token.logprob for token in tokens)
    return tuple(token.id for token in tokens), tuple(logps)


class TrainedAdapter:
    """The adapter that trains, as the server has it: written and loaded again where it has changed."""

    def __init__(self, write: Callable[[Path], object], max_rank: int) -> None:
        self.write, self.max_rank = write, max_rank
        self.folder = tempfile.TemporaryDirectory(prefix="llmtune-vllm-")
        self._print: list[int] | None = None
        self._name: str | None = None

    def name(self, model: Any, client: Client | None) -> str:
        """What the server calls the adapter as it is now. Collective."""
        found = fingerprint(model)
        if any(shared(found != self._print)):
            self._print = found
            folder = Path(shared(self.folder.name)[0]) / "adapter"
            self.write(folder)
            self._name = on_first(partial(self._load, client, folder))
        assert self._name is not None
        return self._name

    def _load(self, client: Client | None, folder: Path) -> str:
        assert client is not None
        require_readable(str(folder), self.max_rank)
        name = client.server.load_adapter(str(folder))
        if self._name is not None:
            client.server.unload_adapter(self._name)
        return name

    def close(self) -> None:
        """Remove what was written."""
        self.folder.cleanup()


def fingerprint(model: Any) -> list[int]:
    """What changes where this rank's piece of any tensor that trains does: the sum of its bits, as whole numbers."""
    sums = []
    for tensor in model.parameters():
        if tensor.requires_grad:
            held = getattr(tensor, "_local_tensor", tensor).detach().contiguous()
            bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[held.element_size()]
            sums.append(held.view(bits).sum(dtype=torch.int64))
    return torch.stack(sums).tolist() if sums else []
