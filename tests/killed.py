"""Processes that train on recorded episodes and are killed."""

import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
from conftest import ROOT

SCRIPT = ROOT / "tests" / "recorded_run.py"
WRITE, LEARNER, RAY, DRIVER = "write", "ray::_Actor", "raylet/raylet", "driver"  # targets: names of processes


class Driver:
    """A process that trains a run, with its output."""

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
        """The version that it resumed from; None if it has not printed it."""
        match = re.search(r"^run: .*, starting from version (\d+)$", self.printed, re.MULTILINE)
        return int(match[1]) if match else None

    @property
    def done(self) -> int:
        """Number of completed steps, saved or not."""
        numbers = re.findall(r"^(?:step|turn) (\d+)[/:]", self.printed, re.MULTILINE)
        return max(map(int, numbers), default=self.start or 0)

    def wait_for(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while self.done < step:
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.02)

    def kill(self, target: str) -> None:
        """kill -9 of the driver, or of its child process with the name `target`."""
        while target != DRIVER:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):  # it ended in the meantime
                    if target in str(child.cmdline()[:1]):
                        child.kill()
                        return
            time.sleep(0.1)  # it is restarting
        self.process.kill()

    def wait(self) -> int:
        return self.process.wait(timeout=600)
