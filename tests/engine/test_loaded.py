"""Which versions an engine lets go of: those of their own policy, and never another's in use."""

from conftest import adapter

from rlora.engine.loaded import Loaded, in_the_way, unused
from rlora.records import Adapter


def held(number: int, policy: str = "run", leases: int = 0, life: bytes = b"") -> Loaded:
    made = Adapter(policy, number, adapter(number).config + life, adapter(number).weights)
    return Loaded(made, None, leases=leases)


def test_the_newest_and_the_last_of_a_policy_stay() -> None:
    three, four, two = held(3), held(4), held(2)
    assert unused([three, four, two], "run") == [three]  # 2 was asked for last: a prompt of before goes on under it
    assert unused([three, four], "run") == [three]
    assert unused([held(3, leases=1), four], "run") == []


def test_newest_is_within_a_policy() -> None:
    ours, others = [held(3), held(4)], [held(7, "other"), held(8, "other")]
    assert unused([*ours, *others], "run") == ours[:1]
    assert unused([*others, *ours], "other") == others[:1]
    assert unused([held(3), held(3, "other"), held(9, "third")], "run") == []


def test_a_number_that_was_trained_again_takes_the_first_ones_place() -> None:
    first, again = held(3), held(3, life=b" ")
    assert first.version != again.version
    assert unused([first, again], "run") == [first]


def test_room_is_made_by_ones_own_policy_first_and_by_none_in_use() -> None:
    ours, theirs, used = held(3), held(8, "other"), held(9, "third", leases=1)
    assert in_the_way([used, theirs, ours], "run") is ours
    assert in_the_way([used, theirs], "run") is theirs
    assert in_the_way([theirs, held(2, "fourth")], "run") is theirs  # the one that was asked for longest ago
    assert in_the_way([used], "run") is None
