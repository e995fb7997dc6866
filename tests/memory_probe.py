"""Run in a process of its own: a learner's pass over its largest row, and what RAM it took. The config as JSON."""

import json
import sys
import threading
import time

from rlora import machine
from rlora.config import validate
from rlora.core.footprint import bytes_of, forward_backward, largest_row
from rlora.core.learner import Learner
from rlora.core.setup import Setup


def main() -> None:
    config = validate(json.loads(sys.argv[1]))
    learner = Learner(config, config.model)
    learner.open("run", Setup.of(config))
    row = largest_row(config, learner.rows.tokens, learner.device, on_gpu=False)
    before, peak, over = machine.private_bytes() or 0, 0, False

    def watch() -> None:
        nonlocal peak
        while not over:
            peak = max(peak, machine.private_bytes() or 0)
            time.sleep(0.001)

    watching = threading.Thread(target=watch)
    watching.start()
    forward_backward(learner.policies, "run", row)
    over = True
    watching.join()
    base = sum(map(bytes_of, learner.policies.base.parameters())) - sum(
        bytes_of(weight) for weight in learner.policies.parameters_of("run").values()
    )
    print(json.dumps({"peak": peak - before, "base": base, "tokens": len(row.input_ids)}))


if __name__ == "__main__":
    main()
