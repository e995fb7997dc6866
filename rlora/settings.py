"""The settings of a run: one frozen dataclass, a docstring for each field."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from rlora.fields import STRICT, Arguments, Count, Decay, Directory, Gpus, Positive
from rlora.records import MAX_RANK, Style
from rlora.watch_settings import CheckConfig, EvaluateConfig, HealthConfig, TrackersConfig


@dataclass(frozen=True)
class SamplingConfig:
    __pydantic_config__ = STRICT

    temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """Temperature of training rollouts; the learner's logprobs use it too."""
    max_tokens: Count = 256
    """Longest completion, in tokens; of several turns all of them together, and what the env says."""
    max_prompt_tokens: Count = 512
    """Longest prompt, in tokens. Longer ones are left out when the data is loaded, and counted."""


@dataclass(frozen=True)
class ChatConfig:
    __pydantic_config__ = STRICT

    system: str = ""
    """System message of every prompt that has none."""
    template: str = ""
    """A chat template (Jinja), the file it is in, or the name of one of the tokenizer's, in place of its default."""
    template_args: Arguments = field(default_factory=dict)
    """What the template takes beside messages, such as enable_thinking."""
    prefill: str = ""
    """What each message of the policy begins with: part of the prompt, and of what reward functions see. What the
    template opens itself, such as <think>, is not written twice."""
    stop: tuple[str, ...] = ()
    """Strings that end the policy's message, as its end token does; the env's own beside them."""
    think: tuple[str, str] = ("<think>", "</think>")
    """The model's tags around its thinking, special tokens or text; reward functions see <think> and </think>."""


@dataclass(frozen=True)
class ScoringConfig:
    __pydantic_config__ = STRICT

    style: Style = "auto"
    """The form of the reward functions, where their parameters' names do not tell it; docs/rewards.md has them."""
    correct: float = 1.0
    """Reward of an episode of that status; so are the next four."""
    wrong: float = 0.0
    """Of an answer that is not right."""
    unparsable: float = 0.0
    """Of one that has no answer, or none that can be read."""
    timeout: float = 0.0
    """Of one whose reward function took longer than `deadline`."""
    error: float = 0.0
    """Of one whose reward function failed."""
    max_errors: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The run stops where a larger share of a step's episodes is in error."""
    deadline: Positive = 10.0
    """Seconds that a call of a reward function, or of an env's reply, may take; then its process is replaced."""
    first_deadline: Annotated[float, Field(ge=0)] = 60.0
    """Seconds that the first call of each function in each process may take, for it may load a model."""
    memory_mib: Count = 2048
    """MiB that a call may take."""
    workers: Count = 2
    """Processes of a replica that call them."""
    concurrency: Count = 16
    """Calls at once of a reward function that is a coroutine, in each process."""
    replicas: Count = 1
    """Ray actors that have such processes; Ray spreads them over the nodes."""
    cpus: Annotated[float, Field(ge=0)] = 0.0
    """Ray CPUs that a replica reserves."""
    environment: tuple[str, ...] = ()
    """Names of environment variables that reward functions get on every node; their values are never stored."""


@dataclass(frozen=True)
class EngineConfig:
    __pydantic_config__ = STRICT

    replicas: Count = 1
    """How many engines sample; Ray places each by its resources."""
    cpus: Annotated[float, Field(ge=0)] = 0.5
    """Ray CPUs that a replica reserves. Below 1 by default: engine and learner take turns."""
    gpus: Gpus = "auto"
    """Ray GPUs that a replica reserves, where the cluster has GPUs; 0 keeps it on the CPU. `auto` is 1 where there is
    one for each engine and learner, else 0.5: an engine and a learner share a card. With `tensor_parallel_size` it is
    of each part, and 1."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of a replica; 0 shares the cores out over all that compute at once."""
    kv_cache_gib: Annotated[int, Field(ge=0)] = 0
    """Memory for keys and values of a replica, in GiB. 0: 2 on CPU, on a GPU what is left."""
    max_num_seqs: Annotated[int, Field(ge=0)] = 0
    """Completions that a replica samples at a time. 0: 128 on CPU, 256 on a GPU."""
    max_num_batched_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens that a replica computes at a time, most of them of prompts. 0 is vLLM's default for the device."""
    eager: bool = False
    """On a GPU: neither compile nor capture CUDA graphs. The start takes a minute less, each token longer."""
    tensor_parallel_size: Count = 1
    """GPUs of a replica."""
    gpu_memory_utilization: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of a GPU's memory that a replica may use. 0: what the learner leaves there, by its `gpus`."""
    max_replicas: Count = 8
    """The most engines that `rlora scale` may ask for while a run goes on."""
    patience: Positive = 120.0
    """Seconds in which an engine has to take a swap; one that does not is replaced."""
    straggler_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Seconds that a step waits for its last groups once half are there; later ones count for later steps, or not.
    0: 120 and a tenth for each of `sampling.max_tokens`, for groups that are late have the longest completions."""

    def sequences(self, on_gpu: bool) -> int:
        """Completions that a replica samples at a time."""
        return self.max_num_seqs or (256 if on_gpu else 128)


@dataclass(frozen=True)
class LearnerConfig:
    __pydantic_config__ = STRICT

    adapter: Literal["lora", "none"] = "lora"
    """What is trained: a low-rank adapter, or, with `none`, all weights: the baseline, whose lr is a tenth or less."""
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] = 1
    """Rank r of the adapter, 1 to 8: W' = W + (alpha / r) B A. Experts share it, each has at least 1."""
    alpha: Positive = 32.0
    """Scale of the adapter; with alpha / r the best learning rate hardly depends on the rank."""
    targets: Literal["all", "attention", "mlp"] = "all"
    """Which weight matrices it is over; `all` is attention, MLP and experts. Attention alone learns clearly worse."""
    head: bool = False
    """Whether it is over the output head too, where that is not tied to the embeddings."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) in place of alpha / r."""
    init: Literal["uniform", "orthonormal"] = "uniform"
    """How A starts: uniform within 1 / sqrt(d_in), or with orthonormal rows. B starts at 0."""
    start_from: Directory = ""
    """The directory of an adapter in PEFT's format to start from; by default a fresh one, whose policy is the base."""
    lr: Positive | Literal["auto"] = 1e-4
    """Learning rate of Adam; `auto` takes the rule that was fitted for adapters to the base's hidden size."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How it falls from lr at the first step to `lr_floor` after the last (`steps`; a resumed run may have more)."""
    lr_floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Where it falls to, as a share of lr."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of Adam's two moments."""
    eps: Positive = 1e-12
    """Adam's epsilon; small, because gradients of an adapter can be tiny."""
    max_grad_norm: Positive = 1.0
    """The gradient is scaled down to this norm where it is longer."""
    microbatch_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens in one forward pass, each prompt's once; lower it where memory is short. 0: 2048 on CPU, on a GPU as many,
    up to 16384, as fit in the learner's part of its memory."""
    checkpointing: bool | Literal["auto"] = "auto"
    """Compute activations again in the backward pass instead of keeping them: less memory, up to half more time.
    `auto`: on a GPU where the longest row needs it."""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """Hold the learner's base in 8 or 4 bit; engines keep `dtype`, and the importance ratio bridges the gap."""
    max_bad_updates: Count = 3
    """Updates in a row that may be skipped for a non-finite loss or gradient before the run stops."""
    replicas: Count = 1
    """How many learners share each update (data-parallel); Ray places each by its resources."""
    concurrent: Count = 1
    """Policies to update at the same time where several train together, each by `replicas` learners. Each learner has
    its share of the cores, also where there are fewer policies."""
    shard: bool = False
    """Divide the base's layers among the `replicas`, 2 or more; embeddings and output head stay whole on each."""
    cpus: Annotated[float, Field(ge=0)] = 0.5
    """Ray CPUs that a learner reserves."""
    gpus: Gpus = "auto"
    """Ray GPUs that a learner reserves, where the cluster has GPUs, and its part of a card's memory; 0 keeps it on the
    CPU. `auto` is as `engine.gpus`."""
    deterministic: bool = False
    """Take only kernels that give the same bits each time, so that updates can be replayed on a GPU too."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of a learner; 0 takes all cores, or its share where `max_staleness` lets engines run beside it."""

    @property
    def full_finetuning(self) -> bool:
        """Whether all weights are trained: then there is no adapter."""
        return self.adapter == "none"


ReadyAlgorithm = Literal["reinforce", "grpo", "dr-grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "ppo"]


@dataclass(frozen=True)
class AlgorithmConfig:
    __pydantic_config__ = STRICT

    name: ReadyAlgorithm | Annotated[str, Field(pattern=r".:\w+$")] = "reinforce"
    """Sets what the fields below are unless they are given (docs/algorithms.md has the table), or names an objective of
    your own, as module:name or path/to/file.py:name."""
    advantage: Literal["centred", "standardised", "leave-one-out", "whitened", "gae"] = "centred"
    """From the returns of a group (the first three), of the whole step, or of each token by a critic."""
    loss: Literal["reinforce", "clip", "gspo", "cispo"] = "reinforce"
    """Of a token: its ratio to the update's start as it is, clipped, its episode's clipped, or a clipped weight."""
    average: Literal["tokens", "episodes", "constant"] = "tokens"
    """Whether each token counts alike in a minibatch, or each episode, or by 1 / (episodes x sampling.max_tokens)."""
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    """How far below 1 the ratio may be before it is clipped."""
    clip_high: Annotated[float, Field(ge=0)] = 0.2
    """How far above 1."""
    dual_clip: Annotated[float, Field(ge=0)] = 0.0
    """The most that a token of negative advantage may cost, times that; above 1 + `clip_high`, or 0 for no bound."""
    correction: Literal["token-truncate", "token-mask", "episode-truncate", "episode-mask", "none"] = "token-truncate"
    """What p_start / p_behaviour does, of a token or the product over an episode, where it is over the cap."""
    importance_cap: Annotated[float, Field(ge=1)] = 2.0
    """Cap of that ratio."""
    kl: Annotated[float, Field(ge=0)] = 0.0
    """Coefficient of the KL to the reference policy: the base, with the adapter off. 0 computes none."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Whether the KL is added to the loss or taken from the reward."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of the KL a token (Schulman 2020): k2 or k3 in the loss, k1 in the reward."""
    entropy: Annotated[float, Field(ge=0)] = 0.0
    """Coefficient of the entropy bonus. 0 computes no entropy."""
    epochs: Count = 1
    """Times that an update goes through the step's episodes."""
    minibatches: Count = 1
    """Parts of the step's groups; each is one Adam step."""
    target_kl: Annotated[float, Field(ge=0)] = 0.0
    """An update ends before a minibatch whose mean KL a token from the update's start is above this; 0: no bound."""
    refills: Annotated[int, Field(ge=0)] = 0
    """Times that a step asks for more prompts in place of groups whose rewards agree (DAPO's dynamic sampling); none
    where it has late ones (`engine.straggler_seconds`)."""
    drop_truncated: bool = False
    """Learn nothing from completions that were cut off at sampling.max_tokens."""
    overlong_tokens: Annotated[int, Field(ge=0)] = 0
    """The last so many tokens before sampling.max_tokens cost more and more of `overlong_penalty`."""
    overlong_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Taken from the reward of a completion of sampling.max_tokens tokens."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount a token, of `gae` and `whitened`."""
    lam: Annotated[float, Field(ge=0, le=1)] = 1.0
    """GAE's lambda."""
    bootstrap_truncated: bool = False
    """With `gae`, add to the reward of a completion that was cut off what the critic expects after it. For rewards that
    go on; where the reward is of the whole answer it counts twice, and the policy learns to be cut off."""

    @property
    def of_group(self) -> bool:
        """Whether an advantage is relative to the other completions of the prompt, and the same for all its tokens."""
        return self.advantage not in ("whitened", "gae")

    def kl_of(self, where: Literal["loss", "reward"]) -> bool:
        """Whether the KL to the reference policy is computed, and counts there."""
        return self.kl > 0 and self.kl_in == where


@dataclass(frozen=True)
class CriticConfig:
    __pydantic_config__ = STRICT

    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] = 1
    """Rank of the critic's own adapter, over all matrices of the same base; its scale is `learner.alpha`."""
    lr: Positive = 3e-4
    """Learning rate of its adapter and its head; it falls like the policy's."""
    clip: Annotated[float, Field(ge=0)] = 0.2
    """How far a value may move from what it was before the update; 0 is no bound."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps in which the critic learns and the policy does not."""


PRESETS: dict[str, dict[str, Any]] = {
    "reinforce": {},
    "grpo": {"advantage": "standardised", "loss": "clip", "average": "episodes"},
    "dr-grpo": {"loss": "clip", "average": "constant"},
    "dapo": {"advantage": "standardised", "loss": "clip", "clip_high": 0.28, "refills": 2},
    "gspo": {
        "advantage": "standardised", "loss": "gspo", "average": "episodes", "clip_low": 3e-4, "clip_high": 4e-4,
        "correction": "episode-truncate", "minibatches": 4,
    },
    "cispo": {"advantage": "standardised", "loss": "cispo", "clip_low": 1.0, "clip_high": 4.0, "minibatches": 4},
    "rloo": {"advantage": "leave-one-out"},
    "reinforce++": {"advantage": "whitened", "loss": "clip", "kl": 1e-3, "kl_in": "reward", "kl_estimator": "k1"},
    "ppo": {"advantage": "gae", "loss": "clip", "minibatches": 4, "lam": 0.95},
}  # fmt: skip


@dataclass(frozen=True)
class CheckpointConfig:
    __pydantic_config__ = STRICT

    keep_last: Count = 20
    """Bundles to keep, the newest ones; one is written after each step. Of all weights two at most, and no others."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Beside them those of each so many steps; 0: none."""
    keep_best: Annotated[int, Field(ge=0)] = 1
    """Beside them so many of those whose episodes had the highest mean reward. That is known `max_staleness` + 1 steps
    later, so `keep_last` has to be above `max_staleness`."""
    best_by: Literal["reward", "accuracy"] = "reward"
    """What `keep_best` goes by: the mean reward of training episodes, or the accuracy on held-out prompts that
    `evaluate.every` measures."""
    episodes_mib: Annotated[int, Field(ge=0)] = 64
    """The most MiB of episodes, compressed, that a bundle holds for `rlora replay`; 0 keeps none."""
    patience: Positive = 600.0
    """Seconds that training goes on in memory where bundles can't be written, and waits for one to be."""


@dataclass(frozen=True)
class Config:
    __pydantic_config__ = STRICT

    model: Directory
    """The frozen base: a hub id, a local directory, or demo:smollm2-135m."""
    env: str
    """Where prompts come from: module:Name or path/to/file.py:Name."""
    reward: str | tuple[str, ...]
    """What scores completions: module:name or path/to/file.py:name; of several the weighted sum."""
    env_args: Arguments = field(default_factory=dict)
    """Arguments of the env; on the command line also --env-args.NAME VALUE. A file's go with the file's env only."""
    reward_args: Arguments = field(default_factory=dict)
    """Arguments of the reward functions that have a parameter of that name; also --reward-args.NAME VALUE."""
    reward_weights: tuple[float, ...] = ()
    """The weight of each reward function; all 1 by default."""
    steps: Count = 100
    """Steps to train in all, those before a --resume included; each makes one new adapter version."""
    prompts_per_step: Count = 16
    """Prompts a step."""
    group_size: Count = 8
    """Completions a prompt (G); 2 or more where an advantage is relative to its group's mean."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Versions that an episode may be behind the learner; 0 is on policy, 1 samples while the learner updates."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """Times in a row that a lost engine or learner is started again before the run does without it, or stops."""
    seed: int = 0
    """Seed of the order of prompts, the adapter's A, and sampling."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the frozen base, in the engine and in the learner. The adapter's masters and Adam are always fp32."""
    sampling: SamplingConfig = SamplingConfig()
    chat: ChatConfig = ChatConfig()
    scoring: ScoringConfig = ScoringConfig()
    engine: EngineConfig = EngineConfig()
    learner: LearnerConfig = LearnerConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    critic: CriticConfig = CriticConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    check: CheckConfig = CheckConfig()
    health: HealthConfig = HealthConfig()
    trackers: TrackersConfig = TrackersConfig()

    @property
    def max_model_len(self) -> int:
        return self.sampling.max_prompt_tokens + self.sampling.max_tokens

    @property
    def straggler_seconds(self) -> float:
        """Seconds that a step waits for its last groups once half are there."""
        return self.engine.straggler_seconds or 120.0 + self.sampling.max_tokens / 10

    @property
    def rewards(self) -> tuple[str, ...]:
        """Each reward function."""
        return (self.reward,) * bool(self.reward) if isinstance(self.reward, str) else self.reward
