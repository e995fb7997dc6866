"""Reward functions as users of TRL, verl and OpenRLHF have them, from the documentation and examples of these.

Those under a file's name are as they stand there, but for the name where it has several of one name. Under "in the same
form" are others that call for what the documentation describes.
"""

import asyncio
import re

import torch

# --- TRL, docs/source/grpo_trainer.md: the quick start, and "Using a custom reward function", its examples 1 to 3 ---


def reward_len(completions, **kwargs):
    return [-abs(20 - len(completion)) for completion in completions]


def reward_token_count(completion_ids, **kwargs):
    """Reward function that assigns higher scores to longer completions (in terms of token count)."""
    return [float(len(ids)) for ids in completion_ids]


def format_reward_func(completions, **kwargs):
    """Reward function that checks if the completion has a specific format."""
    pattern = r"^<think>.*?</think><answer>.*?</answer>$"
    completion_contents = [completion[0]["content"] for completion in completions]
    matches = [re.match(pattern, content) for content in completion_contents]
    return [1.0 if match else 0.0 for match in matches]


def boxed_reward_func(completions, ground_truth, **kwargs):
    # Regular expression to capture content inside \boxed{}
    matches = [re.search(r"\\boxed\{(.*?)\}", completion) for completion in completions]
    contents = [match.group(1) if match else "" for match in matches]
    # Reward 1 if the content is the same as the ground truth, 0 otherwise
    return [1.0 if c == gt else 0.0 for c, gt in zip(contents, ground_truth)]


# in the same form: several tasks, a coroutine, what may be logged


def reward_num_unique_chars(completions, **kwargs):
    return [len(set(c)) for c in completions]


def math_reward_func(prompts, completions, task, **kwargs):
    rewards = []
    for prompt, completion, t in zip(prompts, completions, task):
        if t == "math":
            # Calculate math-specific reward
            correct = "4" in completion
            reward = 1.0 if correct else -1.0
            rewards.append(reward)
        else:
            # Return None for non-math tasks
            rewards.append(None)
    return rewards


async def async_reward_func(prompts, completions, **kwargs):
    # Simulate an async call, such as one to a judge
    await asyncio.sleep(0.01)
    return [float(len(completion) % 5) for completion in completions]


def logging_reward_func(completions, answer, trainer_state, log_extra=None, log_metric=None, **kwargs):
    extracted = [completion.split()[-1] for completion in completions]
    rewards = [1.0 if e == a else 0.0 for e, a in zip(extracted, answer)]
    if log_extra:
        log_extra("extracted_length", [len(e) for e in extracted])
    if log_metric:
        log_metric("accuracy", sum(rewards) / len(rewards))
    return [reward + trainer_state.global_step for reward in rewards]


# --- verl, docs/preparation/reward_function.rst and verl/utils/reward_score/gsm8k.py ---


def my_reward_fn(data_source, solution_str, ground_truth, extra_info=None):
    return len(solution_str) / 100


def extract_solution(solution_str, method="strict"):
    assert method in ["strict", "flexible"]
    if method == "strict":
        # this also tests the formatting of the model
        solutions = re.findall("#### (\\-?[0-9\\.\\,]+)", solution_str)
        if len(solutions) == 0:
            final_answer = None
        else:
            # take the last solution
            final_answer = solutions[-1].replace(",", "").replace("$", "")
    elif method == "flexible":
        answer = re.findall("(\\-?[0-9\\.\\,]+)", solution_str)
        final_answer = None
        if len(answer) == 0:
            # no reward is there is no answer
            pass
        else:
            invalid_str = ["", "."]
            # find the last number that is not '.'
            for final_answer in reversed(answer):
                if final_answer not in invalid_str:
                    break
    return final_answer


def compute_score(solution_str, ground_truth, method="strict", format_score=0.0, score=1.0):
    """The scoring function for GSM8k."""
    answer = extract_solution(solution_str=solution_str, method=method)
    if answer is None:
        return 0
    if answer == ground_truth:
        return score
    return format_score


# in the same form: a dict, and a batch for verl's BatchRewardManager


def compute_score_dict(data_source, solution_str, ground_truth, extra_info=None):
    correct = ground_truth in solution_str
    return {"score": 1.0 if correct else -1.0, "acc": correct, "pred": solution_str}


def compute_score_batched(data_sources, solution_strs, ground_truths, extra_infos):
    return [float(gt in s) for s, gt in zip(solution_strs, ground_truths, strict=True)]


# --- OpenRLHF, examples/python/reward_func.py ---


def reward_func(queries, prompts, labels, **kwargs):
    # queries is prompts + responses
    # labels is answers
    print(queries)
    reward = torch.randint(0, 2, (len(queries),)).float()

    # rewards is used the calculate the advantage (with format reward)
    # scores is used in dynamic filtering (0-1 reward)
    # extra_logs is used to log the info into wandb
    return {"rewards": reward, "scores": reward, "extra_logs": {"dummy_scores": reward}}


# in the same form: a tensor


def reward_func_of_lengths(queries, prompts, labels):
    # queries is prompts + responses
    nega_query_lens = [-len(q) / 100.0 for q in queries]
    return torch.Tensor(nega_query_lens)
