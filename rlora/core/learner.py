"""The learner: owns the adapter's fp32 masters and Adam; groups in, the next adapter version out."""

import math
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import cast

import safetensors.torch
import torch
import torch.distributed
from torch import Tensor
from transformers import PreTrainedModel
from upath import UPath

from rlora import machine
from rlora.core import peft_format
from rlora.core.algorithm import credit, learned_from, token_losses, weigher, whiten
from rlora.core.batch import Lesson, Microbatch, alone, idle, lesson, microbatches, shares
from rlora.core.lora import Spec
from rlora.core.loss import Tokens, value_loss
from rlora.core.optimizer import Optimizer, auto_lr, scheduled_lr
from rlora.core.policy import CRITIC, Policy
from rlora.core.sharding import shard
from rlora.model.base import load_base, load_quantised
from rlora.records import OFF, WHOLE_FILES, Adapter, Canary, Group, RloraError, UpdateStats
from rlora.settings import Config, LearnerConfig

_CANARY = 24  # tokens: one short prompt, and enough logprobs for a mean
_OTHER_BASE = 0.2  # nats that a base's canary may move, mean over its tokens, between machines and kernels
_FIGURES = (  # sums over the tokens of a minibatch
    "loss", "tokens", "kl_behaviour", "ratio_truncated", "kl_update", "entropy", "clipped", "kl_reference",
    "value_loss",
)  # fmt: skip


class Learner:
    """A policy and its optimizer. `base` is where to load the frozen base from; `run` names the adapters."""

    def __init__(self, config: Config, base: str, run: str) -> None:
        self.config, self.base, self.run = config, base, run
        self.device = machine.device()
        machine.seed(config.seed)  # for what a user's loss may draw; rlora's own draws are all seeded by themselves
        if config.learner.deterministic:
            torch.use_deterministic_algorithms(True)
        dtype, quantise = machine.DTYPES[config.dtype], config.learner.quantise
        place = torch.device("cpu") if config.learner.shard else self.device  # `join` moves it, a layer at a time
        model = load_base(base, dtype, place) if quantise == "none" else load_quantised(base, dtype, quantise)
        learner = config.learner
        self.critic = config.algorithm.advantage == "gae"
        if learner.whole:
            self.policy = Policy(model, [], config.seed, learner.checkpointing)
        else:
            spec, start = first_adapter(learner, lambda: model)
            critic = [Spec(config.critic.rank, learner.alpha)] if self.critic else []
            self.policy = Policy(model, [spec, *critic], config.seed, learner.checkpointing, self.critic)
            if start is not None:
                peft_format.fill(self.policy.bank, 0, start)
        self.lrs = [auto_lr(config, model.config) if learner.lr == "auto" else learner.lr, config.critic.lr][
            : 1 + self.critic
        ]
        self.optimizer = Optimizer(*self.policy.trained(), learner)
        self.rank, self.ranks = 0, 1
        self.version = 0
        self.skipped_in_a_row = 0  # updates whose loss or gradient was not finite
        self.canary: Canary | None = None
        self.canary = self._canary()

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
            shard(self.policy.body, self.device)
            self.policy.to(self.device)  # what is not sharded

    def update(self, groups: Sequence[Group]) -> tuple[Adapter, UpdateStats]:
        """One step: what the algorithm makes of `groups`, an Adam step a minibatch on the adapter, and version + 1.

        A minibatch with a non-finite loss or gradient leaves adapter and optimizer as they were; the version goes up
        all the same. Where several learners share the update, each is given all groups and computes its part; the
        gradients are added up, and all take the same steps.
        """
        began, algorithm = time.perf_counter(), self.config.algorithm
        lrs = [scheduled_lr(self.config, lr, self.version) for lr in self.lrs]
        if self.critic and self.version < self.config.critic.warmup:
            lrs[0] = 0.0
        lessons, explained_variance = self._lessons(groups)
        sums: Counter[str] = Counter()
        losses: list[float] = []  # of the minibatches that had anything to learn
        norms: list[float] = []
        for chosen in self._minibatches(len(groups), algorithm.epochs):
            of_minibatch = self._gradient([groups[i] for i in chosen], [lessons[i] for i in chosen])
            sums.update(of_minibatch)
            if not of_minibatch["tokens"]:
                continue
            if 0 < algorithm.target_kl < of_minibatch["kl_update"] / of_minibatch["tokens"]:
                break
            losses.append(of_minibatch["loss"])
            norms.append(self.optimizer.step(*lrs) if math.isfinite(losses[-1]) else math.nan)
        steps = [norm for norm in norms if math.isfinite(norm)]
        if norms:
            self.canary = self._canary()
        self.version += 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if norms and not steps else 0

        def a_token(name: str, computed: bool = True) -> float | None:
            return sums[name] / sums["tokens"] if computed and sums["tokens"] else None

        stats = UpdateStats(
            loss=fmean(losses) if losses else 0.0,
            grad_norm=fmean(steps) if steps else math.nan if norms else 0.0,
            lr=lrs[0],
            kl_behaviour=a_token("kl_behaviour"),
            ratio_truncated=a_token("ratio_truncated"),
            clipped=a_token("clipped", algorithm.loss != "reinforce"),
            kl_update=a_token("kl_update"),
            kl_reference=a_token("kl_reference", algorithm.kl > 0),
            entropy=a_token("entropy"),
            value_loss=a_token("value_loss", self.critic),
            explained_variance=explained_variance if self.critic else None,
            minibatches=len(steps),
            tokens=int(sums["tokens"]),
            seconds=time.perf_counter() - began,
            skipped_in_a_row=self.skipped_in_a_row,
            own_bytes=machine.own_bytes(),
        )
        return self.adapter(), stats

    def _lessons(self, groups: Sequence[Group]) -> tuple[list[list[Lesson]], float | None]:
        """What this rank is to learn from each group, nothing from those that are another's or carry no gradient; and
        the share of the returns' variance that the critic knew."""
        algorithm, max_tokens = self.config.algorithm, self.config.sampling.max_tokens

        def credited(lessons: list[list[Lesson]]) -> list[list[Lesson]]:
            return [credit(group, of, algorithm, max_tokens) for group, of in zip(groups, lessons, strict=True)]

        lessons = [
            [lesson(group.prompt.token_ids, each) for each in group.episodes if learned_from(each, algorithm)]
            for group in groups
        ]
        at_once = algorithm.of_group and not algorithm.kl_of("reward")
        if at_once:
            lessons = credited(lessons)
            if not algorithm.kl_of("loss") and not algorithm.entropy:  # which every token has
                lessons = [[each for each in of if each.tokens.advantages.any()] for of in lessons]
        own = shares([sum(each.length for each in of) for of in lessons], self.ranks)[self.rank]
        lessons = self._before([of if i in own else [] for i, of in enumerate(lessons)])
        if not at_once:
            lessons = credited(lessons)
        if algorithm.of_group:
            return lessons, None
        return whiten(lessons, self._over_ranks)

    def _over_ranks(self, sums: Tensor) -> Tensor:
        if self.ranks == 1:
            return sums
        sums = sums.to(self.device)
        torch.distributed.all_reduce(sums)
        return sums.cpu()

    @torch.no_grad()
    def _before(self, lessons: list[list[Lesson]]) -> list[list[Lesson]]:
        """The lessons with what the algorithm has to know before its first minibatch."""
        algorithm = self.config.algorithm
        of_start = algorithm.epochs * algorithm.minibatches > 1 or algorithm.kl_of("reward")
        if not (of_start or algorithm.kl or self.critic):
            return lessons
        known: dict[Tokens, dict[str, Tensor]] = defaultdict(dict)
        for chosen in self._minibatches(len(lessons), epochs=1):  # the rows of then: they round alike
            of_minibatch = [lessons[i] for i in chosen]
            of_reference = _by(OFF, of_minibatch) if algorithm.kl else []
            of_policy = of_minibatch if of_start else []
            of_critic = _by(CRITIC, of_minibatch, algorithm.bootstrap_truncated) if self.critic else []
            for row in chain(self._rows(of_reference), self._rows(of_policy + of_critic)):
                for part, hidden in self.policy.read(row):
                    critic = part.adapters == CRITIC
                    said = self.policy.values_of(hidden) if critic else self._logprobs(part, hidden)[0]
                    for each, its in zip(part.lessons, said.cpu().split(part.lengths.tolist()), strict=True):
                        known[each.tokens] |= _named(each, its)
        return [[each.knowing(**known[each.tokens]) for each in of] for of in lessons]

    def _minibatches(self, groups: int, epochs: int) -> Iterator[list[int]]:
        """The places of each minibatch's groups, in another order each epoch; alike on all ranks."""
        algorithm = self.config.algorithm
        for epoch in range(epochs):
            order = list(range(groups))
            if algorithm.epochs * algorithm.minibatches > 1:
                random.Random(f"{self.config.seed} {self.version} {epoch}").shuffle(order)
            for part in range(algorithm.minibatches):
                if chosen := order[part :: algorithm.minibatches]:
                    yield chosen

    def _gradient(self, groups: Sequence[Group], lessons: Sequence[Sequence[Lesson]]) -> dict[str, float]:
        """The loss of a minibatch and its gradient, both of all ranks; returns sums over all their tokens."""
        weight = weigher(groups, self.config.algorithm, self.config.sampling.max_tokens)
        weighted = [
            [each.knowing(weights=torch.full_like(each.tokens.weights, weight(each.episode))) for each in of]
            for of in lessons
        ]
        sums = dict.fromkeys(_FIGURES, torch.zeros((), device=self.device))
        self.optimizer.zero_grad()
        for row in self._rows(weighted + (_by(CRITIC, weighted) if self.critic else [])):
            loss = torch.zeros((), device=self.device)
            for part, hidden in self.policy.read(row):
                losses, figures = self._token_losses(part, hidden)
                loss = loss + (losses * part.tokens.weights).sum()
                for name, figure in figures.items():
                    sums[name] = sums[name] + figure.detach().sum()
            loss.backward()
        stacked = torch.stack(list(sums.values()))
        if self.ranks > 1:
            stacked = self.optimizer.add_over_ranks(stacked)
        return dict(zip(sums, stacked.tolist(), strict=True))

    def _token_losses(self, part: Microbatch, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the critic's part or of the policy's: the loss of each of its C tokens, and figures a token."""
        algorithm, tokens = self.config.algorithm, part.tokens
        if part.adapters == CRITIC:
            before, returns = cast(Tensor, tokens.values), cast(Tensor, tokens.returns)
            losses = value_loss(self.policy.values_of(hidden), before, returns, self.config.critic.clip)
            return losses, {"value_loss": losses}
        logprobs, entropies = self._logprobs(part, hidden)
        losses, figures = token_losses(part, logprobs, entropies, algorithm)
        return losses, figures | {"loss": losses * tokens.weights, "tokens": torch.ones_like(logprobs)}

    def _logprobs(self, part: Microbatch, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """And the entropies where they are in the loss: always by the same head, for two of them round otherwise."""
        temperature = self.config.sampling.temperature
        if self.config.algorithm.entropy:
            return self.policy.logprobs_and_entropies_of(hidden, part, temperature)
        return self.policy.logprobs_of(hidden, part, temperature), None

    def _rows(self, lessons: Sequence[Sequence[Lesson]]) -> Iterator[Microbatch]:
        rows = microbatches(lessons, self.config.learner.microbatch_tokens, self.policy.base.dtype, self.device)
        return self._in_step(rows) if self.config.learner.shard else rows

    def _in_step(self, batches: Iterator[Microbatch]) -> Iterator[Microbatch]:
        """`batches`, then idle ones until no rank has any left: each pass of one rank needs the others' weights."""
        while True:
            batch = next(batches, None)
            left = torch.tensor(int(batch is not None), device=self.device)
            torch.distributed.all_reduce(left, torch.distributed.ReduceOp.MAX)
            if not left:
                return
            yield batch or idle(self.policy.base.dtype, self.device)

    def adapter(self) -> Adapter:
        """The current version, in PEFT's format; without an adapter all weights, in that of transformers."""
        if self.config.learner.whole:
            with tempfile.TemporaryDirectory() as saved:
                self.policy.base.save_pretrained(saved, max_shard_size="1000GB")
                config, weights = ((Path(saved) / name).read_bytes() for name in WHOLE_FILES)
            return Adapter(self.run, self.version, config, weights, whole=True, canary=self.canary)
        config, weights = peft_format.encode(self.policy.bank, 0, self.base)
        return Adapter(self.run, self.version, config, weights, canary=self.canary)

    @torch.no_grad()
    def _canary(self) -> Canary | None:
        """What the policy says of the same few random tokens each time.

        None where the context does not hold two, or where an adapter is over the head: vLLM can't apply that to the
        logprobs of a prompt.
        """
        count = min(_CANARY, self.config.max_model_len - 1)  # an engine samples one more
        if count < 2 or self.policy.head_factors:
            return None
        vocabulary = self.policy.base.config.get_text_config().vocab_size
        tokens = torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(0)).tolist()
        row = alone(tokens, self.policy.base.dtype, self.policy.base.device)
        logprobs = tuple(self.policy.logprobs(row).tolist())
        if self.canary:
            of_base = self.canary.base_logprobs
        else:
            of_base = tuple(self.policy.logprobs(replace(row, adapters=OFF)).tolist())
        return Canary(tuple(tokens), logprobs, of_base)

    def state(self) -> bytes:
        """All that the next update depends on beside its groups and the config, in safetensors format.

        The version, all adapters' masters (the critic's too, and its head), Adam's moments, the state of every random
        generator, and the base's canary, by which `resume` knows the base.
        """
        counts = {"version": self.version, "skipped_in_a_row": self.skipped_in_a_row}
        tensors = {name: torch.tensor(count) for name, count in counts.items()}
        if self.canary:
            tensors["canary.base"] = torch.tensor(self.canary.base_logprobs)
        return safetensors.torch.save(tensors | machine.random_state() | self.optimizer.state())

    def resume(self, state: bytes) -> Adapter:
        """Go on from `state`, with the update that it would have made; returns its adapter.

        Raises RloraError, with nothing changed, where it is of another base, rank or set of matrices.
        """
        tensors = safetensors.torch.load(state)
        own, saved = self.canary.base_logprobs if self.canary else (), tensors.get("canary.base")
        if saved is not None and len(own) == len(saved):  # it is shorter in a context that does not hold it
            off = (torch.tensor(own) - saved).abs().mean().item()
            if off > _OTHER_BASE:
                raise RloraError(
                    f"model = {self.config.model!r}: the saved adapter was trained over another base: the logprobs of "
                    f"a few tokens are {off:.2g} nats apart, and would be nearly the same; give the base that it had"
                )
        self.optimizer.resume(tensors)
        machine.set_random_state(tensors)
        self.canary = self._canary()
        self.version, self.skipped_in_a_row = int(tensors["version"]), int(tensors["skipped_in_a_row"])
        return self.adapter()


def _by(adapter: int, lessons: Sequence[Sequence[Lesson]], ends: bool = False) -> list[list[Lesson]]:
    """The same lessons, by another adapter of the bank."""
    return [[replace(each, adapter=adapter, ends=ends) for each in of] for of in lessons]


def _named(each: Lesson, said: Tensor) -> dict[str, Tensor]:
    """What was said of a lesson before an update, by the name under which `Lesson.knowing` takes it."""
    if each.adapter != CRITIC:
        return {"reference_logprobs" if each.adapter == OFF else "start_logprobs": said}
    return {"values": said[:-1], "end": said[-1:]} if each.ends else {"values": said}


def first_adapter(learner: LearnerConfig, base: Callable[[], PreTrainedModel]) -> tuple[Spec, dict[str, Tensor] | None]:
    """What a run starts with: the adapter the config asks for, and its tensors where it was saved before.

    `base` gives the model, to compare with where weights of one were saved too.
    Raises RloraError where `start_from` can't be read, or is of another rank or scale than the config says.
    """
    spec = Spec(learner.rank, learner.alpha, learner.rslora, learner.init, learner.targets, learner.head)
    if not learner.start_from:
        return spec, None
    for name in ("targets", "head", "init"):
        if getattr(learner, name) != getattr(LearnerConfig(), name):
            raise RloraError(
                f"learner.{name} = {getattr(learner, name)!r}: learner.start_from brings its own; leave it out"
            )
    try:
        saved, tensors = peft_format.decode(*peft_format.plain(*peft_format.read(UPath(learner.start_from)), base))
    except RloraError as error:
        raise RloraError(f"learner.start_from = {learner.start_from!r}: {error}") from error
    for field in ("rank", "alpha", "rslora"):
        ours, its = getattr(spec, field), getattr(saved, field)
        if ours != its:
            raise RloraError(
                f"learner.start_from = {learner.start_from!r}: its {field} is {its}, learner.{field} is {ours}; "
                f"set learner.{field} to {its}"
            )
    return saved, tensors


def refuse_to_go_on(config: Config, update: UpdateStats) -> None:
    """Raise RloraError after `learner.max_bad_updates` skipped updates in a row."""
    if update.skipped_in_a_row >= config.learner.max_bad_updates:
        raise RloraError(
            f"learner: {update.skipped_in_a_row} updates in a row had a non-finite loss or gradient ({update}); the "
            'adapter is as it was before them. Lower learner.lr or use dtype = "float32"'
        )
