"""The index hears of the pool: who joins, leaves, restarts, and how large blocks and caches are."""

from __future__ import annotations

from array import array

from pointsman.config import Endpoint as EndpointSettings
from pointsman.endpoints.pool import Pool
from pointsman.endpoints.target import targets_of
from pointsman.prefix.approximate import PrefixIndex
from pointsman.prefix.follow import follow
from pointsman.prefix.kv_wire import Stored
from pointsman.prefix.precise import PreciseIndex
from pointsman.testing import request
from pointsman.types import Metrics, Tokenized

TEXT = "x" * 10_000


def pool_and_index(*names: str) -> tuple[Pool, PrefixIndex]:
    pool, index = Pool(lambda: 0.0), PrefixIndex(block_tokens=64)
    follow(index, pool)
    for name in names:
        (target,) = targets_of(EndpointSettings(url=f"http://{name}:8000", name=name))
        pool.add(target, "test")
    return pool, index


def publish(pool: Pool, name: str, block_tokens: int, kv_blocks: int, *, restarted: bool = False) -> None:
    metrics = Metrics(at_s=1.0, block_tokens=block_tokens, kv_blocks=kv_blocks)
    pool.learn_metrics(name, "vllm", metrics, restarted)


def test_endpoints_that_join_are_indexed_until_they_leave_or_restart() -> None:
    pool, index = pool_and_index("a", "b")
    for slot in (0, 1):
        index.insert(slot, index.match(request(TEXT)).chains)
    publish(pool, "a", 0, 0, restarted=True)
    assert set(index.match(request(TEXT)).held_by_slot) == {1}
    pool.remove("b")
    assert index.match(request(TEXT)).held_by_slot == {}


def test_one_block_size_suits_every_engine() -> None:
    pool, index = pool_and_index("a", "b")
    publish(pool, "a", 16, 1000)
    assert index.block_tokens == 64
    publish(pool, "b", 96, 1000)
    assert index.block_tokens == 96


def test_the_first_request_for_an_adapter_finds_none_of_the_base_models_blocks() -> None:
    pool, precise = Pool(lambda: 0.0), PreciseIndex()
    follow(PrefixIndex(), pool, precise=precise)
    (target,) = targets_of(EndpointSettings(url="http://a:8000", name="a"))
    pool.add(target, "test")
    ids = array("I", range(64)).tobytes()
    precise.add(0)
    precise.apply(0, [Stored([1, 2, 3, 4], None, ids, 16)], 0.0)

    def found(model: str) -> int:
        asked = request(model=model, tokenized=(Tokenized(ids + b"last"),))
        return precise.match(asked, 0.0).tokens(0)

    pool.learn_models("a", [{"id": "base"}, {"id": "adapter", "parent": "base"}])
    assert (found("base"), found("adapter")) == (64, 0)


def test_sizes_that_are_not_to_be_tuned_stay() -> None:
    pool, index = pool_and_index("a")
    index.auto_tune = False
    publish(pool, "a", 256, 1000)
    assert index.block_tokens == 64
