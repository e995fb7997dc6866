"""Settings of the rollout engines."""

from dataclasses import dataclass

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rlora.settings.fields import STRICT, Gpus, Share


@dataclass(frozen=True)
class EngineConfig:
    __pydantic_config__ = STRICT

    replicas: PositiveInt = 1
    """Number of engines that sample. Ray places each by its resources."""
    cpus: NonNegativeFloat = 0.5
    """Ray CPUs that each engine reserves. The default is below 1 because engine and learner take turns."""
    gpus: Gpus = "auto"
    """Ray GPUs that each engine reserves; 0 runs it on the CPU. `auto` is 1 if the cluster has a GPU for each engine
    and learner, else 0.5, so that an engine and a learner share one. With `engine.tensor_parallel_size` it is 1 per
    part."""
    threads: NonNegativeInt = 0
    """CPU threads per engine; 0 divides the cores among all processes that compute at the same time."""
    kv_cache_gib: NonNegativeInt = 0
    """Memory in GiB for the KV cache of each engine; 0 is 2 on CPU, and the remaining memory budget on a GPU."""
    max_num_seqs: NonNegativeInt = 0
    """Completions that each engine samples concurrently; 0 is 128 on CPU and 256 on a GPU."""
    max_num_batched_tokens: NonNegativeInt = 0
    """Tokens that each engine computes per step, mostly of prompts; 0 is vLLM's default for the device."""
    eager: bool = False
    """On a GPU, skip compilation and CUDA graphs: the engine starts a minute sooner and each token takes longer."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs that each engine divides the model over."""
    gpu_memory_utilization: Share = 0.0
    """Share of a GPU's memory that each engine may use; 0 is what the learner leaves, by its `learner.gpus`."""
    max_replicas: PositiveInt = 8
    """Largest number of engines that `rlora scale` may request during a run."""
    patience: PositiveFloat = 120.0
    """Time limit in seconds for an engine to load a new version; an engine that exceeds it is replaced."""
    straggler_seconds: NonNegativeFloat = 0.0
    """Seconds that a step waits for its last groups after half have arrived. Later groups count for a later step if
    `max_staleness` allows. 0 is 120 plus a tenth of `sampling.max_tokens`, since late groups have the longest
    completions."""

    def sequences(self, on_gpu: bool) -> int:
        """Completions that each engine samples concurrently."""
        return self.max_num_seqs or (256 if on_gpu else 128)
