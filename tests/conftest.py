"""What several test files share: a tiny base, the real demo base, groups, and where the shared data lies."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reached a hub would pass here and fail there
if "PYTEST_XDIST_WORKER" in os.environ:  # threads that wait for each other must not keep a core from other workers
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from commands import ROOT, SMALL, TOKEN, orphans, processes
from playwright.sync_api import Browser, sync_playwright
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlora import machine
from rlora.cli.logs import show_log
from rlora.cli.main import main
from rlora.config import validate
from rlora.core.advantage import centred
from rlora.core.batch import Microbatch, Sample, sample_of
from rlora.core.learner import Learner, PolicyState
from rlora.core.lora import Bank, Spec
from rlora.core.setup import Setup
from rlora.model.base import DEMO, locate
from rlora.records import Adapter, Episode, Group, Prompt, RewardInput, UpdateStats, Version
from rlora.rollout.cursor import Cursor
from rlora.run import episodes
from rlora.run.checkpoint import Bundle
from rlora.run.directory import Provenance
from rlora.run.start import read_start
from rlora.settings import Config

# Tests interrupt commands; these would inherit that a shell's background job ignores SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
SHARED = ROOT.parent / "shared"
SHORT = f"{ROOT}/tests/short_completion.py:short_completion"  # a reward that differs between any model's completions
NEEDS_SHARED = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")

show_log()  # so that tests of the library see what the command line prints


def pytest_xdist_auto_num_workers() -> int:
    """The workers of `make test`: one per core, with 10 GiB each for its engines and learners."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(machine.cores(), memory // (10 * 2**30), 4))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long tests, so that all workers end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("vllm") is None)


def exit_status(*arguments: str) -> int:
    """The exit status of `rlora ...`, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rlora", *arguments])
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


@contextmanager
def ray_head(files: Path, environment: Mapping[str, str], *more: str) -> Iterator[str]:
    """The address of a Ray cluster that `ray start` began in an environment. It keeps its files in `files`."""
    options = "--head", "--port=0", "--num-cpus=1", f"--temp-dir={files}", "--include-dashboard=false", *more
    try:
        with ray_node(files / "head.log", environment, *options) as told:
            (address,) = set(re.findall(r"--address='([^']+)'", told))
            yield address
    finally:
        shutil.rmtree(files, ignore_errors=True)


@contextmanager
def ray_node(log: Path, environment: Mapping[str, str], *options: str) -> Iterator[str]:
    """A node that `ray start` begins, and what it printed until it ran."""
    command = [str(Path(sys.executable).with_name("ray")), "start", *options, "--block", "--disable-usage-stats"]
    with log.open("w") as output:
        node = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield log.read_text()
    finally:
        node.terminate()
        node.wait(timeout=60)


@pytest.fixture
def nothing_stays_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test that leaves a process behind, or a file in RAM of an engine.

    Other tests and programs run on the machine, so only what this test started counts.
    """
    monkeypatch.setenv(*TOKEN)
    before, ended = processes().keys(), threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            processes()

    watching = threading.Thread(target=watch)
    watching.start()
    yield
    ended.set()
    watching.join()

    def left() -> dict[int, str]:
        return {pid: what for pid, what in (orphans() | processes()).items() if pid not in before}

    deadline = time.monotonic() + 20
    while left() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left()


@pytest.fixture(scope="session")
def demo() -> str:
    """The directory of SmolLM2-135M-Instruct."""
    return locate(DEMO)


@pytest.fixture(scope="session")
def shallow(demo: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of the first four of SmolLM2's 30 layers: its tokenizer and widths, and a third of its weights.

    For tests of what happens around a run. Its completions make no sense and never end by themselves.
    """
    path = tmp_path_factory.mktemp("shallow")
    shutil.copytree(demo, path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    AutoModelForCausalLM.from_pretrained(demo, num_hidden_layers=4).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def small(shallow: str) -> tuple[str, ...]:
    """Options of a small run of the shallow base, with a reward that its completions differ in."""
    return (*SMALL, "--model", shallow, "--reward", SHORT)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a two-layer Llama with random weights, in fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def save_words(path: str) -> None:
    """A tokenizer of 97 words."""
    words = {f"w{index}": index for index in range(97)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w2")), eos_token="w1")
    tokenizer.save_pretrained(path)


@pytest.fixture
def worded(tmp_path: Path, tiny: str) -> str:
    """The directory of the tiny model with a tokenizer, whose token 5 is "w5"."""
    model = str(tmp_path / "model")
    shutil.copytree(tiny, model)
    save_words(model)
    return model


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")  # not for the session: while it is open, asyncio.run fails in this process
def browser() -> Iterator[Browser]:
    """Chromium without a screen; tests that use it are skipped without it."""
    if not CHROMIUM:
        pytest.skip("there is no Chromium (Debian's package chromium)")
    options = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
               "--disable-component-update", "--disable-sync"]  # fmt: skip
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


_SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 0,
    "eos_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TINY_CONFIGS: dict[str, dict[str, object]] = {
    "llama": _SMALL,
    "qwen2": _SMALL,
    "qwen3": _SMALL,
    "gemma": _SMALL,
    "mistral": _SMALL,
    "phi3": _SMALL,
    "mixtral": _SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _SMALL | _EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3_moe": _SMALL | _EXPERTS,
}  # by transformers' model type


def tiny_model(name: str, **settings: object) -> PreTrainedModel:
    """A two-layer model of a class, in fp32; the same random weights each time."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **TINY_CONFIGS[name] | settings)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def adapted(model: torch.nn.Module, spec: Spec, seed: int = 0) -> Bank:
    """A bank over a model with one adapter, "run", which all passes are under."""
    bank = Bank(model)
    bank.add("run", spec, seed)
    bank.serves.adapter = "run"
    return bank


def stir(bank: Bank) -> None:
    """Make every B random, so that no adapter's policy is the base."""
    for factors in bank.factors.values():
        for pair in factors.pairs.values():
            pair.b.data.normal_(std=0.1)


class Solo:
    """A learner with one policy, "run"."""

    name = "run"

    def __init__(self, config: Config, base: str) -> None:
        self.config, self.learner = config, Learner(config, base)
        self.policies, self.bank, self.base = self.learner.policies, self.learner.policies.bank, base
        self.device = self.learner.device
        self.resume()

    def resume(self, state: bytes | None = None) -> Adapter:
        """Go on from a state; without one begin."""
        self.learner.close(self.name)
        return self.learner.open(self.name, Setup.of(self.config, read_start(self.config)), state)

    @property
    def held(self) -> PolicyState:
        return self.learner.states[self.name]

    @property
    def version(self) -> int:
        return self.held.number

    def update(self, groups: Sequence[Group]) -> tuple[Adapter, UpdateStats]:
        return self.learner.update(self.name, groups)

    def adapter(self) -> Adapter:
        return self.learner.adapter(self.name)

    def state(self) -> bytes:
        return self.learner.state(self.name)

    def logprobs(self, row: Microbatch, temperature: float = 1.0) -> torch.Tensor:
        return self.policies.logprobs(row, self.name, temperature)


@pytest.fixture
def tiny_base(tiny: str) -> PreTrainedModel:
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    return base


@pytest.fixture(scope="session")
def config() -> Callable[..., Config]:
    """A valid config; keyword arguments replace top-level fields."""

    def make(**changes: object) -> Config:
        values: dict[str, object] = {
            "model": DEMO,
            "env": "rlora.envs.arithmetic:Arithmetic",
            "reward": "rlora.rewards.integer:integer_answer",
            "dtype": "float32",
            "sampling": {"max_tokens": 8, "max_prompt_tokens": 48},
        }
        return validate(values | changes)

    return make


def episode(tokens: list[int], reward: float | None = None, logprobs: list[float] | None = None) -> Episode:
    return Episode(tuple(tokens), tuple(logprobs or [-1.0] * len(tokens)), "stop", Version("run", 0), reward=reward)


def group(prompt: list[int], *episodes: Episode) -> Group:
    return Group(Prompt("?", answer=0, token_ids=tuple(prompt)), episodes)


def case(*completions: str, answer: object = None, **columns: object) -> RewardInput:
    """A group of such completions, as reward functions see it."""
    messages = tuple(({"role": "assistant", "content": text},) for text in completions)
    ids = tuple(tuple(range(len(text))) for text in completions)
    return RewardInput("?", "<user>?</user>", answer, columns, completions, messages, ids, ({},) * len(completions))


@pytest.fixture
def groups() -> list[Group]:
    """Three groups over the tiny vocabulary: two that carry a gradient and one whose rewards agree."""
    return [
        group([5, 6, 7], episode([8, 9, 1], 1.0), episode([10, 1], 0.0)),
        group([5, 11], episode([12, 13, 14, 1], 1.0), episode([15], 1.0)),
        group([20, 21, 22, 23, 24], episode([25, 1], 0.5), episode([26, 27, 28], 0.0), episode([], 1.0)),
    ]


ORIGIN = Provenance("run", "0123456789abcdef", "prompts", {"torch": "2"}, "a machine")
WEIGHTS = (2).to_bytes(8, "little") + b"{}"  # a safetensors file of no tensors


def adapter(number: int) -> Adapter:
    return Adapter("run", number, b'{"base_model_name_or_path": "base"}', WEIGHTS + number.to_bytes(2, "little") * 50)


def write_provenance(run: Path) -> None:
    """A run's directory, as far as it says whose bundles are its own: ORIGIN's."""
    (run / "config.toml").write_text(
        f'[provenance]\nid = "{ORIGIN.id}"\nprompts_sha256 = ""\nmachine = ""\n[provenance.packages]\n'
    )


@pytest.fixture
def bundle(config: Callable[..., Config], groups: list[Group]) -> Callable[..., Bundle]:
    """The bundle of a version; keyword arguments replace its fields."""

    def make(version: int, **changes: Any) -> Bundle:
        made = Bundle(ORIGIN, adapter(version), b"state" * version, Cursor(version), config())
        return replace(made, update=episodes.encode(groups), rewards={version - 1: (2.5, 5)}, **changes)

    return make


def marked(groups: Sequence[Group]) -> list[Group]:
    """With rewards that differ, so that every token is computed."""
    return [group.with_rewards([float(i) for i, _ in enumerate(group.episodes)]) for group in groups]


def samples(groups: Sequence[Group]) -> list[list[Sample]]:
    """Each episode of the groups whose rewards differ, with its advantage and a weight of 1."""
    return [
        [
            sample_of(group.prompt.token_ids, episode, advantage, 1.0)
            for episode, advantage in zip(group.episodes, centred(torch.tensor(group.rewards)).tolist(), strict=True)
            if episode.completion_ids
        ]
        for group in groups
        if group.informative
    ]
