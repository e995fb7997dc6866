"""The records that travel between the rooms, and the protocols of what can be plugged in. Stdlib only."""

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
WHOLE_FILES = ("config.json", "model.safetensors")
STATUSES = ("correct", "wrong", "unparsable", "timeout", "error")  # of an episode, once it is scored
Style = Literal[  # the forms of reward functions; docs/rewards.md has them
    "auto", "completion", "group", "trl", "verl", "verl-batch", "openrlhf", "verifiers", "verifiers-group", "areal"
]
Messages = Sequence[Mapping[str, str]]  # chat messages: {"role": ..., "content": ...}


def without_surrogates(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


class RloraError(Exception):
    """An error that the user can mend; its text names the field, the value and the fix."""


class RewardError(RloraError):
    """A reward function failed. `groups` are the sampled, unscored groups."""

    def __init__(self, message: str, groups: Sequence[Group] = ()) -> None:
        super().__init__(message)
        self.groups = tuple(groups)


class DeliveryError(RloraError):
    """An engine does not serve the version that it should."""


class EngineLostError(RloraError):
    """The process of an engine died, or vLLM failed in it. What it held can be made again elsewhere."""


class NotLoadedError(RloraError):
    """An engine was asked for a version that it does not hold."""


class StaleError(RloraError):
    """An engine gave a request up: its version is too old to learn from, or its policy has left."""


@dataclass(frozen=True)
class Version:
    """The identity of an adapter, everywhere: two are the same adapter where all three fields are equal."""

    policy: str  # unique in the job: the name of a run
    number: int  # 0 at the start, + 1 for each update
    digest: str = ""  # of the adapter's bytes: a number that is trained again after a crash has another; "": unknown

    def __str__(self) -> str:
        return f"{self.policy}-v{self.number}-{self.digest[:12]}"


@dataclass(frozen=True)
class Prompt:
    """One problem. An env gives `text` and `answer`; rlora adds `token_ids` when the data is loaded."""

    text: str | Messages  # a plain string is sent as one user message where the tokenizer has a chat template
    answer: Any = None  # what the reward compares with
    token_ids: tuple[int, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)  # what else a reward function may ask for, by name


@dataclass(frozen=True)
class Episode:
    """One completion of a prompt, sampled by one adapter version."""

    completion_ids: tuple[int, ...]  # T tokens; with a stop token, or a stop string, at the end if it came to one
    behaviour_logprobs: tuple[float, ...]  # T natural logs, of the distribution that was sampled from
    finish_reason: str  # "stop"; "length" where it was cut off, "context" where what the env said had no room left
    version: Version  # that sampled it
    text: str = ""  # the policy's last message, without special tokens
    reward: float | None = None  # None until it is scored
    sampled_mask: tuple[bool, ...] = ()  # T: which tokens the policy sampled, where some are a tool's; empty: all
    messages: Messages = ()  # all that followed the prompt, the env's among it; the last of the policy's is `text`
    state: Mapping[str, Any] = field(default_factory=dict)  # what the env's `reply` kept of it
    status: str = ""  # of STATUSES, once it is scored
    parts: Mapping[str, float] = field(default_factory=dict)  # what each reward function gave, by name, not weighted

    @property
    def sampled_tokens(self) -> int:
        """How many the policy sampled."""
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
        """Whether rewards differ; where they agree, advantages that are relative to the group are all zero."""
        return len(set(self.rewards)) > 1

    @property
    def scored(self) -> Group:
        """With those of its episodes that have a reward."""
        return replace(self, episodes=tuple(episode for episode in self.episodes if episode.reward is not None))

    def with_rewards(self, rewards: Sequence[float]) -> Group:
        pairs = zip(self.episodes, rewards, strict=True)
        return replace(self, episodes=tuple(replace(episode, reward=reward) for episode, reward in pairs))


@dataclass(frozen=True)
class RewardInput:
    """A group as reward functions see it. Each of the tuples has G items."""

    prompt: str | Messages  # as the env gave it
    prompt_text: str  # as the policy read it, special tokens included
    answer: Any
    columns: Mapping[str, Any]  # the prompt's
    completions: tuple[str, ...]  # the policy's last message, without special tokens
    messages: tuple[Messages, ...]  # all that followed the prompt, the env's messages among it
    completion_ids: tuple[tuple[int, ...], ...]
    states: tuple[Mapping[str, Any], ...]  # what the env's `reply` kept of each
    responses: tuple[str, ...] = ()  # all that followed the prompt, the env's too, without special tokens
    queries: tuple[str, ...] = ()  # the prompt and all that followed it, special tokens included
    step: int = 0  # of the run, in which it is scored
    steps: int = 0  # that the run has in all
    epoch: float | None = None  # how often all training prompts were sampled; None where that is not known
    prompt_ids: tuple[int, ...] = ()  # of `prompt_text`


@dataclass(frozen=True)
class Score:
    """What one reward function says of one episode: a status, a number, or, if it has nothing to say of it, neither."""

    status: str | None = None  # of STATUSES
    value: float | None = None  # None with a status: the number that the config gives it
    extra: Mapping[str, float] = field(default_factory=dict)  # other figures, to be logged
    detail: str = ""  # of an error: what it was, and in which file and line


@dataclass(frozen=True)
class Canary:
    """A few tokens, and what the learner says of each but the first: its logprob at temperature 1."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # under the version
    base_logprobs: tuple[float, ...]  # without an adapter


@dataclass(frozen=True)
class Adapter:
    """One immutable version of the policy: the bytes of the two files of PEFT's format, and who made them.

    Without an adapter (`learner.adapter = "none"`) a version is all weights, in the format of transformers.
    """

    policy: str
    number: int  # of the version
    config: bytes  # adapter_config.json; of all weights config.json
    weights: bytes  # adapter_model.safetensors, fp32; of all weights model.safetensors, in the base's dtype
    full_weights: bool = False  # all weights
    canary: Canary | None = None  # what an engine that serves it gives too; None where no learner said

    @property
    def files(self) -> dict[str, bytes]:
        """What it is on disk, by name."""
        names = WHOLE_FILES if self.full_weights else ADAPTER_FILES
        return dict(zip(names, (self.config, self.weights), strict=True))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the config and, in the order of their names, each tensor's name, dtype, shape and bytes."""
        tensors, data = self._tensors
        digest = hashlib.sha256(self.config)
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor['dtype']} {tensor['shape']}\n".encode())
            digest.update(data[slice(*tensor["data_offsets"])])
        return digest.hexdigest()

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return sum(math.prod(tensor["shape"]) for tensor in self._tensors[0].values())

    @property
    def _tensors(self) -> tuple[dict[str, Any], memoryview]:
        """What a safetensors file says of each tensor, and their bytes: 8 bytes of length, a JSON header, the data."""
        start = 8 + int.from_bytes(self.weights[:8], "little")
        header = json.loads(self.weights[8:start] or "{}")
        header.pop("__metadata__", None)
        return header, memoryview(self.weights)[start:]

    @cached_property
    def version(self) -> Version:
        return Version(self.policy, self.number, self.digest)

    @property
    def name(self) -> str:
        """Of its version, as text."""
        return str(self.version)


OFF = -1  # the number of a version that is none: the base, which is the reference policy
BASE = Adapter("base", OFF, b"", b"")


@dataclass(frozen=True)
class InFlight:
    """A prompt that was sent and not learned from yet."""

    place: int  # of the prompt in the order of all
    step: int  # that sent it
    adapter: Adapter | None = None  # it is sampled under; None while no engine had room
    group: Group | None = None  # once it is played
    scored: bool = False  # the group is


@dataclass(frozen=True)
class Cursor:
    """Where a run is in its prompts, between two steps."""

    next: int = 0  # place of the next prompt that was never sent
    again: tuple[int, ...] = ()  # places of prompts to sample again, before any other
    in_flight: tuple[InFlight, ...] = ()  # in the order in which they were sent


@dataclass(frozen=True)
class UpdateStats:
    """Figures of one update; token means are over the tokens that were computed, None where there were none."""

    loss: float
    grad_norm: float  # before it was clipped
    lr: float
    kl_behaviour: float | None  # nats a token, engine against learner
    ratio_truncated: float | None  # share of tokens over the importance cap
    tokens: int  # completion tokens computed, each as often as it was
    seconds: float
    skipped_in_a_row: int  # updates up to this one without any finite loss and gradient; 0 where this one counted
    minibatches: int = 1  # Adam steps
    clipped: float | None = None  # share of tokens whose ratio to the update's start was
    kl_update: float | None = None  # nats a token that the policy moved in the update, before its last minibatch
    kl_reference: float | None = None  # nats a token, learner against the base
    entropy: float | None = None  # nats a token; the mean of -log p, which it is on policy, unless it is in the loss
    own_bytes: int | None = None  # RAM that the learner's process has for itself after it
    value_loss: float | None = None
    explained_variance: float | None = None  # of the returns, by the critic before the update
    others: Mapping[str, float] = field(default_factory=dict)  # what else the objective tells, by name: token means


@dataclass(frozen=True)
class SaveStats:
    """What the last bundle that was written cost."""

    seconds: float  # on the thread that writes
    bytes: int


@dataclass(frozen=True)
class Sampling:
    """How one batch is sampled. Only the temperature shapes the distribution: the learner has to know it."""

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    group_size: int = 1


@dataclass(frozen=True)
class Receipt:
    """What an engine says of a version that it serves now."""

    digest: str  # of the file that it read
    load_seconds: float  # until it was in its slot
    proof_seconds: float  # of reading file and slot again


@dataclass(frozen=True)
class EngineStats:
    """Figures of an engine since it began."""

    busy_seconds: float  # in which it computed
    canaries: Mapping[str, float]  # by policy: mean absolute difference of its last canary's logprobs and the
    # learner's, nats


@dataclass(frozen=True)
class EngineInfo:
    """What an engine runs on and with."""

    words: str
    kv_cache: int  # bytes


class Env(Protocol):
    """Where prompts come from: built as `Env(**config.env_args)`.

    Where a prompt's `answer` is no completion, as the target of a puzzle, a method `solution(prompt) -> str | None` may
    give a completion that should be paid: the check before a run tries it in place of the answer.
    """

    def train(self) -> Iterable[Prompt]: ...

    def held_out(self) -> Iterable[Prompt]:
        """Prompts that training never sees; may be empty."""
        ...


class Agent(Env, Protocol):
    """An env that answers the policy: its episodes have several turns. `stop` is optional."""

    stop: Sequence[str]  # strings that end the policy's turn, as its own end token does

    def reply(self, prompt: Prompt, message: str, state: dict[str, Any]) -> str | Messages | None:
        """What the policy gets to read after `message`, which is what it wrote in its last turn; None ends the episode.

        A string goes on in the policy's own message, as the result of a tool does that is called in the text; chat
        messages follow it, and the policy answers them. `state` is the episode's own, empty at first: plain data that
        may be changed. It runs where rewards do: in another process, with a deadline.
        """
        ...


class Engine(Protocol):
    """Samples under exact adapter versions. A call returns at once; its future may raise EngineLostError."""

    def load(self, adapter: Adapter, oldest: int = 0, kept: int | None = None) -> Future[Receipt]:
        """Serve a version beside those it serves. Requests for versions of its policy with numbers below `oldest`,
        other than `kept`, are given up. Raises DeliveryError where the engine turns out to serve something else."""
        ...

    def generate(self, prompt: Prompt, sampling: Sampling, version: Version) -> Future[Group]:
        """`sampling.group_size` unscored episodes. Raises NotLoadedError for a version it does not hold, StaleError."""
        ...

    def leave(self, policy: str) -> Future[None]:
        """Give up the requests of a policy, and serve none of its versions any more."""
        ...

    def stats(self) -> Future[EngineStats]:
        """What it has done so far."""
        ...

    def close(self) -> Future[None]:
        """End it; nothing may be asked of it any more."""
        ...
