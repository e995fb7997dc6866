"""Scores a gold answer as a model would write it, beside an empty completion and another prompt's gold."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlora.model.chat import THINK, Chat
from rlora.records import Episode, Group, Prompt, Score, Version, without_surrogates
from rlora.rollout.golds import ANSWERS, FORMS, Form, asked, asks_for, cut, opening
from rlora.scoring.pool import Pool
from rlora.scoring.scoring import reward_input
from rlora.scoring.worker import EnvTurn
from rlora.settings import Config

_THOUGHT = "I think."
_NOBODY = Version("check", 0)  # no policy sampled what is tried

Scores = tuple[tuple[Score, ...], ...]  # by text and function


@dataclass(frozen=True)
class Trial:
    """A prompt's gold in one form, no text, and another gold in that form, if there is one."""

    prompt: Prompt
    gold: Any
    form: Form
    texts: tuple[str, ...]  # as the reward functions get them
    scores: Scores

    def shown(self, function: int, text: int = 0) -> str:
        """What one function says of one text, for people."""
        score = self.scores[text][function]
        said = score.status if score.value is None else f"{score.value:g}"
        said = f"{said}, {score.detail}" if score.detail else said
        return f"prompt {cut(asked(self.prompt))}, gold {cut(self.gold)}, completion {cut(self.texts[text])}: {said}"


class Bench:
    """Makes trials of prompts in `pool`, up to the time `until`."""

    def __init__(self, config: Config, chat: Chat, pool: Pool, agent: bool) -> None:
        self.config, self.chat, self.pool, self.agent = config, chat, pool, agent
        self.judges = [number for number, names in enumerate(pool.names) if names & ANSWERS]  # they read a gold
        self.until = float("inf")
        self.paid: list[Form] = []  # that was paid last
        self.env_errors: list[str] = []

    def gold(self, prompt: Prompt) -> Any:
        """What the reward compares with: a column, where its first function that reads a gold asks for no answer."""
        names = self.pool.names[self.judges[0]] & ANSWERS if self.judges else frozenset[str]()
        columns = sorted(names & prompt.columns.keys())
        return prompt.columns[columns[0]] if columns and not names & {"answer", "answers"} else prompt.answer

    @property
    def late(self) -> bool:
        return time.monotonic() > self.until

    def trials(self, prompt: Prompt, values: list[str], others: list[list[str]], solved: bool) -> Iterator[Trial]:
        """Form by form, until one is paid as it should be; of what is `solved` there is one form."""
        first = [*asks_for(prompt), *self.paid]
        forms = [FORMS[0]] if solved else [*first, *(form for form in FORMS if form not in first)]
        cases = [(thought, form, n) for thought in (False, True) for form in forms for n in range(len(values))]
        for number, (thought, form, n) in enumerate(cases):
            other = others[number % len(others)] if others else []
            pair = [values[n], *other[min(n, len(other) - 1) :][:1]]
            gold, *foreign = [self.model_text(prompt, form, value, thought) for value in pair]
            trial = Trial(prompt, self.gold(prompt), form, *self.score(prompt, [gold, "", *foreign]))
            yield trial
            judge = self.judge([trial])
            if judge is not None and self.is_paid(trial, judge):
                self.paid = [form]
                return
            if judge is None or self.late:
                return

    def model_text(self, prompt: Prompt, form: Form, value: str, thought: bool = False) -> str:
        """An answer as a model writes it after its prompt, which may have opened a thought, or the form itself."""
        before, (opens, closes) = form.before, self.chat.settings.think
        end = opening(self.chat, prompt)
        if end.rfind(opens) > end.rfind(closes):
            line = "" if end.endswith("\n") else "\n"
            before = f"{line}{_THOUGHT}\n{closes}\n{before}"
        elif thought:
            before = f"{opens}\n{_THOUGHT}\n{closes}\n{before}"
        elif before and end.rstrip().endswith(before.rstrip()):
            before = ""
        return f"{before}{value}{form.after}"

    def score(self, prompt: Prompt, texts: Sequence[str], raw: bool = False) -> tuple[tuple[str, ...], Scores]:
        """The texts as the functions get them, and their scores. With `raw` they get the texts themselves."""
        case = reward_input(Group(prompt, tuple(self._episode(prompt, text) for text in texts)), self.chat, 0, 1)
        if raw:
            said = tuple(({"role": "assistant", "content": text},) for text in texts)
            case = replace(case, completions=tuple(texts), messages=said, responses=tuple(texts))
        verdicts = self.pool.do(case).result()
        return case.completions, tuple(zip(*verdicts, strict=True))

    def _episode(self, prompt: Prompt, text: str) -> Episode:
        tokens = self.chat.tokenizer.encode(without_surrogates(text), add_special_tokens=False)
        ids = tuple(tokens) + self.chat.stop_token_ids[:1]
        said = self.chat.text(ids, prompt=prompt.text)
        state: Mapping[str, Any] = {}
        if self.agent:
            answered = self.pool.do(EnvTurn(prompt, said, {})).result()
            state = answered.state
            self.env_errors += [answered.detail] if answered.detail else []
        return Episode(ids, (), "stop", _NOBODY, said, messages=({"role": "assistant", "content": said},), state=state)

    def hidden(self, prompt: Prompt, value: str, function: int) -> str:
        """A completion as a function gets it that it would pay if it had got the model's text, tags as usual; or ""."""
        found = ""
        for thought in (False, True):
            for form in FORMS:
                (seen, *_), scores = self.score(prompt, [self.model_text(prompt, form, value, thought), ""])
                if self._is_more(scores, function):
                    return ""
                opens, closes = THINK
                before = f"{opens}\n{_THOUGHT}\n{closes}\n" if thought else ""
                text = f"{before}{form.before}{value}{form.after}"
                if not self.late and text != seen and not found:
                    found = seen if self._is_more(self.score(prompt, [text, ""], raw=True)[1], function) else ""
        return found

    # --- what came of them ---

    def level(self, score: Score) -> tuple[bool, float] | None:
        """What a score is worth: right or not, then its number. None where the function failed, or said nothing."""
        if score.status in ("error", "timeout") or (score.status is None and score.value is None):
            return None
        value = score.value if score.value is not None else getattr(self.config.scoring, str(score.status))
        return (score.status == "correct" if score.status else value >= self.config.evaluate.threshold), value

    def judge(self, trials: Sequence[Trial]) -> int | None:
        """The first function that reads a gold and says something of this prompt."""
        spoken = [n for n in self.judges for trial in trials if trial.scores[0][n] != Score()]
        return min(spoken, default=None)

    def is_paid(self, trial: Trial, function: int) -> bool:
        """Whether the gold is paid more than no text and another gold, and these are not right."""
        gold, *others = [self.level(scores[function]) for scores in trial.scores]
        known = [other for other in others if other is not None]
        return gold is not None and (bool(known) or gold[0]) and all(not other[0] and other < gold for other in known)

    def _is_more(self, scores: Scores, function: int) -> bool:
        """Whether the first text is paid more than no text, the second."""
        text, nothing = [self.level(each[function]) for each in scores[:2]]
        return text is not None and nothing is not None and text > nothing

    def is_settled(self, function: int, trials: Sequence[Trial]) -> bool:
        """Whether a function has paid some gold more than no text."""
        return any(self._is_more(trial.scores, function) for trial in trials)

    def outcome(self, trials: Sequence[Trial]) -> str:
        """Of one prompt: "paid", "unpaid", "empty" or "foreign" (what is paid too), "failed", or "unknown"."""
        judge = self.judge(trials)
        if judge is None:
            return "unknown"
        if self.is_paid(trials[-1], judge):
            return "paid"
        best = self.best(trials, judge)
        gold, nothing, *foreign = [self.level(scores[judge]) for scores in best.scores]
        if gold is None:
            return "failed"
        if nothing and nothing[0]:
            return "empty"
        return "foreign" if foreign and gold[0] and (nothing is None or gold > nothing) else "unpaid"

    def best(self, trials: Sequence[Trial], function: int) -> Trial:
        """The one whose gold is paid most."""
        return max(trials, key=lambda trial: self.level(trial.scores[0][function]) or (False, float("-inf")))
