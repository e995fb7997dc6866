"""How much memory a pass of the learner takes, counted on a model that has none.

On torch's meta device a tensor has a shape and no data. So a forward and backward pass over the largest row runs there
in seconds for any model, by the very code that trains, and what it would hold at a time is counted.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from rlora import cards
from rlora.core.batch import Microbatch, Sample, microbatches
from rlora.core.flash import Segments, check_heads
from rlora.core.logprobs import LOGITS
from rlora.core.lora import matrices
from rlora.core.loss import Tokens
from rlora.core.policy import Policies
from rlora.core.setup import Setup
from rlora.machine import DTYPES, release
from rlora.model.base import META, without_memory
from rlora.records import RloraError
from rlora.settings import Config, LearnerConfig

CPU_TOKENS = 2048  # of a row: two cost what one of twice the size does, once they have a thousand
GPU_TOKENS = (16384, 8192, 4096, 2048)  # the more, the less a GPU waits for Python between kernels
FRAGMENTED = 1.1  # what an allocator takes for rows, over what they hold
_POLICY, _CRITIC = "footprint", "footprint/critic"
_QUANTISED = {"none": 1.0, "int8": 0.5, "nf4": 0.28}  # of 16 bits, with the scales


class Rows(NamedTuple):
    """The tokens of a forward pass, and whether its activations are computed again in the backward pass."""

    tokens: int
    checkpointing: bool


@dataclass(frozen=True)
class Footprint:
    """Bytes that a learner holds."""

    base: int  # the frozen weights
    adapter: int  # masters, their gradient and Adam's moments, of all that is trained
    activations: int  # the most at a time in a pass over the largest row, without logits
    head: int  # logits at a time

    @property
    def fixed(self) -> int:
        """What does not depend on the rows."""
        return self.base + self.adapter

    @property
    def of_rows(self) -> int:
        return self.activations + self.head

    @property
    def on_gpu(self) -> int:
        """What it takes of a card, with what torch's allocator leaves between rows."""
        return int(self.fixed + FRAGMENTED * self.of_rows)


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are made within it and still held: `now`, and the most at a time, `peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._held = set[int]()

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        given = {_storage(tensor)._cdata for tensor in _tensors((arguments, options))}  # what was made before stays out
        made = operation(*arguments, **(options or {}))
        for tensor in _tensors(made):
            storage = _storage(tensor)
            if storage._cdata not in given and storage._cdata not in self._held:
                self._hold(storage, storage.nbytes())
        return made

    def _hold(self, storage: Any, size: int) -> None:
        self._held.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata, size)

    def _drop(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.now -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


def footprint(config: Config, base: PreTrainedConfig, rows: Rows, on_gpu: bool) -> Footprint:
    """Of a learner of one policy over a base with that config of transformers'."""
    model, learner = without_memory(base, DTYPES[config.dtype]), config.learner
    held = _held_of(model, learner)
    policies = Policies(model, rows.checkpointing, learner.full_finetuning)
    trained = _opened(policies, config)
    row = largest_row(config, rows.tokens, META, on_gpu)
    by_autograd = config.algorithm.entropy > 0 or learner.full_finetuning or learner.head  # it has logits in fp32 too
    with Live() as live:
        pass_over(policies, _POLICY, row, entropies=config.algorithm.entropy > 0)
    gradients = sum(bytes_of(weight.grad) for weight in trained if weight.grad is not None)
    logits = min(len(row.targets), max(1, LOGITS["cuda" if on_gpu else "cpu"] // _vocabulary(base))) * _vocabulary(base)
    return Footprint(
        base=held,
        adapter=_bytes_to_train(trained, config),
        activations=live.peak - gradients,
        head=logits * (2 * model.dtype.itemsize + 4 * 4 if by_autograd else model.dtype.itemsize),
    )


def adapter_bytes(config: Config, base: PreTrainedConfig) -> int:
    """`Footprint.adapter` by itself, of a policy and its critic: what one more of them takes of a learner."""
    policies = Policies(without_memory(base, DTYPES[config.dtype]), whole=config.learner.full_finetuning)
    return _bytes_to_train(_opened(policies, config), config)


def _opened(policies: Policies, config: Config) -> list[Tensor]:
    """The weights of a policy and its critic, which are opened for that."""
    if config.learner.full_finetuning:
        return list(policies.base.parameters())
    setup, trained = _setup(config), list[Tensor]()
    for name, spec in ((_POLICY, setup.spec), (_CRITIC, setup.critic_spec)):
        if spec:
            policies.add(name, spec, seed=0, values=name == _CRITIC)
            trained += policies.parameters_of(name).values()
    return trained


def _bytes_to_train(weights: Sequence[Tensor], config: Config) -> int:
    masters = (
        0 if config.learner.full_finetuning and config.dtype == "float32" else 4
    )  # beside weights that are in 16 bits
    return sum(int(weight.numel()) for weight in weights) * (masters + 4 + 8)


def rows_for(config: Config, base: str, device: torch.device) -> Rows:
    """What `learner.microbatch_tokens` = 0 and `learner.checkpointing` = "auto" are on this machine, for the base that
    is loaded from `base`.

    On a GPU the largest rows that fit in the learner's part of the card, without checkpointing where that is possible.
    Raises RloraError, with what would fit, where nothing does, and for a base that no kernel takes.
    """
    if device.type != "cuda":
        return given_rows(config)
    model = AutoConfig.from_pretrained(base, trust_remote_code=False)
    check_heads(model)
    gpus = config.learner.gpus
    room, part = cards.room_of_learner(1.0 if gpus == "auto" else gpus)
    return fitting_rows(config, model, room, part)


def given_rows(config: Config) -> Rows:
    """On a CPU."""
    return Rows(config.learner.microbatch_tokens or CPU_TOKENS, config.learner.checkpointing is True)


def fitting_rows(config: Config, base: PreTrainedConfig, room: int, part: str) -> Rows:
    """The largest that fit in `room` bytes of a GPU; `part` says in words of what they are a part.

    One row is counted, of the longest prompt and completion, without checkpointing and with; what others hold grows
    with their tokens.
    """
    given, asked, least = config.learner.microbatch_tokens, config.learner.checkpointing, config.max_model_len
    sizes = [given] if given else [*(size for size in GPU_TOKENS if size > least), least]
    for checkpointing in [False, True] if asked == "auto" else [asked]:
        taken = footprint(config, base, Rows(least, checkpointing), on_gpu=True)
        left = (room - taken.fixed) / FRAGMENTED - taken.head
        fits = max(0, int(left * least / taken.activations))
        for size in sizes:
            if max(size, least) <= fits:
                return Rows(size, checkpointing)
    if given and asked != "auto" and taken.fixed <= room:
        return Rows(given, asked)  # as was asked for
    gib = cards.GIB
    instead = (
        f"rows of about {fits} tokens would fit: lower sampling.max_tokens or sampling.max_prompt_tokens, for a row "
        "holds a prompt with a completion at least"
        if fits
        else "use a smaller model, a larger card, learner.quantise, or learner.shard over several cards"
    )
    raise RloraError(
        f"GPU: the learner needs {taken.on_gpu / gib:.1f} GiB and has {room / gib:.1f}, {part}: {taken.base / gib:.1f} "
        f"for the base, {taken.adapter / gib:.2f} for adapter and Adam, {FRAGMENTED * taken.of_rows / gib:.1f} for a "
        f"row of {least} tokens{' with checkpointing' * bool(asked)}; {instead}"
    )


def largest_row(config: Config, tokens: int, device: torch.device, on_gpu: bool) -> Microbatch:
    """The largest of up to `tokens` tokens: groups of the longest prompts, each with the longest completions."""
    completion, prompt = config.sampling.max_tokens, config.sampling.max_prompt_tokens
    groups, left = list[int](), max(tokens, config.max_model_len)  # completions of each, and tokens
    while (fit := min(config.group_size, (left - prompt) // completion)) > 0:
        groups.append(fit)
        left -= prompt + fit * completion
    none, places = torch.zeros(completion), tuple(range(prompt - 1, prompt - 1 + completion))
    sample = Sample((0,) * prompt, (0,) * completion, places, (0,) * completion, Tokens(none, none, none))
    most = 2 * max(tokens, config.max_model_len)  # all in one row
    (row,) = microbatches([[sample] * fit for fit in groups], most, DTYPES[config.dtype], device)
    if on_gpu and device == META:  # elsewhere the layout follows from the device
        row = replace(row, layout=Segments.of([(prompt, [completion - 1] * fit) for fit in groups], device))
    return row


def rehearsed(policies: Policies, config: Config, tokens: int, device: torch.device) -> int:
    """Compute the largest row once; returns the bytes that torch took of a GPU at most, of which it gives all back that
    are free then."""
    if not policies.full_weights:
        policies.add(_POLICY, _setup(config).spec, seed=0)
    try:
        row = largest_row(config, tokens, device, on_gpu=device.type == "cuda")
        pass_over(policies, _POLICY, row, config.algorithm.entropy > 0)
    finally:
        for weight in policies.parameters_of(_POLICY).values():
            weight.grad = None
        policies.remove(_POLICY)
    peak = torch.cuda.max_memory_reserved() if device.type == "cuda" else 0
    release()
    return peak


def pass_over(policies: Policies, policy: str, row: Microbatch, entropies: bool = False) -> None:
    """A forward and backward pass, whose gradients are added to the policy's."""
    outputs = policies.outputs(row, policy, entropies=entropies)
    (outputs.logprobs if outputs.entropies is None else outputs.logprobs + outputs.entropies).sum().backward()


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _setup(config: Config) -> Setup:
    return Setup(config.learner, config.algorithm, config.critic)


def _vocabulary(base: PreTrainedConfig) -> int:
    return int(base.get_text_config().vocab_size)


def _held_of(model: PreTrainedModel, learner: LearnerConfig) -> int:
    """Bytes of the base as the learner holds it: in 8 or 4 bit but for embeddings and head, or divided."""
    own = sum(map(bytes_of, [*model.parameters(), *model.buffers()]))
    inner = sum(bytes_of(matrix.weight) for matrix in matrices(model) if matrix.kind != "head")
    share = _QUANTISED[learner.quantise] / (learner.replicas if learner.shard else 1)
    return int(own - inner + inner * share)
