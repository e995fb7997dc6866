"""Settings of the learner: adapter, optimizer, placement; and of PPO's critic."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rlora.records import MAX_RANK
from rlora.settings.fields import STRICT, Decay, Directory, Gpus, Problem, Share, Tag

_OF_ADAPTERS = ("rank", "alpha", "targets", "head", "rslora", "init", "start_from", "quantise", "shard")


@dataclass(frozen=True)
class LearnerConfig:
    __pydantic_config__ = STRICT

    adapter: Annotated[Literal["lora", "none"], Tag.POLICY] = "lora"
    """Trained weights. `lora`: a low-rank adapter on the frozen base. `none`: all weights of the base (full
    fine-tuning, as a baseline); use a tenth of an adapter's `learner.lr` or less."""
    rank: Annotated[int, Field(ge=1, le=MAX_RANK), Tag.POLICY] = 1
    """Rank r of the adapter, 1 to 8: W' = W + (alpha / r) B A. In a mixture of experts, an expert's adapter has rank r
    divided by the number of experts per token, rounded down and at least 1."""
    alpha: Annotated[PositiveFloat, Tag.POLICY] = 32.0
    """Scale of the adapter: the product B A is multiplied by alpha / r, where r is `learner.rank`. With this scale the
    best learning rate hardly depends on the rank ("LoRA Without Regret"). `learner.rslora` changes the scale."""
    targets: Annotated[Literal["all", "attention", "mlp"], Tag.POLICY] = "all"
    """Weight matrices that the adapter covers. `all`: attention, MLP and experts. `attention`: only attention, which
    learns worse ("LoRA Without Regret"). `mlp`: only MLP and experts."""
    head: Annotated[bool, Tag.POLICY] = False
    """Whether the adapter also covers the output head. This is an error for a model whose output head is tied to the
    embeddings."""
    rslora: Annotated[bool, Tag.POLICY] = False
    """Whether the adapter's scale is alpha / sqrt(r) (rsLoRA, arXiv:2312.03732) instead of alpha / r, where r is
    `learner.rank`."""
    init: Literal["uniform", "orthonormal"] = "uniform"
    """Initial values of the adapter's A. `uniform`: uniform between -1 / sqrt(d_in) and 1 / sqrt(d_in), where d_in is
    the number of input features. `orthonormal`: random orthonormal rows. B starts at 0 with both, so the initial policy
    equals the base."""
    start_from: Annotated[Directory, Tag.POLICY] = ""
    """Directory of a LoRA adapter in PEFT's format from which training starts. `learner.rank`, `learner.alpha` and
    `learner.rslora` must equal the adapter's; `learner.targets`, `learner.head` and `learner.init` must be unset. Empty
    (the default) starts from a new adapter, so the initial policy equals the base."""
    lr: PositiveFloat | Literal["auto"] = 1e-4
    """Learning rate of Adam. `auto` computes the rate from the base's hidden size, by the rule of "LoRA Without Regret"
    (docs/algorithms.md); `rlora train` prints the result."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the learning rate. `constant`: `learner.lr` in every step. `linear`, `cosine`: the rate falls from
    `learner.lr` at the first step to `learner.lr_floor` times `learner.lr` after the last of `steps`, along a line or
    along half a cosine wave."""
    lr_floor: Share = 0.0
    """Final learning rate as a fraction of `learner.lr`, 0 to 1, for `learner.lr_schedule` = `linear` and `cosine`."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of Adam's first and second moment, beta1 and beta2."""
    eps: PositiveFloat = 1e-12
    """Epsilon of Adam, which is added to the denominator of a step. The default is small because the gradients of an
    adapter can be tiny."""
    max_grad_norm: PositiveFloat = 1.0
    """Maximum norm of a minibatch's gradient. A gradient with a larger norm is scaled down to this norm."""
    microbatch_tokens: NonNegativeInt = 0
    """Maximum number of tokens in a forward pass of the learner, where a prompt counts once for all its completions. A
    pass holds at least one prompt with one completion. Lower values need less memory. `0` is 2048 on the CPU; on a GPU
    it is as many as fit into the learner's share of the memory (`learner.gpus`), up to 16384."""
    checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass (`true`), which needs less memory and one more forward pass, or keep
    them (`false`). `auto` is `true` only on a GPU, and only if the learner's share of the memory is too small
    otherwise."""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """Quantisation of the learner's base by bitsandbytes (pip install 'rlora[quantise]'), to save memory. `none`: the
    base is in `dtype`. `int8`: 8-bit. `nf4`: 4-bit. Engines keep the base in `dtype`; the importance ratio
    (`algorithm.correction`) corrects for the difference."""
    max_bad_updates: PositiveInt = 3
    """Number of consecutive skipped updates after which the run stops. An update is skipped, and leaves the adapter
    unchanged, if no minibatch has a finite loss and gradient."""
    replicas: PositiveInt = 1
    """Number of learners that share each update (data parallelism). On GPUs, each learner needs a GPU of its own."""
    concurrent: PositiveInt = 1
    """Number of policies of a sweep that are updated at the same time, each by `learner.replicas` learners. The cores
    are divided among all learners, even if there are fewer policies than this number."""
    shard: bool = False
    """Whether to divide the layers of the frozen base among the learners (FSDP2), to save memory. This needs
    `learner.replicas` of 2 or more. Each learner keeps a full copy of the embeddings and the output head."""
    cpus: NonNegativeFloat = 0.5
    """Number of Ray CPUs that each learner reserves, for Ray's scheduling only; `learner.threads` sets the number of
    threads."""
    gpus: Gpus = "auto"
    """Number of Ray GPUs that each learner reserves. A number below 1 is also the share of the GPU's memory that the
    learner may use. `0` runs the learner on the CPU. `auto` is 0 if the cluster has no GPU. Otherwise it is 1 if there
    is a GPU for each engine and learner or if `learner.replicas` is above 1, else 0.5."""
    deterministic: bool = False
    """Whether the learner uses only kernels that return the same bits each time. `rlora replay` needs this to recompute
    updates bit for bit on a GPU."""
    threads: NonNegativeInt = 0
    """Number of CPU threads per learner. `0` divides all cores among the learners. If `max_staleness` is above 0,
    engines sample at the same time, and `0` divides only the cores that the default of `engine.threads` leaves."""

    @property
    def full_finetuning(self) -> bool:
        """Whether all weights are trained, without an adapter."""
        return self.adapter == "none"

    def check(self) -> Iterator[Problem]:
        """Yield a Problem for every rule that these settings break."""
        if self.full_finetuning:
            for name in _OF_ADAPTERS:
                if getattr(self, name) != getattr(LearnerConfig, name):
                    yield Problem(
                        f"learner.{name}",
                        'there is no adapter to which this applies (learner.adapter = "none"); unset '
                        f'learner.{name}, or set learner.adapter = "lora"',
                    )
        elif self.shard and self.quantise != "none":
            yield Problem(
                "learner.shard",
                f"a base quantised to {self.quantise} is not divided among learners; set learner.shard = false, "
                'or learner.quantise = "none"',
            )
        elif self.shard and self.replicas == 1:
            yield Problem(
                "learner.shard",
                "a single learner (learner.replicas = 1) has no other learner to divide the base with; set "
                "learner.replicas to 2 or more, or learner.shard = false",
            )


@dataclass(frozen=True)
class CriticConfig:
    __pydantic_config__ = STRICT

    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] = 1
    """Rank of the critic's adapter, 1 to 8, for `algorithm.advantage` = `gae`. The critic is a second adapter on the
    same base, which covers all matrices with the scale `learner.alpha` / `critic.rank`, and a linear value head."""
    lr: PositiveFloat = 3e-4
    """Learning rate of Adam for the critic's adapter and value head. The rate follows `learner.lr_schedule` and
    `learner.lr_floor`."""
    clip: NonNegativeFloat = 0.2
    """Clip range of the critic's loss (PPO's value clipping): the larger of the squared errors of the value and of the
    value clipped to this distance from its value before the update. `0` does not clip."""
    warmup: NonNegativeInt = 0
    """Number of steps at the start of training in which only the critic learns, while the policy's learning rate is
    0."""
