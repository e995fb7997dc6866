"""Grades the rows of a file in worker processes with a deadline, as a run grades its episodes."""

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rlora.records import RewardInput, RloraError, Score
from rlora.scoring.pool import Pool
from rlora.scoring.worker import Setup
from rlora.settings import ScoringConfig

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a JSON Lines file. Empty lines are skipped.

    Raises RloraError if the file is missing, if a line is not JSON, or if a row lacks "gold" or a string "prediction".
    """
    table = []
    if not path.is_file():
        raise RloraError(f"{path}: there is no such file; name one with a JSON object per line")
    for number, line in enumerate(path.read_text("utf-8", "replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RloraError(f"{path}, line {number}: not JSON ({error}); write one object per line") from None
        if not isinstance(row, dict) or "gold" not in row or not isinstance(row.get("prediction"), str):
            raise RloraError(
                f'{path}, line {number}: each row needs "gold" and a string "prediction"; add the missing key to '
                f"{line[:200]}"
            )
        table.append(row)
    return table


def grade(table: Sequence[Row], setup: Setup, workers: int, threshold: float) -> list[Row]:
    """Grade each row's "prediction" against its "gold" by the first reward function of `setup`, in `workers` processes.

    Blocks. Returns the rows with "status", "reward" and, if a call failed, "detail". A number without a status is
    correct if it is at least `threshold`; a status without a number has the default reward of `[scoring]`. Raises
    RloraError if the reward function can't be loaded, RewardError if a worker process can't be restarted.
    """
    with closing(Pool(setup, workers)) as pool:
        scores = [pool.submit(_reward_input(row)) for row in table]
        return [row | _verdict(score.result()[0][0], threshold) for row, score in zip(table, scores, strict=True)]


def _reward_input(row: Row) -> RewardInput:
    messages = ({"role": "assistant", "content": row["prediction"]},)
    columns = {name: value for name, value in row.items() if name not in ("gold", "prediction")}
    return RewardInput("", "", row["gold"], columns, (row["prediction"],), (messages,), ((),), ({},))


def _verdict(score: Score, threshold: float) -> Row:
    rewards = ScoringConfig()
    status = score.status or ("correct" if (score.value or 0.0) >= threshold else "wrong")
    reward = score.value if score.value is not None else getattr(rewards, status)
    return {"status": status, "reward": reward} | ({"detail": score.detail} if score.detail else {})
