"""The pieces of training one by one: sample, forward_backward, optim_step, save."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

from rlora.records import Adapter, Group, Prompt, RloraError, UpdateStats
from rlora.run.source import Source, given, reachable
from rlora.store import names, read_file, write_directory

if TYPE_CHECKING:  # what imports torch and Ray
    from torch import Tensor

    from rlora.cluster.ranks import Ranks
    from rlora.core.batch import Sample
    from rlora.core.learner import ForwardBackwardOutput, Groups
    from rlora.core.objectives.objective import Loss
    from rlora.core.optimizer import Adam, StepStats
    from rlora.core.setup import Setup
    from rlora.rollout.fleet import Fleet
    from rlora.rollout.player import AgentLoop
    from rlora.rollout.task import ServedPolicy

_STATE = "state.safetensors"


@contextmanager
def policy(config: Source = None, *, resume: str | PathLike[str] | None = None, **changes: Any) -> Iterator[Policy]:
    """A policy to sample and train by hand, on a learner and engines that end with the context.

    `config` and `changes` are those of `rlora.train`, of which `model` alone is needed: without an env prompts are
    whatever `sample` is given, without a reward function episodes have no rewards. With `resume` it goes on from what
    `Policy.save` wrote. Raises RloraError.
    """
    with policies(config, {"policy": changes}, {"policy": resume} if resume else {}) as opened:
        yield opened["policy"]


@contextmanager
def policies(
    config: Source, members: Mapping[str, Mapping[str, Any]], resume: Mapping[str, str | PathLike[str]] | None = None
) -> Iterator[Mapping[str, Policy]]:
    """Several, over one base, by their names: `members` are the fields in which each differs from `config`."""
    from rlora import cluster
    from rlora.rollout.task import ServedPolicy
    from rlora.run.prepare import checked

    resume = resume or {}
    if unknown := resume.keys() - members.keys():
        raise RloraError(f"resume = {sorted(unknown)}: the policies are {', '.join(members)}; name one of those")
    made: list[tuple[ServedPolicy, Setup, bytes | None]] = []
    for name, changes in members.items():
        own = given(config, changes, least={"env": "", "reward": ""})
        task, setup = checked(own)
        saved = _saved(resume[name], setup) if name in resume else None
        made.append((ServedPolicy(name, own, task), setup, saved))
    with cluster.start([served for served, *_ in made]) as job:
        learners, fleet, agent_loops = job.learners, job.fleet, job.loops
        yield {
            served.policy: Policy(served, learners[served.policy], fleet, agent_loops[served.policy], setup, saved)
            for served, setup, saved in made
        }


class Policy:
    """The base and one adapter, which is trained."""

    def __init__(
        self,
        served: ServedPolicy,
        learner: Ranks,
        fleet: Fleet,
        loop: AgentLoop,
        setup: Setup,
        saved: bytes | None = None,
    ) -> None:
        self.name, self.config, self.task = served.policy, served.config, served.task
        self._learner, self._fleet, self._loop = learner, fleet, loop
        self._adapter: Adapter = learner.open(self.name, setup, saved)
        self._stepped = False  # since the adapter was a version
        self._delivered: Adapter | None = None

    @property
    def adapter(self) -> Adapter:
        """The policy's newest version, which is a new one where steps have changed it."""
        if self._stepped:
            self._adapter, self._stepped = self._learner.next_version(self.name), False
        return self._adapter

    def sample(
        self, prompts: Sequence[Prompt | str], group_size: int | None = None, temperature: float | None = None
    ) -> list[Group]:
        """Sample `group_size` completions of each prompt under the adapter as it is now, and score them.

        Where steps have changed the adapter they make a new version, which is proven on every engine first. A
        `temperature` other than the config's is for evaluation (0 is greedy): the learner computes with the config's.
        """
        from rlora.rollout.evaluate import answer
        from rlora.rollout.stream import sampling_of

        adapter, asked = self.adapter, self._tokenised(prompts)
        if adapter is not self._delivered:
            self._fleet.swap(adapter, oldest=adapter.number)
            self._delivered = adapter
        sampling = sampling_of(self.config, group_size or self.config.group_size, temperature)
        return answer(self.config, asked, sampling, self._fleet, self._loop)

    def samples(self, group: Group, advantages: Sequence[float]) -> list[Sample]:
        """The group's episodes as training samples, with an advantage each; without those that have no token."""
        from rlora.core.batch import sample_of

        pairs = zip(group.episodes, advantages, strict=True)
        return [
            sample_of(group.prompt.token_ids, episode, advantage)
            for episode, advantage in pairs
            if episode.sampled_tokens
        ]

    def forward(self, groups: Groups, reference: bool = False) -> list[list[Tensor]]:
        """The logprob of each target of each sample, (C,) float32: of the policy, or of the reference policy."""
        return self._learner.forward(self.name, groups, reference)

    def forward_backward(self, groups: Groups, loss: Loss) -> ForwardBackwardOutput:
        """Add the gradient of `loss` over the samples to what was added since the last step.

        `loss(outputs, microbatch)` returns a sum over the microbatch's targets, and figures of (C,) each. The samples
        of a group have one prompt, which is computed once.
        """
        return self._learner.forward_backward(self.name, groups, loss)

    def optim_step(self, adam: Adam) -> StepStats:
        """One step of Adam, with these settings, along the gradient that was added up."""
        self._stepped = True
        return self._learner.optim_step(self.name, adam)

    def update(self, groups: Sequence[Group]) -> UpdateStats:
        """What the config's algorithm makes of scored groups: one whole step of training, as in `rlora.train`."""
        if any(episode.reward is None for group in groups for episode in group.episodes):
            raise RloraError("update: an episode has no reward; give the config a `reward`, or Group.with_rewards")
        self._adapter, stats = self._learner.update(self.name, groups)
        self._stepped = False
        return stats

    def save(self, directory: str | PathLike[str]) -> None:
        """Write the adapter in PEFT's format, and beside it all that training goes on from.

        Raises RloraError where the directory holds anything else.
        """
        path = reachable(str(directory))
        files = self.adapter.files | {_STATE: self._learner.state(self.name)}
        if others := sorted(set(names(path)) - files.keys()):
            raise RloraError(f"{path}: it holds {', '.join(others[:3])}; name a directory for the adapter alone")
        write_directory(path, files)

    def _tokenised(self, prompts: Sequence[Prompt | str]) -> list[Prompt]:
        from rlora.rollout.task import tokenise

        if isinstance(prompts, str):
            raise RloraError(f"prompts = {prompts!r}: give a list of prompts")
        most = self.config.sampling.max_prompt_tokens
        asked = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
        fitting = [tokenise([prompt], self.task.chat, most) for prompt in asked]
        for prompt, tokenised in zip(asked, fitting, strict=True):
            if not tokenised:
                raise RloraError(
                    f"prompt {prompt.text!r}: it has no token, or more than sampling.max_prompt_tokens = {most}; "
                    "raise that, or shorten it"
                )
        return [prompt for (prompt,) in fitting]


def _saved(directory: str | PathLike[str], setup: Setup) -> bytes:
    """What `Policy.save` wrote for a policy to go on from. Raises RloraError where it isn't there, or of another."""
    from rlora.core.peft_format import decode
    from rlora.run.start import check_same_adapter, read

    path = reachable(str(directory))
    state = read_file(path / _STATE)
    if state is None:
        raise RloraError(f"resume = {str(path)!r}: it has no {_STATE}; name a directory that Policy.save wrote")
    check_same_adapter(f"resume = {str(path)!r}", decode(*read(path))[0], setup.learner)
    return state
