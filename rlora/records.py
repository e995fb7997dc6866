"""Data classes that the packages exchange, and the protocols that plug-ins implement. Imports the stdlib only."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol

MAX_RANK = 8
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MODEL_FILES = ("config.json", "model.safetensors")
STATUSES = ("correct", "wrong", "unparsable", "timeout", "error")  # of a scored episode
Style = Literal[  # calling conventions of reward functions, see docs/rewards.md
    "auto", "completion", "group", "trl", "verl", "verl-batch", "openrlhf", "verifiers", "verifiers-group", "areal"
]
Messages = Sequence[Mapping[str, str]]  # chat messages: {"role": ..., "content": ...}


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, which tokenizers reject, by question marks."""
    return text.encode("utf-8", "replace").decode()


class RloraError(Exception):
    """A user-fixable error. The message names the field, the value and the fix."""


class RewardError(RloraError):
    """A reward function failed. `groups` are the sampled, unscored groups."""

    def __init__(self, message: str, groups: Sequence[Group] = ()) -> None:
        super().__init__(message)
        self.groups = tuple(groups)


class DeliveryError(RloraError):
    """An engine does not serve the adapter version that it was sent."""


class EngineLostError(RloraError):
    """An engine's process died, or vLLM failed in it. Another engine can redo its requests."""


class NotLoadedError(RloraError):
    """A request names an adapter version that the engine has not loaded."""


class StaleError(RloraError):
    """The engine aborted a request: its version is too old to learn from, or its policy has left the engine."""


@dataclass(frozen=True)
class Version:
    """Identity of an adapter. Two adapters are the same if all three fields are equal."""

    policy: str  # the run's name, unique in the job
    number: int  # starts at 0, + 1 per update
    digest: str = ""  # of the adapter's bytes; differs if a number is trained again after a crash; "": unknown

    def __str__(self) -> str:
        return f"{self.policy}-v{self.number}-{self.digest[:12]}"


@dataclass(frozen=True)
class Prompt:
    """One problem. The env sets `text` and `answer`; rlora adds `token_ids` when it loads the data."""

    text: str | Messages  # with a chat template, a string becomes one user message
    answer: Any = None  # reference answer for the reward function
    token_ids: tuple[int, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)  # further arguments of reward functions, by name


@dataclass(frozen=True)
class Episode:
    """One completion of a prompt, sampled by one adapter version."""

    completion_ids: tuple[int, ...]  # T tokens, including the stop token or stop string that ended it
    behaviour_logprobs: tuple[float, ...]  # T natural logarithms, under the sampling distribution
    finish_reason: str  # "stop"; "length": cut off; "context": the env's reply did not fit into the context
    version: Version  # the version that sampled it
    text: str = ""  # the policy's last message, without special tokens
    reward: float | None = None  # None before scoring
    sampled_mask: tuple[bool, ...] = ()  # T: False for tokens that the env added; empty: all True
    messages: Messages = ()  # all messages after the prompt, including the env's; the policy's last one is `text`
    state: Mapping[str, Any] = field(default_factory=dict)  # as the env's `reply` left it
    status: str = ""  # one of STATUSES; empty before scoring
    parts: Mapping[str, float] = field(default_factory=dict)  # unweighted result of each reward function, by name

    @property
    def sampled_tokens(self) -> int:
        """Number of tokens that the policy sampled."""
        return sum(self.sampled_mask) if self.sampled_mask else len(self.completion_ids)


@dataclass(frozen=True)
class Group:
    """The G episodes of one prompt."""

    prompt: Prompt
    episodes: tuple[Episode, ...]

    @property
    def rewards(self) -> list[float]:
        return [episode.reward for episode in self.episodes if episode.reward is not None]

    @property
    def informative(self) -> bool:
        """Whether rewards differ. If they are equal, all group-relative advantages are zero."""
        return len(set(self.rewards)) > 1

    @property
    def scored(self) -> Group:
        """The group without its unscored episodes."""
        return replace(self, episodes=tuple(episode for episode in self.episodes if episode.reward is not None))

    def with_rewards(self, rewards: Sequence[float]) -> Group:
        pairs = zip(self.episodes, rewards, strict=True)
        return replace(self, episodes=tuple(replace(episode, reward=reward) for episode, reward in pairs))


@dataclass(frozen=True)
class RewardInput:
    """A group as reward functions see it. Every tuple has G items, except `prompt_ids`."""

    prompt: str | Messages  # as the env returned it
    prompt_text: str  # as the policy reads it, with special tokens
    answer: Any
    columns: Mapping[str, Any]  # `Prompt.columns`
    completions: tuple[str, ...]  # the policy's last message, without special tokens
    messages: tuple[Messages, ...]  # all messages after the prompt, including the env's
    completion_ids: tuple[tuple[int, ...], ...]
    states: tuple[Mapping[str, Any], ...]  # `Episode.state`
    responses: tuple[str, ...] = ()  # all text after the prompt, including the env's, without special tokens
    queries: tuple[str, ...] = ()  # the prompt and all text after it, with special tokens
    step: int = 0  # current training step
    steps: int = 0  # total training steps
    epoch: float | None = None  # passes over the training prompts so far; None: unknown
    prompt_ids: tuple[int, ...] = ()  # tokens of `prompt_text`


@dataclass(frozen=True)
class Score:
    """Result of one reward function for one episode: a status, a number, or neither if the function does not apply."""

    status: str | None = None  # one of STATUSES
    value: float | None = None  # None with a status: the config's reward for that status
    extra: Mapping[str, float] = field(default_factory=dict)  # further metrics to log
    detail: str = ""  # for an error: its message, file and line


@dataclass(frozen=True)
class Canary:
    """A short token sequence (T tokens), with the learner's logprobs (T - 1) at temperature 1 for all but the first."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # under the version
    base_logprobs: tuple[float, ...]  # under the base


@dataclass(frozen=True)
class Adapter:
    """One immutable version of a policy, as the bytes of the two files of PEFT's format.

    In full finetuning (`learner.adapter = "none"`) a version consists of all weights, in the format of transformers.
    """

    policy: str
    number: int  # see `Version`
    config: bytes  # adapter_config.json; in full finetuning config.json
    weights: bytes  # adapter_model.safetensors, fp32; in full finetuning model.safetensors, in the base's dtype
    full_weights: bool = False  # full finetuning
    canary: Canary | None = None  # an engine that serves it must reproduce this; None: no learner computed one

    @property
    def files(self) -> dict[str, bytes]:
        """The files on disk, by name."""
        names = MODEL_FILES if self.full_weights else ADAPTER_FILES
        return dict(zip(names, (self.config, self.weights), strict=True))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the config and each tensor's name, dtype, shape and bytes, sorted by name."""
        tensors, data = self._tensors
        digest = hashlib.sha256(self.config)
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor['dtype']} {tensor['shape']}\n".encode())
            digest.update(data[slice(*tensor["data_offsets"])])
        return digest.hexdigest()

    @property
    def parameters(self) -> int:
        """Number of parameters, summed over all tensors."""
        return sum(math.prod(tensor["shape"]) for tensor in self._tensors[0].values())

    @property
    def _tensors(self) -> tuple[dict[str, Any], memoryview]:
        """Header entry of each tensor, and the data. Safetensors: 8 bytes of header length, a JSON header, the data."""
        start = 8 + int.from_bytes(self.weights[:8], "little")
        header = json.loads(self.weights[8:start] or "{}")
        header.pop("__metadata__", None)
        return header, memoryview(self.weights)[start:]

    @cached_property
    def version(self) -> Version:
        return Version(self.policy, self.number, self.digest)

    @property
    def name(self) -> str:
        """The version as text."""
        return str(self.version)


OFF = -1  # version number of the base without an adapter, which is the reference policy
BASE = Adapter("base", OFF, b"", b"")


@dataclass(frozen=True)
class InFlight:
    """A prompt that was sent for sampling and whose group has not been learned from yet."""

    position: int  # of the prompt in the run's order
    step: int  # the step that sent it
    adapter: Adapter | None = None  # the version that samples it; None: waits for a free engine
    group: Group | None = None  # None: still being sampled
    scored: bool = False  # whether the group is scored


@dataclass(frozen=True)
class Cursor:
    """State of a run's prompts between two steps. Positions count prompts in the run's order."""

    next: int = 0  # position of the next prompt that was never sent
    retries: tuple[int, ...] = ()  # positions of prompts to sample again, before `next`
    in_flight: tuple[InFlight, ...] = ()  # in the order of sending


@dataclass(frozen=True)
class UpdateStats:
    """Metrics of one update. Means are over the computed completion tokens, None if there were none."""

    loss: float
    grad_norm: float  # before clipping
    lr: float
    kl_behaviour: float | None  # nats per token, engine against learner
    ratio_truncated: float | None  # share of tokens whose importance weight exceeded the cap
    tokens: int  # completion tokens computed, summed over epochs
    seconds: float
    skipped_in_a_row: int  # consecutive updates without a finite loss and gradient, up to this one
    minibatches: int = 1  # Adam steps
    clipped: float | None = None  # share of tokens whose ratio to the policy before the update was clipped
    kl_update: float | None = None  # nats per token, policy before the update against the one at its last minibatch
    kl_reference: float | None = None  # nats per token, learner against the base
    entropy: float | None = None  # nats per token; exact if the loss has an entropy term, else estimated by mean -log p
    private_bytes: int | None = None  # `machine.private_bytes` of the learner's process after the update
    value_loss: float | None = None
    explained_variance: float | None = None  # of the returns, by the critic's values before the update
    objective_metrics: Mapping[str, float] = field(default_factory=dict)  # the objective's own, means per token


@dataclass(frozen=True)
class SaveStats:
    """Cost of the checkpoint that was written last."""

    seconds: float  # on the writer's thread
    bytes: int


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one batch. Only the temperature shapes the distribution; the learner applies it too."""

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    group_size: int = 1


@dataclass(frozen=True)
class Receipt:
    """Receipt for an adapter version that an engine now serves."""

    digest: str  # of the file that the engine read
    load_seconds: float  # until the adapter was in its slot
    proof_seconds: float  # for reading back and comparing file and slot


@dataclass(frozen=True)
class EngineStats:
    """Metrics of an engine since its start."""

    busy_seconds: float  # time spent computing
    canaries: Mapping[str, float]  # by policy: mean |engine - learner| of the last canary's logprobs, nats


@dataclass(frozen=True)
class EngineInfo:
    """Description of an engine's device and memory."""

    description: str  # device, dtype, version and cache as text
    kv_cache: int  # bytes


class Env(Protocol):
    """Source of prompts, constructed as `Env(**config.env_args)`.

    If a prompt's `answer` is not itself a completion (the target of a puzzle), an optional method
    `solution(prompt) -> str | None` returns a correct completion. The check before a run tries it instead.
    """

    def train(self) -> Iterable[Prompt]: ...

    def held_out(self) -> Iterable[Prompt]:
        """Prompts that are never trained on. May be empty."""
        ...


class Agent(Env, Protocol):
    """An env that replies to the policy, for episodes of several turns. `stop` is optional."""

    stop: Sequence[str]  # strings that end the policy's turn, like its end token

    def reply(self, prompt: Prompt, message: str, state: dict[str, Any]) -> str | Messages | None:
        """Reply to `message`, the text of the policy's last turn. None ends the episode.

        A string continues the policy's message, like the result of a tool that is called inside the text. Chat messages
        follow the policy's message, and the policy answers them. `state` belongs to the episode: a dict of plain data,
        empty at first, that may be modified. Runs in a separate process with a deadline, like reward functions.
        """
        ...


class Engine(Protocol):
    """Samples under exact adapter versions. Calls do not block; their futures may raise EngineLostError."""

    def load(self, adapter: Adapter, oldest: int = 0, kept: int | None = None) -> Future[Receipt]:
        """Load a version in addition to the present ones. Aborts requests of its policy for versions with numbers below
        `oldest`, except `kept`. Raises DeliveryError if the engine turns out to serve something else."""
        ...

    def generate(self, prompt: Prompt, sampling: Sampling, version: Version) -> Future[Group]:
        """Sample `sampling.group_size` unscored episodes. Raises NotLoadedError, or StaleError if it is aborted."""
        ...

    def leave(self, policy: str) -> Future[None]:
        """Abort the requests of a policy, and unload its versions."""
        ...

    def stats(self) -> Future[EngineStats]:
        """Metrics since the engine's start."""
        ...

    def close(self) -> Future[None]:
        """Stop the engine. No method may be called afterwards."""
        ...
