"""Which path of a simulated engine does what: those of vLLM 0.32.0, and ``/sim/...`` for control."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from pointsman.errors import SettingsError
from pointsman.sim import tokens
from pointsman.sim.connection import Connection, Request
from pointsman.sim.faults import parse
from pointsman.sim.formats import anthropic, openai
from pointsman.sim.formats.ask import Ask, Refused, read
from pointsman.sim.kv_names import lora_path
from pointsman.sim.server import SimulatedEngine

VERSION = "0.32.0"
TEXT = "text/plain; version=0.0.4; charset=utf-8"
RESPONSES = "/v1/responses/"

Plain = Callable[[SimulatedEngine, Request], bytes]


def handle(engine: SimulatedEngine, connection: Connection, request: Request) -> None:
    """Answer ``request``, or have the engine generate the answer."""
    try:
        parser = _GENERATE.get(request.path) if request.method == "POST" else None
        if parser is not None:
            engine.generate(connection, request, parser(engine, request.body))
        elif request.path.startswith("/sim/"):
            _control(engine, connection, request)
        else:
            _plain(engine, connection, request)
    except Refused as refused:
        if request.path.startswith("/v1/messages"):
            refused = _AnthropicRefused(refused.status, refused.message, refused.kind)
        engine.refuse(connection, refused)


class _AnthropicRefused(Refused):
    def body(self) -> bytes:
        return msgspec.json.encode({"type": "error", "error": {"type": self.kind, "message": self.message}})


def _plain(engine: SimulatedEngine, connection: Connection, request: Request) -> None:
    methods = _PLAIN.get(request.path)
    if methods is None and request.path.startswith(RESPONSES):
        methods = _RESPONSE
    if methods is None:
        raise Refused(404, "Not Found", "NotFoundError")
    plain = methods.get(request.method)
    if plain is None:
        raise Refused(405, "Method Not Allowed", "BadRequestError")
    kind = TEXT if request.path == "/metrics" else "application/json"
    connection.answer(200, plain(engine, request), kind)


# generation


def _fixed(parser: Callable[[bytes], Ask]) -> Callable[[SimulatedEngine, bytes], Ask]:
    return lambda engine, body: parser(body)


_GENERATE: Mapping[str, Callable[[SimulatedEngine, bytes], Ask]] = {
    "/v1/completions": _fixed(openai.completions),
    "/v1/chat/completions": _fixed(openai.chat),
    "/v1/embeddings": _fixed(openai.embeddings),
    "/v1/messages": _fixed(anthropic.messages),
    "/v1/responses": lambda engine, body: engine.responses.ask(body),
}


# plain answers


def _empty(engine: SimulatedEngine, request: Request) -> bytes:
    return b""


def _metrics(engine: SimulatedEngine, request: Request) -> bytes:
    engine.observed()
    return engine.metrics.page() + engine.loras_line()


def _load(engine: SimulatedEngine, request: Request) -> bytes:
    return b'{"server_load":%d}' % (len(engine.engine.running) + len(engine.engine.waiting))


def _version(engine: SimulatedEngine, request: Request) -> bytes:
    return msgspec.json.encode({"version": VERSION})


def _models(engine: SimulatedEngine, request: Request) -> bytes:
    base = engine.spec.models[0]
    served: list[tuple[str, str, str | None, int | None]] = [
        *((name, base, None, engine.max_model_len) for name in engine.spec.models),
        *((name, lora_path(name), base, None) for name in engine.loras),
    ]
    cards: list[dict[str, object]] = [
        {
            "id": name,
            "object": "model",
            "created": engine.created_s,
            "owned_by": "vllm",
            "root": root,
            "parent": parent,
            "max_model_len": length,
            "permission": [],
        }
        for name, root, parent, length in served
    ]
    return msgspec.json.encode({"object": "list", "data": cards})


def _tokenize(engine: SimulatedEngine, request: Request) -> bytes:
    text, with_texts = openai.tokenize(request.body)
    ids = tokens.to_ids(text)
    answer = {
        "count": len(ids),
        "max_model_len": engine.max_model_len,
        "tokens": ids,
        "token_strs": [tokens.text_of(tokens.from_ids([i])) for i in ids] if with_texts else None,
    }
    return msgspec.json.encode(answer)


def _detokenize(engine: SimulatedEngine, request: Request) -> bytes:
    return msgspec.json.encode({"prompt": openai.detokenize(request.body)})


def _count_tokens(engine: SimulatedEngine, request: Request) -> bytes:
    return anthropic.count_tokens(request.body)


def _reset_prefix_cache(engine: SimulatedEngine, request: Request) -> bytes:
    engine.engine.reset_cache()
    return b""


def _kv_event_sources(engine: SimulatedEngine, request: Request) -> bytes:
    return msgspec.json.encode({} if engine.publisher is None else engine.publisher.sources())


class _Adapter(msgspec.Struct):
    lora_name: str
    lora_path: str = ""


def _load_lora(engine: SimulatedEngine, request: Request) -> bytes:
    name = read(request.body, _Adapter).lora_name
    engine.loras[name] = None
    return f"Success: LoRA adapter '{name}' added successfully.".encode()


def _unload_lora(engine: SimulatedEngine, request: Request) -> bytes:
    name = read(request.body, _Adapter).lora_name
    engine.check_model(name)
    engine.loras.pop(name, None)
    return f"Success: LoRA adapter '{name}' removed successfully.".encode()


def _get_response(engine: SimulatedEngine, request: Request) -> bytes:
    return engine.responses.get(request.path.removeprefix(RESPONSES))


def _delete_response(engine: SimulatedEngine, request: Request) -> bytes:
    return engine.responses.delete(request.path.removeprefix(RESPONSES))


_PLAIN: Mapping[str, Mapping[str, Plain]] = {
    "/health": {"GET": _empty},
    "/ping": {"GET": _empty, "POST": _empty},
    "/load": {"GET": _load},
    "/version": {"GET": _version},
    "/metrics": {"GET": _metrics},
    "/v1/models": {"GET": _models},
    "/tokenize": {"POST": _tokenize},
    "/detokenize": {"POST": _detokenize},
    "/v1/messages/count_tokens": {"POST": _count_tokens},
    "/kv_event_sources": {"GET": _kv_event_sources},
    "/reset_prefix_cache": {"POST": _reset_prefix_cache},
    "/v1/load_lora_adapter": {"POST": _load_lora},
    "/v1/unload_lora_adapter": {"POST": _unload_lora},
}
_RESPONSE: Mapping[str, Plain] = {"GET": _get_response, "DELETE": _delete_response}


# control


def _control(engine: SimulatedEngine, connection: Connection, request: Request) -> None:
    """``/sim/...``: state, log, lag and faults of this engine, or of a sibling named in the path's end."""
    what, _, name = request.path.removeprefix("/sim/").partition("/")
    target = engine.fleet.get(name) if name else engine
    act = _CONTROL.get((request.method, what))
    if target is None or act is None:
        raise Refused(404, "Not Found", "NotFoundError")
    act(target, connection, request)


def _state(engine: SimulatedEngine, connection: Connection, request: Request) -> None:
    connection.answer(200, msgspec.json.encode(engine.state))


def _log(engine: SimulatedEngine, connection: Connection, request: Request) -> None:
    connection.answer(200, msgspec.json.encode(list(engine.log)))


def _lag(engine: SimulatedEngine, connection: Connection, request: Request) -> None:
    connection.answer(200, msgspec.json.encode(engine.lag))


def _clear_lag(engine: SimulatedEngine, connection: Connection, request: Request) -> None:
    engine.lag.clear()
    _lag(engine, connection, request)


def _faults(engine: SimulatedEngine, connection: Connection, request: Request) -> None:
    connection.answer(200, msgspec.json.encode(engine.faults.active))


def _inflict(engine: SimulatedEngine, connection: Connection, request: Request) -> None:
    try:
        fault = parse(read(request.body, object))
    except SettingsError as exc:
        raise Refused(400, exc.message, "Bad Request") from exc
    connection.answer(200, msgspec.json.encode(fault), more=b"connection: close\r\n")
    connection.transport.close()
    engine.inflict(fault)


def _clear_faults(engine: SimulatedEngine, connection: Connection, request: Request) -> None:
    engine.clear_faults()
    _faults(engine, connection, request)


_CONTROL: Mapping[tuple[str, str], Callable[[SimulatedEngine, Connection, Request], None]] = {
    ("GET", "state"): _state,
    ("GET", "log"): _log,
    ("GET", "lag"): _lag,
    ("DELETE", "lag"): _clear_lag,
    ("GET", "fault"): _faults,
    ("POST", "fault"): _inflict,
    ("DELETE", "fault"): _clear_faults,
}
