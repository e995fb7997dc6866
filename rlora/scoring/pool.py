"""Worker processes for untrusted calls: reward functions on a model's text, and an env's replies to that text.

A call that exceeds its deadline gets the status "timeout", and a call that ends its process gets the status "error". A
new process replaces a process that was killed or has died. Other requests are unaffected.
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
from rlora.scoring.clock import CallRecord, Clock
from rlora.scoring.worker import (
    COROUTINES,
    ENV,
    IDLE,
    EnvReply,
    EnvTurn,
    Job,
    Setup,
    fields_of,
    reward_names,
    timeout_message,
)

_MAIN = "from rlora.scoring.worker import main; main()"
_GRACE = 1.0  # seconds after a call's deadline until its process is killed; a coroutine is cancelled at the deadline
_BATCH = 64  # maximum number of jobs that a worker takes at a time, in addition to the first
_RETRIES = 3
_MEMORY_SIGNALS = ("signal 6", "signal 7", "signal 11")  # how C code ends when an allocation fails
_START_TIMEOUT = 120.0  # seconds in which a worker must have loaded its functions

Result: TypeAlias = list[list[Score]] | EnvReply  # scores by reward function and episode, or a reply


class Pool:
    """Worker processes that call the reward functions and the env of `setup`. A thread of this process feeds each.

    The constructor starts `workers` processes, and blocks until all have loaded the functions and the env, for at most
    about `_START_TIMEOUT` seconds. Raises RloraError if a process can't load them. `names` has one item per reward
    function: the names of the values that the function asks for (`RewardFunction.names`).
    """

    def __init__(self, setup: Setup, workers: int) -> None:
        self._setup = setup
        self._jobs: queue.SimpleQueue[tuple[Job, Future[Result]] | None] = queue.SimpleQueue()
        started: list[Future[list[frozenset[str]]]] = [Future() for _ in range(workers)]
        self._threads = [threading.Thread(target=self._serve, args=(future,), daemon=True) for future in started]
        for thread in self._threads:
            thread.start()
        try:
            self.names, *_ = [future.result() for future in started]  # per function, of the values it asks for
        except BaseException:
            self.close()
            raise

    @overload
    def submit(self, request: RewardInput) -> Future[list[list[Score]]]: ...
    @overload
    def submit(self, request: EnvTurn) -> Future[EnvReply]: ...
    def submit(self, request: RewardInput | EnvTurn) -> Future[Any]:
        """Queue a request for the next free worker, and return a future immediately.

        The result for an EnvTurn is an EnvReply. The result for a RewardInput is a list with an item per reward
        function, which is a list with a Score per episode. A call that fails does not raise: its Score or EnvReply has
        the status "error" or "timeout". The future raises RewardError if the worker can't be restarted, or dies
        repeatedly outside of calls.
        """
        future: Future[Result] = Future()
        self._jobs.put((Job(request), future))
        return future

    def close(self) -> None:
        """Cancel the futures of queued requests, wait for the requests that workers have taken, and end the processes.

        Blocks until all processes have ended. A second call does nothing. A request that is submitted afterwards never
        resolves.
        """
        with suppress(queue.Empty):
            while queued := self._jobs.get_nowait():
                queued[1].cancel()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self, started: Future[list[frozenset[str]]]) -> None:
        worker = _WorkerProcess(self._setup)  # started by this thread: a worker dies with the thread that started it
        try:
            started.set_result(worker.start())
        except BaseException as error:
            started.set_exception(error)
            return
        while (work := self._take()) is not None:
            try:
                worker.run(work)
            except Exception as error:  # most likely the process can't be restarted
                worker.stop()
                for _, future in work:
                    if not future.done():
                        future.set_exception(RewardError(str(error)))
                with suppress(RloraError):
                    worker.start()
        worker.stop()

    def _take(self) -> "list[tuple[Job, Future[Result]]] | None":
        """Block until a job is queued, and take a share of the queue. Skips cancelled jobs. None if the pool closes."""
        taken = [self._jobs.get()]
        share = min(_BATCH, self._jobs.qsize() // len(self._threads))
        with suppress(queue.Empty):
            while taken[-1] and len(taken) <= share:
                taken.append(self._jobs.get_nowait())
        if taken == [None]:
            return None
        if taken[-1] is None:
            self._jobs.put(None)
        return [pair for pair in taken if pair and pair[1].set_running_or_notify_cancel()]


class _WorkerProcess:
    """Handle of one worker process, used by the thread of the pool that feeds the process."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.names = setup, reward_names(setup.rewards)
        self.slow_first_calls = 0  # number of first calls that exceeded `first_deadline`, at most one per process

    def start(self) -> list[frozenset[str]]:
        """Start the process, and block until it has loaded its functions.

        Returns, per reward function, the names of the values that the function asks for. Raises RloraError if the
        functions can't be loaded, or if that takes more than `_START_TIMEOUT` seconds.
        """
        self.connection, child_end = Pipe()
        with tempfile.TemporaryFile() as file:
            file.write(bytes(Clock.SIZE))
            file.flush()
            self.clock = Clock(file.fileno())
            descriptors = child_end.fileno(), file.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _MAIN, *map(str, descriptors)],
                stdin=subprocess.DEVNULL,
                pass_fds=descriptors,
                start_new_session=True,  # processes that a function starts are killed with it
                env=os.environ | self.setup.environment | {"PYTHONPATH": _path()},
            )
        child_end.close()
        self.connection.send(self.setup)
        try:
            if not self.connection.poll(_START_TIMEOUT):
                raise RloraError(
                    f"{fields_of(self.setup)}: loading took more than {_START_TIMEOUT:.0f} s, the limit for the start "
                    "of a worker process; move slow work to the first call, which scoring.first_deadline limits"
                )
            answer = json.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            exit_status = self._end(patience=1.0)
            remedy = self._remedy(exit_status) or "; import the files in a Python process to find what ends the process"
            raise RloraError(
                f"{fields_of(self.setup)}: the worker process ended during loading ({exit_status}){remedy}"
            ) from None
        except BaseException:
            self._end()
            raise
        if "error" in answer:
            self._end()
            raise RloraError(answer["error"])
        self.coroutines: list[int] = answer["coroutines"]
        return [frozenset(names) for names in answer["names"]]

    def run(self, work: "list[tuple[Job, Future[Result]]]") -> None:
        """Run the jobs, and set the results of their futures. Blocks, and restarts the process if a call ends it.

        Raises RloraError if the process can't be restarted, or dies repeatedly outside of calls.
        """
        unexplained = 0  # consecutive deaths that no call can be blamed for
        while work:
            try:
                self._run(work)
                return
            except _OverrunError as fault:
                self.start()
                work, previous = [pair for pair in work if not pair[1].done()], work
                unexplained = unexplained + 1 if fault.job < 0 else 0
                if unexplained > _RETRIES:
                    raise RloraError(
                        f"{fields_of(self.setup)}: {unexplained} consecutive times, and not in a call, "
                        f"{fault.score.detail}; check the machine's free memory, and threads that the functions start"
                    ) from fault
                if fault.call == COROUTINES and len(work) > 1:  # run the jobs one by one to find the one at fault
                    for pair in work:
                        self.run([pair])
                    return
                if fault.job >= 0:
                    culprit, future = previous[fault.job]
                    blamed = replace(culprit, failures={**culprit.failures, fault.call: fault.score}), future
                    work = [blamed if pair[1] is future else pair for pair in work]

    def stop(self) -> None:
        """End this worker process and the processes that its functions have started, and block until it has exited.

        A running call has 1 second before the process is killed. The futures of its jobs are not set here. A second
        call does nothing.
        """
        with suppress(OSError):
            self.connection.send([])
        self._end(patience=1.0)

    def _run(self, work: "list[tuple[Job, Future[Result]]]") -> None:
        """Run the jobs in the process. Raises _OverrunError if a call had to be killed, or if the process died."""
        self.clock.write(*IDLE, self.setup.deadline)
        unfinished = len(work)
        try:
            self.connection.send([job for job, _ in work])
            while unfinished:
                current = self.clock.read()
                patience = current.start + current.deadline + _GRACE - time.monotonic() if current else _GRACE
                if self.connection.poll(max(0.0, patience)):
                    results = json.loads(self.connection.recv_bytes())
                    unfinished -= len(results)
                    for number, result in results:
                        work[number][1].set_result(_result(work[number][0], result))
                elif current and self.clock.read() == current:
                    self._end()
                    message = timeout_message(
                        self.setup, current.deadline, self._function_name(current.call, current.function)
                    )
                    self._count_slow_first_call(current.deadline)
                    raise _OverrunError(current.job, current.call, Score("timeout", detail=message))
        except (EOFError, ConnectionError):
            current = self.clock.read() or CallRecord(*IDLE, 0.0, 0.0)
            exit_status, name = self._end(patience=1.0), self._function_name(current.call, current.function)
            message = f"the worker process ended ({exit_status})" + (f" in a call to {name}" if name else "")
            if current.job >= 0 and exit_status.startswith("exit"):
                message += "; raise an exception instead of ending the process"
            score = Score("error", detail=message + self._remedy(exit_status))
            raise _OverrunError(current.job, current.call, score) from None

    def _function_name(self, call: int, function: int) -> str:
        """Return the name of the called function, or of all coroutine functions if several calls were awaited at once.

        Empty for an env's reply and between two calls.
        """
        functions = self.coroutines if call == COROUTINES else [function] if function != ENV else []
        return " or ".join(self.names[number] for number in functions)

    def _count_slow_first_call(self, deadline: float) -> None:
        """Set `first_deadline` to 0 after `_RETRIES` processes whose first call exceeded it: the function hangs."""
        self.slow_first_calls += deadline > self.setup.deadline
        if self.slow_first_calls >= _RETRIES:
            self.setup = replace(self.setup, first_deadline=0.0)

    def _remedy(self, exit_status: str) -> str:
        """Return advice if the exit status indicates a lack of memory, else an empty string."""
        field = f"scoring.memory_mib = {self.setup.memory_mib}"
        if exit_status == "signal 9":
            return f"; most likely the machine ran out of memory: lower {field}, or scoring.workers"
        return f"; if an allocation failed, raise {field}" if exit_status in _MEMORY_SIGNALS else ""

    def _end(self, patience: float = 0.0) -> str:
        """Close the pipe, wait `patience` seconds for the process to exit, then kill it and all processes of its group.

        Returns its exit status or signal as text.
        """
        self.connection.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        return f"signal {-code}" if code < 0 else f"exit status {code}"


def _path() -> str:
    """Return this process's module search path in the format of PYTHONPATH."""
    return os.pathsep.join(entry or os.getcwd() for entry in sys.path)


class _OverrunError(Exception):
    """A process did not finish its jobs. `job` and `call` are the indices of those at fault, -1 if no call ran."""

    def __init__(self, job: int, call: int, score: Score) -> None:
        super().__init__(score.detail)
        self.job, self.call, self.score = job, call, score


def _result(job: Job, result: Any) -> Result:
    if isinstance(job.request, EnvTurn):
        return EnvReply(**result)
    verdicts: list[list[Score]] = [[Score(*score) for score in scores] for scores in result]
    return verdicts
