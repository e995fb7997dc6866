"""Which engine holds which version."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rlora.records import Adapter, Engine


def swap(engines: Sequence[Engine], adapter: Adapter) -> None:
    """Deliver `adapter` to every engine and retire the versions before it; returns when all of them serve it.

    An engine takes it between two batches, so no request is in flight on a version that is retired.
    """

    def deliver(engine: Engine) -> None:
        engine.load(adapter)
        for version in engine.versions():
            if version != adapter.version:
                engine.retire(version)

    with ThreadPoolExecutor(len(engines)) as pool:
        list(pool.map(deliver, engines))
