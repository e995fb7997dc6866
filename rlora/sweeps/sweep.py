"""A sweep: runs that train together over one base, each an ordinary run in a directory of its own."""

import json
import secrets
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import tomli_w
from upath import UPath

from rlora.cluster.gauges import Gauges
from rlora.config import differences
from rlora.records import RloraError
from rlora.rollout.task import Task, load_task
from rlora.run import directory
from rlora.run.checkpoint import BUNDLES
from rlora.run.prepare import Tell, is_finished, prepared, say
from rlora.run.run import Observer, Run
from rlora.run.source import Source, config_at, given, read_run
from rlora.settings import Config
from rlora.store import HALF, names, read_file, write_file
from rlora.sweeps.budget import budget
from rlora.sweeps.diary import DIARY, SWEEP, WANTED, Diary, whole_lines
from rlora.sweeps.directed import Directed
from rlora.sweeps.display import Display
from rlora.sweeps.halving import Halving
from rlora.sweeps.members import Member, config_of, groups
from rlora.sweeps.members import members as members_of
from rlora.trackers.tracking import tracked
from rlora.train import drive


@dataclass(frozen=True)
class Swept:
    """What a sweep has come to."""

    directory: Path
    summaries: Mapping[str, Mapping[str, Any]]  # by member, what its summary.json says
    statuses: Mapping[str, str]  # finished, dropped, paused or failed


@dataclass(frozen=True)
class Plan:
    """What a sweep was asked to be: sweep.toml."""

    config: Mapping[str, Any]  # the tables that members share
    over: Mapping[str, Sequence[Any]]  # axes: the values of a field, by its full name
    members: Mapping[str, Mapping[str, Any]]  # single ones, by name
    halving: Halving

    @property
    def made(self) -> list[Member]:
        """The members. Raises RloraError for those that can't be."""
        return members_of(self.config, self.over, self.members)


class Sweep:
    """The members of a sweep, its diary, and the runs of those that train."""

    def __init__(self, place: Path, made: Sequence[Member], halving: Halving, tell: Tell) -> None:
        self.place, self.members, self.halving, self.tell = place, {each.name: each for each in made}, halving, tell
        self.diary = Diary(place)
        self.display = Display(place)
        self._observers: list[Observer] = [self.display, Gauges()]
        self._held: dict[str, ExitStack] = {}  # what each open run holds, its lock among it
        self._tasks: dict[str, Task] = {}
        self._said: set[str] = set()
        for forked in forks(place, self.members, self.diary.lines):
            self.members[forked.name] = forked

    # --- training ---

    def train(self) -> None:
        """Train the members that are not finished, dropped or paused, group by group.

        Raises RloraError at the end, where members have failed.
        """
        try:
            left = [each for each in self.members.values() if self._is_left(each)]
            together = groups(left, {each.name: self._task(each.config).stop for each in left})
            if len(together) > 1:
                names = "; ".join(", ".join(each.name for each in group) for group in together)
                self.tell(f"{len(together)} groups train one after the other, for they share no process: {names}")
            for group in together:
                self._tell_budget(group)
            for group in together:
                self._train(group)
        finally:
            for name in list(self._held):
                self.let_go(name)
        failed = {name: fate for name, fate in self.diary.fates.items() if fate.status == "failed"}
        if failed:
            reasons = "\n".join(f"{name}, after {fate.step} steps: {fate.why}" for name, fate in failed.items())
            raise RloraError(
                f"{len(failed)} of {len(self.members)} members failed:\n{reasons}\n"
                f"`rlora sweep --resume {self.place}` continues them"
            )

    def _tell_budget(self, group: Sequence[Member]) -> None:
        """Say what a group will take. Raises RloraError where it does not fit."""
        made = budget(group, {each.name: self._task(each.config) for each in group}, self.place)
        made.check()
        self.tell("\n".join(f"{what}: {value}" for what, value in made.lines))

    def _train(self, group: Sequence[Member]) -> None:
        runs: list[Run] = []
        for member in group:
            run = self.opened(member)
            if is_finished(run.place, run.config, run.start):  # it died before that was noted
                self.diary.note("finished", member.name, run.number)
                self.let_go(member.name)
            else:
                self.diary.note("began", member.name, run.number)
                runs.append(run)
        if not runs:
            return
        directed = Directed(self, group, runs)
        self.display.begin()
        try:
            drive(runs, directed)
        except RloraError:
            if not any(run.failure for run in runs):
                raise
        finally:
            self.display.end()
            directed.note_ends()

    def opened(self, member: Member) -> Run:
        """A member's run: a new one, a fork, or one that goes on. Its lock is held until `let_go`."""
        place, stack = UPath(self.place / member.name), ExitStack()
        origin, there = self._origin_of(member.name), directory.CONFIG in names(place)
        if origin and not names(place / BUNDLES):  # it died before its first bundle
            there = False
        fork = f"{self.place / origin[0]}@{origin[1]}" if origin else None
        begun: dict[str, Any] = {"resume": place} if there else {"run_dir": place, "fork": fork, "overwrite": True}
        config = read_run(place) if there else member.config
        try:
            run = stack.enter_context(
                prepared(config, **begun, observers=self._observers, tell=self._tell_once, load=self._task)
            )
            stack.enter_context(tracked(run))
        except RloraError as error:
            stack.close()
            raise RloraError(f"member {member.name}: {error}") from error
        run.together = run.is_quiet = True
        self._held[member.name] = stack
        return run

    def let_go(self, name: str, error: BaseException | None = None) -> None:
        """Let others have a member's directory, and end its trackers; `error` is what ended it."""
        if stack := self._held.pop(name, None):
            with suppress(*([type(error)] if error else ())):
                stack.__exit__(type(error) if error else None, error, None)

    def _is_left(self, member: Member) -> bool:
        """Whether a member has something to train."""
        fate = self.diary.fates.get(member.name)
        return not fate or fate.status not in ("dropped", "finished", "paused")

    def _tell_once(self, text: str) -> None:
        """Print a message once, even if it applies to several members."""
        if text not in self._said and not text.startswith("run: "):
            self._said.add(text)
            self.tell(text)

    def _task(self, config: Config) -> Task:
        """What a member trains on; members that agree in all that it depends on have the same."""
        others = Config(model="-", env="-", reward="-")
        free = ("learner", "critic", "algorithm", "engine", "checkpoint", "health", "trackers", "steps", "restarts",
                "prompts_per_step", "group_size", "max_staleness", "dtype")  # fmt: skip
        table = asdict(replace(config, **{name: getattr(others, name) for name in free}))
        key = json.dumps(table, sort_keys=True, default=str)
        if key not in self._tasks:
            self._tasks[key] = load_task(config)
        return self._tasks[key]

    @property
    def statuses(self) -> dict[str, str]:
        """What has become of each member."""
        fates = self.diary.fates
        return {name: fates[name].status if name in fates else "waiting" for name in self.members}

    @property
    def summaries(self) -> dict[str, dict[str, Any]]:
        """What each member's summary.json says."""
        return {name: directory.summary(UPath(self.place / name)) for name in self.members}

    # --- what was asked, and what was decided ---

    def asked(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The lines of `wanted.jsonl` that are not answered yet, by their numbers."""
        yield from list(enumerate(whole_lines(self.place / WANTED)))[self.diary.handled :]

    def rung_of(self, group: Sequence[Member]) -> int | None:
        """The next step at which configurations of a group are dropped."""
        ours = {each.name for each in group}
        halved = [line for line in self.diary.lines if line["event"] == "halved"]
        done = {line["at"] for line in halved if ours & {*line["kept"], *line["dropped"]}}
        return next((rung for rung in self.halving.at if rung not in done), None)

    def forked(self, asked: Mapping[str, Any]) -> Member:
        """The member that a fork makes. Raises RloraError where it can't be."""
        name, source = asked["name"], self.members[asked["member"]]
        if name in self.members:
            raise RloraError(f"{name}: there is a member of this name; give another")
        fork = fork_of(self.place, source, name, asked["version"], asked["changes"])
        if len(groups([source, fork], {each.name: self._task(each.config).stop for each in (source, fork)})) > 1:
            raise RloraError(f"{name}: it can't share processes with {source.name}; leave out what the job has once")
        return fork

    def _origin_of(self, name: str) -> tuple[str, int] | None:
        """The member and the version that a member began from."""
        forked = [line for line in self.diary.lines if line["event"] == "forked" and line["member"] == name]
        return (forked[-1]["of"], forked[-1]["version"]) if forked else None


def sweep(
    config: Source | Sequence[Source] = None, over: Mapping[str, Sequence[Any]] | None = None,
    members: Mapping[str, Mapping[str, Any]] | None = None, *, run_dir: str | PathLike[str] | None = None,
    resume: str | PathLike[str] | None = None, halving: Halving | None = None,
    tell: Tell = say, **changes: Any,
) -> Swept:  # fmt: skip
    """Train many policies over one base, as `rlora sweep` does: the runs of a sweep, its members.

    `config` and `changes` are as in `rlora.train`. `over` has axes, the values of a field by its full name, and every
    combination is a member; `members` has single ones by name, each with the fields that it changes. Or `config` is a
    list: each is a member, which differs from the first one in some fields.
    With `resume`, the directory of a sweep, its members go on from their newest bundles.

    Raises RloraError for what can't be swept before anything is trained; and at the end where members have failed, with
    the reason of each. What the others have learned is in their directories.
    """
    if resume is not None:
        if config or changes or run_dir:
            raise RloraError(
                f"sweep: resume = {str(resume)!r} continues the members where they are, under their own "
                "configs; leave out config and run_dir"
            )
        place = Path(resume)
        plan = read_sweep(place)
        told = ("over", plan.over, over), ("members", plan.members, members), ("halving", plan.halving, halving)
        for name, was, now in told:
            if now and now != was:
                raise RloraError(f"sweep: --resume {place}: {name} was {was}, and is {now} now; leave it out")
    else:
        if isinstance(config, Sequence) and not isinstance(config, str):
            table, members = of_list([given(each, changes) for each in config])
        else:
            table = asdict(given(config, changes))
        plan = Plan(table, over or {}, members or {}, halving or Halving())
        plan.halving.check(plan.made)
        place = Path(run_dir) if run_dir else Path("runs") / f"sweep-{time.strftime('%Y%m%d-%H%M%S')}"
        create(place, plan)
    with directory.held(UPath(place)):
        going = Sweep(place, plan.made, plan.halving, tell)
        going.train()
    return Swept(place, going.summaries, going.statuses)


def create(place: Path, plan: Plan) -> None:
    """Make the directory of a sweep, with its `sweep.toml`. Raises RloraError where something is there already."""
    if any(not name.endswith(HALF) for name in names(place)):  # a process was killed while it wrote the others
        raise RloraError(
            f"--run-dir {place}: it is not empty; go on with its sweep by `rlora sweep --resume {place}`, or name "
            "another directory"
        )
    place.mkdir(parents=True, exist_ok=True)
    told = {"id": secrets.token_hex(8), "packages": directory.packages(), **asdict(plan)}
    write_file(place / SWEEP, tomli_w.dumps(told).encode())


def read_sweep(place: Path) -> Plan:
    """What `create` wrote. Raises RloraError where no sweep is."""
    content = read_file(place / SWEEP)
    if content is None:
        raise RloraError(f"{place}: no sweep is there (it has no {SWEEP}); name a directory that `rlora sweep` made")
    told = tomllib.loads(content.decode())
    return Plan(told["config"], told["over"], told["members"], Halving.of(told["halving"]))


def read_members(place: Path) -> tuple[list[Member], tuple[str, ...]]:
    """The members of a sweep, forks too, and the fields by which they are repetitions of one configuration."""
    plan = read_sweep(place)
    made = {each.name: each for each in plan.made}
    return [*made.values(), *forks(place, made, whole_lines(place / DIARY))], plan.halving.pool


def forks(place: Path, made: Mapping[str, Member], lines: Iterable[Mapping[str, Any]]) -> list[Member]:
    """The members that were forked from others, by the lines of the diary."""
    known = dict(made)
    for line in lines:
        if line["event"] == "forked":
            name = line["member"]
            known[name] = fork_of(place, known[line["of"]], name, line["version"], line["changes"])
    return [each for name, each in known.items() if name not in made]


def fork_of(place: Path, source: Member, name: str, version: int, changes: Mapping[str, Any]) -> Member:
    """The member that begins from a version of another, with changes. Raises RloraError where it can't be."""
    table = asdict(config_at(UPath(place / source.name), version))
    return Member(name, {**source.changes, **changes}, config_of(table, name, changes))


def of_list(configs: Sequence[Config]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The first config, and as members what each changes in it; named by that, or by their number."""
    if not configs:
        raise RloraError("sweep: the list of configs is empty; give two or more")
    first = configs[0]
    changes = [{name: now for name, (_, now) in differences(first, each).items()} for each in configs]
    named = {f"member-{number}": each for number, each in enumerate(changes)}
    return asdict(first), named
