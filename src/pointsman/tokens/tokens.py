"""Token ids for requests: at once where they are given or nearly all of them are remembered, else soon, or
not.

Nothing here fails a request: where ids do not come in time the approximate index answers, and ``Found``
says why.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from prometheus_client.metrics_core import Metric

from pointsman.config import Tokens as TokensSettings
from pointsman.endpoints.pool import Pool
from pointsman.errors import SettingsError
from pointsman.observability.telemetry import counter, gauge
from pointsman.tokens.asked import Chat, Texts, asked
from pointsman.tokens.conversation import NotText
from pointsman.tokens.engines import Engines
from pointsman.tokens.found import Found
from pointsman.tokens.memory import Memory
from pointsman.types import Endpoint, InferenceRequest, Tokenized

if TYPE_CHECKING:
    from pointsman.tokens.folder import Model
    from pointsman.tokens.tokenizer import Plan

log = logging.getLogger(__name__)

ANY_MODEL = "*"
AT_ONCE_BYTES = 16_384
"""Chats up to here are rendered and looked up in some 100 us, which is what a thread costs, too; larger
ones go to a thread (bench/micro/tokenise.py).
"""
AT_ONCE_CHARS = 192
"""Text that is tokenised in some 50 us."""
MOST_JOBS = 64
"""Prompts that may wait for a thread."""
COMPARE_ONE_OF = 1000
"""Requests of a model whose ids made here are compared with its engine's; the first is, too."""


Answer = Found | asyncio.Future[Found]


class Tokens:
    """Where the prompts' token ids come from."""

    def __init__(self, settings: TokensSettings, pool: Pool) -> None:
        """``SettingsError`` where a tokenizer that the settings name cannot be used."""
        self._budget_s = settings.budget_s
        self._pool = pool
        self._memory = Memory(settings.cache_bytes)
        self._models = _load(settings, self._memory)
        self._engines = Engines(pool, settings.url)
        self._threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "tokens")
        self._jobs = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._made_here: Counter[tuple[int, type]] = Counter()
        """Prompts by model and kind; those that differed from the engine's are in ``_distrusted``."""
        self._distrusted: set[tuple[int, type]] = set()
        self.found: Counter[str] = Counter()
        """Requests by the source of their ids."""
        self.missing: Counter[str] = Counter()
        """Requests without ids by reason."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """How long the found ones took, by source, in all."""
        self.compared: Counter[str] = Counter()
        """Prompts made here that were ``equal`` to the engine's, or ``differ``."""

    def ask(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> Answer:
        """The ids at once, or a future that is done in ``tokens.budget_s``. ``endpoints`` may serve it."""
        start_s = asyncio.get_running_loop().time()
        wanted, reason = None, ""
        try:
            wanted = asked(request)
        except NotText as exc:
            reason = exc.reason
        if isinstance(wanted, tuple):
            return self._count(Found(wanted, "given"), start_s)
        if reason == "malformed":
            return self._count(Found(reason=reason), start_s)
        model = self._model(request.model, endpoints)
        if wanted is None or model is None or (id(model), type(wanted)) in self._distrusted:
            return self._later(self._from_engine(request, wanted, endpoints, reason), start_s)
        plans = None
        if len(request.body) <= AT_ONCE_BYTES:
            try:
                plans = model.plans(wanted)
            except NotText as exc:
                return self._later(self._from_engine(request, wanted, endpoints, exc.reason), start_s)
            if sum(plan.missing_chars for plan in plans) <= AT_ONCE_CHARS:
                found = _finish(model, wanted, plans)
                self._compare(request, model, wanted, found, endpoints)
                return self._count(found, start_s)
        if self._jobs >= MOST_JOBS:
            return self._count(Found(reason="busy"), start_s)
        self._jobs += 1
        return self._later(self._from_here(request, model, wanted, plans, endpoints), start_s)

    def _model(self, name: str, endpoints: Sequence[Endpoint]) -> Model | None:
        """The tokenizer for ``name``: its own, that of the model it adapts, or the one for any."""
        models = self._models
        if not models:
            return None
        model = models.get(name)
        if model is None and endpoints:
            member = self._pool.members.get(endpoints[0].name)
            for card in member.models_detail if member else ():
                if card.get("id") == name:
                    model = models.get(str(card.get("parent"))) or models.get(str(card.get("root")))
        return model or models.get(ANY_MODEL)

    # -- what takes longer

    def _later(self, work: Coroutine[Any, Any, Found], start_s: float) -> asyncio.Future[Found]:
        """What ``work`` finds, if it does so in time; it goes on anyway, and others find what it left."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Found] = loop.create_future()

        def settle(found: Found) -> None:
            if not answer.done():
                answer.set_result(self._count(found, start_s))

        async def run() -> None:
            try:
                found = await work
            except NotText as exc:
                found = Found(reason=exc.reason)
            except Exception:  # a bug here must not cost the request its answer
                log.exception("token ids could not be found")
                found = Found(reason="failed")
            timer.cancel()
            settle(found)

        timer = loop.call_later(self._budget_s, settle, Found(reason="late"))
        self._begin(run())
        return answer

    async def _from_here(
        self,
        request: InferenceRequest,
        model: Model,
        wanted: Texts | Chat,
        plans: Sequence[Plan] | None,
        endpoints: Sequence[Endpoint],
    ) -> Found:
        def work() -> Found:
            return _finish(model, wanted, model.plans(wanted) if plans is None else plans)

        try:
            found = await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except NotText as exc:
            return await self._from_engine(request, wanted, endpoints, exc.reason)
        finally:
            self._jobs -= 1
        self._compare(request, model, wanted, found, endpoints)
        return found

    async def _from_engine(
        self,
        request: InferenceRequest,
        wanted: Texts | Chat | None,
        endpoints: Sequence[Endpoint],
        reason: str,
    ) -> Found:
        """``reason`` is why it could not be done here."""
        try:
            return await self._engines.ask(request, wanted, endpoints)
        except NotText as exc:
            return Found(reason=reason if exc.reason == "nobody" and reason else exc.reason)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- whether what is made here is right

    def _compare(
        self,
        request: InferenceRequest,
        model: Model,
        wanted: Texts | Chat,
        found: Found,
        endpoints: Sequence[Endpoint],
    ) -> None:
        """Now and then ask the engine the same: it may have another template, or tokenizer, than we think."""
        kind = id(model), type(wanted)
        if self._made_here[kind] % COMPARE_ONE_OF == 0:
            self._begin(self._compared(request, kind, wanted, found, endpoints))
        self._made_here[kind] += 1

    async def _compared(
        self,
        request: InferenceRequest,
        kind: tuple[int, type],
        wanted: Texts | Chat,
        found: Found,
        endpoints: Sequence[Endpoint],
    ) -> None:
        try:
            answer = await self._engines.ask(request, wanted, endpoints)
        except NotText:
            return
        if answer.prompts == found.prompts:
            self.compared["equal"] += 1
            return
        self.compared["differ"] += 1
        self._distrusted.add(kind)
        log.warning(
            "tokens.models: the engine makes other tokens of a %s for %s than the tokenizer named for it, "
            "from token %d on. Has it a chat template or tokenizer of its own? It is asked from now on.",
            "chat" if isinstance(wanted, Chat) else "prompt",
            request.model,
            _first_difference(answer.prompts, found.prompts),
        )

    # -- counts and end

    def _count(self, found: Found, start_s: float) -> Found:
        if found.prompts:
            self.found[found.source] += 1
            self.seconds[found.source] += asyncio.get_running_loop().time() - start_s
        else:
            self.missing[found.reason] += 1
        return found

    def metrics(self) -> Iterator[Metric]:
        """For the metrics page."""
        yield counter(
            "pointsman_token_ids_found",
            "Requests whose prompts are known as token ids, by where the ids came from.",
            ("source",),
            {(source,): count for source, count in self.found.items()},
        )
        yield counter(
            "pointsman_token_ids_missing",
            "Requests that were decided without token ids, by reason.",
            ("reason",),
            {(reason,): count for reason, count in self.missing.items()},
        )
        yield counter(
            "pointsman_token_ids_seconds",
            "What finding token ids took, by where they came from.",
            ("source",),
            {(source,): spent_s for source, spent_s in self.seconds.items()},
        )
        yield counter(
            "pointsman_token_ids_compared",
            "Prompts tokenised here that were compared with the engine's own tokens.",
            ("result",),
            {(result,): count for result, count in self.compared.items()},
        )
        yield gauge(
            "pointsman_token_memory_bytes",
            "Memory charged to texts tokenised lately.",
            (),
            [((), self._memory.used_bytes)],
        )

    def close(self) -> None:
        """Stop everything; answers that are awaited come as ``late``."""
        for task in self._tasks:
            task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._engines.close()


def _load(settings: TokensSettings, memory: Memory) -> Mapping[str, Model]:
    if not settings.models:
        return {}
    try:
        from pointsman.tokens.folder import load
    except ImportError as exc:
        raise SettingsError("tokens.models: needs more packages: pip install 'pointsman[tokens]'") from exc
    loaded: dict[str, Model] = {}
    paths: dict[str, Model] = {}
    for name, path in settings.models.items():
        if path not in paths:
            paths[path] = load(name, path, memory, settings.allow_download)
        loaded[name] = paths[path]
    return loaded


def _finish(model: Model, wanted: Texts | Chat, plans: Sequence[Plan]) -> Found:
    finish, special = model.tokenizer.finish, wanted.add_special
    return Found(tuple(Tokenized(finish(plan, add_special=special)) for plan in plans), "here")


def _first_difference(left: Sequence[Tokenized], right: Sequence[Tokenized]) -> int:
    """Tokens that two batches have in common, in the first prompt that differs."""
    for a, b in zip(left, right, strict=False):
        if a.ids != b.ids:
            shorter = min(a.count, b.count)
            same = (i for i in range(shorter) if a.ids[4 * i : 4 * i + 4] != b.ids[4 * i : 4 * i + 4])
            return next(same, shorter)
    return 0
