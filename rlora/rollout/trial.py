"""Scores a gold answer as a model would write it, next to an empty completion and another prompt's gold answer."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlora.model.chat import THINK, Chat
from rlora.records import Episode, Group, Prompt, Score, Version, without_surrogates
from rlora.rollout.golds import ANSWERS, FORMS, Form, message_opening, prompt_text, requested_forms, shorten
from rlora.scoring.pool import Pool
from rlora.scoring.scoring import reward_input
from rlora.scoring.worker import EnvTurn
from rlora.settings import Config

_THOUGHT = "I think."
_NO_VERSION = Version("check", 0)  # no policy samples the completions of a trial

Scores = tuple[tuple[Score, ...], ...]  # by text, then by function


@dataclass(frozen=True)
class Trial:
    """Scores of a prompt's gold answer in one form, of an empty text, and of another prompt's gold answer if given."""

    prompt: Prompt
    gold: Any
    form: Form
    texts: tuple[str, ...]  # as the reward functions receive them
    scores: Scores

    def describe(self, function: int, text: int = 0) -> str:
        """Return a line with the score of a function for a text. `function` and `text` are indices in `scores`."""
        score = self.scores[text][function]
        verdict = score.status if score.value is None else f"{score.value:g}"
        verdict = f"{verdict}, {score.detail}" if score.detail else verdict
        prompt, gold = shorten(prompt_text(self.prompt)), shorten(self.gold)
        return f"prompt {prompt}, gold {gold}, completion {shorten(self.texts[text])}: {verdict}"


class TrialRunner:
    """Runs trials in `pool` until `deadline` (of `time.monotonic`), and judges their scores.

    `agent` says whether the env replies. Methods that score block until the pool has answered.
    """

    def __init__(self, config: Config, chat: Chat, pool: Pool, agent: bool) -> None:
        self.config, self.chat, self.pool, self.agent = config, chat, pool, agent
        self.gold_functions = [number for number, names in enumerate(pool.names) if names & ANSWERS]
        self.deadline = float("inf")  # time.monotonic()
        self.rewarded_forms: list[Form] = []  # of the last prompt whose gold answer was rewarded
        self.env_errors: list[str] = []

    def gold(self, prompt: Prompt) -> Any:
        """Return what the reward compares with: the answer, or a column if the first gold function reads no answer."""
        names = self.pool.names[self.gold_functions[0]] & ANSWERS if self.gold_functions else frozenset[str]()
        columns = sorted(names & prompt.columns.keys())
        return prompt.columns[columns[0]] if columns and not names & {"answer", "answers"} else prompt.answer

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self.deadline

    def trials(
        self, prompt: Prompt, texts: list[str], other_golds: list[list[str]], is_solution: bool
    ) -> Iterator[Trial]:
        """Yield trials form by form, until the gold answer is rewarded (`is_rewarded`) or the deadline has passed.

        Also ends if no function scores the prompt. `texts` are the texts of the gold answer, and `other_golds` the
        texts of other prompts' gold answers. If `is_solution` is set, the texts are tried in one form only.
        """
        first = [*requested_forms(prompt), *self.rewarded_forms]
        forms = [FORMS[0]] if is_solution else [*first, *(form for form in FORMS if form not in first)]
        cases = [(thought, form, n) for thought in (False, True) for form in forms for n in range(len(texts))]
        for number, (thought, form, n) in enumerate(cases):
            foreign_texts = other_golds[number % len(other_golds)] if other_golds else []
            pair = [texts[n], *foreign_texts[min(n, len(foreign_texts) - 1) :][:1]]
            gold, *foreign = [self.model_text(prompt, form, text, thought) for text in pair]
            trial = Trial(prompt, self.gold(prompt), form, *self.score(prompt, [gold, "", *foreign]))
            yield trial
            judge = self.judge([trial])
            if judge is not None and self.is_rewarded(trial, judge):
                self.rewarded_forms = [form]
                return
            if judge is None or self.is_late:
                return

    def model_text(self, prompt: Prompt, form: Form, answer: str, thought: bool = False) -> str:
        """Return an answer as a model writes it after the prompt. `thought` puts a thought before the answer.

        What the prompt ends with, the opening tag of a thought or the prefix of the form, is not repeated.
        """
        prefix, (opening_tag, closing_tag) = form.prefix, self.chat.settings.think
        end = message_opening(self.chat, prompt)
        if end.rfind(opening_tag) > end.rfind(closing_tag):
            line = "" if end.endswith("\n") else "\n"
            prefix = f"{line}{_THOUGHT}\n{closing_tag}\n{prefix}"
        elif thought:
            prefix = f"{opening_tag}\n{_THOUGHT}\n{closing_tag}\n{prefix}"
        elif prefix and end.rstrip().endswith(prefix.rstrip()):
            prefix = ""
        return f"{prefix}{answer}{form.suffix}"

    def score(self, prompt: Prompt, texts: Sequence[str], raw: bool = False) -> tuple[tuple[str, ...], Scores]:
        """Return the texts as the functions receive them in a run, and their scores. `raw` passes `texts` unchanged."""
        group = reward_input(Group(prompt, tuple(self._episode(prompt, text) for text in texts)), self.chat, 0, 1)
        if raw:
            messages = tuple(({"role": "assistant", "content": text},) for text in texts)
            group = replace(group, completions=tuple(texts), messages=messages, responses=tuple(texts))
        scores = self.pool.submit(group).result()
        return group.completions, tuple(zip(*scores, strict=True))

    def _episode(self, prompt: Prompt, text: str) -> Episode:
        tokens = self.chat.tokenizer.encode(without_surrogates(text), add_special_tokens=False)
        ids = tuple(tokens) + self.chat.stop_token_ids[:1]
        message = self.chat.text(ids, prompt=prompt.text)
        state: Mapping[str, Any] = {}
        if self.agent:
            reply = self.pool.submit(EnvTurn(prompt, message, {})).result()
            state = reply.state
            self.env_errors += [reply.detail] if reply.detail else []
        messages = ({"role": "assistant", "content": message},)
        return Episode(ids, (), "stop", _NO_VERSION, message, messages=messages, state=state)

    def altered_text(self, prompt: Prompt, answer: str, function: int) -> str:
        """Look for a completion that the chat settings alter so that the function does not reward the completion.

        Returns the text that the function receives. Returns "" if the function rewards a form of the answer, or if it
        does not reward the model's own text with the tags <think> and </think> either.
        """
        altered = ""
        for thought in (False, True):
            for form in FORMS:
                (received, *_), scores = self.score(prompt, [self.model_text(prompt, form, answer, thought), ""])
                if self._beats_empty(scores, function):
                    return ""
                opening_tag, closing_tag = THINK
                prefix = f"{opening_tag}\n{_THOUGHT}\n{closing_tag}\n" if thought else ""
                text = f"{prefix}{form.prefix}{answer}{form.suffix}"
                if not self.is_late and text != received and not altered:
                    raw_scores = self.score(prompt, [text, ""], raw=True)[1]
                    altered = received if self._beats_empty(raw_scores, function) else ""
        return altered

    # --- judging the scores ---

    def level(self, score: Score) -> tuple[bool, float] | None:
        """Return a score as (is correct, number), or None if the function failed or gave no score."""
        if score.status in ("error", "timeout") or (score.status is None and score.value is None):
            return None
        value = score.value if score.value is not None else getattr(self.config.scoring, str(score.status))
        return (score.status == "correct" if score.status else value >= self.config.evaluate.threshold), value

    def judge(self, trials: Sequence[Trial]) -> int | None:
        """Return the first function that reads a gold answer and scores this prompt, or None."""
        scoring = [n for n in self.gold_functions for trial in trials if trial.scores[0][n] != Score()]
        return min(scoring, default=None)

    def is_rewarded(self, trial: Trial, function: int) -> bool:
        """Return whether only the gold answer is correct, and has a higher score than the other texts of the trial."""
        gold, *wrong = [self.level(scores[function]) for scores in trial.scores]
        levels = [level for level in wrong if level is not None]
        return gold is not None and (bool(levels) or gold[0]) and all(not level[0] and level < gold for level in levels)

    def _beats_empty(self, scores: Scores, function: int) -> bool:
        """Return whether the first text has a higher score than the second, which is empty."""
        text, empty = [self.level(text_scores[function]) for text_scores in scores[:2]]
        return text is not None and empty is not None and text > empty

    def rewards_any(self, function: int, trials: Sequence[Trial]) -> bool:
        """Return whether a function rewards the gold answer of any trial more than an empty text."""
        return any(self._beats_empty(trial.scores, function) for trial in trials)

    def outcome(self, trials: Sequence[Trial]) -> str:
        """Return the outcome of one prompt's trials.

        "rewarded": only the gold answer is rewarded, as it should be. "unrewarded": the gold answer gets no reward.
        "empty", "foreign": an empty text or another prompt's gold answer is rewarded too. "failed": the function
        failed. "unknown": no function scored the prompt.
        """
        judge = self.judge(trials)
        if judge is None:
            return "unknown"
        if self.is_rewarded(trials[-1], judge):
            return "rewarded"
        best = self.best(trials, judge)
        gold, empty, *foreign = [self.level(scores[judge]) for scores in best.scores]
        if gold is None:
            return "failed"
        if empty and empty[0]:
            return "empty"
        return "foreign" if foreign and gold[0] and (empty is None or gold > empty) else "unrewarded"

    def best(self, trials: Sequence[Trial], function: int) -> Trial:
        """Return the trial whose gold answer gets the highest reward."""
        return max(trials, key=lambda trial: self.level(trial.scores[0][function]) or (False, float("-inf")))
