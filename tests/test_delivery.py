from typing import Any

from rlora.delivery import swap
from rlora.records import Adapter


class FakeEngine:
    def __init__(self, *held: int) -> None:
        self.held = list(held)

    def load(self, adapter: Adapter) -> None:
        self.held.append(adapter.version)

    def versions(self) -> list[int]:
        return list(self.held)

    def retire(self, version: int) -> None:
        self.held.remove(version)


def test_after_a_swap_every_engine_holds_that_version_alone() -> None:
    engines: Any = [FakeEngine(), FakeEngine(3), FakeEngine(2, 3)]
    swap(engines, Adapter("run", 4, b"{}", b""))
    assert [engine.held for engine in engines] == [[4], [4], [4]]


def test_versions_that_stale_collections_ask_for_stay() -> None:
    engine: Any = FakeEngine(1, 2, 3, 9)  # 9 is of another time
    swap([engine], Adapter("run", 4, b"{}", b""), max_staleness=2)
    assert sorted(engine.held) == [2, 3, 4]
