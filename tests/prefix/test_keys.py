"""Keys: equal exactly when tokens, adapter, salt and images are, on both sides."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from pointsman.prefix.keys import MASK, Xxh3
from pointsman.prefix.kv_wire import ExtraKeys, Stored
from pointsman.types import Tokenized

SCHEME = Xxh3()
IDS = list(range(1000, 1040))


def pack(ids: list[int]) -> bytes:
    return array("I", ids).tobytes()


def keys(
    ids: list[int],
    *,
    size: int = 4,
    model: str = "",
    salt: str = "",
    media: tuple[tuple[str, int, int], ...] = (),
) -> list[int]:
    return SCHEME.of_prompt(Tokenized(pack(ids), media), model, salt, size)


def told(
    ids: list[int], parent: int | None = None, *, lora: str = "", extra_keys: ExtraKeys = (), size: int = 4
) -> list[int]:
    event = Stored(list(range(len(ids) // size)), None, pack(ids), size, lora, extra_keys=extra_keys)
    return SCHEME.of_event(event, parent, lora)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=40), st.data())
def test_an_event_has_the_prompts_keys_wherever_it_begins(ids: list[int], data: st.DataObject) -> None:
    whole = keys(ids)
    first = data.draw(st.integers(0, len(whole) - 1))
    parent = whole[first - 1] if first else None
    assert told(ids[first * 4 : len(whole) * 4], parent) == whole[first:]
    assert len(set(whole)) == len(whole) == len(ids) // 4
    assert all(0 <= key <= MASK for key in whole)


@given(
    st.lists(st.integers(0, 3), min_size=12, max_size=12),
    st.lists(st.integers(0, 3), min_size=12, max_size=12),
)
def test_keys_are_equal_as_far_as_prompts_are(one: list[int], other: list[int]) -> None:
    same = 0
    while same < 3 and one[: same * 4 + 4] == other[: same * 4 + 4]:
        same += 1
    assert [a == b for a, b in zip(keys(one), keys(other), strict=True)] == [i < same for i in range(3)]


def test_adapters_salts_and_block_sizes_share_nothing() -> None:
    variants = [
        keys(IDS),
        keys(IDS, model="a"),
        keys(IDS, salt="a"),
        keys(IDS, model="a", salt="a"),
        keys(IDS, size=8),
    ]
    every = [key for variant in variants for key in variant]
    assert len(set(every)) == len(every) == 45


def test_an_image_is_in_the_keys_of_the_blocks_it_covers_and_so_of_those_after() -> None:
    plain = keys(IDS)
    cat, dog = (keys(IDS, media=((name, 5, 6),)) for name in ("cat", "dog"))
    assert cat[:1] == dog[:1] == plain[:1]
    assert not {*cat[1:]} & {*dog[1:]}
    assert not {*cat[1:]} & {*plain[1:]}
    last = keys(IDS, media=(("cat", 38, 9),))
    assert last[:9] == plain[:9]
    assert last[9] != plain[9]


def test_extra_keys_of_engines_say_the_same() -> None:
    media = (("dog", 6, 3), ("cat", 1, 3))
    first, second, third = ("cat",), ("dog",), ("dog",)
    more = [None] * 7
    assert told(IDS, extra_keys=(first, second, third, *more)) == keys(IDS, media=media)
    older = ((("cat", 1),), (("dog", -2),), (("dog", -6),), *more)
    assert told(IDS, extra_keys=older) == keys(IDS, media=media)


def test_extra_keys_name_adapter_then_images_then_salt() -> None:
    extra: ExtraKeys = (("a", "cat", "secret"), *[("a",)] * 9)
    assert told(IDS, lora="a", extra_keys=extra) == keys(
        IDS, model="a", salt="secret", media=(("cat", 0, 2),)
    )
    salted: ExtraKeys = (("secret",), *[None] * 9)
    assert told(IDS, extra_keys=salted) == keys(IDS, salt="secret")


def test_two_extras_are_not_one_that_reads_the_same() -> None:
    one = told(IDS, extra_keys=(("ab", "c"), *[None] * 9))
    assert one != told(IDS, extra_keys=(("a", "bc"), *[None] * 9))


def test_an_extra_that_no_request_can_have_is_not_left_out() -> None:
    assert told(IDS, extra_keys=((b"embeddings",), *[None] * 9))[0] != keys(IDS)[0]
