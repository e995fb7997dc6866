"""Processes that train recorded episodes, and are killed."""

import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
from conftest import ROOT

SCRIPT = ROOT / "tests" / "recorded_run.py"
WRITE, LEARNER, RAY, DRIVER = "write", "ray::_Actor", "raylet/raylet", "driver"  # what is killed, by the process's name


class Driver:
    """A process that trains a run, and what it has printed."""

    def __init__(self, run: Path, config: str, record: str, *fault: str) -> None:
        self.run, self.log = run, run.with_suffix(".log")
        with self.log.open("w") as output:
            command = [sys.executable, str(SCRIPT), config, str(run), record, *fault]
            self.process = subprocess.Popen(command, stdout=output, stderr=output)

    @property
    def printed(self) -> str:
        return self.log.read_text()

    @property
    def start(self) -> int | None:
        """The version that it went on from, None where it did not come so far."""
        said = re.search(r"^run: .*, from version (\d+) on$", self.printed, re.MULTILINE)
        return int(said[1]) if said else None

    @property
    def done(self) -> int:
        """Steps that it has done, saved or not."""
        told = re.findall(r"^(?:step|turn) (\d+)[/:]", self.printed, re.MULTILINE)
        return max(map(int, told), default=self.start or 0)

    def wait_for(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while self.done < step:
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.02)

    def kill(self, what: str) -> None:
        """kill -9 of the driver itself, or of the process of its that has such a name."""
        while what != DRIVER:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):  # it has ended meanwhile
                    if what in str(child.cmdline()[:1]):
                        child.kill()
                        return
            time.sleep(0.1)  # it is being started again
        self.process.kill()

    def wait(self) -> int:
        return self.process.wait(timeout=600)
