"""One update of a policy: from groups of episodes to steps of Adam, by the verbs of the learner."""

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlora import machine
from rlora.core.advantage import SMALL, whitened
from rlora.core.batch import Sample, sample_of, shares
from rlora.core.objectives.critic import values_loss
from rlora.core.objectives.objective import Need
from rlora.core.optimizer import Adam, scheduled_lr
from rlora.core.setup import Setup
from rlora.records import Episode, Group, RloraError, UpdateStats

if TYPE_CHECKING:
    from rlora.core.learner import Learner, PolicyState

_READY = ("kl_behaviour", "ratio_truncated", "clipped", "kl_update", "kl_reference", "entropy", "value_loss")


def update(learner: "Learner", held: "PolicyState", groups: Sequence[Group]) -> UpdateStats:
    """What the policy's objective makes of `groups`: an Adam step a minibatch, and the version's number + 1."""
    began, setup, objective = time.perf_counter(), held.setup, held.objective
    algorithm, lr = setup.algorithm, scheduled_lr(setup.learner, held.lr, held.number, setup.steps)
    if held.critic and held.number < setup.critic.warmup:
        lr = 0.0
    samples, explained_variance = _samples(learner, held, groups)
    held.zero_grad()
    sums: Counter[str] = Counter()
    losses: list[float] = []  # of the minibatches that had anything to learn
    norms: list[float] = []
    for chosen in _minibatches(setup, held.number, len(groups), algorithm.epochs):
        weight = objective.weights([groups[i] for i in chosen])
        weighted = [[_weighted(sample, weight) for sample in samples[i]] for i in chosen]
        figures = learner.forward_backward(held.name, weighted, objective.loss).sums
        if not figures["tokens"]:
            continue
        if held.critic:
            of_critic = learner.forward_backward(held.critic.name, weighted, values_loss(setup.critic.clip))
            figures["value_loss"] = of_critic.sums["value_loss"]
        sums.update(figures)
        if 0 < algorithm.target_kl < figures.get("kl_update", 0.0) / figures["tokens"]:
            break
        losses.append(figures["loss"])
        if not math.isfinite(losses[-1]):
            held.optimizer.zero_grad()
        stepped = [learner.optim_step(held.name, _adam(setup, lr))]
        if held.critic:
            lr_of_critic = scheduled_lr(setup.learner, held.critic.lr, held.number, setup.steps)
            stepped.append(learner.optim_step(held.critic.name, _adam(setup, lr_of_critic)))
        norms.append(stepped[0].grad_norm if all(each.stepped for each in stepped) else math.nan)
    held.zero_grad()
    steps = [norm for norm in norms if math.isfinite(norm)]
    held.skipped_in_a_row = held.skipped_in_a_row + 1 if norms and not steps else 0
    means = {name: total / sums["tokens"] for name, total in sums.items() if sums["tokens"]}
    return UpdateStats(
        loss=fmean(losses) if losses else 0.0,
        grad_norm=fmean(steps) if steps else math.nan if norms else 0.0,
        lr=lr,
        **{name: means.get(name) for name in _READY},
        others={name: mean for name, mean in means.items() if name not in (*_READY, "loss", "tokens")},
        explained_variance=explained_variance if held.critic else None,
        minibatches=len(steps),
        tokens=int(sums["tokens"]),
        seconds=time.perf_counter() - began,
        skipped_in_a_row=held.skipped_in_a_row,
        own_bytes=machine.own_bytes(),
    )


def _adam(setup: Setup, lr: float) -> Adam:
    learner = setup.learner
    return Adam(lr, learner.betas, learner.eps, max_grad_norm=learner.max_grad_norm)


def _weighted(sample: Sample, weight: Callable[[Episode], float]) -> Sample:
    assert sample.episode is not None
    return sample.with_tokens(weights=torch.full_like(sample.tokens.weights, weight(sample.episode)))


def _samples(
    learner: "Learner", held: "PolicyState", groups: Sequence[Group]
) -> tuple[list[list[Sample]], float | None]:
    """What this learner computes of each group, nothing of those that are another's or carry no gradient; and the share
    of the returns' variance that the critic knew."""
    objective = held.objective
    samples = [
        [sample_of(group.prompt.token_ids, each) for each in group.episodes if objective.learns_from(each)]
        for group in groups
    ]
    at_once = not objective.needs_first
    if at_once:
        samples = _credited(held, groups, samples)
        if objective.skips_zeros:
            samples = [[each for each in of if each.tokens.advantages.any()] for of in samples]
    own = shares([sum(each.length for each in of) for of in samples], learner.ranks)[learner.rank]
    samples = _before(learner, held, [of if i in own else [] for i, of in enumerate(samples)])
    if not at_once:
        samples = _credited(held, groups, samples)
    return whiten(samples, learner.add_up) if objective.whitens else (samples, None)


def _credited(held: "PolicyState", groups: Sequence[Group], samples: list[list[Sample]]) -> list[list[Sample]]:
    """With advantages, and returns where there is a critic: not whitened yet, and until then in float64 where they come
    of large rewards."""

    def credited(group: Group, of: list[Sample]) -> list[Sample]:
        advantages = held.objective.advantages(group, of) if of else []
        shapes = [tuple(each.shape) for each in advantages]
        if shapes != [(len(sample.targets),) for sample in of]:
            raise RloraError(
                f"algorithm.name = {held.setup.algorithm.name!r}: its advantages have the shapes {shapes}; there are "
                f"{[len(sample.targets) for sample in of]} tokens to give one each"
            )
        return [_with(sample, each) for sample, each in zip(of, advantages, strict=True)]

    return [credited(group, of) for group, of in zip(groups, samples, strict=True)]


def _with(sample: Sample, advantages: Tensor) -> Sample:
    values = sample.tokens.values
    if values is None:
        return sample.with_tokens(advantages=advantages)
    return sample.with_tokens(advantages=advantages, returns=(advantages + values).float())


def _before(learner: "Learner", held: "PolicyState", samples: list[list[Sample]]) -> list[list[Sample]]:
    """The samples with what the objective has to know before its first minibatch."""
    needs, critic = held.objective.needs, held.critic
    known: list[list[Sample]] = list(samples)
    chosen_of = _minibatches(held.setup, held.number, len(samples), epochs=1) if needs else iter(())
    for chosen in chosen_of:  # the rows of then: they round alike
        of_minibatch = [samples[i] for i in chosen]
        said: dict[Need, list[list[Tensor]]] = {}
        if Need.REFERENCE in needs:
            said[Need.REFERENCE] = learner.forward(held.name, of_minibatch, reference=True)
        if Need.START in needs:
            said[Need.START] = learner.forward(held.name, of_minibatch)
        if critic and Need.VALUES in needs:
            ends = held.setup.algorithm.bootstrap_truncated
            asked = [[each.to_the_end() for each in of] for of in of_minibatch] if ends else of_minibatch
            said[Need.VALUES] = learner.forward(critic.name, asked)
        for place, i in enumerate(chosen):
            known[i] = [
                _knowing(sample, {need: of[place][number] for need, of in said.items()})
                for number, sample in enumerate(samples[i])
            ]
    return known


def _knowing(sample: Sample, said: Mapping[Need, Tensor]) -> Sample:
    tokens = len(sample.targets)
    end = said[Need.VALUES][tokens:] if Need.VALUES in said else None  # where the critic was asked for it
    known = {need.value: values[:tokens] for need, values in said.items()}
    return sample.with_tokens(end=end if end is not None and len(end) else None, **known)


def _minibatches(setup: Setup, number: int, groups: int, epochs: int) -> Iterator[list[int]]:
    """The places of each minibatch's groups, in another order each epoch; alike on all ranks."""
    algorithm = setup.algorithm
    for epoch in range(epochs):
        order = list(range(groups))
        if algorithm.epochs * algorithm.minibatches > 1:
            random.Random(f"{setup.seed} {number} {epoch}").shuffle(order)
        for part in range(algorithm.minibatches):
            if chosen := order[part :: algorithm.minibatches]:
                yield chosen


def whiten(
    samples: Sequence[Sequence[Sample]], add_up: Callable[[Tensor], Tensor]
) -> tuple[list[list[Sample]], float | None]:
    """With advantages of mean 0 and variance 1 over the tokens of all learners; and the explained variance.

    That is the share of the returns' variance that the critic knew: 1 - Var(R - V) / Var(R), where R - V is the
    advantage. None where all returns are the same. `add_up` adds a tensor up over the learners.
    """
    mean, variance = _moments(samples, torch.zeros(2, dtype=torch.float64), add_up)
    far = (mean.abs() > SMALL) & (variance <= (1e-5 * mean).square())  # a difference of two large numbers
    if far.any():
        off, closer = _moments(samples, mean, add_up)
        mean, variance = torch.where(far, mean + off, mean), torch.where(far, closer, variance)
    dtype = torch.float64 if far[0] else torch.float32

    def normal(each: Sample) -> Sample:
        advantages = whitened(each.tokens.advantages.to(dtype), mean[0].to(dtype), variance[0].to(dtype))
        return each.with_tokens(advantages=advantages.float())

    explained = float(1 - variance[0] / variance[1]) if variance[1] else None
    return [[normal(each) for each in of] for of in samples], explained


def _moments(
    samples: Sequence[Sequence[Sample]], about: Tensor, add_up: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The means of advantages and of returns over all tokens, less `about`, and their variances: (2,) float64 each.

    Without a critic returns are taken for advantages.
    """
    tokens = [each.tokens for of in samples for each in of]
    none = torch.zeros(0)
    advantages = torch.cat([none, *(each.advantages for each in tokens)])
    returns = torch.cat([none, *(each.advantages if each.returns is None else each.returns for each in tokens)])
    x = torch.stack([advantages, returns]).double() - about[:, None]
    sums = add_up(torch.cat([torch.tensor([x.shape[1]]), x.sum(1), x.square().sum(1)]))
    mean, square = sums[1:].view(2, 2) / sums[0].clamp(min=1)
    return mean, (square - mean.square()).clamp(min=0)
