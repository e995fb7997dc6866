import os
import tempfile
import time

from rlora.scoring.clock import Clock


def test_what_is_half_written_is_not_read() -> None:
    """A process writes without a pause, in which another reads: all that is read is of one call."""
    with tempfile.TemporaryFile() as file:
        file.write(bytes(Clock.SIZE))
        file.flush()
        clock = Clock(file.fileno())
        clock.write(0, 0, 0, 0.0)
        writer, deadline = os.fork(), time.monotonic() + 1.0
        if not writer:
            number = 0
            while time.monotonic() < deadline + 0.5:
                number += 1
                clock.write(number, number, number, float(number))
            os._exit(0)
        try:
            seen = []
            while time.monotonic() < deadline:
                seen.append(clock.read())
        finally:
            os.waitpid(writer, 0)
    calls = [call for call in seen if call]
    assert len({call.job for call in calls}) > 10
    assert all(call.job == call.call == call.function == call.deadline for call in calls)
    assert [call.since for call in calls] == sorted(call.since for call in calls)
