"""llm-d's EndpointPickerConfig: read it, add what llm-d adds by itself, and hand on what other parts need.

Nothing in it is ignored in silence: a misspelt key, a parameter that nothing reads or a type that does not
exist yet stops start-up and is named; what merely has no effect is logged as a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import msgspec
import yaml

from pointsman.errors import SettingsError
from pointsman.registry import Plugin, build, hint, own_name, plugins
from pointsman.scheduling.coming import COMING
from pointsman.scheduling.datalayer import (
    SOURCES,
    CoreMetricsExtractor,
    EndpointNotificationSource,
    EngineConfig,
    FileDiscovery,
    MetricsDataSource,
)
from pointsman.scheduling.interfaces import (
    Admitter,
    DispatchObserver,
    Filter,
    Picker,
    ProfileHandler,
    SaturationDetector,
    Scorer,
)
from pointsman.scheduling.parsers import Parser, PassthroughParser
from pointsman.scheduling.picker_document import (
    DataLayer,
    Document,
    FlowControl,
    ProfileSpec,
    RequestHandler,
    Use,
)
from pointsman.scheduling.producers.precise_prefix import PrecisePrefixCache
from pointsman.scheduling.producers.tokens import TokenProducer
from pointsman.scheduling.profile import Profile
from pointsman.scheduling.signals import SENT

log = logging.getLogger(__name__)

API_VERSION = "llm-d.ai/v1alpha1"
OLD_API_VERSION = "inference.networking.x-k8s.io/v1alpha1"
KIND = "EndpointPickerConfig"
DEFAULT_DETECTOR = "utilization-detector"
DEFAULT_PICKER = "max-score-picker"
GATES = {"flowControl": False, "haPopulateNonLeaderDatastore": True}
NOT_YET = "is not available in this version"

BLEND: Mapping[str, Any] = {
    "apiVersion": API_VERSION,
    "kind": KIND,
    "plugins": [
        {"type": "queue-scorer"},
        {"type": "kv-cache-utilization-scorer"},
        {"type": "prefix-cache-scorer"},
    ],
    "schedulingProfiles": [
        {
            "name": "default",
            "plugins": [
                {"pluginRef": "queue-scorer", "weight": 2.0},
                {"pluginRef": "kv-cache-utilization-scorer", "weight": 2.0},
                {"pluginRef": "prefix-cache-scorer", "weight": 3.0},
            ],
        }
    ],
}
"""What llm-d runs without a configuration (facts 3)."""


class LoadedConfig(msgspec.Struct, kw_only=True):
    """A configuration ready to schedule with, and the settings it holds for other parts."""

    profiles: tuple[Profile, ...]
    handler: ProfileHandler | None
    """None where the only profile always runs."""
    plugins: tuple[Plugin, ...]
    """Every plugin, producers first."""
    detector: SaturationDetector
    reads_metrics: bool
    """Whether the engines' metrics pages are read at all."""
    metrics: MetricsDataSource | None
    """None where the configuration leaves how to read them to the settings."""
    extractor: CoreMetricsExtractor | None
    """None where it leaves it to us which metrics mean what."""
    discovery: FileDiscovery | None
    parsers: tuple[str, ...] | None
    """Formats of ``api`` that are parsed, in order; None: all. A path none of them takes is a 400."""
    precise: PrecisePrefixCache | None
    """What it says of KV events; None where it names no such producer."""
    only_sent: bool
    """It names a producer of prefix matches, and that goes by what was sent alone."""
    tokens: TokenProducer | None

    @property
    def metrics_interval_s(self) -> float | None:
        """How often to read metrics; None where the configuration does not say."""
        return self.metrics.interval_s if self.metrics else None

    @property
    def engine_configs(self) -> tuple[EngineConfig, ...]:
        """Engines it adds, or ours that it replaces."""
        return self.extractor.engine_configs if self.extractor else ()

    @property
    def discovery_path(self) -> str:
        """File of endpoints, "" without one; ``discovery.watch_file`` says whether to read it again."""
        return self.discovery.path if self.discovery else ""


def load_picker_config(text: str, where: str = "picker config") -> LoadedConfig:
    """The configuration in ``text`` (YAML or JSON); llm-d's compiled-in one when it is empty."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise SettingsError(f"{where}: not YAML: {' '.join(str(exc).split())}") from exc
    return load_tree(BLEND if tree is None else tree, where)


def load_tree(tree: Any, where: str) -> LoadedConfig:
    """The same from plain data."""
    try:
        document = msgspec.convert(tree, Document)
    except msgspec.ValidationError as exc:
        raise SettingsError(f"{where}: {exc}") from exc
    return _Loader(document, where).load()


T = TypeVar("T")


class _Loader:
    """One configuration being put together; llm-d's order of additions, facts 3."""

    def __init__(self, document: Document, where: str) -> None:
        self.document = document
        self.where = where
        self.built: dict[str, Plugin] = {}
        self.used: set[str] = set()

    def fail(self, message: str) -> SettingsError:
        return SettingsError(f"{self.where}: {message}")

    def load(self) -> LoadedConfig:
        self._check_document()
        self._build_plugins()
        specs = self._profile_specs()
        handler = self._handler(specs)
        self._default_pickers(specs)
        detector = self._detector()
        layer = self.document.data_layer or DataLayer()
        reads_metrics, metrics, extractor = self._metrics(layer)
        parsers = self._parsers()
        precise = self._only(PrecisePrefixCache)
        sent = any(spec.type == SENT for spec in self.document.plugins or ())
        self._check_names()
        if precise is not None or sent:
            self._name_prefix_producers(sent)
        profiles = tuple(self._profile(spec) for spec in specs)
        for name in self.built.keys() - self.used:
            if _scheduling_kinds(self.built[name]):
                log.warning("%s: plugin %s is in no scheduling profile and has no effect", self.where, name)
        scheduling_last = sorted(self.built.values(), key=lambda p: bool(_scheduling_kinds(p)))
        return LoadedConfig(
            profiles=profiles,
            handler=handler if len(profiles) > 1 else None,
            plugins=tuple(scheduling_last),
            detector=detector,
            reads_metrics=reads_metrics,
            metrics=metrics,
            extractor=extractor,
            discovery=self._discovery(layer),
            parsers=parsers,
            precise=precise,
            only_sent=sent and precise is None,
            tokens=self._only(TokenProducer),
        )

    def _check_document(self) -> None:
        document = self.document
        if document.kind != KIND:
            raise self.fail(f"kind: {document.kind!r} is not {KIND}")
        if document.api_version == OLD_API_VERSION:
            self._outdated(f"apiVersion {OLD_API_VERSION}", API_VERSION)
        elif document.api_version != API_VERSION:
            raise self.fail(f"apiVersion: {document.api_version!r} is not {API_VERSION}")
        for gate in document.feature_gates or ():
            self._check_gate(gate)

    def _outdated(self, old: str, new: str) -> None:
        log.warning("%s: %s is deprecated, use %s", self.where, old, new)

    def _check_gate(self, text: str) -> None:
        name, equals, value = text.partition("=")
        if name not in GATES:
            raise self.fail(f"featureGates: unknown gate {name!r}{hint(name, GATES)}")
        on = value.strip().lower() if equals else "true"
        if on not in ("true", "false", "1", "0", "t", "f"):
            raise self.fail(f"featureGates: {text}: the value is true or false")
        if name == "flowControl" and on[0] in "t1":
            raise self.fail(f"featureGates: flowControl {NOT_YET}")
        if name == "haPopulateNonLeaderDatastore":
            log.warning("%s: feature gate %s has no effect: there is no leader election", self.where, name)

    # -- plugins

    def _build_plugins(self) -> None:
        for i, spec in enumerate(self.document.plugins or ()):
            name = spec.name or spec.type
            if name in self.built:
                raise self.fail(f"plugins[{i}]: a second plugin called {name!r}; give it a name of its own")
            self.built[name] = self._build(spec.type, spec.parameters, f"plugins[{i}]")
        for plugin in list(self.built.values()):
            for needed in plugin.needs:
                if not any(own_name(type(p)) == needed for p in self.built.values()):
                    self.built[needed] = self._build(needed, None, "plugins")

    def _build(self, type_: str, parameters: dict[str, Any] | None, at: str) -> Plugin:
        if type_ in COMING:
            raise self.fail(f"{at}: {type_} ({COMING[type_]}) {NOT_YET}")
        if type_ not in plugins():
            raise self.fail(f"{at}: unknown plugin type {type_!r}{hint(type_, {*plugins(), *COMING})}")
        plugin = build(type_, parameters, f"{self.where}: {at}")
        cls = type(plugin)
        if type_ != own_name(cls):
            self._outdated(f"plugin type {type_}", own_name(cls))
        if cls.replaced_by:
            self._outdated(f"plugin type {type_}", cls.replaced_by)
        for field in msgspec.structs.fields(cls):
            if field.name in cls.outdated and field.encode_name in (parameters or {}):
                log.warning("%s: %s: %s: %s", self.where, type_, field.encode_name, cls.outdated[field.name])
        for key, why in cls.unused.items():
            if _given(parameters or {}, key):
                log.warning("%s: %s: %s has no effect: %s", self.where, type_, key, why)
        return plugin

    def _check_names(self) -> None:
        """One instance of what the whole pool shares, and producer names that mean it."""
        types: dict[str, list[str]] = {}
        for name, plugin in self.built.items():
            types.setdefault(own_name(type(plugin)), []).append(name)
        for name, plugin in self.built.items():
            for field, producer in plugin.producers.items():
                wanted = getattr(plugin, field)
                if producer == SENT and isinstance(self.built.get(wanted), PrecisePrefixCache):
                    continue
                if wanted and wanted != producer and wanted not in types.get(producer, ()):
                    raise self.fail(f"plugin {name}: no {producer} is called {wanted!r}")
        for producer in {p for plugin in self.built.values() for p in plugin.producers.values()}:
            if len(types.get(producer, ())) > 1:
                raise self.fail(f"plugins: more than one {producer} {NOT_YET}")

    def _name_prefix_producers(self, sent: bool) -> None:
        """Of plugins that read prefix matches: the producer's type in the place of its name. Who names none
        reads, as in llm-d, the one that goes by the name of what was sent; it is said where there is none
        (``sent`` false).
        """
        for name, plugin in self.built.items():
            for field in (field for field, producer in plugin.producers.items() if producer == SENT):
                wanted = getattr(plugin, field)
                if not wanted and not sent and SENT not in self.built:
                    log.warning(
                        "%s: plugin %s names no producer of prefix matches and goes by what was sent, as in "
                        "llm-d; to go by KV events, it must name the precise one",
                        self.where,
                        name,
                    )
                found = self.built.get(wanted or SENT)
                setattr(plugin, field, own_name(type(found)) if found else SENT)

    def _only(self, kind: type[T]) -> T | None:
        """The configured plugin of this kind."""
        found = [(name, plugin) for name, plugin in self.built.items() if isinstance(plugin, kind)]
        if len(found) > 1:
            raise self.fail(f"plugins: more than one {own_name(kind)} {NOT_YET}")  # type: ignore[arg-type]
        return found[0][1] if found else None

    def _get(self, ref: str, at: str) -> Plugin:
        if ref not in self.built:
            raise self.fail(f"{at}: no plugin is called {ref!r}{hint(ref, self.built)}")
        self.used.add(ref)
        return self.built[ref]

    def _add(self, type_: str) -> Plugin:
        """The plugin called like its type, added with defaults if it is not configured."""
        if type_ not in self.built:
            self.built[type_] = build(type_, None, self.where)
        self.used.add(type_)
        return self.built[type_]

    def _first(self, kind: type[T]) -> str | None:
        return next((name for name, plugin in self.built.items() if isinstance(plugin, kind)), None)

    # -- profiles

    def _profile_specs(self) -> list[ProfileSpec]:
        specs = self.document.scheduling_profiles
        if not specs:
            every = [n for n, p in self.built.items() if isinstance(p, (Filter, Scorer, Picker))]
            return [ProfileSpec(name="default", plugins=[Use(plugin_ref=name) for name in every])]
        names = [spec.name for spec in specs]
        for i, name in enumerate(names):
            if not name:
                raise self.fail(f"schedulingProfiles[{i}]: has no name")
            if names.index(name) != i:
                raise self.fail(f"schedulingProfiles[{i}]: a second profile called {name!r}")
        return specs

    def _handler(self, specs: Sequence[ProfileSpec]) -> ProfileHandler | None:
        handlers = [name for name, p in self.built.items() if isinstance(p, ProfileHandler)]
        self.used.update(handlers)
        if len(handlers) > 1:
            raise self.fail(f"plugins: more than one profile handler: {', '.join(handlers)}")
        if len(specs) == 1:
            return None
        if not handlers or own_name(type(self.built[handlers[0]])) == "single-profile-handler":
            raise self.fail("plugins: several schedulingProfiles need a handler: header-profile-handler")
        return cast(ProfileHandler, self.built[handlers[0]])

    def _default_pickers(self, specs: Sequence[ProfileSpec]) -> None:
        for spec in specs:
            uses = spec.plugins = spec.plugins or []
            plugins_ = [self._get(u.plugin_ref, f"schedulingProfiles {spec.name!r}") for u in uses]
            if not any(isinstance(plugin, Picker) for plugin in plugins_):
                picker = self._first(Picker)  # type: ignore[type-abstract]  # a protocol is fine here
                if picker is None:
                    self._add(picker := DEFAULT_PICKER)
                self.used.add(picker)
                uses.append(Use(plugin_ref=picker))

    def _profile(self, spec: ProfileSpec) -> Profile:
        filters, scorers, pickers = [], [], []
        for use in spec.plugins or ():
            name, plugin = use.plugin_ref, self.built[use.plugin_ref]
            kinds = _scheduling_kinds(plugin)
            if not kinds and isinstance(plugin, DispatchObserver | Admitter):
                # An earlier form of llm-d's predicted-latency guide lists the producer.
                log.warning("%s: %s runs for every request; in a profile it has no effect", self.where, name)
                continue
            if not kinds:
                raise self.fail(f"schedulingProfiles {spec.name!r}: {name} is no filter, scorer or picker")
            if isinstance(plugin, Filter):
                filters.append((name, plugin))
            if isinstance(plugin, Scorer):
                scorers.append((name, 1.0 if use.weight is None else use.weight, plugin))
            elif use.weight is not None:
                log.warning("%s: the weight of %s has no effect: it is no scorer", self.where, name)
            if isinstance(plugin, Picker):
                pickers.append(plugin)
        if len(pickers) > 1:
            raise self.fail(f"schedulingProfiles {spec.name!r}: has more than one picker")
        return Profile(spec.name, filters, scorers, pickers[0])

    # -- what other parts do

    def _detector(self) -> SaturationDetector:
        document, ref = self.document, ""
        if document.saturation_detector is not None:
            self._outdated("saturationDetector", "flowControl.saturationDetector")
            ref = document.saturation_detector.plugin_ref
        for key in document.flow_control or ():
            if key != "saturationDetector":
                raise self.fail(f"flowControl.{key}: flow control {NOT_YET}")
        if document.flow_control:
            flow_control = self._convert(document.flow_control, FlowControl, "flowControl")
            if flow_control.saturation_detector is not None:
                ref = flow_control.saturation_detector.plugin_ref
        if not ref or (ref == DEFAULT_DETECTOR and ref not in self.built):
            return cast(SaturationDetector, self._add(DEFAULT_DETECTOR))
        plugin = self._get(ref, "saturationDetector")
        if not isinstance(plugin, SaturationDetector):
            raise self.fail(f"saturationDetector: {ref} is no saturation detector")
        return plugin

    def _convert(self, tree: Any, cls: type[T], at: str) -> T:
        try:
            return msgspec.convert(tree, cls)
        except msgspec.ValidationError as exc:
            raise self.fail(f"{at}: {exc}") from exc

    def _metrics(
        self, layer: DataLayer
    ) -> tuple[bool, MetricsDataSource | None, CoreMetricsExtractor | None]:
        """Whether metrics are read, and what the configuration says about how."""
        for key, value in (
            ("peerDiscovery", layer.peer_discovery),
            ("crossReplicaSyncerPluginRef", layer.cross_replica_syncer_plugin_ref),
            ("crossReplicaSyncInterval", layer.cross_replica_sync_interval),
        ):
            if value:
                raise self.fail(f"dataLayer.{key} {NOT_YET}")
        metrics: list[Plugin] = []
        extractors: list[Plugin] = []
        for i, spec in enumerate(layer.sources or ()):
            at = f"dataLayer.sources[{i}]"
            source = self._get(spec.plugin_ref, at)
            if isinstance(source, EndpointNotificationSource):
                for ref in spec.extractors or ():
                    self._get(ref.plugin_ref, at)
                continue
            if type(source) not in SOURCES:
                raise self.fail(f"{at}: {spec.plugin_ref} is no data source")
            readers = [self._get(ref.plugin_ref, at) for ref in spec.extractors or ()]
            if not readers:
                raise self.fail(f"{at}: {spec.plugin_ref} has no extractors and would have no effect")
            for ref, reader in zip(spec.extractors or (), readers, strict=True):
                if type(reader) is not SOURCES[type(source)]:
                    raise self.fail(f"{at}: {ref.plugin_ref} cannot read {spec.plugin_ref}")
            if isinstance(source, MetricsDataSource):
                metrics.append(source)
                extractors += readers
        if len(metrics) > 1 or len(extractors) > 1:
            raise self.fail(f"dataLayer.sources: more than one source of metrics or extractor {NOT_YET}")
        reads = bool(metrics) or layer.inject_defaults is not False
        if reads and not metrics:
            # llm-d then wires the plugins that go by their default names, configured or not.
            metrics = [self._get(n, "plugins") for n in ("metrics-data-source",) if n in self.built]
            extractors = [self._get(n, "plugins") for n in ("core-metrics-extractor",) if n in self.built]
        for name, plugin in self.built.items():
            if isinstance(plugin, (MetricsDataSource, CoreMetricsExtractor)) and name not in self.used:
                raise self.fail(f"plugins: {name} is not in dataLayer.sources and would have no effect")
        return (
            reads,
            cast("MetricsDataSource | None", metrics[0] if metrics else None),
            cast("CoreMetricsExtractor | None", extractors[0] if extractors else None),
        )

    def _discovery(self, layer: DataLayer) -> FileDiscovery | None:
        found: FileDiscovery | None = None
        if layer.discovery is not None:
            plugin = self._get(layer.discovery.plugin_ref, "dataLayer.discovery")
            if not isinstance(plugin, FileDiscovery):
                raise self.fail(f"dataLayer.discovery: {layer.discovery.plugin_ref} discovers no endpoints")
            found = plugin
        for name, plugin in self.built.items():
            if isinstance(plugin, FileDiscovery) and plugin is not found:
                raise self.fail(f"plugins: {name} is not dataLayer.discovery and would have no effect")
        return found

    def _parsers(self) -> tuple[str, ...] | None:
        handler = self.document.request_handler or RequestHandler()
        references = list(handler.parsers or ())
        if self.document.parser is not None:
            self._outdated("parser", "requestHandler.parsers")
            references = references or [self.document.parser]
        parsers = [self._parser(ref.plugin_ref) for ref in references]
        unused = [n for n, p in self.built.items() if isinstance(p, Parser) and n not in self.used]
        if unused:
            raise self.fail(f"plugins: {unused[0]} is not in requestHandler.parsers and would have no effect")
        if any(isinstance(parser, PassthroughParser) for parser in parsers[:-1]):
            raise self.fail("requestHandler.parsers: passthrough-parser takes every path, so put it last")
        return tuple(dict.fromkeys(name for parser in parsers for name in parser.formats)) or None

    def _parser(self, ref: str) -> Parser:
        plugin = self._get(ref, "requestHandler.parsers")
        if not isinstance(plugin, Parser):
            raise self.fail(f"requestHandler.parsers: {ref} is no parser")
        return plugin


def _given(parameters: Mapping[str, Any], key: str) -> bool:
    """Whether there is something at the dotted ``key``."""
    node: Any = parameters
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node is not None


def _scheduling_kinds(plugin: Plugin) -> Iterable[type]:
    return [kind for kind in (Filter, Scorer, Picker) if isinstance(plugin, kind)]
