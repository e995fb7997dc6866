"""Checks the reward functions before a run, on a gold answer, another prompt's gold answer and an empty completion.

Rewards are compared within one prompt and one answer format, so their scale does not matter.
"""

import inspect
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlora.model.chat import Chat
from rlora.plugin import file_of, location_prefix
from rlora.records import Prompt, RewardError, RloraError
from rlora.rollout.golds import (
    FORMS,
    answer_texts,
    column_faults,
    gold_faults,
    message_opening,
    mismatch_reasons,
    prompt_faults,
    requested_markers,
    shorten,
)
from rlora.rollout.toolset import is_agent
from rlora.rollout.trial import Trial, TrialRunner
from rlora.scoring.pool import Pool
from rlora.scoring.worker import reward_names
from rlora.settings import Config

_SECONDS = 4.0  # time limit after the first call; a slower reward is tried on fewer prompts
_EXAMPLES = 3  # per fault
_FAILED = ("error", "timeout")


@dataclass(frozen=True)
class Fault:
    """A fault that the check found."""

    text: str  # names the field that likely causes the fault
    examples: tuple[str, ...] = ()  # each a line with a prompt, its gold answer, a completion and its score

    def __str__(self) -> str:
        return "\n    ".join([self.text, *self.examples])


@dataclass(frozen=True)
class Report:
    """Result of `check`. As a string it has one warning per fault and one line per note."""

    prompts: int = 0  # on which the reward functions were tried
    seconds: float = 0.0
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()  # what could not be tried

    def __str__(self) -> str:
        return "\n".join([f"warning: {fault}" for fault in self.faults] + [f"note: {note}" for note in self.notes])


def check(
    config: Config, env: Any, chat: Chat, pool: Pool, prompts: Sequence[Prompt], held_out: Sequence[Prompt],
    is_instance: bool = False,
) -> Report:  # fmt: skip
    """Check the reward functions that `pool` runs, on `check.prompts` of the training and held-out prompts.

    Blocks until the calls are done: no new prompt is tried later than 4 seconds after the first call.
    `is_instance` says that the env was passed as an object instead of being constructed from `env_args`. Raises
    RloraError if there is a fault and `check.strict` is set.
    """
    if not config.check.prompts:
        return Report()
    start = time.monotonic()
    reward_check = _RewardCheck(config, env, chat, pool, is_instance)
    try:
        reward_check.run(prompts, held_out)
    except RewardError as error:  # the pool could not restart its processes
        reward_check.faults.append(Fault(str(error)))
    faults, notes = tuple(reward_check.faults), tuple(reward_check.notes)
    report = Report(len(reward_check.trials), time.monotonic() - start, faults, notes)
    if config.check.strict and report.faults:
        fix = "fix them, or set check.strict = false"
        raise RloraError(f"check.strict = true: the check before the run found faults; {fix}\n{report}")
    return report


class _RewardCheck:
    def __init__(self, config: Config, env: Any, chat: Chat, pool: Pool, is_instance: bool) -> None:
        self.config, self.env, self.chat = config, env, chat
        self.agent = is_agent(env)
        self.runner = TrialRunner(config, chat, pool, self.agent)
        self.functions = reward_names(config.rewards)
        self.solution = getattr(env, "solution", None)
        self.all_trials: list[Trial] = []
        self.trials: list[list[Trial]] = []  # by prompt, only of prompts that were tried in all necessary forms
        self.faults: list[Fault] = []
        self.notes: list[str] = []
        parameters = {} if is_instance else inspect.signature(type(env)).parameters
        self.column = config.env_args.get("answer", parameters["answer"].default) if "answer" in parameters else None
        self.gold_field = f"env = {config.env!r}" if self.column is None else f"env_args.answer = {self.column!r}"

    def run(self, prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
        most = self.config.check.prompts
        held_out_count = most // 4 if prompts else most
        sample = _spread(prompts, most - min(held_out_count, len(held_out))) + _spread(held_out, held_out_count)
        self.faults += [Fault(text) for text in prompt_faults(self.chat, sample)]
        if self.runner.gold_functions and not self.solution:
            self._check_golds([*prompts, *held_out])
        self._try_prompts(sample)
        altering_fields = self._find_altered_texts()
        self._report_outcomes(altering_fields)
        self._report_errors()

    def _check_golds(self, prompts: Sequence[Prompt]) -> None:
        golds = [*map(self.runner.gold, prompts)]
        self.faults += [Fault(text) for text in gold_faults(golds, self.gold_field)]
        if isinstance(self.column, str) and self.column:
            self.faults += [Fault(text) for text in column_faults(self.column, prompts, self.gold_field)]

    def _answer_texts(self, prompt: Prompt) -> list[str]:
        """Return the result of the env's method `solution`, else texts in which a model may write the gold answer."""
        if self.solution:
            try:
                solution = self.solution(prompt)
                return [] if solution is None else [str(solution)]
            except Exception as error:
                prefix = location_prefix(error, self.config.env.rpartition(":")[0], file_of(self.env))
                reason = f"its solution raised {type(error).__name__}: {error}; fix this method"
                self.faults.append(Fault(f"{prefix}env = {self.config.env!r}: {reason}"))
                self.solution = lambda _: None
                return []
        return answer_texts(self.runner.gold(prompt))

    def _try_prompts(self, sample: Sequence[Prompt]) -> None:
        texts = [self._answer_texts(prompt) for prompt in sample]
        for number, prompt in enumerate(sample):
            if not texts[number]:
                continue
            if not self.trials:
                self._make_first_call(prompt, texts[number][0])
            if self.runner.is_late:
                count = f"{len(self.trials)} of {len(sample)} prompts"
                self.notes += [f"the reward functions are slow, and were tried on {count}"] if self.all_trials else []
                break
            equal = {text.casefold() for text in texts[number]}
            candidates = texts[number + 1 :] + texts[:number]
            other_golds = [gold for gold in candidates if gold and equal.isdisjoint(map(str.casefold, gold))][:3]
            trials = [*self.runner.trials(prompt, texts[number], other_golds, bool(self.solution))]
            self.all_trials += trials
            if not self.runner.is_late or self.runner.outcome(trials) == "rewarded":  # else forms may be untried
                self.trials.append(trials)
        self._note_untested()

    def _make_first_call(self, prompt: Prompt, answer: str) -> None:
        """Make one call, which may load a model. The time limit of the further calls starts when this call ends."""
        _, (scores,) = self.runner.score(prompt, [self.runner.model_text(prompt, FORMS[0], answer)])
        slow = [name for name, score in zip(self.functions, scores, strict=True) if score.status == "timeout"]
        self.runner.deadline = time.monotonic() + (0 if slow else _SECONDS)
        if slow:
            limits = self.config.scoring
            longest = "first_deadline" if limits.first_deadline > limits.deadline else "deadline"
            field = f"scoring.{longest} = {getattr(limits, longest):g}"
            text = f"{field}: the first call of {slow[0]} took longer, which counts as a timeout in a run"
            self.faults.append(
                Fault(f"{text}; raise scoring.{longest}, or do the slow loading when the function's file is imported")
            )

    def _note_untested(self) -> None:
        if not self.all_trials and not self.runner.is_late:
            self.notes.append(f"no gold answer could be tried, because {self.gold_field} provides none")
        elif not self.runner.gold_functions:
            if not all(self.runner.is_rewarded(trial, 0) for trial in self.all_trials):
                names = ", ".join(self.functions)
                self.notes.append(f"{names}: no function asks for the answer, so gold answers could not be tried")
        elif self.trials and all(self.runner.judge(trials) is None for trials in self.trials):
            name = self.functions[self.runner.gold_functions[0]]
            self.notes.append(f"{name}: the function scored none of the prompts that were tried")
        elif len(self.trials) > 1 and not any(len(trial.texts) > 2 for trial in self.all_trials):
            gold = f"{self.gold_field} is the same for all prompts, {shorten(self.all_trials[0].gold)}"
            self.notes.append(f"no other prompt's gold answer could be tried, because {gold}")

    # --- results ---

    def _find_altered_texts(self) -> dict[int, str]:
        """Return, by function, the field that alters the model's text so that the function does not reward the text."""
        fields = {}
        for number, name in enumerate(self.functions):
            if not self.all_trials or self.runner.is_late or self.runner.rewards_any(number, self.all_trials):
                continue
            prompt = self.all_trials[0].prompt
            received = self.runner.altered_text(prompt, self._answer_texts(prompt)[0], number)
            if received:
                fields[number] = self._altering_field(prompt)
                text = f"{fields[number]}: {name} does not reward {shorten(received)}, the text that this function "
                text += "receives for a gold answer in a run. Without a prefill and with the tags <think> and </think> "
                self.faults.append(Fault(f"{text}the answer is rewarded; change the function or the field"))
        return fields

    def _altering_field(self, prompt: Prompt) -> str:
        settings = self.config.chat
        if settings.prefill:
            return f"chat.prefill = {settings.prefill!r}"
        is_open = settings.think[0] in message_opening(self.chat, prompt)
        return "chat.template" if is_open else f"chat.think = {settings.think!r}"

    def _report_outcomes(self, altering_fields: dict[int, str]) -> None:
        outcomes = [(self.runner.outcome(trials), trials) for trials in self.trials]
        groups = {name: [trials for outcome, trials in outcomes if outcome == name] for name, _ in outcomes}
        lenient = [trials for trials in groups.get("rewarded", []) if self._is_lenient(trials[0])]
        if 4 * len(lenient) >= len(outcomes):
            groups["foreign"] = groups.get("foreign", []) + lenient
        for outcome, text, template in (
            ("unrewarded", 0, "{} of {} gold answers are not rewarded by {} in any form"),
            ("empty", 1, "an empty completion is rewarded for {} of {} prompts by {}"),
            ("foreign", 2, "another prompt's gold answer is rewarded for {} of {} prompts by {}"),
            ("failed", 0, "{} of {} gold answers can't be scored by {}"),
        ):
            self._add_fault(groups.get(outcome, []), text, template, altering_fields)
        self._report_format(groups.get("rewarded", []))

    def _is_lenient(self, trial: Trial) -> bool:
        judge = self.runner.judge([trial])
        levels = [] if judge is None else [self.runner.level(scores[judge]) for scores in trial.scores]
        return len(levels) > 2 and all(level is not None and level[0] for level in (levels[0], levels[2]))

    def _add_fault(
        self, groups: Sequence[Sequence[Trial]], text: int, template: str, altering_fields: dict[int, str]
    ) -> None:
        """Add a fault for prompts with the same outcome. `text` is the index of the trials' text that shows it."""
        if not groups:
            return
        judge = self.runner.judge(groups[0]) or 0
        best = [self.runner.best(trials, judge) for trials in groups]
        examples = [trial.describe(judge, text) for trial in best if len(trial.texts) > text]
        fault = template.format(len(groups), len(self.trials), self.functions[judge])
        causes = [altering_fields[judge]] if judge in altering_fields else self._likely_causes(best, text)
        self.faults.append(Fault(f"{fault}. Likely: {'; or '.join(causes)}", tuple(examples[:_EXAMPLES])))

    def _likely_causes(self, trials: Sequence[Trial], text: int) -> list[str]:
        """Return the fields that may cause the fault, each with the reason."""
        reward = f"reward = {self.config.rewards[self.runner.judge(trials) or 0]!r}"
        causes = self._style_cause()
        if text == 1 and trials[0].texts[1].strip():
            causes.append(f"chat.prefill = {self.config.chat.prefill!r}, which starts every completion")
        if text == 2:
            return [*causes, f"{reward}, if it ignores the answer", f"{self.gold_field}, which the function receives"]
        if text == 1:
            return [*causes, f"{reward}, or evaluate.threshold = {self.config.evaluate.threshold:g}"]
        causes += self._gold_causes(trials)
        if not causes:
            causes = [f"{self.gold_field}, which does not match what {reward} expects ({_gold_types(trials)})"]
        if " raised " in trials[0].scores[0][self.runner.judge(trials) or 0].detail:
            causes.insert(0, f"{reward}, which raised an error")
        if self.agent and not self.solution:
            causes.append("the env replies, and the reward needs several messages: give the env a solution(prompt)")
        elif self.column is None and not self.solution and not self.config.env.startswith("rlora."):
            causes.append("the answers are not completions: give the env a solution(prompt) that returns a completion")
        return causes

    def _style_cause(self) -> list[str]:
        style = self.config.scoring.style
        return [f"scoring.style = {style!r}, if the function has a different signature"] if style != "auto" else []

    def _gold_causes(self, trials: Sequence[Trial]) -> list[str]:
        reasons = dict.fromkeys(reason for trial in trials for reason in mismatch_reasons(trial.gold))
        return [f"{self.gold_field}: {reason}" for reason in reasons]

    def _report_format(self, rewarded: Sequence[Sequence[Trial]]) -> None:
        """Report gold answers that are rewarded in a form that prompts do not request, or too little to count."""
        if not rewarded:
            return
        first, judge = rewarded[0], self.runner.judge(rewarded[0]) or 0
        markers = [requested_markers(trials[0].prompt) for trials in rewarded]
        differs = [
            bool(requested) and trials[-1].form.marker not in requested
            for trials, requested in zip(rewarded, markers, strict=True)
        ]
        if len(rewarded) == len(self.trials) and all(differs) and not self.solution:
            text = f"prompts ask for {' or '.join(markers[0])}, which {self.functions[judge]} does not reward; this "
            text += f"function rewards {first[-1].form.name!r} instead. Likely: the prompts' template, or "
            text += f"reward = {self.config.rewards[judge]!r}"
            self.faults.append(Fault(text, (first[0].describe(judge),)))
        levels = [self.runner.level(trials[-1].scores[0][self.runner.judge(trials) or 0]) for trials in rewarded]
        if not any(level and level[0] for level in levels):
            field = f"evaluate.threshold = {self.config.evaluate.threshold:g}"
            text = f"{field}: gold answers are rewarded less, so no answer counts as correct"
            text += "; lower evaluate.threshold, or raise the reward"
            self.faults.append(Fault(text, (first[-1].describe(judge),)))

    def _report_errors(self) -> None:
        """Report texts on which a function fails although it scores other texts, with one example per function."""
        failed_prompts = [trials for trials in self.trials if self.runner.outcome(trials) == "failed"]
        reported = {(id(trial), self.runner.judge(trials)) for trials in failed_prompts for trial in trials}
        for function, name in enumerate(self.functions):
            rest = [trial for trial in self.all_trials if (id(trial), function) not in reported]
            for text, kind in enumerate(("a gold answer", "an empty completion", "another prompt's gold answer")):
                failed = [
                    trial for trial in rest if trial.scores[text:] and trial.scores[text][function].status in _FAILED
                ]
                if failed:
                    prompts = len({id(trial.prompt) for trial in failed})
                    count = f"{prompts} of {max(prompts, len(self.trials))} prompts"
                    self.faults.append(
                        Fault(f"{name} fails on {kind}, for {count}", (failed[0].describe(function, text),))
                    )
        for detail, times in Counter(self.runner.env_errors).most_common(_EXAMPLES):
            self.faults.append(Fault(f"{detail} ({times} times)"))


def _gold_types(trials: Sequence[Trial]) -> str:
    types = " or ".join(sorted({type(trial.gold).__name__ for trial in trials}))
    columns = ", ".join(trials[0].prompt.columns)
    return f"gold answers are of type {types}" + (f"; the rows have {columns}" if columns else "")


def _spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Return `count` prompts at equal distances, beginning with the first, or all if there are fewer."""
    count = min(count, len(prompts))
    return [prompts[number * len(prompts) // count] for number in range(count)]
