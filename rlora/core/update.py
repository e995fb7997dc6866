"""One update of a policy: from groups of episodes to Adam steps, through the learner's public methods."""

import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlora import machine
from rlora.core.advantage import LARGEST_IN_FLOAT32, whitened
from rlora.core.batch import Sample, sample_of, shares
from rlora.core.objectives.critic import values_loss
from rlora.core.objectives.objective import Need
from rlora.core.optimizer import Adam, scheduled_lr
from rlora.core.setup import Setup
from rlora.records import Episode, Group, RloraError, Trained, UpdateStats

if TYPE_CHECKING:
    from rlora.core.learner import Learner, PolicyState

_FIGURES = ("kl_behaviour", "ratio_truncated", "clipped", "kl_update", "kl_reference", "entropy", "value_loss")


def update(learner: "Learner", state: "PolicyState", groups: Sequence[Group]) -> UpdateStats:
    """Train on `groups` with the policy's objective, one Adam step per minibatch. Return the metrics."""
    began, setup, objective = time.perf_counter(), state.setup, state.objective
    algorithm, lr = setup.algorithm, scheduled_lr(setup.learner, state.lr, state.number, setup.steps)
    if state.critic and state.number < setup.critic.warmup:
        lr = 0.0
    seconds: dict[str, float] = defaultdict(float)  # by part of the update
    with _timed(seconds, "passes"):
        samples, explained_variance = _make_samples(learner, state, groups)
    state.zero_grad()
    first: dict[int, list[Tensor]] = {}  # by group: logprobs per sample, when they were first computed
    sums: Counter[str] = Counter()
    losses: list[float] = []  # of the minibatches that have tokens to learn from
    norms: list[float] = []
    for chosen in _minibatches(setup, state.number, len(groups), algorithm.epochs):
        weight = objective.weights([groups[i] for i in chosen])
        weighted = [[_with_weight(sample, weight) for sample in samples[i]] for i in chosen]
        with _timed(seconds, "gradient"):
            output = learner.forward_backward(state.name, weighted, objective.loss)
            figures = output.sums
            if not figures["tokens"]:
                continue
            if state.critic:
                critic_output = learner.forward_backward(state.critic.name, weighted, values_loss(setup.critic.clip))
                figures["value_loss"] = critic_output.sums["value_loss"]
        first = dict(zip(chosen, output.outputs, strict=True)) | first
        sums.update(figures)
        if 0 < algorithm.target_kl < figures.get("kl_update", 0.0) / figures["tokens"]:
            break
        losses.append(figures["loss"])
        if not math.isfinite(losses[-1]):
            state.optimizer.zero_grad()
        with _timed(seconds, "adam"):
            steps = [learner.optim_step(state.name, _adam(setup, lr))]
            if state.critic:
                critic_lr = scheduled_lr(setup.learner, state.critic.lr, state.number, setup.steps)
                steps.append(learner.optim_step(state.critic.name, _adam(setup, critic_lr)))
        norms.append(steps[0].grad_norm if all(step.stepped for step in steps) else math.nan)
    state.zero_grad()
    finite_norms = [norm for norm in norms if math.isfinite(norm)]
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if norms and not finite_norms else 0
    means = {name: total / sums["tokens"] for name, total in sums.items() if sums["tokens"]}
    return UpdateStats(
        loss=fmean(losses) if losses else 0.0,
        grad_norm=fmean(finite_norms) if finite_norms else math.nan if norms else 0.0,
        lr=lr,
        **{name: means.get(name) for name in _FIGURES},
        objective_metrics=_objective_metrics(means),
        explained_variance=explained_variance if state.critic else None,
        minibatches=len(finite_norms),
        tokens=int(sums["tokens"]),
        seconds=time.perf_counter() - began,
        skipped_in_a_row=state.skipped_in_a_row,
        private_bytes=machine.private_bytes(),
        parts=dict(seconds),
        trained=_trained(groups, samples, first),
    )


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the seconds within the context to a part. Each part ends with results on the CPU, also on a GPU."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[part] += time.perf_counter() - start


def _trained(
    groups: Sequence[Group], samples: Sequence[Sequence[Sample]], logprobs: Mapping[int, Sequence[Tensor]]
) -> dict[tuple[int, int], Trained]:
    """Return what was computed for the episodes of this learner's samples. `logprobs` are by group, per sample."""
    trained = {}
    for number, group_samples in enumerate(samples):
        numbers = {id(episode): index for index, episode in enumerate(groups[number].episodes)}
        computed = logprobs.get(number) or [torch.zeros(0)] * len(group_samples)
        for sample, first in zip(group_samples, computed, strict=True):
            start = first if sample.tokens.start_logprobs is None else sample.tokens.start_logprobs
            tensors = (sample.tokens.advantages.float(), start)
            trained[number, numbers[id(sample.episode)]] = Trained(*(tensor.numpy().tobytes() for tensor in tensors))
    return trained


def _objective_metrics(means: Mapping[str, float]) -> dict[str, float]:
    """Return the figures of an objective, means per token. With a figure `pairs`, the others become means per pair."""
    pairs = means.get("pairs", 1.0)
    return {name: mean / pairs for name, mean in means.items() if name not in (*_FIGURES, "loss", "tokens", "pairs")}


def _adam(setup: Setup, lr: float) -> Adam:
    learner = setup.learner
    return Adam(lr, learner.betas, learner.eps, max_grad_norm=learner.max_grad_norm)


def _with_weight(sample: Sample, weight: Callable[[Episode], float]) -> Sample:
    assert sample.episode is not None
    return sample.with_tokens(weights=torch.full_like(sample.tokens.weights, weight(sample.episode)))


def _make_samples(
    learner: "Learner", state: "PolicyState", groups: Sequence[Group]
) -> tuple[list[list[Sample]], float | None]:
    """Return this learner's samples of each group, without samples of other learners or without a gradient, and the
    explained variance of the critic."""
    objective = state.objective
    samples = [
        [sample_of(group.prompt.token_ids, episode) for episode in group.episodes if objective.learns_from(episode)]
        for group in groups
    ]
    needs_no_pass = not objective.needs_first
    if needs_no_pass:
        samples = _add_advantages(state, groups, samples)
        if objective.skips_zeros:
            samples = [[sample for sample in group if sample.tokens.advantages.any()] for group in samples]
    share = shares([sum(sample.length for sample in group) for group in samples], learner.ranks)[learner.rank]
    samples = _precompute(learner, state, [group if i in share else [] for i, group in enumerate(samples)])
    if not needs_no_pass:
        samples = _add_advantages(state, groups, samples)
    return whiten(samples, learner.all_reduce) if objective.whitens else (samples, None)


def _add_advantages(state: "PolicyState", groups: Sequence[Group], samples: list[list[Sample]]) -> list[list[Sample]]:
    """Return the samples with advantages, not whitened yet, and with returns if there is a critic. Advantages of large
    rewards are float64 until they are whitened."""

    def credit(group: Group, group_samples: list[Sample]) -> list[Sample]:
        advantages = state.objective.advantages(group, group_samples) if group_samples else []
        shapes = [tuple(tensor.shape) for tensor in advantages]
        if shapes != [(len(sample.targets),) for sample in group_samples]:
            raise RloraError(
                f"algorithm.name = {state.setup.algorithm.name!r}: its advantages have the shapes {shapes}; return one "
                f"advantage per token, for samples of {[len(sample.targets) for sample in group_samples]} tokens"
            )
        return [_with_advantages(sample, tensor) for sample, tensor in zip(group_samples, advantages, strict=True)]

    return [credit(group, group_samples) for group, group_samples in zip(groups, samples, strict=True)]


def _with_advantages(sample: Sample, advantages: Tensor) -> Sample:
    values = sample.tokens.values
    if values is None:
        return sample.with_tokens(advantages=advantages)
    return sample.with_tokens(advantages=advantages, returns=(advantages + values).float())


def _precompute(learner: "Learner", state: "PolicyState", samples: list[list[Sample]]) -> list[list[Sample]]:
    """Return the samples with the outputs that the objective needs before its first minibatch."""
    needs, critic = state.objective.needs, state.critic
    completed: list[list[Sample]] = list(samples)
    minibatches = _minibatches(state.setup, state.number, len(samples), epochs=1) if needs else iter(())
    for chosen in minibatches:  # the same rows as in the first epoch, so they round alike
        minibatch = [samples[i] for i in chosen]
        outputs: dict[Need, list[list[Tensor]]] = {}
        if Need.REFERENCE in needs:
            outputs[Need.REFERENCE] = learner.forward(state.name, minibatch, reference=True)
        if Need.START in needs:
            outputs[Need.START] = learner.forward(state.name, minibatch)
        if critic and Need.VALUES in needs:
            with_end = state.setup.algorithm.truncated == "bootstrap"
            inputs = [[sample.to_the_end() for sample in group] for group in minibatch] if with_end else minibatch
            outputs[Need.VALUES] = learner.forward(critic.name, inputs)
        for position, i in enumerate(chosen):
            completed[i] = [
                _with_outputs(sample, {need: tensors[position][number] for need, tensors in outputs.items()})
                for number, sample in enumerate(samples[i])
            ]
    return completed


def _with_outputs(sample: Sample, outputs: Mapping[Need, Tensor]) -> Sample:
    tokens = len(sample.targets)
    end = outputs[Need.VALUES][tokens:] if Need.VALUES in outputs else None  # empty unless it was computed to the end
    values = {need.value: tensor[:tokens] for need, tensor in outputs.items()}
    return sample.with_tokens(end=end if end is not None and len(end) else None, **values)


def _minibatches(setup: Setup, number: int, groups: int, epochs: int) -> Iterator[list[int]]:
    """Yield the indices of each minibatch's groups, shuffled in every epoch; the same on all ranks."""
    algorithm = setup.algorithm
    for epoch in range(epochs):
        order = list(range(groups))
        if algorithm.epochs * algorithm.minibatches > 1:
            random.Random(f"{setup.seed} {number} {epoch}").shuffle(order)
        for part in range(algorithm.minibatches):
            if chosen := order[part :: algorithm.minibatches]:
                yield chosen


def whiten(
    samples: Sequence[Sequence[Sample]], all_reduce: Callable[[Tensor], Tensor]
) -> tuple[list[list[Sample]], float | None]:
    """Scale advantages to mean 0 and variance 1 over the tokens of all learners. Return the samples and the explained
    variance: the share of the returns' variance that the critic predicted, 1 - Var(R - V) / Var(R), where R - V is the
    advantage; None if all returns are equal. `all_reduce` sums a tensor over the learners.
    """
    mean, variance = _moments(samples, torch.zeros(2, dtype=torch.float64), all_reduce)
    # mean(x^2) - mean(x)^2 is imprecise if both are large and nearly equal; then the moments about the mean are taken.
    imprecise = (mean.abs() > LARGEST_IN_FLOAT32) & (variance <= (1e-5 * mean).square())
    if imprecise.any():
        shift, centred_variance = _moments(samples, mean, all_reduce)
        mean = torch.where(imprecise, mean + shift, mean)
        variance = torch.where(imprecise, centred_variance, variance)
    dtype = torch.float64 if imprecise[0] else torch.float32

    def whiten_sample(sample: Sample) -> Sample:
        advantages = whitened(sample.tokens.advantages.to(dtype), mean[0].to(dtype), variance[0].to(dtype))
        return sample.with_tokens(advantages=advantages.float())

    explained = float(1 - variance[0] / variance[1]) if variance[1] else None
    return [[whiten_sample(sample) for sample in group] for group in samples], explained


def _moments(
    samples: Sequence[Sequence[Sample]], origin: Tensor, all_reduce: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return means of advantages and returns over all tokens, relative to `origin`, and variances: (2,) float64 each.

    Without a critic, the advantages take the place of the returns.
    """
    tokens = [sample.tokens for group in samples for sample in group]
    empty = torch.zeros(0)
    advantages = torch.cat([empty, *(item.advantages for item in tokens)])
    returns = torch.cat([empty, *(item.advantages if item.returns is None else item.returns for item in tokens)])
    x = torch.stack([advantages, returns]).double() - origin[:, None]
    sums = all_reduce(torch.cat([torch.tensor([x.shape[1]]), x.sum(1), x.square().sum(1)]))
    mean, square = sums[1:].view(2, 2) / sums[0].clamp(min=1)
    return mean, (square - mean.square()).clamp(min=0)
