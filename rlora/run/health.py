"""Health rules: conditions on a run's metrics that detect training problems, and a remedy for each."""

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
_MOSTLY_MASKED = 0.9  # share of tokens
_USUAL_KL = 0.02  # nats per token; a lower KL is the usual difference between engine and learner in bf16


@dataclass(frozen=True)
class Rule:
    """A condition on a run's metrics, and a remedy: a text that says what the condition means and what to do."""

    holds: Callable[[Lines, Config], bool]  # whether the condition is met after the last of these steps
    remedy: str


def check_updates(config: Config, update: UpdateStats) -> None:
    """Raise RloraError if `update` is at least the `learner.max_bad_updates`-th skipped update in a row."""
    if update.skipped_in_a_row >= config.learner.max_bad_updates:
        raise RloraError(
            f"learner: {update.skipped_in_a_row} updates in a row had a non-finite loss or gradient (loss "
            f"{update.loss:.3g}, gradient norm {update.grad_norm:.3g}, lr {update.lr:.3g}) and did not change the "
            f"adapter, and learner.max_bad_updates = {config.learner.max_bad_updates} stops the run; lower learner.lr, "
            'or set dtype = "float32"'
        )


class Health:
    """Checks the health rules after each step. `lines` are the metrics of the steps before a resume."""

    def __init__(self, config: Config, lines: Lines = ()) -> None:
        self.config, self.lines = config, list(lines)
        self.fired: dict[str, int] = {}  # by rule: the first step after which its condition was met
        self.holding: dict[str, int] = {}  # by rule whose condition is met now: the step since which it is met
        for line in self.lines:
            self._note({name.removeprefix("health/") for name in line if name.startswith("health/")}, line["step"])

    def update(self, line: Line) -> dict[str, str]:
        """Add the metrics of a step. Returns the rules whose condition is met after this step: remedies by rule name.

        The condition of most rules covers the last `health.steps` steps, so it is not met before that many steps.
        """
        self.lines.append(line)
        remedies: dict[str, str] = {
            name: rule.remedy for name, rule in RULES.items() if rule.holds(self.lines, self.config)
        }
        self._note(set(remedies), line["step"])
        return remedies

    def check_stop(self, remedies: Mapping[str, str]) -> None:
        """Raise RloraError if `health.stop` lists a rule of `remedies`, which `update` returned."""
        if stopping := [name for name in self.config.health.stop if name in remedies]:
            reasons = "\n".join(f"{name}: {remedies[name]}" for name in stopping)
            raise RloraError(
                f"health.stop = {list(self.config.health.stop)}: the run stops, with everything saved; apply a remedy, "
                f"or remove the rule from health.stop, and resume the run\n{reasons}"
            )

    def _note(self, names: set[str], step: int) -> None:
        self.holding = {name: self.holding.get(name, step) for name in names}
        for name in names:
            self.fired.setdefault(name, step)


def _window(lines: Lines, config: Config) -> Lines:
    """Return the metrics of the last `health.steps` steps; empty if there are fewer steps."""
    count = config.health.steps
    return lines[-count:] if len(lines) >= count else ()


def _every_step(lines: Lines, config: Config, holds: Callable[[Line], bool]) -> bool:
    return bool(last := _window(lines, config)) and all(holds(line) for line in last)


def _equal_rewards(line: Line) -> bool:
    """Return whether all rewards of a step are equal."""
    return line["reward/max"] is not None and line["reward/max"] == line.get("reward/min")


def _floor(lines: Lines, config: Config) -> bool:
    least = min((line["reward/min"] for line in lines if line.get("reward/min") is not None), default=None)

    def at_floor(line: Line) -> bool:
        return _equal_rewards(line) and bool(line["reward/max"] == least and line["status/correct"] < 1)

    return _every_step(lines, config, at_floor)


def _solved(lines: Lines, config: Config) -> bool:
    return _every_step(lines, config, lambda line: _equal_rewards(line) and line["status/correct"] == 1)


def _no_signal(lines: Lines, config: Config) -> bool:
    """Return whether no group was informative. If all rewards of each step are equal, `floor` or `solved` applies."""
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
    """Return whether one of several reward functions returned 0 for every completion."""
    last = _window(lines, config)
    names = reward_names(config.rewards)
    return (
        bool(last) and len(names) > 1 and any(all(line.get(f"reward/{name}") == 0 for line in last) for name in names)
    )


def _apart(lines: Lines, config: Config) -> bool:
    """Return whether the KL of each of the last steps is more than ten times the median KL of the steps before."""
    values = [line["kl/behaviour"] for line in lines if line["kl/behaviour"] is not None]
    count = config.health.steps
    earlier, last = values[:-count], values[-count:]
    return len(earlier) >= count and min(last) > max(_USUAL_KL, 10 * median(earlier))


def _collapsed(lines: Lines, config: Config) -> bool:
    """Return whether the entropy is below a tenth of its initial value, and most completions are not correct."""
    count = config.health.steps
    values = [line["entropy"] for line in lines if line["entropy"] is not None]
    if len(values) < 2 * count or lines[-1]["status/correct"] > _MOSTLY_CORRECT:
        return False
    return bool(max(values[-count:]) < 0.1 * fmean(values[:count]))


def _overfits(lines: Lines, config: Config) -> bool:
    """Return whether the newest held-out accuracy is below the 95% interval of the best held-out accuracy, and the
    training reward has risen since the best version was evaluated."""
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
    """Return whether every completion was cut off, and most were not correct: an answer can come before the cut."""
    return _every_step(
        lines, config, lambda line: line["completion/truncated"] == 1 and line["status/correct"] <= _MOSTLY_CORRECT
    )


def _masked(lines: Lines, config: Config) -> bool:
    masks = config.algorithm.correction.endswith("mask") or config.algorithm.geometric_mask > 0
    return masks and _every_step(lines, config, lambda line: (line.get("ratio/truncated") or 0.0) > _MOSTLY_MASKED)


def _skipped(lines: Lines, config: Config) -> bool:
    return len(lines) > 1 and all(line["update/skipped"] for line in lines[-2:])


RULES: dict[HealthRule, Rule] = {
    "floor": Rule(
        _floor,
        "all rewards equal the lowest reward of the run, so nothing is learned: try `rlora show prompt` and "
        "`rlora check`, easier prompts, a larger group_size, or a model that is sometimes correct",
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
        "reward functions time out or fail for a larger share of the episodes than health.errors: fix the function "
        "(errors are printed above), or raise scoring.deadline",
    ),
    "dead_part": Rule(
        _dead_part,
        "one of the reward functions always returns 0: reward/NAME in metrics.jsonl shows which; call this function on "
        "a completion that should be rewarded, with `rlora grade` or from Python",
    ),
    "engine_learner_apart": Rule(
        _apart,
        "kl/behaviour, the KL between engine and learner, is above ten times its earlier median: stop and resume the "
        'run, which restarts engine and learner, or set dtype = "float32"; swap/canary shows the difference of their '
        "logprobs at each delivery",
    ),
    "entropy_collapsed": Rule(
        _collapsed,
        "the policy repeats the same completions, and at least half of the completions are not correct: lower "
        "learner.lr, set algorithm.entropy or algorithm.kl, and continue from an earlier version (--fork RUN@STEP)",
    ),
    "overfitting": Rule(
        _overfits,
        "the training reward rises while the held-out accuracy falls: use the version with the best accuracy "
        '(checkpoint.best_by = "accuracy" keeps its bundle), train on more prompts, or check whether the policy '
        "exploits the reward function",
    ),
    "no_signal": Rule(
        _no_signal,
        "the rewards of each group are equal, so there is no gradient: raise group_size or sampling.temperature, or "
        "use prompts of a different difficulty",
    ),
    "masked": Rule(
        _masked,
        "masks remove more than 90% of the tokens, so hardly anything is learned: allow larger ratios "
        "(algorithm.importance_cap, importance_floor, geometric_mask), or lower max_staleness or learner.lr",
    ),
    "skipped": Rule(
        _skipped,
        "the last two updates were skipped, because their loss or gradient was not finite: lower learner.lr, or set "
        'dtype = "float32"',
    ),
}
