"""Sweeps. A sweep has members: runs that train together over one base, each an ordinary run in its own directory."""

import json
import logging
import secrets
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import tomli_w
from upath import UPath

from rlora.cluster.gauges import Gauges
from rlora.cluster.resources import check_joins
from rlora.config import differences
from rlora.records import RloraError
from rlora.rollout.task import Task, load_task
from rlora.run import directory
from rlora.run.checkpoint import BUNDLES
from rlora.run.prepare import Report, is_finished, prepared
from rlora.run.run import Observer, Run
from rlora.run.source import Source, config_at, read_run, resolve_config
from rlora.settings import Config
from rlora.store import HALF, names, read_file, write_file
from rlora.sweeps.budget import budget
from rlora.sweeps.diary import DIARY, SWEEP, WANTED, Diary, complete_lines
from rlora.sweeps.directed import SweepTurns
from rlora.sweeps.display import Display
from rlora.sweeps.halving import Halving
from rlora.sweeps.members import Member, config_of, groups
from rlora.sweeps.members import members as members_of
from rlora.trackers.tracking import tracked
from rlora.train import drive

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Swept:
    """What `sweep` returns: the directory of the sweep, and the results of its members."""

    directory: Path  # of the sweep; the run of a member is in <directory>/<member>
    summaries: Mapping[str, Mapping[str, Any]]  # content of summary.json, by member
    statuses: Mapping[str, str]  # finished, dropped, paused or failed, by member


@dataclass(frozen=True)
class Plan:
    """Definition of a sweep, as stored in sweep.toml."""

    config: Mapping[str, Any]  # tables of the shared config
    axes: Mapping[str, Sequence[Any]]  # values of the grid, by full field name
    members: Mapping[str, Mapping[str, Any]]  # changes of the single members, by name
    halving: Halving

    def build_members(self) -> list[Member]:
        """Build all members. Raises RloraError for an invalid member."""
        return members_of(self.config, self.axes, self.members)


class Sweep:
    """State of a sweep in this process: the members, the diary and the open runs. `train` trains the members.

    `path` is the sweep's directory. `report` receives lines for the user.
    """

    def __init__(self, path: Path, members: Sequence[Member], halving: Halving, report: Report) -> None:
        self.path, self.halving, self.report = path, halving, report
        self.members = {member.name: member for member in members}
        self.diary = Diary(path)
        self.display = Display(path)
        self._observers: list[Observer] = [self.display, Gauges()]
        self._stacks: dict[str, ExitStack] = {}  # contexts of each open run, such as its lock
        self._tasks: dict[str, Task] = {}
        self._reported: set[str] = set()
        for fork in forks(path, self.members, self.diary.lines):
            self.members[fork.name] = fork

    # --- training ---

    def train(self) -> None:
        """Train the members that are not finished, dropped or paused, group by group (`members.groups`).

        Blocks until all groups have ended. Raises RloraError before training if memory or disk space is too small, and
        at the end if members have failed.
        """
        try:
            for number, request in self.requests():  # made while no process trained; they decide who is pending
                with self.refusing(number, request):
                    self._carry_out(number, request)
            pending = [member for member in self.members.values() if self._is_pending(member)]
            parts = groups(pending)
            if len(parts) > 1:
                names = "; ".join(", ".join(member.name for member in group) for group in parts)
                self.report(
                    f"{len(parts)} groups train one after the other, because they can't share processes: {names}"
                )
            for group in parts:
                self._report_budget(group)
            for group in parts:
                self._train(group)
        finally:
            for name in list(self._stacks):
                self.release(name)
        failed = {name: state for name, state in self.diary.states.items() if state.status == "failed"}
        if failed:
            reasons = "\n".join(f"{name}, after {state.step} steps: {state.reason}" for name, state in failed.items())
            raise RloraError(
                f"{len(failed)} of {len(self.members)} members failed:\n{reasons}\n"
                f"`rlora sweep --resume {self.path}` continues them"
            )

    def _report_budget(self, group: Sequence[Member]) -> None:
        """Report what a group needs. Raises RloraError if memory or disk space is too small."""
        needs = budget(group, {member.name: self._task(member.config) for member in group}, self.path)
        needs.check()
        self._report_once("\n".join(f"{label}: {value}" for label, value in needs.lines))

    def _train(self, group: Sequence[Member]) -> None:
        runs: list[Run] = []
        for member in group:
            run = self.open_member(member)
            if is_finished(run.path, run.config, run.start):  # an earlier process died before it wrote the event
                self.diary.note("finished", member.name, run.number)
                self.release(member.name)
            else:
                self.diary.note("began", member.name, run.number)
                runs.append(run)
        if not runs:
            return
        turns = SweepTurns(self, group, runs)
        self.display.begin()
        try:
            drive(runs, turns)
        except RloraError:
            if not any(run.failure for run in runs):
                raise
        finally:
            self.display.end()
            turns.note_ends()

    def open_member(self, member: Member) -> Run:
        """Open a member's run: new, forked or resumed. The lock of the run is held until `release`."""
        path, stack = UPath(self.path / member.name), ExitStack()
        origin, exists = self._origin_of(member.name), directory.CONFIG in names(path)
        if origin and not names(path / BUNDLES):  # the process died before the fork's first bundle
            exists = False
        fork = f"{self.path / origin[0]}@{origin[1]}" if origin else None
        source: dict[str, Any] = {"resume": path} if exists else {"run_dir": path, "fork": fork, "overwrite": True}
        config = read_run(path) if exists else member.config
        try:
            run = stack.enter_context(
                prepared(config, **source, observers=self._observers, report=self._report_once, load=self._task)
            )
            stack.enter_context(tracked(run))
        except RloraError as error:
            stack.close()
            raise RloraError(f"member {member.name}: {error}") from error
        run.has_peers = run.is_quiet = True
        self._stacks[member.name] = stack
        return run

    def release(self, name: str, error: BaseException | None = None) -> None:
        """Release a member's lock and end its trackers. `error` is the exception that ended the run, if any."""
        if stack := self._stacks.pop(name, None):
            with suppress(*([type(error)] if error else ())):
                stack.__exit__(type(error) if error else None, error, None)

    def _is_pending(self, member: Member) -> bool:
        """Return whether a member has steps to train."""
        state = self.diary.states.get(member.name)
        return not state or state.status not in ("dropped", "finished", "paused")

    def _report_once(self, text: str) -> None:
        """Report a message once, even if it applies to several members."""
        if text not in self._reported and not text.startswith("run: "):
            self._reported.add(text)
            self.report(text)

    def _task(self, config: Config) -> Task:
        """Load a member's prompts and rewards. Members that agree in all fields that affect these share a task."""
        defaults = Config(model="-", env="-", reward="-")
        irrelevant = ("learner", "critic", "algorithm", "engine", "checkpoint", "health", "trackers", "steps",
                      "restarts", "prompts_per_step", "group_size", "max_staleness", "dtype")  # fmt: skip
        table = asdict(replace(config, **{name: getattr(defaults, name) for name in irrelevant}))
        loss = config.algorithm.loss if config.algorithm.supervised else ""  # says what an example is
        key = json.dumps([table, loss], sort_keys=True, default=str)
        if key not in self._tasks:
            self._tasks[key] = load_task(config)
        return self._tasks[key]

    @property
    def statuses(self) -> dict[str, str]:
        """Status of each member."""
        states = self.diary.states
        return {name: states[name].status if name in states else "waiting" for name in self.members}

    @property
    def summaries(self) -> dict[str, dict[str, Any]]:
        """Content of each member's summary.json."""
        return {name: directory.summary(UPath(self.path / name)) for name in self.members}

    # --- requests and decisions ---

    def requests(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield the unanswered lines of `wanted.jsonl`, each after its index in the file."""
        yield from list(enumerate(complete_lines(self.path / WANTED)))[self.diary.handled :]

    @contextmanager
    def refusing(self, number: int, request: Mapping[str, Any]) -> Iterator[None]:
        """Turn the error of an impossible request into a warning and an event `refused`."""
        try:
            yield
        except (RloraError, OSError, LookupError) as error:
            self.diary.note("refused", request["member"], why=str(error), request=number)
            _log.warning(f"{request['what']} {request['member']}: {error}")

    def _carry_out(self, number: int, request: Mapping[str, Any]) -> None:
        """Carry out a request for a member that is not in training, or for a fork."""
        if request["what"] == "fork":
            self.note_fork(number, request)
            return
        event, state = {"pause": "paused", "go": "went on", "drop": "dropped"}[request["what"]], self.diary.states
        self.diary.note(event, request["member"], state[request["member"]].step, why="requested", request=number)

    def next_rung(self, group: Sequence[Member]) -> int | None:
        """Return the next step at which configurations of a group are dropped; None after the last such step."""
        group_names = {member.name for member in group}
        halved = [line for line in self.diary.lines if line["event"] == "halved"]
        done = {line["at"] for line in halved if group_names & {*line["kept"], *line["dropped"]}}
        return next((rung for rung in self.halving.at if rung not in done), None)

    def note_fork(self, number: int, request: Mapping[str, Any], job: Config | None = None) -> Member:
        """Add the member that a fork request describes. Raises RloraError if the member is invalid, or if the processes
        of a job, whose shared config is `job`, can't serve it."""
        name, source = request["name"], self.members[request["member"]]
        if name in self.members:
            raise RloraError(f"{name}: a member has this name already; use a different name")
        fork = fork_of(self.path, source, name, request["version"], request["changes"])
        if len(groups([source, fork])) > 1:
            raise RloraError(
                f"{name}: can't share processes with {source.name}, because a setting that members share (model, "
                "dtype, ...) differs, or because all weights are trained; remove that change, or start "
                f"a separate run with `rlora train --fork {self.path / source.name}@{request['version']}`"
            )
        if job:
            check_joins(name, fork.config, job)
        facts = {"of": request["member"], "version": request["version"], "changes": request["changes"]}
        self.diary.note("forked", name, request["version"], request=number, **facts)
        self.members[name] = fork
        return fork

    def _origin_of(self, name: str) -> tuple[str, int] | None:
        """Return the member and version that the member `name` was forked from; None if it is not a fork."""
        forked = [line for line in self.diary.lines if line["event"] == "forked" and line["member"] == name]
        return (forked[-1]["of"], forked[-1]["version"]) if forked else None


def sweep(
    config: Source | Sequence[Source] = None, over: Mapping[str, Sequence[Any]] | None = None,
    members: Mapping[str, Mapping[str, Any]] | None = None, *, run_dir: str | PathLike[str] | None = None,
    resume: str | PathLike[str] | None = None, halving: Halving | None = None,
    tell: Report = _log.info, **changes: Any,
) -> Swept:  # fmt: skip
    """Train many policies over one base, the members of a sweep, as `rlora sweep` does.

    `config` and `changes` are as in `rlora.train`. `over` has the axes, values by full field name; every combination is
    a member. `members` has single members by name, each with the fields that differ from `config`. Alternatively
    `config` is a list with the config of each member. `halving` drops the worse configurations during the sweep.
    `run_dir` is the directory of a new sweep (default: runs/sweep-TIME). `resume`, the directory of a sweep, continues
    its members from their newest bundles (checkpoints). `tell` receives progress lines.

    Blocks until all members have ended. Raises RloraError before training for an invalid sweep, and at the end if
    members failed, with the reason of each. The results of the remaining members are in their directories.
    """
    if resume is not None:
        if config or changes or run_dir:
            raise RloraError(
                f"sweep: resume = {str(resume)!r} continues the members in their directories, under their own configs; "
                "remove config, run_dir and the fields to change"
            )
        path = Path(resume)
        plan = read_sweep(path)
        arguments = ("over", plan.axes, over), ("members", plan.members, members), ("halving", plan.halving, halving)
        for name, stored, value in arguments:
            if value and value != stored:
                raise RloraError(
                    f"sweep: --resume {path}: {name} was {stored} and is {value} now, but a resumed sweep keeps its "
                    f"members and halving rule; remove {name}"
                )
    else:
        if isinstance(config, Sequence) and not isinstance(config, str):
            table, members = changes_of([resolve_config(source, changes) for source in config])
        else:
            table = asdict(resolve_config(config, changes))
        plan = Plan(table, over or {}, members or {}, halving or Halving())
        plan.halving.check(plan.build_members())
        path = Path(run_dir) if run_dir else Path("runs") / f"sweep-{time.strftime('%Y%m%d-%H%M%S')}"
        create(path, plan)
    with directory.locked(UPath(path)):
        state = Sweep(path, plan.build_members(), plan.halving, tell)
        try:
            state.train()
        except (KeyboardInterrupt, SystemExit) as interrupt:
            interrupt.add_note(f"`rlora sweep --resume {path}` continues its members from their newest saved steps")
            raise
    return Swept(path, state.summaries, state.statuses)


def create(path: Path, plan: Plan) -> None:
    """Create the directory of a sweep, with its `sweep.toml`. Raises RloraError if the directory is not empty."""
    if any(not name.endswith(HALF) for name in names(path)):  # a killed process leaves incomplete files
        raise RloraError(
            f"--run-dir {path}: the directory is not empty; resume its sweep with `rlora sweep --resume {path}`, or "
            "use a different directory"
        )
    path.mkdir(parents=True, exist_ok=True)
    table = {
        "id": secrets.token_hex(8), "packages": directory.packages(), "config": plan.config, "over": plan.axes,
        "members": plan.members, "halving": asdict(plan.halving),
    }  # fmt: skip
    write_file(path / SWEEP, tomli_w.dumps(table).encode())


def read_sweep(path: Path) -> Plan:
    """Read `sweep.toml` in the directory `path`. Raises RloraError if there is no such file."""
    content = read_file(path / SWEEP)
    if content is None:
        raise RloraError(f"{path}: not the directory of a sweep (no {SWEEP}); use a directory of `rlora sweep`")
    table = tomllib.loads(content.decode())
    return Plan(table["config"], table["over"], table["members"], Halving.of(table["halving"]))


def read_members(path: Path) -> tuple[list[Member], tuple[str, ...]]:
    """Read the members of the sweep in `path`, including forks, and the halving rule's `pool`."""
    plan = read_sweep(path)
    members = {member.name: member for member in plan.build_members()}
    return [*members.values(), *forks(path, members, complete_lines(path / DIARY))], plan.halving.pool


def forks(path: Path, members: Mapping[str, Member], lines: Iterable[Mapping[str, Any]]) -> list[Member]:
    """Build the members that were forked, from `lines` of the diary. `members` has the other members by name."""
    result = dict(members)
    for line in lines:
        if line["event"] == "forked":
            name = line["member"]
            result[name] = fork_of(path, result[line["of"]], name, line["version"], line["changes"])
    return [member for name, member in result.items() if name not in members]


def fork_of(path: Path, source: Member, name: str, version: int, changes: Mapping[str, Any]) -> Member:
    """Build a member that starts from a version of `source`, with `changes`, which are fields by full name.

    `path` is the sweep's directory. Raises RloraError if a change is invalid.
    """
    table = asdict(config_at(UPath(path / source.name), version))
    return Member(name, {**source.changes, **changes}, config_of(table, name, changes))


def changes_of(configs: Sequence[Config]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the tables of the first config, and the fields in which each config differs from the first.

    These are by member name: member-0 for the first config, member-1, ... Raises RloraError if there is no config.
    """
    if not configs:
        raise RloraError("sweep: the list of configs is empty; pass two or more")
    first = configs[0]
    changes = [{name: value for name, (_, value) in differences(first, config).items()} for config in configs]
    return asdict(first), {f"member-{number}": change for number, change in enumerate(changes)}
