"""An env that answers twice: once within the policy's message, once with a message of its own."""

from typing import Any

from rlora.records import Prompt


class Quiz:
    stop = (".",)

    def train(self) -> list[Prompt]:
        return [Prompt(f"What is {a} + {a + 1}? Answer in a sentence.", answer=2 * a + 1) for a in range(2, 8)]

    def held_out(self) -> list[Prompt]:
        return self.train()[:2]

    def reply(self, prompt: Prompt, message: str, state: dict[str, Any]) -> str | list[dict[str, str]] | None:
        state["turns"] = [*state.get("turns", []), message]
        said = {1: " Or rather:", 2: [{"role": "user", "content": "Are you sure? Say it again."}], 3: None}
        return said[len(state["turns"])]  # type: ignore[return-value]


def all_turns(completion: str, answer: int, messages: list[dict[str, str]], state: dict[str, Any]) -> float:
    """How many turns the env heard (none if the first was cut off). The policy's last message is the completion."""
    assert messages[-1] == {"role": "assistant", "content": completion}
    return float(len(state.get("turns", [])))
