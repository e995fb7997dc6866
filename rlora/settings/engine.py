"""Settings of the rollout engines."""

from dataclasses import dataclass

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rlora.settings.fields import STRICT, Gpus, Share


@dataclass(frozen=True)
class EngineConfig:
    __pydantic_config__ = STRICT

    replicas: NonNegativeInt = 1
    """Number of engines (vLLM), which sample the completions. Ray places each engine on a node with enough free CPUs
    and GPUs."""
    cpus: NonNegativeFloat = 0.5
    """Number of Ray CPUs that each engine reserves, for Ray's scheduling only; `engine.threads` sets the number of
    threads. The default is below 1 because engine and learner take turns."""
    gpus: Gpus = "auto"
    """Number of Ray GPUs that each engine reserves; with `engine.tensor_parallel_size` = n, an engine reserves n times
    this number. `0` runs the engine on the CPU. `auto` is 0 if the cluster has no GPU. Otherwise it is 1 if there is a
    GPU for each engine and learner or if `engine.tensor_parallel_size` is above 1, else 0.5, so that an engine and a
    learner share a GPU."""
    threads: NonNegativeInt = 0
    """Number of CPU threads per engine, for engines on the CPU. `0` divides the cores among the engines; if
    `max_staleness` is above 0, the learner gets a share too, because it computes at the same time."""
    kv_cache_gib: NonNegativeInt = 0
    """Size of each engine's KV cache in GiB. `0` (the default) chooses the size: 2 GiB on the CPU; on a GPU what the
    base model and the activations leave of the engine's memory."""
    max_num_seqs: NonNegativeInt = 0
    """Maximum number of completions that each engine samples at the same time. `0` is 128 on the CPU and 256 on a
    GPU."""
    max_num_batched_tokens: NonNegativeInt = 0
    """Maximum number of tokens that each engine computes in one vLLM step, most of them prompt tokens. `0` is vLLM's
    default for the device."""
    eager: bool = False
    """Whether an engine on a GPU runs without compilation and CUDA graphs. The engine then starts sooner and samples
    more slowly, which suits short tests."""
    tensor_parallel_size: PositiveInt = 1
    """Number of GPUs over which each engine divides the model (tensor parallelism). Use more than 1 if the model does
    not fit on one GPU."""
    gpu_memory_utilization: Share = 0.0
    """Fraction of a GPU's memory that an engine may use, 0 to 1. `0` is the memory that a learner on the same GPU
    leaves; several engines share that memory in proportion to `engine.gpus`."""
    max_replicas: PositiveInt = 8
    """Maximum number of engines that `rlora scale` can request during a run."""
    patience: PositiveFloat = 120.0
    """Time limit in seconds for an engine to load and verify a new version of an adapter. An engine that takes longer
    is considered dead and is replaced."""
    straggler_seconds: NonNegativeFloat = 0.0
    """Time in seconds that a step waits for its remaining groups after half of its groups have arrived. A group that
    arrives later is used in a later step, unless it is staler than `max_staleness` by then. `0` is 120 seconds plus 0.1
    seconds per token of `sampling.max_tokens`."""

    def sequences(self, on_gpu: bool) -> int:
        """Return the maximum number of completions that an engine samples at the same time."""
        return self.max_num_seqs or (256 if on_gpu else 128)
