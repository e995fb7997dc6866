"""Token losses of the policy and estimators beside them. Pure torch; callers sum and normalise once."""

from torch import Tensor


def truncated_importance_loss(logprobs: Tensor, behaviour_logprobs: Tensor, advantages: Tensor, cap: float) -> Tensor:
    """-min(p_learner / p_behaviour, cap) * A * log p_learner, the ratio detached. All (N,) -> (N,)

    Its gradient is -min(ratio, cap) * A * grad log p: the gradient of the importance-weighted objective of "LoRA
    Without Regret" (Thinking Machines, 2025), with the weight truncated as in "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training" (Yao et al. 2025, TIS). Because the weight is detached, a token over the cap
    keeps a bounded gradient; PPO's clip would silence it.
    """
    ratio = (logprobs.detach() - behaviour_logprobs).exp()
    return -ratio.clamp(max=cap) * advantages * logprobs


def kl_k3(logprobs: Tensor, behaviour_logprobs: Tensor) -> Tensor:
    """KL(behaviour || learner) a token, from tokens of the behaviour policy: exp(d) - 1 - d, d = log p_learner -
    log p_behaviour. Never negative, unbiased (Schulman 2020, "Approximating KL divergence", k3). (N,) -> (N,)"""
    d = logprobs - behaviour_logprobs
    return d.exp() - 1 - d
