"""Which engine holds which version."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rlora.records import Adapter, Engine


def swap(engines: Sequence[Engine], adapter: Adapter, max_staleness: int = 0) -> None:
    """Deliver `adapter` to every engine; returns when all of them serve it.

    Versions more than `max_staleness` behind it are retired: no collection in flight or queued asks for them.
    """

    def deliver(engine: Engine) -> None:
        engine.load(adapter)
        for version in engine.versions():
            if not adapter.version - max_staleness <= version <= adapter.version:
                engine.retire(version)

    with ThreadPoolExecutor(len(engines)) as pool:
        list(pool.map(deliver, engines))
