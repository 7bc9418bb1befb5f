"""What is learned per endpoint and noted per request does not outlive them."""

from __future__ import annotations

from pointsman.scheduling.learned import Learned, RunningMean
from pointsman.scheduling.underway import UnderWay
from pointsman.testing import fleet, request


def test_an_endpoint_that_takes_over_a_slot_begins_anew() -> None:
    learned: Learned[list[int]] = Learned(list)
    (before,), (after,) = fleet(name=["old"]), fleet(name=["new"])
    assert learned.get(before) is None
    learned.of(before).append(1)
    assert learned.get(before) == [1]
    assert learned.get(after) is None
    assert learned.of(after) == []
    assert learned.get(before) is None, "who has left is not taken for who is there now"
    assert len(learned) == 1


def test_an_endpoint_is_known_by_name_and_slot_whatever_its_snapshot() -> None:
    learned: Learned[list[int]] = Learned(list)
    learned.of(fleet(kv_usage=[0.1])[0]).append(1)
    assert learned.of(fleet(kv_usage=[0.9])[0]) == [1]


def test_a_running_mean_begins_with_the_first_value_and_follows_the_others() -> None:
    mean = RunningMean(0.25)
    seen = []
    for value in (4.0, 8.0, 8.0, 0.0):
        mean.add(value)
        seen.append(mean.value)
    assert seen == [4.0, 5.0, 5.75, 4.3125]


def test_notes_are_by_request_and_taken_once() -> None:
    notes: UnderWay[str] = UnderWay()
    one, other = request("same"), request("same")
    assert one == other
    notes.note(one, "first")
    notes.note(other, "second")
    notes.note(one, "first again")
    assert (notes.take(one), notes.take(one), notes.take(other)) == ("first again", None, "second")
    assert len(notes) == 0
