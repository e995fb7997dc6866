"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): grade-school word problems with an integer answer."""

from collections.abc import Sequence
from pathlib import Path

import datasets

from rlora.records import Prompt, RloraError

TEMPLATE = "{question}\nReason step by step, and end with the answer as a number after ####."


class GSM8K:
    """`path` is a hub id, or a local directory with train.jsonl and test.jsonl; the test split is held out.

    Rows have `question` and `answer`; the gold answer is what follows #### in `answer`. `template` holds {question}.
    """

    def __init__(self, path: str = "openai/gsm8k", template: str = TEMPLATE) -> None:
        if "{question}" not in template:
            raise RloraError(f"env_args.template = {template!r}: it needs {{question}} where the problem goes")
        local = Path(path)
        self._splits = {}
        for split in ("train", "test"):
            try:
                if local.is_dir():
                    rows = datasets.load_dataset("json", data_files=str(local / f"{split}.jsonl"), split="train")
                else:
                    rows = datasets.load_dataset(path, "main", split=split)
            except Exception as error:  # a hub, a file system and a parser are behind it
                raise RloraError(
                    f"env_args.path = {path!r}: {split} can't be read ({error}); give a hub id that can be reached, "
                    "or a directory with train.jsonl and test.jsonl"
                ) from error
            self._splits[split] = [_prompt(row, index, f"{path}, {split}", template) for index, row in enumerate(rows)]

    def train(self) -> Sequence[Prompt]:
        return self._splits["train"]

    def held_out(self) -> Sequence[Prompt]:
        return self._splits["test"]


def _prompt(row: dict[str, str | None], index: int, where: str, template: str) -> Prompt:
    for column in ("question", "answer"):
        if row.get(column) is None:
            fault = "is null" if column in row else f"is missing (the row has {', '.join(row)})"
            raise RloraError(f"{where}, row {index}: column {column!r} {fault}; every row needs question and answer")
    question, answer = str(row["question"]), str(row["answer"])
    gold = answer.rpartition("####")[2].strip().replace(",", "")
    if not gold.lstrip("-").isdigit():
        raise RloraError(f"{where}, row {index}: answer = {answer!r} has no integer after ####; mend or drop the row")
    return Prompt(template.replace("{question}", question), answer=int(gold))
