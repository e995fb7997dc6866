"""Data classes that the packages exchange, and protocols of plug-ins. This module imports the standard library and
`rlora.errors` only."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol

from rlora.errors import DeliveryError as DeliveryError
from rlora.errors import EngineLostError as EngineLostError
from rlora.errors import NotLoadedError as NotLoadedError
from rlora.errors import RewardError as RewardError
from rlora.errors import RloraError as RloraError
from rlora.errors import StaleError as StaleError

MAX_RANK = 8
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MODEL_FILES = ("config.json", "model.safetensors")
STATUSES = ("correct", "wrong", "unparsable", "timeout", "error")  # of a scored episode
Style = Literal[  # calling conventions of reward functions, see docs/rewards.md
    "auto", "completion", "group", "trl", "verl", "verl-batch", "openrlhf", "verifiers", "verifiers-group", "areal"
]
Messages = Sequence[Mapping[str, Any]]  # chat messages: {"role": ..., "content": ...}, possibly with "tool_calls"
Tools = Sequence[Mapping[str, Any]]  # JSON schemas of tools: {"type": "function", "function": {...}}


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, which tokenizers reject, by question marks."""
    return text.encode("utf-8", "replace").decode()


@dataclass(frozen=True)
class Version:
    """Identity of an adapter version, an immutable state of a policy's adapter.

    Two versions are the same if all three fields are equal.
    """

    policy: str  # the run's name, unique in the job
    number: int  # starts at 0, + 1 per update
    digest: str = ""  # `Adapter.digest`; "" if unknown. A number that is trained again can have a different digest

    def __str__(self) -> str:
        return f"{self.policy}-v{self.number}-{self.digest[:12]}"


@dataclass(frozen=True)
class Prompt:
    """One problem. The env sets all fields except those that rlora adds when the data is loaded."""

    text: str | Messages  # a string becomes one user message; () for a given completion that is a whole text
    answer: Any = None  # reference answer for the reward function
    token_ids: tuple[int, ...] = ()  # of `text` after the chat template; rlora adds them
    columns: Mapping[str, Any] = field(default_factory=dict)  # further arguments of reward functions, by name
    completions: tuple[str | Messages | Episode, ...] = ()  # given ones, for SFT (one) and pairs (chosen, rejected)
    weight: float = 1.0  # of the example in the loss of SFT
    tools: Tools = ()  # that the chat template describes to the policy
    source: str = ""  # file and row, for error messages
    evaluation_set: str = ""  # name of the set in `evaluate.sets` that it belongs to; rlora adds it


@dataclass(frozen=True)
class Kept:
    """The tokens that each of S sampled tokens was drawn from: what top-k, top-p and min-p kept of the vocabulary."""

    ids: bytes  # int32, in native byte order: the kept tokens of all sampled tokens, one after the other
    counts: tuple[int, ...]  # S, the number of tokens that were kept; 0: the whole vocabulary

    def __add__(self, following: Kept) -> Kept:
        """Return the kept tokens of both."""
        return Kept(self.ids + following.ids, self.counts + following.counts)


@dataclass(frozen=True)
class Episode:
    """One completion of a prompt, sampled by one adapter version."""

    completion_ids: tuple[int, ...]  # T tokens, including the stop token or stop string at the end
    behaviour_logprobs: tuple[float, ...]  # T, nats, at the sampling temperature; 0.0 for tokens that the env added
    finish_reason: str  # "stop"; "length": cut off; "context": the env's reply did not fit into the context
    version: Version  # the version that sampled the completion
    text: str = ""  # the policy's last message, without special tokens
    reward: float | None = None  # None before scoring
    sampled_mask: tuple[bool, ...] = ()  # T: False for tokens that the env added; empty: all True
    messages: Messages = ()  # all messages after the prompt, including the env's; the policy's last message is `text`
    state: Mapping[str, Any] = field(default_factory=dict)  # as the env's `reply` left the state
    status: str = ""  # one of STATUSES; empty before scoring
    parts: Mapping[str, float] = field(default_factory=dict)  # unweighted result of each reward function, by name
    kept: Kept | None = None  # with top-k, top-p or min-p, of the tokens that the policy sampled

    @property
    def sampled_tokens(self) -> int:
        """Number of tokens that the policy sampled."""
        return sum(self.sampled_mask) if self.sampled_mask else len(self.completion_ids)


@dataclass(frozen=True)
class Group:
    """The G episodes of one prompt."""

    prompt: Prompt
    episodes: tuple[Episode, ...]
    temperature: float | None = None  # the episodes were sampled at, if `Policy.sample` was given one

    @property
    def rewards(self) -> list[float]:
        """Rewards of the scored episodes, in the order of the episodes."""
        return [episode.reward for episode in self.episodes if episode.reward is not None]

    @property
    def informative(self) -> bool:
        """Whether rewards differ. If all rewards are equal, all group-relative advantages are zero."""
        return len(set(self.rewards)) > 1

    @property
    def scored(self) -> Group:
        """The group without its unscored episodes."""
        return replace(self, episodes=tuple(episode for episode in self.episodes if episode.reward is not None))

    def with_rewards(self, rewards: Sequence[float]) -> Group:
        """Return a copy with `rewards`, one per episode. Raises ValueError if their number is not G."""
        pairs = zip(self.episodes, rewards, strict=True)
        return replace(self, episodes=tuple(replace(episode, reward=reward) for episode, reward in pairs))


@dataclass(frozen=True)
class RewardInput:
    """What reward functions receive of a group. Every tuple has G items, one per episode, except `prompt_ids`."""

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
    step: int = 0  # current training step, from 0
    steps: int = 0  # total training steps
    epoch: float | None = None  # passes over the training prompts so far; None: unknown
    prompt_ids: tuple[int, ...] = ()  # tokens of `prompt_text`


@dataclass(frozen=True)
class Score:
    """Result of one reward function for one episode: a status, a number, or neither if the function does not apply."""

    status: str | None = None  # one of STATUSES
    value: float | None = None  # the number; if None, a status is worth the reward in the config's [scoring] table
    extra: Mapping[str, float] = field(default_factory=dict)  # further metrics to log
    detail: str = ""  # for an error: its message, file and line


@dataclass(frozen=True)
class Canary:
    """A text of T tokens with the learner's logprobs, which an engine must reproduce to prove that it serves a version.

    The T - 1 logprobs are of all tokens but the first, in nats at temperature 1.
    """

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
    canary: Canary | None = None  # for the check of engines; None if no learner computed a canary

    @property
    def files(self) -> dict[str, bytes]:
        """The files on disk, by name."""
        names = MODEL_FILES if self.full_weights else ADAPTER_FILES
        return dict(zip(names, (self.config, self.weights), strict=True))

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex, over the config and each tensor's name, dtype, shape and bytes, sorted by name."""
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
        """Header entry of each tensor, and the data. The format: 8 bytes of header length, a JSON header, the data."""
        start = 8 + int.from_bytes(self.weights[:8], "little")
        header = json.loads(self.weights[8:start] or "{}")
        header.pop("__metadata__", None)
        return header, memoryview(self.weights)[start:]

    @cached_property
    def version(self) -> Version:
        """Identity of the adapter."""
        return Version(self.policy, self.number, self.digest)

    @property
    def name(self) -> str:
        """The version as text."""
        return str(self.version)


OFF = -1  # version number of the base without an adapter, which is the reference policy
BASE = Adapter("base", OFF, b"", b"")


@dataclass(frozen=True)
class Trained:
    """What an update computed for an episode's S sampled tokens, as float32 in native byte order."""

    advantages: bytes  # S
    logprobs: bytes  # S, nats, under the policy when the update first computed them; empty if it did not


@dataclass(frozen=True)
class UpdateStats:
    """Metrics of one update.

    Metrics per token, and shares of tokens, are means over the completion tokens that went through a forward and
    backward pass in this update, counted once per epoch. Such a metric is None if there was no such token, or if the
    algorithm does not compute the metric.
    """

    loss: float  # mean over the minibatches; 0 without tokens
    grad_norm: float  # before clipping, mean over the Adam steps; NaN if no gradient was finite, 0 without tokens
    lr: float  # of the policy; 0 while only the critic is trained (`critic.warmup`)
    kl_behaviour: float | None  # nats per token, KL between the policies of engine and learner
    ratio_truncated: float | None  # share of tokens that are masked, or whose importance ratio is outside of its limits
    tokens: int  # number of these completion tokens
    seconds: float  # duration
    skipped_in_a_row: int  # consecutive updates without a finite loss and gradient, including this update
    minibatches: int = 1  # Adam steps with a finite gradient
    clipped: float | None = None  # share of tokens whose ratio to the policy before the update is clipped
    kl_update: float | None = None  # nats per token, KL between the policies before and during the update
    kl_reference: float | None = None  # nats per token, KL between the learner's policy and the base
    entropy: float | None = None  # nats per token; exact if the loss has an entropy term, else estimated by mean -log p
    private_bytes: int | None = None  # `machine.private_bytes` of the learner's process after the update
    value_loss: float | None = None  # loss of the critic per token
    explained_variance: float | None = None  # share of the returns' variance that the critic's values had predicted
    objective_metrics: Mapping[str, float] = field(default_factory=dict)  # returned by the objective, per token
    parts: Mapping[str, float] = field(default_factory=dict)  # seconds of the first learner by part of the update
    trained: Mapping[tuple[int, int], Trained] = field(default_factory=dict)  # by group and episode, those with samples


@dataclass(frozen=True)
class SaveStats:
    """Duration and size of the checkpoint that was written last."""

    seconds: float  # on the writer's thread
    bytes: int


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of a request. The learner computes probabilities at the same temperature, over the tokens that
    top-k, top-p and min-p kept (`Episode.kept`). A completion ends at one of `stop_token_ids` or of the strings `stop`,
    and at the model's own end token."""

    max_tokens: int  # per completion
    temperature: float = 1.0  # 0 is greedy
    group_size: int = 1  # completions per prompt
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

    @property
    def truncates(self) -> bool:
        """Whether a token is sampled from a part of the vocabulary."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass(frozen=True)
class Receipt:
    """What an engine reports after it has loaded and verified an adapter version."""

    digest: str  # of the file that the engine read
    load_seconds: float  # until the adapter was in its slot, including the wait for a free slot
    proof_seconds: float  # for reading back and comparing file and slot


@dataclass(frozen=True)
class EngineStats:
    """Metrics of an engine since its start."""

    busy_seconds: float  # time spent computing
    canaries: Mapping[str, float]  # by policy: mean |engine - learner| of the last canary's logprobs, nats
    kv_seconds: float = 0.0  # share of the KV cache in use, integrated over the busy time


@dataclass(frozen=True)
class EngineInfo:
    """Description of an engine's device and memory, for the log."""

    description: str  # device, dtype, version and cache as text
    kv_cache: int  # size of the KV cache in bytes


class Env(Protocol):
    """Source of prompts, constructed as `Env(**config.env_args)`.

    If a prompt's `answer` is not itself a completion (the target of a puzzle), an optional method
    `solution(prompt) -> str | None` returns a correct completion. The check before a run tries that completion instead
    of the answer.
    """

    def train(self) -> Iterable[Prompt]:
        """Return the prompts to train on."""
        ...

    def held_out(self) -> Iterable[Prompt]:
        """Return prompts that are never trained on, for evaluation; possibly none."""
        ...


class Agent(Env, Protocol):
    """An env that replies to the policy, for episodes of several turns.

    A turn is what the policy generates between two replies. `stop` is optional.
    """

    stop: Sequence[str]  # strings that end the policy's turn, like the end token

    def reply(self, prompt: Prompt, message: str, state: dict[str, Any]) -> str | Messages | None:
        """Reply to `message`, the text of the policy's last turn. None ends the episode.

        A string continues the policy's message, like the result of a tool that is called inside the text. Chat messages
        follow the policy's message, and the policy answers them. `state` belongs to the episode: a dict of plain data,
        empty at first, which `reply` can modify. rlora calls `reply` in a separate process with the time limit
        `scoring.deadline`, like reward functions.
        """
        ...


class Engine(Protocol):
    """Samples under adapter versions. Methods return without blocking.

    Their futures raise EngineLostError if the engine's process dies or vLLM fails.
    """

    def load(self, adapter: Adapter, oldest: int = 0, kept: int | None = None) -> Future[Receipt]:
        """Load and verify a version, while requests for other versions continue.

        Requests of `adapter.policy` for version numbers below `oldest`, except `kept`, are aborted. The future raises
        DeliveryError if the engine serves something other than `adapter`.
        """
        ...

    def generate(self, prompt: Prompt, sampling: Sampling, version: Version) -> Future[Group]:
        """Sample `sampling.group_size` unscored episodes of `prompt` under `version`.

        The future raises NotLoadedError if the version is not loaded, StaleError if the request is aborted, and
        DeliveryError if the version's canary fails.
        """
        ...

    def leave(self, policy: str) -> Future[None]:
        """Abort the requests of a policy, and unload its versions."""
        ...

    def stats(self) -> Future[EngineStats]:
        """Return the metrics since the engine's start."""
        ...

    def close(self) -> Future[None]:
        """Stop the engine. Its methods must not be called afterwards."""
        ...
