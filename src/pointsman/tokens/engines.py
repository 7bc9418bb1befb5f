"""Asks engines what the tokens of a prompt are: vLLM's render, which tells of media as well, else its
``/tokenize``. So models work whose tokenizer only their own code knows.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Raw

from pointsman.api.token_ids import Id, pack, rendered
from pointsman.config import Endpoint as EndpointSettings
from pointsman.config import split_url
from pointsman.endpoints.fetch import Fetcher
from pointsman.endpoints.pool import Pool
from pointsman.endpoints.target import Target, targets_of
from pointsman.tokens.asked import Chat, Texts
from pointsman.tokens.conversation import NotText, has_media
from pointsman.tokens.found import Found
from pointsman.types import Endpoint, InferenceRequest, Tokenized

Way = Literal["render", "tokenize"]

TIMEOUT_S = 5.0
"""llm-d's for text (facts 3.5)."""
LACKS_S = 60.0
"""An endpoint that has no such path is asked again after so long."""
TRIES = 3
MOST_ASKS = 64
"""Under way at once; what comes on top is not asked."""
MOST_TEXTS = 8
"""Prompts of a batch for which ``/tokenize`` is asked, one by one."""
KEPT = 4
"""Connections to an endpoint that are kept when idle."""
RENDERED = ("/completions", "/responses", "/messages")
"""Ends of paths below which vLLM has a ``/render``."""

_LACKING = (403, 404, 405, 501)
_REFUSED = (400, 413, 422)


class _Line:
    """A connection to an endpoint, for one question at a time."""

    def __init__(self, target: Target) -> None:
        self._prefix = target.url.prefix
        self._fetcher = Fetcher(target, target.url, "/", TIMEOUT_S, self._on_answer)
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    def _on_answer(self, status: int, body: bytes) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_result((status, body))

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        self._answer = asyncio.get_running_loop().create_future()
        self._fetcher.post(self._prefix + path, body)
        return await self._answer

    def close(self) -> None:
        self._fetcher.close()


class Engines:
    """Spreads questions over the endpoints that serve the model; with ``url`` asks one server in their
    place.
    """

    def __init__(self, pool: Pool, url: str = "") -> None:
        self._pool = pool
        self._instead: Target | None = None
        if url:
            split_url(url, "tokens.url")
            (self._instead,) = targets_of(EndpointSettings(url=url))
        self._idle: dict[str, list[_Line]] = {}
        self._under_way: Counter[str] = Counter()
        self._lacks: dict[tuple[str, Way], float] = {}
        """Until when a target is not asked in this way."""
        self._turn = 0
        self._asks = 0
        pool.listen(self._on_pool)

    async def ask(
        self, request: InferenceRequest, wanted: Texts | Chat | None, endpoints: Sequence[Endpoint]
    ) -> Found:
        """``wanted`` is None for what only a render can tell. ``NotText`` says why there is no answer."""
        if self._asks >= MOST_ASKS:
            raise NotText("busy")
        self._asks += 1
        try:
            return await self._ask(request, wanted, endpoints)
        finally:
            self._asks -= 1

    async def _ask(
        self, request: InferenceRequest, wanted: Texts | Chat | None, endpoints: Sequence[Endpoint]
    ) -> Found:
        reason, tries = "nobody", 0
        ways: list[tuple[Way, list[tuple[str, bytes]]]] = [
            ("render", _render_call(request)),
            ("tokenize", _tokenize_calls(request, wanted)),
        ]
        for way, calls in ways:
            for target in self._order(way, endpoints) if calls else ():
                if tries == TRIES:
                    break
                tries += 1
                status, bodies = await self._call(target, calls)
                if status == 200:
                    prompts = _READ[way](bodies)
                    if prompts:
                        return Found(prompts, way)
                    raise NotText("failed")
                if status in _REFUSED:
                    raise NotText("refused")
                if status in _LACKING:
                    self._lacks[target.name, way] = asyncio.get_running_loop().time() + LACKS_S
                    tries -= 1
                else:
                    reason = "failed"
        raise NotText(reason)

    def _order(self, way: Way, endpoints: Sequence[Endpoint]) -> list[Target]:
        """Whom to ask, those first that we ask least right now, and one after the other."""
        members = self._pool.members
        targets = [members[e.name].target for e in endpoints if e.name in members]
        if self._instead is not None:
            targets = [self._instead]
        now_s = asyncio.get_running_loop().time()
        targets = [t for t in targets if self._lacks.get((t.name, way), 0.0) < now_s]
        turn = self._turn % (len(targets) or 1)
        return sorted(targets[turn:] + targets[:turn], key=lambda target: self._under_way[target.name])

    async def _call(self, target: Target, calls: Sequence[tuple[str, bytes]]) -> tuple[int, list[bytes]]:
        """The status that is not 200, if any, and the answers."""
        name, bodies = target.name, []
        idle = self._idle.setdefault(name, [])
        line = idle.pop() if idle else _Line(target)
        self._under_way[name] += 1
        self._turn += 1
        whole = False
        try:
            for path, body in calls:
                status, answer = await line.post(path, body)
                if status != 200:
                    break
                bodies.append(answer)
            whole = True
        finally:
            self._under_way[name] -= 1
            if whole and len(idle) < KEPT and self._idle.get(name) is idle:
                idle.append(line)
            else:
                line.close()
        return status, bodies

    def _on_pool(self, event: str, endpoint: Endpoint) -> None:
        name = endpoint.name
        if event in ("left", "restarted"):
            for line in self._idle.pop(name, ()):
                line.close()
            self._lacks = {key: until for key, until in self._lacks.items() if key[0] != name}

    def close(self) -> None:
        """Drop the connections."""
        for lines in self._idle.values():
            for line in lines:
                line.close()
        self._idle.clear()


def _render_call(request: InferenceRequest) -> list[tuple[str, bytes]]:
    path = request.path.partition("?")[0].rstrip("/")
    return [(path + "/render", request.body)] if path.endswith(RENDERED) else []


class _TextAsk(msgspec.Struct, omit_defaults=True):
    prompt: str
    model: str = ""
    add_special_tokens: bool = True


class _ChatAsk(msgspec.Struct, omit_defaults=True):
    """Fields whose value is the default are left out, so that engines which lack them take the rest."""

    messages: object
    model: str = ""
    tools: object = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False


def _tokenize_calls(request: InferenceRequest, wanted: Texts | Chat | None) -> list[tuple[str, bytes]]:
    """Every field that changes the ids is passed on: the defaults of ``/tokenize`` are not those of chats."""
    if wanted is None:
        return []
    asks: list[_TextAsk | _ChatAsk]
    if isinstance(wanted, Chat):
        if has_media(wanted.messages):  # it would not tell which
            return []
        variables = dict(wanted.variables)
        asks = [
            _ChatAsk(
                [_renamed(message) for message in wanted.messages],
                request.model,
                wanted.tools,
                wanted.template,
                add_generation_prompt=bool(variables.pop("add_generation_prompt")),
                continue_final_message=bool(variables.pop("continue_final_message")),
                add_special_tokens=wanted.add_special,
                chat_template_kwargs=variables,
            )
        ]
    elif len(wanted.texts) <= MOST_TEXTS:
        asks = [_TextAsk(text, request.model, wanted.add_special) for text in wanted.texts]
    else:
        return []
    return [("/tokenize", msgspec.json.encode(ask)) for ask in asks]


def _renamed(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """``reasoning_content`` by its newer name: chats know both, ``/tokenize`` only that one."""
    if message.get("reasoning_content") is None or message.get("reasoning") is not None:
        return message
    return {**message, "reasoning": message["reasoning_content"]}


class _Tokens(msgspec.Struct, gc=False):
    tokens: list[Id]


def _read_render(bodies: Sequence[bytes]) -> tuple[Tokenized, ...]:
    """One prompt, or a list of them for completions."""
    (body,) = bodies
    try:
        parts = msgspec.json.decode(body, type=list[Raw]) if body.lstrip()[:1] == b"[" else [Raw(body)]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ()
    found = [rendered(part) for part in parts]
    return tuple(prompt for (prompt,) in found) if all(found) else ()


def _read_tokenize(bodies: Sequence[bytes]) -> tuple[Tokenized, ...]:
    try:
        return tuple(Tokenized(pack(msgspec.json.decode(body, type=_Tokens).tokens)) for body in bodies)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ()


_READ: Mapping[Way, Callable[[Sequence[bytes]], tuple[Tokenized, ...]]] = {
    "render": _read_render,
    "tokenize": _read_tokenize,
}
