"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): grade-school word problems with an integer answer."""

import re
from collections.abc import Sequence
from typing import Any

from rlora.records import Prompt, RloraError

from .table import Table

TEMPLATE = "{question}\nReason step by step, and end with the answer as a number after ####."


class GSM8K(Table):
    """The word problems of GSM8K. The test split is held out. The answer is an integer.

    `path` is a hub id, or a local directory with train.jsonl and test.jsonl, whose rows have `question` and `answer`;
    the gold answer follows #### in `answer`. `template` is the prompt's text, with the placeholder {question}. Raises
    RloraError if a row has no gold answer.
    """

    def __init__(self, path: str = "openai/gsm8k", template: str = TEMPLATE) -> None:
        if "{question}" not in template:
            raise RloraError(f"env_args.template = {template!r}: it needs the placeholder {{question}}")
        super().__init__(path, "main", held_out_split="test", template=template)
        self._rows = {"train": super().train(), "test": super().held_out()}

    def train(self) -> Sequence[Prompt]:
        return self._rows["train"]

    def held_out(self) -> Sequence[Prompt]:
        return self._rows["test"]

    def gold(self, value: Any, source: str) -> int:
        """Return the integer after ####. Raises RloraError, which begins with `source`, if there is none."""
        gold = str(value).rpartition("####")[2].strip().replace(",", "")
        if not re.fullmatch(r"-?[0-9]+", gold):
            raise RloraError(f"{source}: answer = {value!r} has no integer after ####; fix or drop the row")
        return int(gold)
