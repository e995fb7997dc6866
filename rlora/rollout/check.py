"""Try the reward functions before a run: on the gold answer, on another prompt's gold, and on an empty completion.

Rewards are compared within one prompt and one form, so their scale does not matter.
"""

import inspect
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlora.model.chat import Chat
from rlora.plugin import at, file_of
from rlora.records import Prompt, RewardError, RloraError
from rlora.rollout.golds import (
    FORMS,
    cut,
    faults_of_column,
    faults_of_golds,
    faults_of_prompts,
    looks,
    marks,
    opening,
    written,
)
from rlora.rollout.trial import Bench, Trial
from rlora.scoring.pool import Pool
from rlora.scoring.worker import names_of
from rlora.settings import Config

_SECONDS = 4.0  # after the first call; a slower reward is tried on fewer prompts
_SHOWN = 3  # examples of a fault
_FAILED = ("error", "timeout")


@dataclass(frozen=True)
class Fault:
    """What is wrong, with the field that is likely at fault, and examples."""

    text: str
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n    ".join([self.text, *self.examples])


@dataclass(frozen=True)
class Report:
    """The outcome of a check."""

    prompts: int = 0  # on which the reward functions were tried
    seconds: float = 0.0
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()  # what could not be tried

    def __str__(self) -> str:
        return "\n".join([f"warning: {fault}" for fault in self.faults] + [f"note: {note}" for note in self.notes])


def check(
    config: Config, env: Any, chat: Chat, pool: Pool, prompts: Sequence[Prompt], held_out: Sequence[Prompt],
    ready_made: bool = False,
) -> Report:  # fmt: skip
    """Try the reward functions that `pool` runs. Raises RloraError where there is a fault, with `check.strict`.

    `ready_made` says that the env was given as an object, and not built from `env_args`.
    """
    if not config.check.prompts:
        return Report()
    start = time.monotonic()
    made = _Check(config, env, chat, pool, ready_made)
    try:
        made.run(prompts, held_out)
    except RewardError as error:  # its processes can't be started again
        made.faults.append(Fault(str(error)))
    report = Report(len(made.trials), time.monotonic() - start, tuple(made.faults), tuple(made.notes))
    if config.check.strict and report.faults:
        raise RloraError(f"check.strict = true: the check before the run has found faults\n{report}")
    return report


class _Check:
    def __init__(self, config: Config, env: Any, chat: Chat, pool: Pool, ready_made: bool) -> None:
        self.config, self.env, self.chat = config, env, chat
        self.agent = hasattr(env, "reply")
        self.bench = Bench(config, chat, pool, self.agent)
        self.functions = names_of(config.rewards)
        self.solution = getattr(env, "solution", None)
        self.tried: list[Trial] = []
        self.trials: list[list[Trial]] = []  # by prompt, of those that were tried to the end
        self.faults: list[Fault] = []
        self.notes: list[str] = []
        parameters = {} if ready_made else inspect.signature(type(env)).parameters
        self.column = config.env_args.get("answer", parameters["answer"].default) if "answer" in parameters else None
        self.answers = f"env = {config.env!r}" if self.column is None else f"env_args.answer = {self.column!r}"

    def run(self, prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
        most = self.config.check.prompts
        of_held_out = most // 4 if prompts else most
        sample = _spread(prompts, most - min(of_held_out, len(held_out))) + _spread(held_out, of_held_out)
        self.faults += [Fault(text) for text in faults_of_prompts(self.chat, sample)]
        if self.bench.judges and not self.solution:
            self._look_at_golds([*prompts, *held_out])
        self._try(sample)
        hidden = self._look_for_what_is_hidden()
        self._tell_what_is_paid(hidden)
        self._tell_errors()

    def _look_at_golds(self, prompts: Sequence[Prompt]) -> None:
        self.faults += [Fault(text) for text in faults_of_golds([*map(self.bench.gold, prompts)], self.answers)]
        if isinstance(self.column, str) and self.column:
            self.faults += [Fault(text) for text in faults_of_column(self.column, prompts, self.answers)]

    def _written(self, prompt: Prompt) -> list[str]:
        """How a model may write the gold; of an env that has solutions, its own."""
        if self.solution:
            try:
                solved = self.solution(prompt)
                return [] if solved is None else [str(solved)]
            except Exception as error:
                line = at(error, self.config.env.rpartition(":")[0], file_of(self.env))
                what = f"its solution raised {type(error).__name__}: {error}; fix it there"
                self.faults.append(Fault(f"{line}env = {self.config.env!r}: {what}"))
                self.solution = lambda _: None
                return []
        return written(self.bench.gold(prompt))

    def _try(self, sample: Sequence[Prompt]) -> None:
        values = [self._written(prompt) for prompt in sample]
        for number, prompt in enumerate(sample):
            if not values[number]:
                continue
            if not self.trials:
                self._call_first(prompt, values[number][0])
            if self.bench.late:
                few = f"{len(self.trials)} of {len(sample)} prompts"
                self.notes += [f"the rewards are slow, and were tried on {few}"] if self.tried else []
                break
            known = {text.casefold() for text in values[number]}
            after = values[number + 1 :] + values[:number]
            others = [texts for texts in after if texts and known.isdisjoint(map(str.casefold, texts))][:3]
            trials = [*self.bench.trials(prompt, values[number], others, bool(self.solution))]
            self.tried += trials
            if not self.bench.late or self.bench.outcome(trials) == "paid":  # else forms may be left
                self.trials.append(trials)
        self._tell_what_can_not_be_tried()

    def _call_first(self, prompt: Prompt, value: str) -> None:
        """One call, which may load a model; the time for all others counts from its end."""
        _, (scores,) = self.bench.score(prompt, [self.bench.model_text(prompt, FORMS[0], value)])
        slow = [name for name, score in zip(self.functions, scores, strict=True) if score.status == "timeout"]
        self.bench.until = time.monotonic() + (0 if slow else _SECONDS)
        if slow:
            limits = self.config.scoring
            last = "first_deadline" if limits.first_deadline > limits.deadline else "deadline"
            field = f"scoring.{last} = {getattr(limits, last):g}"
            text = f"{field}: the first call of {slow[0]} took longer, which counts as a timeout in a run"
            self.faults.append(Fault(f"{text}; raise it, or load what is slow while the file is imported"))

    def _tell_what_can_not_be_tried(self) -> None:
        if not self.tried and not self.bench.late:
            self.notes.append(f"no gold could be tried, for {self.answers} gives none")
        elif not self.bench.judges:
            if not all(self.bench.is_paid(trial, 0) for trial in self.tried):
                self.notes.append(f"{', '.join(self.functions)}: no function asks for the answer, so golds say nothing")
        elif self.trials and all(self.bench.judge(trials) is None for trials in self.trials):
            self.notes.append(f"{self.functions[self.bench.judges[0]]}: it says nothing of the prompts that were tried")
        elif len(self.trials) > 1 and not any(len(trial.texts) > 2 for trial in self.tried):
            same = f"{self.answers} gives each prompt the same, {cut(self.tried[0].gold)}"
            self.notes.append(f"no other prompt's gold could be tried, for {same}")

    # --- what came of it ---

    def _look_for_what_is_hidden(self) -> dict[int, str]:
        """By function: the field that keeps the model's text from it."""
        hidden = {}
        for number, name in enumerate(self.functions):
            if not self.tried or self.bench.late or self.bench.is_settled(number, self.tried):
                continue
            seen = self.bench.hidden(self.tried[0].prompt, self._written(self.tried[0].prompt)[0], number)
            if seen:
                hidden[number] = self._what_hides(self.tried[0].prompt)
                text = f"{hidden[number]}: {name} does not pay {cut(seen)}, which is what it gets of a gold in a run"
                self.faults.append(Fault(f"{text}, and would with the usual tags; let what opens the message fit it"))
        return hidden

    def _what_hides(self, prompt: Prompt) -> str:
        settings = self.config.chat
        if settings.prefill:
            return f"chat.prefill = {settings.prefill!r}"
        opened = settings.think[0] in opening(self.chat, prompt)
        return "chat.template" if opened else f"chat.think = {settings.think!r}"

    def _tell_what_is_paid(self, hidden: dict[int, str]) -> None:
        outcomes = [(self.bench.outcome(trials), trials) for trials in self.trials]
        found = {name: [trials for each, trials in outcomes if each == name] for name, _ in outcomes}
        lenient = [trials for trials in found.get("paid", []) if self._is_lenient(trials[0])]
        if 4 * len(lenient) >= len(outcomes):
            found["foreign"] = found.get("foreign", []) + lenient
        self._tell(found.get("unpaid", []), 0, "{} of {} golds are not paid by {} in any form", hidden)
        self._tell(found.get("empty", []), 1, "an empty completion is paid for {} of {} prompts by {}", hidden)
        self._tell(found.get("foreign", []), 2, "another prompt's gold is paid for {} of {} prompts by {}", hidden)
        self._tell(found.get("failed", []), 0, "{} of {} golds can't be scored by {}", hidden)
        self._tell_of_form(found.get("paid", []))

    def _is_lenient(self, trial: Trial) -> bool:
        judge = self.bench.judge([trial])
        levels = [] if judge is None else [self.bench.level(scores[judge]) for scores in trial.scores]
        return len(levels) > 2 and all(level is not None and level[0] for level in (levels[0], levels[2]))

    def _tell(self, found: Sequence[Sequence[Trial]], text: int, what: str, hidden: dict[int, str]) -> None:
        """A fault of what was found of some prompts, with the `text` of each trial that shows it."""
        if not found:
            return
        judge = self.bench.judge(found[0]) or 0
        told = [self.bench.best(trials, judge) for trials in found]
        examples = [trial.shown(judge, text) for trial in told if len(trial.texts) > text]
        count = what.format(len(found), len(self.trials), self.functions[judge])
        likely = [hidden[judge]] if judge in hidden else self._likely(told, text)
        self.faults.append(Fault(f"{count}. Likely: {'; or '.join(likely)}", tuple(examples[:_SHOWN])))

    def _likely(self, told: Sequence[Trial], text: int) -> list[str]:
        """The fields that may be at fault."""
        reward = f"reward = {self.config.rewards[self.bench.judge(told) or 0]!r}"
        fields = self._forced_style()
        if text == 1 and told[0].texts[1].strip():
            fields.append(f"chat.prefill = {self.config.chat.prefill!r}, with which each completion begins")
        if text == 2:
            return [*fields, f"{reward}, which may not compare with the answer", f"{self.answers}, which it gets"]
        if text == 1:
            return [*fields, f"{reward}, or evaluate.threshold = {self.config.evaluate.threshold:g}"]
        fields += self._odd_golds(told)
        if not fields:
            fields = [f"{self.answers}, which is not what {reward} compares with ({_types(told)})"]
        if " raised " in told[0].scores[0][self.bench.judge(told) or 0].detail:
            fields.insert(0, f"{reward}, which raised an error")
        if self.agent and not self.solution:
            fields.append("the env answers, and its reward needs more than one message: give it a solution(prompt)")
        elif self.column is None and not self.solution and not self.config.env.startswith("rlora."):
            fields.append("the golds are no completions: give the env a solution(prompt), a text that should be paid")
        return fields

    def _forced_style(self) -> list[str]:
        style = self.config.scoring.style
        return [f"scoring.style = {style!r}, for the function may have another form"] if style != "auto" else []

    def _odd_golds(self, told: Sequence[Trial]) -> list[str]:
        return [f"{self.answers}: {reason}" for reason in dict.fromkeys(r for t in told for r in looks(t.gold))]

    def _tell_of_form(self, paid: Sequence[Sequence[Trial]]) -> None:
        """What is paid, but not as it was asked for, or as a run counts it."""
        if not paid:
            return
        first, judge = paid[0], self.bench.judge(paid[0]) or 0
        wanted = [marks(trials[0].prompt) for trials in paid]
        other = [asked and each[-1].form.mark not in asked for each, asked in zip(paid, wanted, strict=True)]
        if len(paid) == len(self.trials) and all(other) and not self.solution:
            text = f"prompts ask for {' or '.join(wanted[0])}, which {self.functions[judge]} does not pay"
            text += f", while it pays {first[-1].form.name!r}. Likely: the prompts' template, or "
            text += f"reward = {self.config.rewards[judge]!r}"
            self.faults.append(Fault(text, (first[0].shown(judge),)))
        levels = [self.bench.level(trials[-1].scores[0][self.bench.judge(trials) or 0]) for trials in paid]
        if not any(level and level[0] for level in levels):
            field = f"evaluate.threshold = {self.config.evaluate.threshold:g}"
            text = f"{field}: golds are paid less, so no answer counts as correct; lower it, or raise the reward"
            self.faults.append(Fault(text, (first[-1].shown(judge),)))

    def _tell_errors(self) -> None:
        """On which texts a function fails that scores others, for how many prompts, and one of the reasons."""
        lost = [trials for trials in self.trials if self.bench.outcome(trials) == "failed"]
        told = {(id(trial), self.bench.judge(trials)) for trials in lost for trial in trials}
        for function, name in enumerate(self.functions):
            rest = [trial for trial in self.tried if (id(trial), function) not in told]
            for text, what in enumerate(("a gold", "an empty completion", "another prompt's gold")):
                failed = [
                    trial for trial in rest if trial.scores[text:] and trial.scores[text][function].status in _FAILED
                ]
                if failed:
                    prompts = len({id(trial.prompt) for trial in failed})
                    count = f"{prompts} of {max(prompts, len(self.trials))} prompts"
                    self.faults.append(
                        Fault(f"{name} fails on {what}, for {count}", (failed[0].shown(function, text),))
                    )
        for detail, times in Counter(self.bench.env_errors).most_common(_SHOWN):
            self.faults.append(Fault(f"{detail} ({times} times)"))


def _types(told: Sequence[Trial]) -> str:
    kinds = " or ".join(sorted({type(trial.gold).__name__ for trial in told}))
    columns = ", ".join(told[0].prompt.columns)
    return f"golds are of type {kinds}" + (f"; the rows have {columns}" if columns else "")


def _spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """So many of them, from the first on at equal distances."""
    count = min(count, len(prompts))
    return [prompts[number * len(prompts) // count] for number in range(count)]
