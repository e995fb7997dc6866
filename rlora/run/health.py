"""Health rules: detect training problems from a run's metrics, each with a remedy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from rlora.records import RloraError, UpdateStats
from rlora.scoring.worker import reward_names
from rlora.settings import Config, HealthRule

Line = Mapping[str, Any]  # metrics of one step
Lines = Sequence[Line]  # metrics of all steps so far, in order
_MOSTLY_CORRECT = 0.5  # share of correct completions above which low entropy and truncation are not reported
_USUAL_KL = 0.02  # nats per token; a lower KL is the usual difference between engine and learner in bf16


@dataclass(frozen=True)
class Rule:
    """A condition on a run's metrics, and the text of its warning: what the condition means and what to do."""

    holds: Callable[[Lines, Config], bool]
    remedy: str


def check_updates(config: Config, update: UpdateStats) -> None:
    """Raise RloraError after `learner.max_bad_updates` consecutive skipped updates."""
    if update.skipped_in_a_row >= config.learner.max_bad_updates:
        raise RloraError(
            f"learner: {update.skipped_in_a_row} updates in a row had a non-finite loss or gradient (loss "
            f"{update.loss:.3g}, gradient norm {update.grad_norm:.3g}, lr {update.lr:.3g}); they did not change the "
            'adapter. Lower learner.lr or use dtype = "float32"'
        )


class Health:
    """Checks the rules after each step. `lines` are the metrics of earlier steps, for a resumed run."""

    def __init__(self, config: Config, lines: Lines = ()) -> None:
        self.config, self.lines = config, list(lines)
        self.fired: dict[str, int] = {}  # by rule: the first step in which it held
        self.holding: dict[str, int] = {}  # by rule: the step since which it holds
        for line in self.lines:
            self._note({name.removeprefix("health/") for name in line if name.startswith("health/")}, line["step"])

    def update(self, line: Line) -> dict[str, str]:
        """Add the metrics of a step. Returns the rules that hold now, with their remedies."""
        self.lines.append(line)
        remedies: dict[str, str] = {
            name: rule.remedy for name, rule in RULES.items() if rule.holds(self.lines, self.config)
        }
        self._note(set(remedies), line["step"])
        return remedies

    def check_stop(self, remedies: Mapping[str, str]) -> None:
        """Raise RloraError if `health.stop` lists one of the rules."""
        if stopping := [name for name in self.config.health.stop if name in remedies]:
            reasons = "\n".join(f"{name}: {remedies[name]}" for name in stopping)
            raise RloraError(
                f"health.stop = {list(self.config.health.stop)}: the run stops, with everything saved\n{reasons}"
            )

    def _note(self, names: set[str], step: int) -> None:
        self.holding = {name: self.holding.get(name, step) for name in names}
        for name in names:
            self.fired.setdefault(name, step)


def _window(lines: Lines, config: Config) -> Lines:
    """The last `health.steps` steps; empty if there are fewer."""
    count = config.health.steps
    return lines[-count:] if len(lines) >= count else ()


def _every_step(lines: Lines, config: Config, holds: Callable[[Line], bool]) -> bool:
    return bool(last := _window(lines, config)) and all(holds(line) for line in last)


def _equal_rewards(line: Line) -> bool:
    """Whether all rewards of a step are equal."""
    return line["reward/max"] is not None and line["reward/max"] == line.get("reward/min")


def _floor(lines: Lines, config: Config) -> bool:
    least = min((line["reward/min"] for line in lines if line.get("reward/min") is not None), default=None)

    def at_floor(line: Line) -> bool:
        return _equal_rewards(line) and bool(line["reward/max"] == least and line["status/correct"] < 1)

    return _every_step(lines, config, at_floor)


def _solved(lines: Lines, config: Config) -> bool:
    return _every_step(lines, config, lambda line: _equal_rewards(line) and line["status/correct"] == 1)


def _no_signal(lines: Lines, config: Config) -> bool:
    """No group is informative. Steps whose rewards are all equal are left to the rules `floor` and `solved`."""
    of_group = config.algorithm.of_group
    all_equal = _every_step(lines, config, _equal_rewards)
    return (
        of_group and not all_equal and _every_step(lines, config, lambda line: line["reward/informative_groups"] == 0)
    )


def _failing(lines: Lines, config: Config) -> bool:
    last = _window(lines, config)
    share = fmean(line["status/timeout"] + line["status/error"] for line in last) if last else 0.0
    return share > config.health.errors


def _dead_part(lines: Lines, config: Config) -> bool:
    """One of several reward functions returned 0 for every completion."""
    last = _window(lines, config)
    names = reward_names(config.rewards)
    return (
        bool(last) and len(names) > 1 and any(all(line.get(f"reward/{name}") == 0 for line in last) for name in names)
    )


def _apart(lines: Lines, config: Config) -> bool:
    """The KL of the last steps is more than ten times its median in the steps before them."""
    values = [line["kl/behaviour"] for line in lines if line["kl/behaviour"] is not None]
    count = config.health.steps
    earlier, last = values[:-count], values[-count:]
    return len(earlier) >= count and min(last) > max(_USUAL_KL, 10 * median(earlier))


def _collapsed(lines: Lines, config: Config) -> bool:
    """The entropy is below a tenth of its initial value, and most completions are not correct."""
    count = config.health.steps
    values = [line["entropy"] for line in lines if line["entropy"] is not None]
    if len(values) < 2 * count or lines[-1]["status/correct"] > _MOSTLY_CORRECT:
        return False
    return bool(max(values[-count:]) < 0.1 * fmean(values[:count]))


def _overfits(lines: Lines, config: Config) -> bool:
    """Held-out accuracy is below the 95% interval of its best, and the training reward has risen since."""
    evaluated = [(index, line) for index, line in enumerate(lines) if line.get("accuracy/held_out") is not None]
    if len(evaluated) < 2:
        return False
    best_at, best = max(evaluated, key=lambda pair: pair[1]["accuracy/held_out"])
    count = min(config.health.steps, max(1, best_at))
    at_best, now = (
        [line["reward/mean"] for line in part if line["reward/mean"] is not None]
        for part in (lines[max(0, best_at - count) : best_at + 1], lines[-count:])
    )
    falls = evaluated[-1][1]["accuracy/held_out"] < best["accuracy/held_out/low"]
    return bool(at_best and now and falls and fmean(now) > fmean(at_best))


def _truncated(lines: Lines, config: Config) -> bool:
    """Every completion is cut off, and most are not correct: an answer may come before the cut."""
    return _every_step(
        lines, config, lambda line: line["completion/truncated"] == 1 and line["status/correct"] <= _MOSTLY_CORRECT
    )


def _skipped(lines: Lines, config: Config) -> bool:
    return len(lines) > 1 and all(line["update/skipped"] for line in lines[-2:])


RULES: dict[HealthRule, Rule] = {
    "floor": Rule(
        _floor,
        "all rewards are the lowest possible, so nothing is learned: try `rlora show prompt` and `rlora check`, easier "
        "prompts, a larger group_size, or a model that is sometimes correct",
    ),
    "solved": Rule(
        _solved, "every completion is correct, so nothing more is learned: use harder prompts, or stop here"
    ),
    "truncated": Rule(
        _truncated,
        "every completion is cut off: raise sampling.max_tokens, or check with `rlora show prompt` which token should "
        "end the policy's message",
    ),
    "failing_rewards": Rule(
        _failing,
        "reward functions time out or fail for many episodes: see the errors above, fix the function, or raise "
        "scoring.deadline",
    ),
    "dead_part": Rule(
        _dead_part,
        "one of the reward functions always returns 0: see reward/NAME in metrics.jsonl; try it on a completion, and "
        "check that its input can contain what it looks for",
    ),
    "engine_learner_apart": Rule(
        _apart,
        "the KL between engine and learner is far above its earlier values: see swap/canary; resume the run, or use "
        'dtype = "float32"',
    ),
    "entropy_collapsed": Rule(
        _collapsed,
        "the policy repeats the same completions, and they are not correct: lower learner.lr, set algorithm.entropy or "
        "algorithm.kl, and continue from an earlier version (--fork RUN@STEP)",
    ),
    "overfitting": Rule(
        _overfits,
        "the training reward rises while the held-out accuracy falls: use the best version (checkpoint.best_by = "
        '"accuracy") or more prompts, or check whether the policy exploits the reward function',
    ),
    "no_signal": Rule(
        _no_signal,
        "the rewards of each group are equal, so there is no gradient: raise group_size or sampling.temperature, or "
        "use prompts of a different difficulty",
    ),
    "skipped": Rule(
        _skipped,
        'updates are skipped, because their loss or gradient is not finite: lower learner.lr, or use dtype = "float32"',
    ),
}
