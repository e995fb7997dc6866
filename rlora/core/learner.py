"""The learner: K policies over one resident base, each with masters, Adam and random state of its own."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import safetensors.torch
import torch
import torch.distributed
from torch import Tensor

from rlora import cards, machine
from rlora.core import peft_format, state
from rlora.core.batch import Microbatch, Sample, empty_batch, microbatches, single_text
from rlora.core.footprint import rehearsed, rows_for
from rlora.core.objectives import objective_of, telling_of
from rlora.core.objectives.objective import Loss, Need, Objective
from rlora.core.optimizer import Adam, Optimizer, StepStats
from rlora.core.policy import Outputs, Policies
from rlora.core.setup import Setup
from rlora.core.sharding import shard
from rlora.core.update import update
from rlora.model.base import auto_lr, load_base, load_quantised
from rlora.plugin import receive
from rlora.records import WHOLE_FILES, Adapter, Canary, Group, RloraError, UpdateStats
from rlora.settings import Config

_CANARY = 24  # tokens: one short prompt, and enough logprobs for a mean
_OTHER_BASE = 0.2  # nats that a base's canary may move, mean over its tokens, between machines and kernels
Groups = Sequence[Sequence[Sample]]  # the samples of each group have one prompt, which is computed once


@dataclass(eq=False)
class PolicyState:
    """What the learner keeps of one policy. None of it depends on the policies beside it."""

    name: str
    setup: Setup
    objective: Objective
    optimizer: Optimizer
    lr: float
    random: dict[str, Tensor]  # the state of every random generator, between two updates
    critic: "PolicyState | None" = None
    number: int = 0  # of its version
    skipped_in_a_row: int = 0  # updates whose loss or gradient was not finite
    canary: Canary | None = None  # of the version; None between a step and the next one

    def zero_grad(self) -> None:
        """Drop the gradients of the policy and its critic."""
        self.optimizer.zero_grad()
        if self.critic:
            self.critic.zero_grad()


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """What a forward and backward pass gives: of all learners the sums, of this one's samples the outputs."""

    sums: dict[str, float]  # of the loss's figures over all targets; the targets themselves as `tokens`, the `loss`
    outputs: list[list[Tensor]]  # of each sample: its targets' logprobs, or values, (C,) float32 on the CPU


class Learner:
    """Loads the frozen base from `base` and trains policies over it, each opened under a name of its own.

    What a policy learns from the same episodes does not depend on its company, bit for bit: a row of a forward pass
    belongs to one policy. A policy's critic is a policy too, `<name>/critic`, whose outputs are values. The fields of
    `config` that concern the process are used here: the model, its dtype, and how it is held.
    """

    def __init__(self, config: Config, base: str) -> None:
        self.config, self.base = config, base
        self.device = machine.device()
        learner, dtype = config.learner, machine.DTYPES[config.dtype]
        if learner.deterministic:
            torch.use_deterministic_algorithms(True)
        place = torch.device("cpu") if learner.shard else self.device  # `join` moves it, a layer at a time
        quantise = learner.quantise
        self.rows = rows_for(config, base, self.device)  # before the base is loaded
        model = load_base(base, dtype, place) if quantise == "none" else load_quantised(base, dtype, quantise)
        self.policies = Policies(model, self.rows.checkpointing, learner.full_finetuning)
        self.held: dict[str, PolicyState] = {}  # critics too
        self.rank, self.ranks = 0, 1
        self._at_work = self._trained_base = False
        self._of_base: dict[int, tuple[float, ...]] = {}  # the base's logprobs of canaries, by their tokens

    def join(self, address: str, rank: int, ranks: int) -> None:
        """Become one of `ranks` learners that share each update; the first listens at `address` (host:port)."""
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        host, _, port = address.rpartition(":")
        try:
            store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
                host, int(port), ranks, rank == 0, timeout=timedelta(minutes=2)
            )
            torch.distributed.init_process_group(  # Ray tells of a rank that died; one that is slow is waited for
                backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(days=1)
            )
            torch.distributed.all_reduce(torch.zeros(1, device=self.device))  # NCCL connects at its first use
        except RuntimeError as error:
            raise RloraError(f"learner {rank} of {ranks} could not meet the others at {address}: {error}") from error
        self.rank, self.ranks = rank, ranks
        if self.config.learner.shard:
            shard(self.policies.body, self.device)
            self.policies.base.to(self.device)  # what is not sharded

    def rehearse(self) -> tuple[str, int]:
        """Compute the largest row once, under an adapter that is gone then; returns the card, and the bytes that this
        process took of it at most. An engine may start beside it in what is left."""
        return cards.uuid(), rehearsed(self.policies, self.config, self.rows.tokens, self.device)

    def about(self) -> str:
        """What computes where, in words."""
        by_segments = self.device.type == "cuda" and self.config.dtype != "float32"
        attention = "by varlen kernels" if by_segments else "under masks"
        tokens = self.config.learner.microbatch_tokens or self.rows.tokens
        return (
            f"learner on {machine.describe_device()}: {self.config.dtype}, attention {attention}, "
            f"rows of {tokens} tokens, "
            f"checkpointing {'on' if self.rows.checkpointing else 'off'}"
        )

    # --- policies come and go ---

    def open(self, policy: str, setup: Setup, saved: bytes | None = None) -> Adapter:
        """Begin with a policy, or go on from what `state` gave; returns its adapter.

        Raises RloraError, and leaves the others as they are, where the name is taken, the adapter does not fit the
        base, or `saved` is of another base, rank or set of matrices.
        """
        whole, critic = self.policies.full_weights, state.critic_of(policy)
        if policy in self.held or (whole and self.held):
            beside = 'with learner.adapter = "none" a learner has one policy' if whole else "it is open already"
            raise RloraError(f"policy {policy}: {beside}; close the one before")
        if policy.endswith(state.critic_of("")):
            raise RloraError(f"policy {policy}: a name that ends like this is a critic's; give another")
        if self._trained_base and saved is None:
            raise RloraError(f"policy {policy}: all weights were trained by one before; start another learner")
        receive(setup.given)
        try:
            if not whole:
                spec, tensors = peft_format.decode(*setup.start) if setup.start else (setup.spec, None)
                self.policies.add(policy, spec, setup.seed)
                if tensors is not None:
                    peft_format.fill(self.policies.bank, policy, tensors)
            auto = setup.learner.lr == "auto"
            lr = auto_lr(setup.learner, self.policies.base.config) if auto else float(setup.learner.lr)
            opened = self._hold(policy, setup, objective_of(setup.algorithm, setup.max_tokens), lr)
            self._trained_base = whole
            if setup.critic_spec:
                self.policies.add(critic, setup.critic_spec, setup.seed + 1, values=True)
                opened.critic = self._hold(critic, setup, opened.objective, setup.critic.lr)
            opened.canary = self.canary_of(opened)
            if saved is not None:
                self._go_on(opened, saved)
        except BaseException:
            self.close(policy)
            raise
        return self.adapter(policy)

    def close(self, policy: str) -> None:
        """Forget a policy and its critic."""
        for name in (policy, state.critic_of(policy)):
            if held := self.held.pop(name, None):
                held.optimizer.close()
            self.policies.remove(name)

    def adapter(self, policy: str) -> Adapter:
        """The current version, in PEFT's format; without an adapter all weights, in that of transformers."""
        held = self.held[policy]
        if not self.policies.full_weights:
            files = peft_format.encode(self.policies.bank, policy, self.base)
            return Adapter(policy, held.number, *files, canary=held.canary)
        with TemporaryDirectory() as saved:
            self.policies.base.save_pretrained(saved, max_shard_size="1000GB")
            config, weights = ((Path(saved) / name).read_bytes() for name in WHOLE_FILES)
        return Adapter(policy, held.number, config, weights, full_weights=True, canary=held.canary)

    def state(self, policy: str) -> bytes:
        """All that the policy's next update depends on beside its groups and setup, in safetensors format.

        Masters and Adam's moments by matrix and factor, the critic's too, the version's number, the state of every
        random generator, and the base's canary, by which `open` knows the base.
        """
        held = self.held[policy]
        counts = {"version": held.number, "skipped_in_a_row": held.skipped_in_a_row}
        tensors = {name: torch.tensor(count) for name, count in counts.items()}
        if held.canary:
            tensors["canary.base"] = torch.tensor(held.canary.base_logprobs)
        if held.critic:
            tensors |= {f"{state.CRITIC}{name}": each for name, each in held.critic.optimizer.state().items()}
        return safetensors.torch.save(tensors | held.random | held.optimizer.state())

    # --- the parts of an update ---

    @torch.no_grad()
    def forward(self, policy: str, groups: Groups, reference: bool = False) -> list[list[Tensor]]:
        """The logprobs of each sample's targets at the policy's temperature, (C,) float32 on the CPU; a critic's
        values. With `reference` they are the base's."""
        held = self.held[policy]
        return by_sample(
            groups, [(row.samples, _values(self._outputs(held, row, reference))) for row in self._rows(held, groups)]
        )

    def forward_backward(self, policy: str, groups: Groups, loss: Loss) -> ForwardBackwardOutput:
        """Add the gradient of `loss`, summed over microbatches, to the policy's.

        An error on the way drops what was added up, and so do an update and a step.
        """
        held, zero = self.held[policy], torch.zeros((), device=self.device)
        sums, rows = {"loss": zero, "tokens": zero}, list[tuple[Sequence[Sample], Tensor]]()

        def learn(row: Microbatch) -> None:
            outputs = self._outputs(held, row)
            value, figures = loss(outputs, row)
            if not row.samples:  # it is there for the other learners' sake
                value = _values(outputs).sum()
            value.backward()
            rows.append((row.samples, _values(outputs).detach()))
            counted = {**figures, "loss": value, "tokens": torch.ones_like(row.targets)}
            for name, figure in counted.items():
                sums[name] = sums.get(name, zero) + figure.detach().sum()

        try:
            with self._alone(held):
                for row in self._rows(held, groups):
                    learn(row)
                if self.ranks > 1 and len(sums) == 2:  # this learner had no row: the figures' names are not known yet
                    learn(self._idle(held))
        except BaseException:
            held.optimizer.zero_grad()
            raise
        names = sorted(sums)
        self._agree(held, names)
        totals = self.add_up(torch.stack([sums[name] for name in names])).tolist()
        return ForwardBackwardOutput(dict(zip(names, totals, strict=True)), by_sample(groups, rows))

    def optim_step(self, policy: str, adam: Adam) -> StepStats:
        """One step along the gradient that `forward_backward` has added up, which is gone then. One that is not finite,
        or was never asked for, steps nothing."""
        held = self.held[policy]
        if self.ranks > 1:
            held.optimizer.add_over_ranks()
        held.canary = None
        return held.optimizer.step(adam)

    def update(self, policy: str, groups: Sequence[Group]) -> tuple[Adapter, UpdateStats]:
        """One step: what the policy's objective makes of `groups`, an Adam step a minibatch, and version + 1.

        A minibatch with a non-finite loss or gradient leaves adapter and optimizer as they were, and so does a critic's
        its own; the version goes up all the same. Gradients that were added up before are dropped. Where several
        learners share the update, each is given all groups and computes its part; the gradients are added up, and all
        take the same steps.
        """
        held = self.held[policy]
        with self._alone(held):
            stats = update(self, held, groups)
        updated = self.next_version(policy)
        machine.release()
        return updated, stats

    def next_version(self, policy: str) -> Adapter:
        """Make what `optim_step` has come to the policy's next version, its number + 1; returns the adapter."""
        held = self.held[policy]
        held.number, held.canary = held.number + 1, held.canary or self.canary_of(held)
        return self.adapter(policy)

    # --- below, for those above ---

    def add_up(self, sums: Tensor) -> Tensor:
        """The sum over all learners."""
        if self.ranks == 1:
            return sums
        sums = sums.to(self.device)
        torch.distributed.all_reduce(sums)
        return sums.cpu()

    def _hold(self, name: str, setup: Setup, objective: Objective, lr: float) -> PolicyState:
        machine.seed(setup.seed)  # for what a user's loss may draw; rlora's own draws are all seeded by themselves
        optimizer = Optimizer(self.policies.parameters_of(name))
        self.held[name] = held = PolicyState(name, setup, objective, optimizer, lr, machine.random_state())
        return held

    def _agree(self, held: PolicyState, names: list[str]) -> None:
        """Raise RloraError, on all learners, where they have other figures: what would be added up is not the same."""
        if self.ranks > 1:
            digest = int.from_bytes(hashlib.sha256(" ".join(names).encode()).digest()[:4])
            ends = torch.tensor([digest, -digest], device=self.device)
            torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MIN)
            if int(ends.sum()) != 0:
                raise RloraError(
                    f"algorithm.name = {held.setup.algorithm.name!r}: its figures, here {names}, differ between "
                    "microbatches; return the same ones each time, where several learners share an update"
                )

    @contextmanager
    def _alone(self, held: PolicyState) -> Iterator[None]:
        """Let the policy have its own random state, and say which plug-in is at fault."""
        if self._at_work:  # within its update
            yield
            return
        self._at_work = True
        machine.set_random_state(held.random)
        try:
            with telling_of(held.setup.algorithm.name, held.objective):
                yield
        finally:
            self._at_work = False
            held.random = machine.random_state()

    @torch.no_grad()
    def canary_of(self, held: PolicyState) -> Canary | None:
        """What the policy says of the same few random tokens each time.

        None where the context does not hold two, or where an adapter is over the head: vLLM can't apply that to the
        logprobs of a prompt.
        """
        count = min(_CANARY, held.setup.max_model_len - 1)  # an engine samples one more
        if count < 2 or self.policies.adapts_head(held.name):
            return None
        vocabulary = self.policies.base.config.get_text_config().vocab_size
        tokens = torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(0)).tolist()
        row = single_text(tokens, self.policies.base.dtype, self.policies.base.device)
        logprobs = tuple(self.policies.logprobs(row, held.name).tolist())
        if count not in self._of_base:
            self._of_base[count] = tuple(self.policies.logprobs(row, None).tolist())
        return Canary(tuple(tokens), logprobs, self._of_base[count])

    def _go_on(self, held: PolicyState, saved: bytes) -> None:
        tensors = safetensors.torch.load(saved)
        own = held.canary.base_logprobs if held.canary else ()
        theirs = tensors.get("canary.base")
        if theirs is not None and len(own) == len(theirs):  # it is shorter in a context that does not hold it
            off = (torch.tensor(own) - theirs).abs().mean().item()
            if off > _OTHER_BASE:
                raise RloraError(
                    f"model = {self.config.model!r}: the saved adapter was trained over another base: the logprobs of "
                    f"a few tokens are {off:.2g} nats apart, and would be nearly the same; give the base that it had"
                )
        of_policy, of_critic = state.parts(state.by_name(tensors, self.policies, held.name))
        held.optimizer.resume(of_policy)
        if held.critic or of_critic:
            (held.critic or held).optimizer.resume(of_critic)
        held.random = {name: tensor for name, tensor in tensors.items() if name.startswith("random.")}
        held.number, held.skipped_in_a_row = int(tensors["version"]), int(tensors["skipped_in_a_row"])
        held.canary = self.canary_of(held)

    def _outputs(self, held: PolicyState, row: Microbatch, reference: bool = False) -> Outputs | Tensor:
        """What a policy, or the base, gives for a row; a critic's values."""
        if held.name in self.policies.value_heads:
            return self.policies.values(row, held.name)
        under = None if reference else held.name
        return self.policies.outputs(row, under, held.setup.temperature, held.objective.entropies)

    def _rows(self, held: PolicyState, groups: Groups) -> Iterator[Microbatch]:
        dtype, tokens = self.policies.base.dtype, held.setup.learner.microbatch_tokens or self.rows.tokens
        rows = microbatches(groups, tokens, dtype, self.device, held.objective.whole_groups)
        return self._in_step(rows, held) if self.config.learner.shard else rows

    def _idle(self, held: PolicyState) -> Microbatch:
        known = [need.value for need in held.objective.needs] + ["returns"] * (Need.VALUES in held.objective.needs)
        return empty_batch(self.policies.base.dtype, self.device, known)

    def _in_step(self, batches: Iterator[Microbatch], held: PolicyState) -> Iterator[Microbatch]:
        """`batches`, then idle ones until no rank has any left: each pass of one rank needs the others' weights."""
        while True:
            batch = next(batches, None)
            left = torch.tensor(int(batch is not None), device=self.device)
            torch.distributed.all_reduce(left, torch.distributed.ReduceOp.MAX)
            if not left:
                return
            yield batch or self._idle(held)


def _values(outputs: Outputs | Tensor) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs.logprobs


def by_sample(groups: Groups, rows: Sequence[tuple[Sequence[Sample], Tensor]]) -> list[list[Tensor]]:
    """What rows, each its samples and (C,) values, give for each sample: brought to the CPU at once."""
    joined = torch.cat([values for _, values in rows]).cpu() if rows else torch.zeros(0)
    samples = [sample for of, _ in rows for sample in of]
    parts = joined.split([len(sample.targets) for sample in samples])
    known = {id(sample): part for sample, part in zip(samples, parts, strict=True)}
    return [[known[id(sample)] for sample in group] for group in groups]
