"""A search agent: the policy searches a price list, computes with a calculator, and answers.

policy  <tool_call>{"name": "search", "arguments": {"query": "lamp Oslo"}}</tool_call>
env     <tool_response>A lamp costs 47 coins in Oslo.</tool_response>
policy  <tool_call>{"name": "calculator", "arguments": {"expression": "47*12"}}</tool_call>
env     <tool_response>564</tool_response>
policy  The answer is 564.
"""

import random
from collections.abc import Iterator
from typing import Any

from rlora.records import Prompt

from .generated import Generated, counts
from .tools import Search, calculator, called

_ITEMS = tuple("lamp chair kettle bicycle drum carpet ladder mirror piano rope saddle telescope".split())
_CITIES = tuple("Oslo Lima Cairo Quito Paris Hanoi Delhi Perth Turin Dakar Sofia Kyoto".split())
_SHOTS = (("drum", "Paris", 3), ("rope", "Quito", 4))


class Prices(Generated):
    """An agent that needs a price from a list of 144 before it can answer. The list is generated from `seed`.

    `most` is the largest number of items in a question; with 1 the price itself is the answer. `shots` (0 to 2) is
    the number of examples at the start of each prompt. The episode ends with the first message without a call, or whose
    calls would exceed `max_calls` calls. Reward: `rlora.rewards.integer:integer_answer`. Columns for rewards: `item`
    and `city`.
    """

    def __init__(
        self,
        most: int = 20,
        shots: int = 2,
        results: int = 1,
        max_calls: int = 4,
        size: int = 1000,
        held_out_size: int = 100,
        seed: int = 0,
    ) -> None:
        self._most = counts("most", most, 1, 1000)[0]
        self._shots = counts("shots", shots, 0, len(_SHOTS))[0]
        self.max_calls = counts("max_calls", max_calls, 1, 100)[0]
        self._size, self._held_out_size, self._seed = size, held_out_size, seed
        rng = random.Random(seed)
        self._prices = {(item, city): rng.randrange(11, 100) for item in _ITEMS for city in _CITIES}
        self._search = Search(self._documents, counts("results", results, 1, 100)[0])
        self.tools = [self._search.search, calculator]

    def _documents(self) -> list[str]:
        return [_document(item, city, price) for (item, city), price in self._prices.items()]

    def _example(self, item: str, city: str, number: int) -> list[dict[str, Any]]:
        price = self._prices[item, city]
        found = called("search", _document(item, city, price), query=f"{item} {city}")
        computed = called("calculator", str(price * number), expression=f"{price}*{number}") if number > 1 else []
        answer = {"role": "assistant", "content": f"The answer is {price * number}."}
        return [{"role": "user", "content": _question(item, city, number)}, *found, *computed, answer]

    def _problems(self) -> Iterator[Prompt]:
        rng = random.Random(self._seed)
        shots = [(item, city, min(number, self._most)) for item, city, number in _SHOTS[: self._shots]]
        examples = [message for shot in shots for message in self._example(*shot)]
        while True:
            item, city, number = rng.choice(_ITEMS), rng.choice(_CITIES), rng.randint(1, self._most)
            answer = self._prices[item, city] * number
            text = [*examples, {"role": "user", "content": _question(item, city, number)}]
            yield Prompt(text, answer=answer, columns={"item": item, "city": city})


def _document(item: str, city: str, price: int) -> str:
    return f"A {item} costs {price} coins in {city}."


def _question(item: str, city: str, number: int) -> str:
    cost = f"do {number} of the item {item}" if number > 1 else f"does a {item}"
    return f"What {cost} cost in {city}?"
