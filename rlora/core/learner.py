"""The learner: K policies over one resident base, each with its own fp32 master weights, Adam and random state."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import safetensors.torch
import torch
import torch.distributed
from torch import Tensor

from rlora import device
from rlora.core import peft_format
from rlora.core.batch import Microbatch, Sample, empty_batch, microbatches, single_text
from rlora.core.footprint import rehearse, rows_for
from rlora.core.objectives import objective_of, plugin_errors
from rlora.core.objectives.objective import Loss, Need, Objective
from rlora.core.optimizer import Adam, Optimizer, StepStats
from rlora.core.policy import Outputs, Policies
from rlora.core.setup import Setup
from rlora.core.sharding import shard
from rlora.core.state import CRITIC, critic_of, split_critic, with_current_names
from rlora.core.update import update
from rlora.model.base import auto_lr, encode_model, load_base, load_quantised
from rlora.plugin import receive
from rlora.records import Adapter, Canary, Group, RloraError, UpdateStats
from rlora.settings import Config

_CANARY_TOKENS = 24  # a short prompt that has enough logprobs for a mean
_MAX_BASE_DIFFERENCE = 0.2  # nats, mean over a canary's tokens, by which machines and kernels may differ for one base
Groups = Sequence[Sequence[Sample]]  # the samples of a group share one prompt, which is computed once


@dataclass(eq=False)
class PolicyState:
    """The learner's state of one policy, which does not depend on other policies."""

    name: str
    setup: Setup
    objective: Objective
    optimizer: Optimizer
    lr: float
    random: dict[str, Tensor]  # the state of every random generator, between two updates
    critic: "PolicyState | None" = None
    number: int = 0  # of the current version
    skipped_in_a_row: int = 0  # consecutive updates without a finite loss and gradient
    canary: Canary | None = None  # of the current version; None after an optimizer step until the next version

    def zero_grad(self) -> None:
        """Drop the gradients of the policy and of its critic."""
        self.optimizer.zero_grad()
        if self.critic:
            self.critic.zero_grad()


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """The result of a forward and backward pass: sums over all learners, and outputs of this learner's samples."""

    sums: dict[str, float]  # over all targets: the figures of the loss, `loss`, and `tokens`, the number of targets
    outputs: list[list[Tensor]]  # per sample, the logprobs or values of its targets: (C,) float32 on the CPU


class Learner:
    """Loads the frozen base from `base`, a directory or hub id, and trains policies over the base, one per name.

    A policy is trained bit for bit the same whichever other policies are open, because each row of a forward pass
    belongs to one policy. The critic of a policy is the policy `<name>/critic`, whose outputs are values. Only the
    process-wide fields of `config` are used here, such as the dtype, sharding and quantisation of the base.
    """

    def __init__(self, config: Config, base: str) -> None:
        self.config, self.base = config, base
        self.device = device.current_device()
        learner, dtype = config.learner, device.DTYPES[config.dtype]
        if learner.deterministic:
            torch.use_deterministic_algorithms(True)
        target = torch.device("cpu") if learner.shard else self.device  # `join` moves it, one layer at a time
        quantise = learner.quantise
        self.rows = rows_for(config, base, self.device)  # before the base takes memory
        model = load_base(base, dtype, target) if quantise == "none" else load_quantised(base, dtype, quantise)
        self.policies = Policies(model, self.rows.checkpointing, learner.full_finetuning)
        self.states: dict[str, PolicyState] = {}  # by name, critics included
        self.rank, self.ranks = 0, 1
        self._in_context = self._base_was_trained = False
        self._base_logprobs: dict[int, tuple[float, ...]] = {}  # the base's canary, by its number of tokens

    def join(self, address: str, rank: int, ranks: int) -> None:
        """Become one of `ranks` learners that share each update; rank 0 listens at `address` (host:port). Blocks until
        all have joined. Raises RloraError if the connection fails."""
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        host, _, port = address.rpartition(":")
        try:
            store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
                host, int(port), ranks, rank == 0, timeout=timedelta(minutes=2)
            )
            torch.distributed.init_process_group(  # Ray reports a dead rank; a slow one must not time out
                backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(days=1)
            )
            torch.distributed.all_reduce(torch.zeros(1, device=self.device))  # NCCL connects at its first use
        except RuntimeError as error:
            reason = f"no connection to rank 0 at {address} ({error})"
            fix = "check that no firewall blocks TCP connections between the nodes of the learners"
            raise RloraError(f"learner {rank} of {ranks}: {reason}; {fix}") from error
        self.rank, self.ranks = rank, ranks
        if self.config.learner.shard:
            shard(self.policies.body, self.device)
            self.policies.base.to(self.device)  # the weights that are not sharded

    def base_norms(self, policy: str) -> dict[str, float]:
        """Return the Frobenius norm of the base's matrix under each of the policy's adapters, by key; empty for a
        quantised base and in full finetuning."""
        return self.policies.bank.base_norms(policy) if self.config.learner.quantise == "none" else {}

    def rehearse(self) -> tuple[str, int]:
        """Compute the largest row once, under a temporary adapter. Return the GPU's UUID and the peak bytes that this
        process reserved there ("" and 0 on a CPU); an engine may use the rest of the GPU."""
        return device.card_uuid(), rehearse(self.policies, self.config, self.rows.tokens, self.device)

    def about(self) -> str:
        """Return a line for the log: device, dtype, attention and rows."""
        by_segments = self.device.type == "cuda" and self.config.dtype != "float32"
        attention = "by varlen kernels" if by_segments else "under masks"
        tokens = self.config.learner.microbatch_tokens or self.rows.tokens
        return (
            f"learner on {device.describe_device()}: {self.config.dtype}, attention {attention}, "
            f"rows of {tokens} tokens, "
            f"checkpointing {'on' if self.rows.checkpointing else 'off'}"
        )

    # --- opening and closing policies ---

    def open(self, policy: str, setup: Setup, saved: bytes | None = None) -> Adapter:
        """Start a policy, or restore the policy from `saved`, the result of `state()`. Return the policy's adapter.

        Raises RloraError, leaving other policies unchanged, if the name is taken, the adapter does not fit the base, or
        `saved` belongs to a different base, rank or set of matrices.
        """
        full_weights, critic = self.policies.full_weights, critic_of(policy)
        if policy in self.states or (full_weights and self.states):
            only_one = 'with learner.adapter = "none" a learner has only one policy'
            reason = only_one if full_weights else "a policy of this name is already open"
            raise RloraError(f"policy {policy}: {reason}; close the open policy first")
        if policy.endswith(suffix := critic_of("")):
            raise RloraError(f"policy {policy}: names that end in {suffix} are reserved for critics; rename the policy")
        if self._base_was_trained and saved is None:
            raise RloraError(f"policy {policy}: a previous policy trained all weights of the base; start a new learner")
        receive(setup.plugins)
        try:
            if not full_weights:
                spec, tensors = peft_format.decode(*setup.start) if setup.start else (setup.spec, None)
                self.policies.add(policy, spec, setup.seed)
                if tensors is not None:
                    peft_format.fill(self.policies.bank, policy, tensors)
            auto = setup.learner.lr == "auto"
            lr = auto_lr(setup.learner, self.policies.base.config) if auto else float(setup.learner.lr)
            opened = self._register(policy, setup, objective_of(setup.algorithm, setup.max_tokens), lr)
            self._base_was_trained = full_weights
            if setup.critic_spec:
                self.policies.add(critic, setup.critic_spec, setup.seed + 1, values=True)
                opened.critic = self._register(critic, setup, opened.objective, setup.critic.lr)
            opened.canary = self.canary_of(opened)
            if saved is not None:
                self._restore(opened, saved)
        except BaseException:
            self.close(policy)
            raise
        return self.adapter(policy)

    def close(self, policy: str) -> None:
        """Remove a policy and its critic. Does nothing if the policy is not open."""
        for name in (policy, critic_of(policy)):
            if state := self.states.pop(name, None):
                state.optimizer.close()
            self.policies.remove(name)

    def adapter(self, policy: str) -> Adapter:
        """Return the current version in PEFT's format, or with `full_weights` all weights in transformers' format."""
        state = self.states[policy]
        if not self.policies.full_weights:
            files = peft_format.encode(self.policies.bank, policy, self.base)
            return Adapter(policy, state.number, *files, canary=state.canary)
        return Adapter(policy, state.number, *encode_model(self.policies.base), full_weights=True, canary=state.canary)

    def state(self, policy: str) -> bytes:
        """Return everything that the next update depends on, except its groups and setup, in safetensors format.

        The tensors are fp32 master weights and Adam's moments by matrix and factor (the critic's too), the version's
        number, the state of every random generator, and the base's canary, by which `open` recognises the base.
        """
        state = self.states[policy]
        counts = {"version": state.number, "skipped_in_a_row": state.skipped_in_a_row}
        tensors = {name: torch.tensor(count) for name, count in counts.items()}
        if state.canary:
            tensors["canary.base"] = torch.tensor(state.canary.base_logprobs)
        if state.critic:
            critic_state = state.critic.optimizer.state()
            tensors |= {f"{CRITIC}{name}": tensor for name, tensor in critic_state.items()}
        return safetensors.torch.save(tensors | state.random | state.optimizer.state())

    # --- steps of an update ---

    @torch.no_grad()
    def forward(self, policy: str, groups: Groups, reference: bool = False) -> list[list[Tensor]]:
        """Compute the logprobs of each sample's targets at the policy's temperature, or a critic's values: (C,) float32
        on the CPU, by group and sample. With `reference` the logprobs are the base's."""
        state = self.states[policy]
        return by_sample(
            groups, [(row.samples, _values(self._outputs(state, row, reference))) for row in self._rows(state, groups)]
        )

    def forward_backward(self, policy: str, groups: Groups, loss: Loss) -> ForwardBackwardOutput:
        """Add the gradient of `loss`, summed over microbatches, to the policy's accumulated gradient.

        The accumulated gradient is cleared by an error, by `update` and by `optim_step`.
        """
        state, zero = self.states[policy], torch.zeros((), device=self.device)
        sums, rows = {"loss": zero, "tokens": zero}, list[tuple[Sequence[Sample], Tensor]]()

        def accumulate(row: Microbatch) -> None:
            outputs = self._outputs(state, row)
            value, figures = loss(outputs, row)
            if not row.samples:  # an empty row, which only keeps the ranks in step
                value = _values(outputs).sum()
            value.backward()
            rows.append((row.samples, _values(outputs).detach()))
            counted = {**figures, "loss": value, "tokens": torch.ones_like(row.targets)}
            for name, figure in counted.items():
                sums[name] = sums.get(name, zero) + figure.detach().sum()

        try:
            with self._policy_context(state):
                for row in self._rows(state, groups):
                    accumulate(row)
                if self.ranks > 1 and len(sums) == 2:  # this learner had no row, so it lacks the figures' names
                    accumulate(self._empty_row(state))
        except BaseException:
            state.optimizer.zero_grad()
            raise
        names = sorted(sums)
        self._check_figures(state, names)
        totals = self.all_reduce(torch.stack([sums[name] for name in names])).tolist()
        return ForwardBackwardOutput(dict(zip(names, totals, strict=True)), by_sample(groups, rows))

    def optim_step(self, policy: str, adam: Adam) -> StepStats:
        """Step along the gradient that `forward_backward` accumulated, and clear the gradient. Without a gradient, or
        with a gradient that is not finite, weights and moments do not change."""
        state = self.states[policy]
        if self.ranks > 1:
            state.optimizer.all_reduce()
        state.canary = None
        return state.optimizer.step(adam)

    def update(self, policy: str, groups: Sequence[Group]) -> tuple[Adapter, UpdateStats]:
        """Train on `groups` with the policy's objective, one Adam step per minibatch, and make the next version.

        A minibatch with a non-finite loss or gradient leaves adapter and optimizer unchanged, and likewise for the
        critic; the version number increases anyway. Gradients that were accumulated before are dropped. If several
        learners share the update, each receives all groups and computes its share. The gradients of all learners are
        summed, and all learners take the same steps. Return the adapter of the next version, and metrics.
        """
        state = self.states[policy]
        with self._policy_context(state):
            stats = update(self, state, groups)
        updated = self.next_version(policy)
        device.release()
        return updated, stats

    def next_version(self, policy: str) -> Adapter:
        """Make the current weights the next version: increase the version's number by 1, and return the adapter."""
        state = self.states[policy]
        state.number, state.canary = state.number + 1, state.canary or self.canary_of(state)
        return self.adapter(policy)

    # --- helpers ---

    def all_reduce(self, sums: Tensor) -> Tensor:
        """Return the elementwise sum of `sums` over all learners."""
        if self.ranks == 1:
            return sums
        sums = sums.to(self.device)
        torch.distributed.all_reduce(sums)
        return sums.cpu()

    def _register(self, name: str, setup: Setup, objective: Objective, lr: float) -> PolicyState:
        device.seed(setup.seed)  # for random numbers in a user's loss; rlora seeds its own draws separately
        optimizer = Optimizer(self.policies.parameters_of(name))
        self.states[name] = state = PolicyState(name, setup, objective, optimizer, lr, device.random_state())
        return state

    def _check_figures(self, state: PolicyState, names: list[str]) -> None:
        """Raise RloraError on all learners if the names of figures differ: sums over learners would mix figures."""
        if self.ranks > 1:
            digest = int.from_bytes(hashlib.sha256(" ".join(names).encode()).digest()[:4])
            ends = torch.tensor([digest, -digest], device=self.device)
            torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MIN)
            if int(ends.sum()) != 0:
                raise RloraError(
                    f"algorithm.name = {state.setup.algorithm.name!r}: its loss returns figures of different names for "
                    f"some microbatches, here {names}; return the same names for all, since learners sum their figures"
                )

    @contextmanager
    def _policy_context(self, state: PolicyState) -> Iterator[None]:
        """Context with the policy's random state. Errors of a plug-in name the plug-in's file and line."""
        if self._in_context:  # `forward_backward` within `update`
            yield
            return
        self._in_context = True
        device.set_random_state(state.random)
        try:
            with plugin_errors(state.setup.algorithm.name, state.objective):
                yield
        finally:
            self._in_context = False
            state.random = device.random_state()

    @torch.no_grad()
    def canary_of(self, state: PolicyState) -> Canary | None:
        """Compute the policy's canary: logprobs of a few random tokens, always the same, by which engines are checked.

        None if the context has fewer than three tokens, or if the adapter covers the output head, which vLLM does not
        apply to the logprobs of a prompt.
        """
        count = min(_CANARY_TOKENS, state.setup.max_model_len - 1)  # an engine samples one more
        if count < 2 or self.policies.adapts_head(state.name):
            return None
        vocabulary = self.policies.base.config.get_text_config().vocab_size
        tokens = torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(0)).tolist()
        row = single_text(tokens, self.policies.base.dtype, self.policies.base.device)
        logprobs = tuple(self.policies.logprobs(row, state.name).tolist())
        if count not in self._base_logprobs:
            self._base_logprobs[count] = tuple(self.policies.logprobs(row, None).tolist())
        return Canary(tuple(tokens), logprobs, self._base_logprobs[count])

    def _restore(self, state: PolicyState, saved: bytes) -> None:
        tensors = safetensors.torch.load(saved)
        current = state.canary.base_logprobs if state.canary else ()
        previous = tensors.get("canary.base")
        if previous is not None and len(current) == len(previous):  # a shorter context has a shorter canary
            difference = (torch.tensor(current) - previous).abs().mean().item()
            if difference > _MAX_BASE_DIFFERENCE:
                raise RloraError(
                    f"model = {self.config.model!r}: the saved adapter was trained on a different base: the logprobs "
                    f"of a few tokens are {difference:.2g} nats apart; use the base of the saved adapter"
                )
        policy_tensors, critic_tensors = split_critic(with_current_names(tensors, self.policies, state.name))
        state.optimizer.resume(policy_tensors)
        if state.critic or critic_tensors:
            (state.critic or state).optimizer.resume(critic_tensors)
        state.random = {name: tensor for name, tensor in tensors.items() if name.startswith("random.")}
        state.number, state.skipped_in_a_row = int(tensors["version"]), int(tensors["skipped_in_a_row"])
        state.canary = self.canary_of(state)

    def _outputs(self, state: PolicyState, row: Microbatch, reference: bool = False) -> Outputs | Tensor:
        """Compute the outputs of a policy, or with `reference` of the base, for a row; for a critic its values."""
        if state.name in self.policies.value_heads:
            return self.policies.values(row, state.name)
        policy = None if reference else state.name
        return self.policies.outputs(row, policy, state.setup.temperature, state.objective.entropies)

    def _rows(self, state: PolicyState, groups: Groups) -> Iterator[Microbatch]:
        dtype, tokens = self.policies.base.dtype, state.setup.learner.microbatch_tokens or self.rows.tokens
        rows = microbatches(groups, tokens, dtype, self.device, state.objective.whole_groups)
        return self._pad_rows(rows, state) if self.config.learner.shard else rows

    def _empty_row(self, state: PolicyState) -> Microbatch:
        needs = state.objective.needs
        optional = [need.value for need in needs] + ["returns"] * (Need.VALUES in needs)
        return empty_batch(self.policies.base.dtype, self.device, optional)

    def _pad_rows(self, rows: Iterator[Microbatch], state: PolicyState) -> Iterator[Microbatch]:
        """Yield `rows`, then empty rows until all ranks are done: with shards, all ranks must run the same passes."""
        while True:
            row = next(rows, None)
            remaining = torch.tensor(int(row is not None), device=self.device)
            torch.distributed.all_reduce(remaining, torch.distributed.ReduceOp.MAX)
            if not remaining:
                return
            yield row or self._empty_row(state)


def _values(outputs: Outputs | Tensor) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs.logprobs


def by_sample(groups: Groups, rows: Sequence[tuple[Sequence[Sample], Tensor]]) -> list[list[Tensor]]:
    """Split the (C,) values of each row by sample, after one copy to the CPU. `rows` are (samples, values) pairs."""
    joined = torch.cat([values for _, values in rows]).cpu() if rows else torch.zeros(0)
    samples = [sample for row_samples, _ in rows for sample in row_samples]
    parts = joined.split([len(sample.targets) for sample in samples])
    part_of = {id(sample): part for sample, part in zip(samples, parts, strict=True)}
    return [[part_of[id(sample)] for sample in group] for group in groups]
