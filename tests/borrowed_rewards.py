"""Reward functions for TRL, verl, OpenRLHF, verifiers and AReaL, from their documentation.

Functions under a file's name are copied from there; some are renamed, because the file has several of one name.
Functions under "in the same form" use further values that the documentation describes.
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


# in the same form: several tasks, a coroutine, logging


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


def environment_reward_func(environments, **kwargs):
    return [environment.counter for environment in environments]


def skipping_reward_func(completions, trainer_state, **kwargs):
    # curriculum by the epoch; NaN leaves a completion out
    return [float("nan") if "?" in c else 1.0 + trainer_state.epoch for c in completions]


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


def compute_score_of_turns(data_source, solution_str, ground_truth, extra_info):
    return extra_info["num_turns"] - sum(extra_info["rollout_reward_scores"].values()) + extra_info.get("level", 0)


def compute_score_of_turns_batched(data_sources, solution_strs, ground_truths, extra_infos):
    return [compute_score_of_turns(*each) for each in zip(data_sources, solution_strs, ground_truths, extra_infos)]


async def compute_score_genrm(
    data_source, solution_str, ground_truth, extra_info, reward_router_address, reward_model_tokenizer=None
):
    await asyncio.sleep(0)
    return {"score": float(reward_router_address == "10.0.0.1:8000"), "acc": ground_truth in solution_str}


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


# in the same form: the first item of lists, which have one item


def reward_func_of_first(queries, prompts, labels):
    response = queries[0][len(prompts[0]) :]
    reward = torch.tensor(float(labels[0] in response))
    return {"rewards": reward, "scores": reward, "extra_logs": {"length": torch.tensor(len(response))}}


# --- verifiers, docs/v0/environments.md ---


async def correct_answer(completion, answer) -> float:
    response = completion[-1]["content"]
    return 1.0 if answer in response else 0.0


async def check_keywords(completion, info) -> float:
    response = completion[-1]["content"]
    keywords = info["required_keywords"]
    found = sum(1 for kw in keywords if kw.lower() in response.lower())
    return found / len(keywords)


async def length_reward(completion) -> float:
    response = completion[-1]["content"]
    return 1.0 if len(response) < 500 else 0.5


async def diversity_bonus(completions) -> list[float]:
    """Reward unique responses within a group."""
    responses = [c[-1]["content"] for c in completions]
    unique = set(responses)
    # Higher reward if this response is unique
    return [0.2 if responses.count(r) == 1 else 0.0 for r in responses]


async def judge_correctness(prompt, completion, answer, judge) -> float:
    verdict = await judge(prompt, completion, answer)
    return 1.0 if "yes" in verdict.lower() else 0.0


# in the same form: other ways to read messages, and other values


def _text_of(messages):
    return "".join(m["content"] for m in messages if m["role"] == "assistant")


def by_a_helper(completion, answer, **kwargs):
    return float(_text_of(completion) == answer)


def by_a_loop(prompt, completion, task):
    last = None
    for message in reversed(completion):
        if message.get("role") == "assistant":
            last = message
            break
    return float(prompt[0]["content"] == "?" and task == "math" and bool(last["content"]))


def by_state(state):
    return float(state["completion"][-1]["content"] == state["answer"] and state["prompt"][0]["role"] == "user")


def by_zip(completions, answers, infos):
    return [float(c[-1]["content"] == a and i == {}) for c, a, i in zip(completions, answers, infos)]


def by_a_parser(completion, answer, parser):
    return 1.0 if parser.parse_answer(completion) == answer else 0.0


# --- AReaL, docs/en/customization/reward.md ---


def exact_match_reward_fn(prompt, completions, prompt_ids, completion_ids, answer, **kwargs):
    return 1.0 if answer.strip() in completions else 0.0


_model = None


def my_reward_model_fn(prompt, completions, prompt_ids, completion_ids, **kwargs):
    global _model
    if _model is None:
        _model = len
    return float(_model(prompt + completions) - len(prompt_ids) - len(completion_ids))


# in the same form: called by position; a column


def positional_reward_fn(question, response, prompt_ids, response_ids, numbers, target, **kwargs):
    return float(question.endswith(">") and str(sum(numbers)) == response and target == response)
