"""Groups of given completions, in place of sampled ones, for SFT and pairs."""

from dataclasses import replace

from rlora.model.chat import Chat
from rlora.records import BASE, Episode, Group, Messages, Prompt, RloraError, Tools
from rlora.rollout.toolset import checked_schema
from rlora.settings import Config


def example_of(prompt: Prompt, chat: Chat, config: Config, number: int) -> Group:
    """Return the group of a prompt with given completions: an episode for each completion, with rewards 1 and 0 for the
    chosen and the rejected completion of a pair, and the example's weight for a single completion.

    `number` is the index in the data set, for messages. Raises RloraError, with the place in the data, if the number of
    completions does not fit the algorithm, or if prompt or completion is empty or too long.
    """
    source = prompt.source or f"env = {config.env!r}: example {number}"
    tools = [checked_schema(tool, source) for tool in prompt.tools]
    try:
        return _example(prompt, tools, chat, config)
    except RloraError as error:
        raise RloraError(f"{source}: {error}") from error


def _example(prompt: Prompt, tools: Tools, chat: Chat, config: Config) -> Group:
    wanted = config.completions_per_prompt
    if len(prompt.completions) != wanted:
        raise RloraError(
            f"it has {len(prompt.completions)} completions, but algorithm.loss = {config.algorithm.loss!r} "
            f"learns from {'one' if wanted == 1 else 'a chosen and a rejected one'}; use an env that gives them"
        )
    if wanted == 2 and prompt.weight != 1:
        raise RloraError(
            f"its weight is {prompt.weight}, but algorithm.loss = {config.algorithm.loss!r} weighs all pairs alike; "
            "unset env_args.weight"
        )
    if len({tool["function"]["name"] for tool in tools}) < len(tools):
        raise RloraError("two of its tools have the same name; fix or drop the row")
    if not isinstance(prompt.text, str) and not prompt.text and not prompt.token_ids:
        prompt = _text_example(prompt, chat)
    prompt_ids = prompt.token_ids or chat.prompt_ids(prompt.text, tools)
    _check_length("prompt", len(prompt_ids), "sampling.max_prompt_tokens", config.sampling.max_prompt_tokens)
    episodes = []
    for completion, reward in zip(prompt.completions, (prompt.weight if wanted == 1 else 1.0, 0.0), strict=False):
        episode = completion if isinstance(completion, Episode) else _episode(completion, prompt, chat)
        _check_length("completion", len(episode.completion_ids), "sampling.max_tokens", config.sampling.max_tokens)
        episodes.append(replace(episode, reward=reward, kept=None))  # probabilities over all tokens, however sampled
    if wanted == 2 and episodes[0].completion_ids == episodes[1].completion_ids:
        raise RloraError("the chosen and the rejected completion have the same tokens; drop the row")
    return Group(replace(prompt, completions=(), token_ids=prompt_ids), tuple(episodes))


def _text_example(prompt: Prompt, chat: Chat) -> Prompt:
    """Return a prompt of the first token of a text, whose completion is the rest."""
    text = prompt.completions[0]
    if not isinstance(text, str) or len(prompt.completions) > 1:
        raise RloraError("its prompt is empty, which only a single completion of text can have; give one")
    ids = chat.text_ids(text)
    rest = Episode(ids[1:], (0.0,) * (len(ids) - 1), "stop", BASE.version, text)
    return replace(prompt, token_ids=ids[:1], completions=(rest,))


def _episode(completion: str | Messages, prompt: Prompt, chat: Chat) -> Episode:
    ids, mask = chat.completion_ids(completion, prompt.text)
    if not any(mask):
        raise RloraError("every answer of the completion has the weight 0; drop the row")
    messages = () if isinstance(completion, str) else tuple(completion)
    text = completion if isinstance(completion, str) else str(completion[-1]["content"])
    return Episode(ids, (0.0,) * len(ids), "stop", BASE.version, text, sampled_mask=mask, messages=messages)


def _check_length(part: str, tokens: int, field: str, most: int) -> None:
    if not 0 < tokens <= most:
        fault = f"{tokens} tokens, but {field} = {most}; raise {field}, or" if tokens else "no tokens;"
        raise RloraError(f"its {part} has {fault} drop the row")
