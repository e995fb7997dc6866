"""Which versions an engine unloads."""

from conftest import adapter

from rlora.engine.loaded import LoadedAdapter, next_to_unload, unused
from rlora.records import Adapter


def loaded(number: int, policy: str = "run", leases: int = 0, suffix: bytes = b"") -> LoadedAdapter:
    """`suffix` changes the digest, as if the number was trained again."""
    version = Adapter(policy, number, adapter(number).config + suffix, adapter(number).weights)
    return LoadedAdapter(version, None, leases=leases)


def test_the_newest_and_the_last_of_a_policy_stay() -> None:
    three, four, two = loaded(3), loaded(4), loaded(2)
    assert unused([three, four, two], "run") == [three]  # 2 was requested last, to continue an older prompt
    assert unused([three, four], "run") == [three]
    assert unused([loaded(3, leases=1), four], "run") == []


def test_newest_is_within_a_policy() -> None:
    run, other = [loaded(3), loaded(4)], [loaded(7, "other"), loaded(8, "other")]
    assert unused([*run, *other], "run") == run[:1]
    assert unused([*other, *run], "other") == other[:1]
    assert unused([loaded(3), loaded(3, "other"), loaded(9, "third")], "run") == []


def test_a_number_that_was_trained_again_replaces_the_first_one() -> None:
    first, again = loaded(3), loaded(3, suffix=b" ")
    assert first.version != again.version
    assert unused([first, again], "run") == [first]


def test_a_policy_makes_room_itself_first_and_versions_in_use_stay() -> None:
    run, other, used = loaded(3), loaded(8, "other"), loaded(9, "third", leases=1)
    assert next_to_unload([used, other, run], "run") is run
    assert next_to_unload([used, other], "run") is other
    assert next_to_unload([other, loaded(2, "fourth")], "run") is other  # the one that was requested longest ago
    assert next_to_unload([used], "run") is None
