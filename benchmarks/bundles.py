"""The cost of one bundle per step, and the memory growth of driver and learner.

    python benchmarks/bundles.py RUN            # time and bytes per bundle, and memory by step, of an existing run
    python benchmarks/bundles.py --steps 500    # trains a tiny model on Ray and vLLM for 500 steps first

The time that the loop waits for saving, and the time that saving takes in parallel, are shares of the step time. Memory
growth is the slope of a line fitted to the last three quarters of the steps, in MiB of private memory per 100 steps.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, linear_regression, median
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", nargs="?", type=Path, help="the directory of a run")
    parser.add_argument("--steps", type=int, default=500, help="without a run: steps to train a tiny model")
    parser.add_argument("--quick", action="store_true", help="without a run: ten steps")
    options = parser.parse_args()
    if options.run:
        show(options.run)
        return
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        train_tiny(Path(directory), run, 10 if options.quick else options.steps)
        show(run)


def show(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    saved = [line for line in lines if line["checkpoint/seconds"] is not None]
    later = lines[len(lines) // 4 :]
    on_disk = sum(path.stat().st_size for path in (run / "bundles").rglob("*") if path.is_file())
    figures = {
        "steps": len(lines),
        "step_seconds": median(line["time/step"] for line in lines),
        "waited_share": fmean(line.get("time/save", 0.0) for line in lines)
        / fmean(line["time/step"] for line in lines),
        "bundle_share": fmean(line["checkpoint/seconds"] for line in saved)
        / fmean(line["time/step"] for line in saved),
        "bundle_seconds_median": median(line["checkpoint/seconds"] for line in saved),
        "bundle_seconds_max": max(line["checkpoint/seconds"] for line in saved),
        "bundle_bytes": median(line["checkpoint/bytes"] for line in saved),
        "bundles_kept": len(list((run / "bundles").glob("[0-9]*"))),
        "bytes_on_disk": on_disk,
        **{f"{who}_{name}": value for who in ("driver", "learner") for name, value in memory(later, who).items()},
    }
    table = Table("", "")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)
    print(json.dumps(figures))


def memory(lines: list[dict[str, Any]], who: str) -> dict[str, float]:
    steps, used = [line["step"] for line in lines], [line[f"memory/{who}"] / MIB for line in lines]
    return {"mib_first": used[0], "mib_last": used[-1], "mib_per_100_steps": 100 * linear_regression(steps, used).slope}


def train_tiny(directory: Path, run: Path, steps: int) -> None:
    """Train a two-layer Llama with random weights to write the word w5."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    base = str(directory / "tiny")
    shape = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(base)
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(97)}, unk_token="w2"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(base)
    (directory / "w5.py").write_text("def w5(completion, answer):\n    return float(completion.count('w5'))\n")
    command = [
        *(sys.executable, "-m", "rlora", "train", "launch/arithmetic.toml", "--model", base, "--run-dir", str(run)),
        *("--reward", f"{directory}/w5.py:w5", "--dtype", "float32", "--steps", str(steps), "--prompts-per-step", "4"),
        *("--sampling.max-tokens", "8", "--sampling.max-prompt-tokens", "32", "--evaluate.prompts", "0"),
        *("--max-staleness", "1", "--checkpoint.keep-last", "20", "--engine.kv-cache-gib", "1"),
    ]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
