"""Tells when a run is ill: rules over the figures of its steps, each with what to do about it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from rlora.records import RloraError, UpdateStats
from rlora.scoring.worker import names_of
from rlora.settings import Config
from rlora.watch_settings import HealthRule

Line = Mapping[str, Any]  # the figures of a step
Lines = Sequence[Line]  # of a run so far, the step under way last
_MOST = 0.5  # share of right completions from which on entropy and length are no matter of health
_FAR = 0.02  # nats per token: below it engine and learner agree as well as they do in bf16


@dataclass(frozen=True)
class Rule:
    """A rule holds for a run, or not; `remedy` says what that means and what to do."""

    holds: Callable[[Lines, Config], bool]
    remedy: str


def check_updates(config: Config, update: UpdateStats) -> None:
    """Raise RloraError after `learner.max_bad_updates` skipped updates in a row."""
    if update.skipped_in_a_row >= config.learner.max_bad_updates:
        raise RloraError(
            f"learner: {update.skipped_in_a_row} updates in a row had a non-finite loss or gradient (loss "
            f"{update.loss:.3g}, gradient norm {update.grad_norm:.3g}, lr {update.lr:.3g}); the adapter is as it was "
            'before them. Lower learner.lr or use dtype = "float32"'
        )


class Health:
    """Looks at each step of a run. `lines` are those of the steps before, of a run that goes on."""

    def __init__(self, config: Config, lines: Lines = ()) -> None:
        self.config, self.lines = config, list(lines)
        self.fired: dict[str, int] = {}  # the step in which each rule has held first
        self.holding: dict[str, int] = {}  # since which step each rule holds now
        for line in self.lines:
            self._note({name.removeprefix("health/") for name in line if name.startswith("health/")}, line["step"])

    def look(self, line: Line) -> dict[str, str]:
        """Return the rules that hold now, each with its remedy."""
        self.lines.append(line)
        found: dict[str, str] = {
            name: rule.remedy for name, rule in RULES.items() if rule.holds(self.lines, self.config)
        }
        self._note(set(found), line["step"])
        return found

    def refuse(self, found: Mapping[str, str]) -> None:
        """Raise RloraError where one of the rules is to stop the run."""
        if stopping := [name for name in self.config.health.stop if name in found]:
            told = "\n".join(f"{name}: {found[name]}" for name in stopping)
            raise RloraError(
                f"health.stop = {list(self.config.health.stop)}: the run stops, with everything saved\n{told}"
            )

    def _note(self, names: set[str], step: int) -> None:
        self.holding = {name: self.holding.get(name, step) for name in names}
        for name in names:
            self.fired.setdefault(name, step)


def _last(lines: Lines, config: Config) -> Lines:
    """The last `health.steps` steps; none as long as there are fewer."""
    count = config.health.steps
    return lines[-count:] if len(lines) >= count else ()


def _all(lines: Lines, config: Config, holds: Callable[[Line], bool]) -> bool:
    return bool(last := _last(lines, config)) and all(holds(line) for line in last)


def _alike(line: Line) -> bool:
    """Whether all rewards of a step are the same."""
    return line["reward/max"] is not None and line["reward/max"] == line.get("reward/min")


def _floor(lines: Lines, config: Config) -> bool:
    least = min((line["reward/min"] for line in lines if line.get("reward/min") is not None), default=None)
    return _all(lines, config, lambda line: _alike(line) and line["reward/max"] == least and line["status/correct"] < 1)


def _solved(lines: Lines, config: Config) -> bool:
    return _all(lines, config, lambda line: _alike(line) and line["status/correct"] == 1)


def _no_signal(lines: Lines, config: Config) -> bool:
    """No group is informative, though not all rewards are the same: that is told by other rules."""
    of_group = config.algorithm.of_group
    alike = _all(lines, config, _alike)
    return of_group and not alike and _all(lines, config, lambda line: line["reward/informative_groups"] == 0)


def _failing(lines: Lines, config: Config) -> bool:
    last = _last(lines, config)
    share = fmean(line["status/timeout"] + line["status/error"] for line in last) if last else 0.0
    return share > config.health.errors


def _dead_part(lines: Lines, config: Config) -> bool:
    """One of several reward functions has given 0 throughout."""
    last = _last(lines, config)
    names = names_of(config.rewards)
    return (
        bool(last) and len(names) > 1 and any(all(line.get(f"reward/{name}") == 0 for line in last) for name in names)
    )


def _apart(lines: Lines, config: Config) -> bool:
    """The KL of the last steps is ten times what it was in the steps before them."""
    known = [line["kl/behaviour"] for line in lines if line["kl/behaviour"] is not None]
    count = config.health.steps
    before, last = known[:-count], known[-count:]
    return len(before) >= count and min(last) > max(_FAR, 10 * median(before))


def _collapsed(lines: Lines, config: Config) -> bool:
    """The entropy is a tenth of what it was at first, and answers are not right for that."""
    count = config.health.steps
    known = [line["entropy"] for line in lines if line["entropy"] is not None]
    if len(known) < 2 * count or lines[-1]["status/correct"] > _MOST:
        return False
    return bool(max(known[-count:]) < 0.1 * fmean(known[:count]))


def _overfits(lines: Lines, config: Config) -> bool:
    """Held-out accuracy is below the interval of its best, while the training reward has risen since."""
    known = [(place, line) for place, line in enumerate(lines) if line.get("accuracy/held_out") is not None]
    if len(known) < 2:
        return False
    best_at, best = max(known, key=lambda each: each[1]["accuracy/held_out"])
    count = min(config.health.steps, max(1, best_at))
    then, now = (
        [line["reward/mean"] for line in part if line["reward/mean"] is not None]
        for part in (lines[max(0, best_at - count) : best_at + 1], lines[-count:])
    )
    falls = known[-1][1]["accuracy/held_out"] < best["accuracy/held_out/low"]
    return bool(then and now and falls and fmean(now) > fmean(then))


def _truncated(lines: Lines, config: Config) -> bool:
    """Every completion is cut off, and most are not right: an answer may stand before the end."""
    return _all(lines, config, lambda line: line["completion/truncated"] == 1 and line["status/correct"] <= _MOST)


def _skipped(lines: Lines, config: Config) -> bool:
    return len(lines) > 1 and all(line["update/skipped"] for line in lines[-2:])


RULES: dict[HealthRule, Rule] = {
    "floor": Rule(
        _floor,
        "all rewards are the lowest there is, so nothing is learned: try `rlora show prompt` and `rlora check`, easier "
        "prompts, a larger group_size, or a model that is right now and then",
    ),
    "solved": Rule(
        _solved, "every completion is correct, so nothing more is learned: take harder prompts, or stop here"
    ),
    "truncated": Rule(
        _truncated,
        "every completion is cut off: raise sampling.max_tokens, or see by `rlora show prompt` with which token the "
        "policy's message should end",
    ),
    "failing_rewards": Rule(
        _failing,
        "reward functions time out or fail for many episodes: see the errors above, mend the function, or raise "
        "scoring.deadline",
    ),
    "dead_part": Rule(
        _dead_part,
        "one of the reward functions gives 0 throughout: see reward/NAME in metrics.jsonl; try it on a completion, and "
        "look whether what it asks for can be in the text that it gets",
    ),
    "engine_learner_apart": Rule(
        _apart,
        "the KL of engine and learner is far above what it was in this run: see swap/canary; resume the run, or use "
        'dtype = "float32"',
    ),
    "entropy_collapsed": Rule(
        _collapsed,
        "the policy always says the same, and it is not right: lower learner.lr, set algorithm.entropy or "
        "algorithm.kl, and go on from an earlier version (--fork RUN@STEP)",
    ),
    "overfitting": Rule(
        _overfits,
        "the training reward rises while the held-out accuracy falls: take the best version (checkpoint.best_by = "
        '"accuracy"), more prompts, or look whether the reward is gamed',
    ),
    "no_signal": Rule(
        _no_signal,
        "the rewards of each group agree, so there is no gradient: raise group_size or sampling.temperature, or take "
        "prompts of another difficulty",
    ),
    "skipped": Rule(
        _skipped,
        'updates are skipped, for their loss or gradient is not finite: lower learner.lr, or use dtype = "float32"',
    ),
}
