"""Processes that run what is not trusted: reward functions on a model's text, and an env's replies to it.

A call that overruns its deadline or its memory costs its worker, which is killed and replaced, and gets a status.
No call is lost because of another.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Pipe
from typing import Any, TypeAlias, overload

from rlora.records import RewardError, RewardInput, RloraError, Score
from rlora.scoring.clock import Call, Clock
from rlora.scoring.worker import COROUTINES, ENV, IDLE, EnvReply, EnvTurn, Job, Setup, names_of, too_long

_MAIN = "from rlora.scoring.worker import main; main()"
_GRACE = 1.0  # seconds over its deadline after which a call is ended from outside; a coroutine is cancelled before
_BATCH = 64  # jobs that a worker gets at a time
_RETRIES = 3
_OF_MEMORY = ("signal 6", "signal 7", "signal 11")  # how code in C ends that is refused memory
_START = 120.0  # seconds in which a worker has to have loaded what it runs

Result: TypeAlias = list[list[Score]] | EnvReply  # of a RewardInput by reward function and episode; of a EnvTurn


class Pool:
    """`workers` processes, each with a thread here that feeds it.

    Raises RloraError where one can't load what `setup` names.
    """

    def __init__(self, setup: Setup, workers: int) -> None:
        self._setup = setup
        self._jobs: queue.SimpleQueue[tuple[Job, Future[Result]] | None] = queue.SimpleQueue()
        started: list[Future[list[frozenset[str]]]] = [Future() for _ in range(workers)]
        self._threads = [threading.Thread(target=self._serve, args=(each,), daemon=True) for each in started]
        for thread in self._threads:
            thread.start()
        try:
            self.names, *_ = [each.result() for each in started]  # by which each reward function asks for values
        except BaseException:
            self.close()
            raise

    @overload
    def do(self, of: RewardInput) -> Future[list[list[Score]]]: ...
    @overload
    def do(self, of: EnvTurn) -> Future[EnvReply]: ...
    def do(self, of: RewardInput | EnvTurn) -> Future[Any]:
        """Have a case scored, or a turn answered. Raises RewardError where the processes can't be started again."""
        future: Future[Result] = Future()
        self._jobs.put((Job(of), future))
        return future

    def close(self) -> None:
        """End the workers, once they are through with what they have in hand; what waits is cancelled."""
        with suppress(queue.Empty):
            while waiting := self._jobs.get_nowait():
                waiting[1].cancel()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self, started: Future[list[frozenset[str]]]) -> None:
        worker = _Worker(self._setup)  # from this thread: a worker dies with the thread that has started it
        try:
            started.set_result(worker.start())
        except BaseException as error:
            started.set_exception(error)
            return
        while (work := self._take()) is not None:
            try:
                worker.run(work)
            except Exception as error:  # most likely it can't be started any more
                worker.stop()
                for _, future in work:
                    if not future.done():
                        future.set_exception(RewardError(str(error)))
                with suppress(RloraError):
                    worker.start()
        worker.stop()

    def _take(self) -> "list[tuple[Job, Future[Result]]] | None":
        """The next jobs, a share of those that wait, without what is cancelled; None at the end."""
        taken = [self._jobs.get()]
        share = min(_BATCH, self._jobs.qsize() // len(self._threads))
        with suppress(queue.Empty):
            while taken[-1] and len(taken) <= share:
                taken.append(self._jobs.get_nowait())
        if taken == [None]:
            return None
        if taken[-1] is None:
            self._jobs.put(None)
        return [each for each in taken if each and each[1].set_running_or_notify_cancel()]


class _Worker:
    """One process."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.names = setup, names_of(setup.rewards)
        self.slow = 0  # first calls that took longer than they may, one a process

    def start(self) -> list[frozenset[str]]:
        """Start the process; the names by which each reward function asks for values.

        Raises RloraError where it can't load what it runs.
        """
        self.connection, theirs = Pipe()
        with tempfile.TemporaryFile() as file:
            file.write(bytes(Clock.SIZE))
            file.flush()
            self.clock = Clock(file.fileno())
            descriptors = theirs.fileno(), file.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _MAIN, *map(str, descriptors)],
                stdin=subprocess.DEVNULL,
                pass_fds=descriptors,
                start_new_session=True,  # what a function starts is killed with it
                env=os.environ | self.setup.environment | {"PYTHONPATH": _path()},
            )
        theirs.close()
        self.connection.send(self.setup)
        try:
            if not self.connection.poll(_START):
                raise RloraError(f"reward: loading {', '.join(self.setup.rewards)} takes more than {_START:.0f} s")
            answer = json.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            how = self._end(patience=1.0)
            raise RloraError(f"reward: its process ended while it was loaded ({how}){self._remedy(how)}") from None
        except BaseException:
            self._end()
            raise
        if "error" in answer:
            self._end()
            raise RloraError(answer["error"])
        self.coroutines: list[int] = answer["coroutines"]
        return [frozenset(names) for names in answer["names"]]

    def run(self, work: "list[tuple[Job, Future[Result]]]") -> None:
        """Settle the futures of all jobs, however many processes that takes."""
        faultless = 0  # deaths in a row that no call can be blamed for
        while work:
            try:
                self._run(work)
                return
            except _OverrunError as fault:
                self.start()
                work, before = [each for each in work if not each[1].done()], work
                faultless = faultless + 1 if fault.job < 0 else 0
                if faultless > _RETRIES:
                    raise RloraError(f"reward: {fault.score.detail}, {faultless} times in a row") from fault
                if fault.call == COROUTINES and len(work) > 1:  # whose fault it is shows when each is alone
                    for each in work:
                        self.run([each])
                    return
                if fault.job >= 0:
                    culprit, future = before[fault.job]
                    blamed = replace(culprit, overran={**culprit.overran, fault.call: fault.score}), future
                    work = [blamed if each[1] is future else each for each in work]

    def stop(self) -> None:
        """End the process."""
        with suppress(OSError):
            self.connection.send([])
        self._end(patience=1.0)

    def _run(self, work: "list[tuple[Job, Future[Result]]]") -> None:
        """Have the process do the jobs. Raises _OverrunError where it does not get through."""
        self.clock.write(*IDLE, self.setup.deadline)
        left = len(work)
        try:
            self.connection.send([job for job, _ in work])
            while left:
                at = self.clock.read()
                left_for_it = at.since + at.deadline + _GRACE - time.monotonic() if at else _GRACE
                if self.connection.poll(max(0.0, left_for_it)):
                    results = json.loads(self.connection.recv_bytes())
                    left -= len(results)
                    for number, result in results:
                        work[number][1].set_result(_result(work[number][0], result))
                elif at and self.clock.read() == at:
                    self._end()
                    what = too_long(self.setup, at.deadline, self._name(at.call, at.function))
                    self._note_slowness(at.deadline)
                    raise _OverrunError(at.job, at.call, Score("timeout", detail=what))
        except (EOFError, ConnectionError):
            at = self.clock.read() or Call(*IDLE, 0.0, 0.0)
            how, name = self._end(patience=1.0), self._name(at.call, at.function)
            what = f"the process of a call ended ({how})" + (f" (of {name})" if name else "")
            raise _OverrunError(at.job, at.call, Score("error", detail=what + self._remedy(how))) from None

    def _name(self, call: int, function: int) -> str:
        """Of which function a call was; of coroutines that are awaited at once, of which it may have been."""
        functions = self.coroutines if call == COROUTINES else [function] if function != ENV else []
        return " or ".join(self.names[each] for each in functions)

    def _note_slowness(self, deadline: float) -> None:
        """What hangs is not loading anything: from the third process on, a first call has no more time than others."""
        self.slow += deadline > self.setup.deadline
        if self.slow >= _RETRIES:
            self.setup = replace(self.setup, first_deadline=0.0)

    def _remedy(self, how: str) -> str:
        """What to do about how a process ended, where memory may be why."""
        field = f"scoring.memory_mib = {self.setup.memory_mib}"
        if how == "signal 9":
            return f"; most likely the machine ran out of memory: lower {field}, or scoring.workers"
        return f"; if it was refused memory, raise {field}" if how in _OF_MEMORY else ""

    def _end(self, patience: float = 0.0) -> str:
        """Make sure that the process is gone; how it went."""
        self.connection.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        return f"signal {-code}" if code < 0 else f"exit status {code}"


def _path() -> str:
    """Where this process finds modules, as PYTHONPATH."""
    return os.pathsep.join(each or os.getcwd() for each in sys.path)


class _OverrunError(Exception):
    """A process did not get through its jobs: the number of the job and of the call at fault, -1 for none."""

    def __init__(self, job: int, call: int, score: Score) -> None:
        super().__init__(score.detail)
        self.job, self.call, self.score = job, call, score


def _result(job: Job, result: Any) -> Result:
    if isinstance(job.of, EnvTurn):
        return EnvReply(**result)
    verdicts: list[list[Score]] = [[Score(*score) for score in scores] for scores in result]
    return verdicts
