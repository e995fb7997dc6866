import os
import tempfile
import time

from rlora.scoring.clock import Clock


def test_what_is_half_written_is_not_read() -> None:
    """One process writes without a pause while another reads: each record that is read belongs to one call."""
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
            records = []
            while time.monotonic() < deadline:
                records.append(clock.read())
        finally:
            os.waitpid(writer, 0)
    calls = [call for call in records if call]
    assert len({call.job for call in calls}) > 10
    assert all(call.job == call.call == call.function == call.deadline for call in calls)
    assert [call.start for call in calls] == sorted(call.start for call in calls)
