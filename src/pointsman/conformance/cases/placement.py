"""Which endpoint is chosen, with llm-d's scorers for queue, KV cache and LoRA adapters."""

from __future__ import annotations

from pointsman.conformance.case import LLMD, LLMD_TESTS, PROTOCOL, case
from pointsman.conformance.checks import check, equal
from pointsman.conformance.engine import Load
from pointsman.conformance.exchange import DESTINATION
from pointsman.conformance.subject import Subject, get

FULL = ("adapter-b", "other")
"""Two adapters where no third has room."""


@case(
    "lowest-load",
    "A request goes to the endpoint with the shortest queue and the emptiest KV cache.",
    LLMD_TESTS,
)
async def lowest_load(subject: Subject) -> None:
    loads = {"a": Load(3, 0.2), "b": Load(0, 0.1), "c": Load(10, 0.6)}
    for names in ("abc", "bca", "cab"):  # each in turn is the best
        await subject.show(**dict(zip(names, loads.values(), strict=True)))
        equal("the choice", subject.chosen(await subject.ask()), names[1])


@case("kv-cache-breaks-ties", "Of equal queues the one with the emptier KV cache is chosen.", LLMD_TESTS)
async def kv_cache_breaks_ties(subject: Subject) -> None:
    loads = (Load(1, 0.1), Load(1, 0.5), Load(1, 0.9))
    for order in ("abc", "bca", "cab", "acb", "bac", "cba"):
        await subject.show(**dict(zip(order, loads, strict=True)))
        equal("the choice", subject.chosen(await subject.ask()), order[0])


@case("lora-at-equal-load", "At equal load a request for an adapter goes where it is loaded.", LLMD_TESTS)
async def lora_at_equal_load(subject: Subject) -> None:
    full = Load(0, 0.2, FULL)
    for holder in "abcabc":
        await subject.show(**{**dict.fromkeys("abc", full), holder: Load(0, 0.2, ("adapter-a",))})
        equal("the choice", subject.chosen(await subject.ask(model="adapter-a")), holder)


@case(
    "lora-over-kv-cache",
    "A request for an adapter goes where it is loaded even when the KV cache there is fuller.",
    LLMD_TESTS,
)
async def lora_over_kv_cache(subject: Subject) -> None:
    emptier = Load(0, 0.1, FULL)
    for holder, other in (("a", "b"), ("b", "a")):
        await subject.show(**{holder: Load(0, 0.85, ("adapter-a",)), other: emptier, "c": emptier})
        equal("the choice", subject.chosen(await subject.ask(model="adapter-a")), holder)


@case(
    "no-shedding-by-default",
    "Without priorities a request is routed however long every queue is.",
    LLMD_TESTS,
)
async def no_shedding_by_default(subject: Subject) -> None:
    await subject.show(a=Load(90, 0.95), b=Load(60, 0.9), c=Load(90, 0.99))
    equal("the choice", subject.chosen(await subject.ask()), "b")


@case(
    "unknown-model",
    "A model that no endpoint lists and nobody declared is routed like any other.",
    LLMD_TESTS,
)
async def unknown_model(subject: Subject) -> None:
    await subject.show(a=Load(9, 0.9), b=Load(9, 0.9))
    equal("the choice", subject.chosen(await subject.ask(model="nobody-has-heard-of-it")), "c")


@case(
    "headers-only",
    "A request without a body is sent to some endpoint at once, by an answer to its headers alone.",
    LLMD_TESTS,
)
async def headers_only(subject: Subject) -> None:
    async with subject.exchange() as stream:
        answer = await stream.request(get(), [])
        subject.name(answer.destination)
        # A whole request on another stream is a round trip in which anything more would have come.
        await subject.ask()
        equal("what follows the answer to the headers", stream.come(), [])


@case(
    "fallback-list",
    "With several endpoints a request they are listed best first, separated by commas.",
    f"{PROTOCOL} 0.4; {LLMD}",
    group="fallbacks",
    level="protocol",
)
async def fallback_list(subject: Subject) -> None:
    for order in ("bca", "acb"):
        loads = (Load(0, 0.1), Load(3, 0.4), Load(9, 0.9))
        await subject.show(**dict(zip(order, loads, strict=True)))
        answer = await subject.ask()
        names = [subject.name(each.strip()) for each in answer.destination.split(",")]
        equal("the order", "".join(names), order)
        equal("the metadata", _metadata(answer.replies[0].metadata), answer.destination)


@case(
    "destination-in-metadata",
    f"The destination stands in the header and in the dynamic metadata envoy.lb / {DESTINATION}, equal.",
    PROTOCOL,
    level="protocol",
)
async def destination_in_metadata(subject: Subject) -> None:
    await subject.show()
    answer = await subject.ask()
    equal("the metadata", _metadata(answer.replies[0].metadata), answer.destination)


@case(
    "headers-only-metadata",
    "The destination of a request without a body stands in the metadata too.",
    PROTOCOL,
    level="protocol",
)
async def headers_only_metadata(subject: Subject) -> None:
    async with subject.exchange() as stream:
        answer = await stream.request(get(), [])
    equal("the metadata", _metadata(answer.replies[0].metadata), answer.destination)


def _metadata(metadata: object) -> object:
    namespaces = metadata if isinstance(metadata, dict) else {}
    return namespaces.get("envoy.lb", {}).get(DESTINATION)


@case(
    "scores-told",
    "With --emit-endpoint-scores the metadata has the score of every endpoint by address.",
    LLMD_TESTS,
    group="scores",
)
async def scores_told(subject: Subject) -> None:
    await subject.show(a=Load(8, 0.8), b=Load(4, 0.4))
    answer = await subject.ask()
    scores = answer.replies[0].metadata.get("envoy.lb", {}).get(f"{DESTINATION}-scores")
    assert scores is None or isinstance(scores, dict)
    equal("the addresses", sorted(scores or {}), sorted(e.address for e in subject.engines.values()))
    order = sorted(scores or {}, key=lambda address: -float((scores or {})[address]))
    equal("the order by score", "".join(map(subject.name, order)), "cba")
    equal("the best", order[0], answer.destination)


@case("scores-not-told", "Without the flag no scores are told.", LLMD_TESTS)
async def scores_not_told(subject: Subject) -> None:
    answer = await subject.ask()
    answer.routed()
    told = [key for reply in answer.replies for fields in reply.metadata.values() for key in fields]
    check(f"{DESTINATION}-scores" not in told, "scores are told without --emit-endpoint-scores")
