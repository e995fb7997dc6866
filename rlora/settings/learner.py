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
    """What is trained: a low-rank adapter (`lora`), or all weights (`none`), the full fine-tuning baseline, which needs
    a tenth of an adapter's learning rate or less."""
    rank: Annotated[int, Field(ge=1, le=MAX_RANK), Tag.POLICY] = 1
    """Rank r of the adapter, 1 to 8: W' = W + (alpha / r) B A. Experts of a layer share it, with at least rank 1
    each."""
    alpha: Annotated[PositiveFloat, Tag.POLICY] = 32.0
    """Scale of the adapter. With alpha / r the best learning rate hardly depends on the rank."""
    targets: Annotated[Literal["all", "attention", "mlp"], Tag.POLICY] = "all"
    """Weight matrices that the adapter covers; `all` is attention, MLP and experts. `attention` learns clearly
    worse."""
    head: Annotated[bool, Tag.POLICY] = False
    """Whether the adapter also covers the output head, if it is not tied to the embeddings."""
    rslora: Annotated[bool, Tag.POLICY] = False
    """Scale the adapter by alpha / sqrt(r) instead of alpha / r."""
    init: Literal["uniform", "orthonormal"] = "uniform"
    """Initial A: uniform within 1 / sqrt(d_in), or with orthonormal rows. B starts at 0."""
    start_from: Annotated[Directory, Tag.POLICY] = ""
    """Directory of a PEFT adapter to start from. By default the adapter is new, so the initial policy is the base."""
    lr: PositiveFloat | Literal["auto"] = 1e-4
    """Adam's learning rate; `auto` uses the rule fitted for adapters to the base's hidden size."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate schedule from `learner.lr` at the first step to `learner.lr_floor` after the last of `steps`."""
    lr_floor: Share = 0.0
    """Final learning rate of the schedule, as a share of `learner.lr`."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of Adam's two moments."""
    eps: PositiveFloat = 1e-12
    """Adam's epsilon; small, because the gradients of an adapter can be tiny."""
    max_grad_norm: PositiveFloat = 1.0
    """Maximum gradient norm; longer gradients are scaled down to it."""
    microbatch_tokens: NonNegativeInt = 0
    """Tokens per forward pass; each shared prompt counts once. Lower it to save memory. 0 is 2048 on CPU, and on a GPU
    as many as fit into the learner's share of the memory, up to 16384."""
    checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: less memory, up to half more time. `auto` enables it on a GPU if the
    longest row needs it."""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """Hold the learner's base in 8 or 4 bit. Engines keep `dtype`; the importance ratio corrects for the difference."""
    max_bad_updates: PositiveInt = 3
    """Consecutive updates with a non-finite loss or gradient that are skipped before the run stops."""
    replicas: PositiveInt = 1
    """Learners that share each update (data parallel). Ray places each by its resources."""
    concurrent: PositiveInt = 1
    """Policies that are updated at the same time in a sweep, each by `learner.replicas` learners. Each learner has its
    share of the cores, even if there are fewer policies."""
    shard: bool = False
    """Divide the base's layers among `learner.replicas` (2 or more). Embeddings and output head are not divided."""
    cpus: NonNegativeFloat = 0.5
    """Ray CPUs that each learner reserves."""
    gpus: Gpus = "auto"
    """Ray GPUs that each learner reserves, which is also its share of a card's memory; 0 runs it on the CPU. `auto` is
    chosen as for `engine.gpus`."""
    deterministic: bool = False
    """Use only kernels that return the same bits each time, so that updates can be replayed on a GPU too."""
    threads: NonNegativeInt = 0
    """CPU threads per learner; 0 is all cores, or a share of them if `max_staleness` lets engines run at the same
    time."""

    @property
    def full_finetuning(self) -> bool:
        """Whether all weights are trained, without an adapter."""
        return self.adapter == "none"

    def check(self) -> Iterator[Problem]:
        if self.full_finetuning:
            for name in _OF_ADAPTERS:
                if getattr(self, name) != getattr(LearnerConfig, name):
                    yield Problem(
                        f"learner.{name}", 'there is no adapter (learner.adapter = "none"); remove this field'
                    )
        elif self.shard and self.quantise != "none":
            yield Problem(
                "learner.shard",
                f"a base in {self.quantise} can't be divided; disable one of learner.shard and learner.quantise",
            )
        elif self.shard and self.replicas == 1:
            yield Problem(
                "learner.shard",
                "a single learner has nobody to share the base with; set learner.replicas to 2 or more, each on its "
                "own GPU",
            )


@dataclass(frozen=True)
class CriticConfig:
    __pydantic_config__ = STRICT

    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] = 1
    """Rank of the critic's own adapter, which covers all matrices of the same base; its scale is `learner.alpha`."""
    lr: PositiveFloat = 3e-4
    """Learning rate of the critic's adapter and value head. It follows the schedule of the policy's."""
    clip: NonNegativeFloat = 0.2
    """Largest change of a value within an update; 0 is no limit."""
    warmup: NonNegativeInt = 0
    """Initial steps in which only the critic learns, and the policy does not."""
