"""Tasks of reasoning-gym (Stojanovski et al. 2025, arXiv:2505.24760) by name. Needs the extra `gym`.

The library generates the problems, and `rewards/gym.py` grades the completions. The library's scorers are never called,
because several scorers evaluate the model's text as code. Therefore only tasks with a single correct answer, with a
single spelling, are supported.
"""

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from rlora.records import Prompt, RloraError

from .generated import listed

INSTRUCTION = "Give the final answer in <answer> </answer>."
TASKS = (
    "ab", "acre", "aiw", "arc_1d", "arc_agi", "base_conversion", "basic_arithmetic", "bf", "binary_alternation",
    "binary_matrix", "bitwise_arithmetic", "caesar_cipher", "calendar_arithmetic", "chain_sum", "circuit_logic",
    "color_cube_rotation", "count_bits", "count_primes", "course_schedule", "decimal_chain_sum", "emoji_mystery",
    "family_relationships", "figlet_font", "fraction_simplification", "game_of_life", "game_of_life_halting", "gcd",
    "gsm_symbolic", "isomorphic_strings", "largest_island", "lcm", "leg_counting", "letter_counting",
    "list_functions", "mahjong_puzzle", "manipulate_matrix", "maze", "modulo_grid", "needle_haystack",
    "number_filtering", "number_format", "number_sequence", "number_sorting", "products", "ransom_note", "rearc",
    "rectangle_count", "rotate_matrix", "rotten_oranges", "self_reference", "simple_equations", "simple_geometry",
    "spell_backward", "spiral_matrix", "string_insertion", "string_manipulation", "string_splitting",
    "string_synthesis", "syllogism", "time_intervals", "word_sequence_reversal", "word_sorting", "zebra_puzzles",
)  # fmt: skip
_SEVERAL_FORMS = (
    "advanced_geometry", "codeio", "coin_flip", "complex_arithmetic", "decimal_arithmetic", "dice",
    "intermediate_integration", "knights_knaves", "polynomial_equations", "polynomial_multiplication",
    "pool_matrix", "power_function", "prime_factorization", "propositional_logic", "simple_integration",
)  # fmt: skip
_SEVERAL_ANSWERS = (
    "boxnet", "countdown", "cryptarithm", "futoshiki", "graph_color", "group_anagrams", "jugs", "kakurasu",
    "knight_swap", "letter_jumble", "mini_sudoku", "n_queens", "palindrome_generation", "palindrome_partitioning",
    "path_star", "puzzle24", "quantum_lock", "rubiks_cube", "rush_hour", "sentence_reordering", "shortest_path",
    "sokoban", "sudoku", "survo", "tower_of_hanoi", "tsumego", "word_ladder",
)  # fmt: skip
_UNSUPPORTED = {
    **dict.fromkeys(_SEVERAL_FORMS, "its correct answers can be written in several ways; remove the task"),
    **dict.fromkeys(
        _SEVERAL_ANSWERS,
        "its problems can have several correct answers; remove the task (rlora.envs.countdown has Countdown and 24)",
    ),
    "composite": "it mixes other tasks; name these tasks instead",
}


class ReasoningGym:
    """Problems of the tasks that `tasks` names, such as "gcd,lcm", in turn, generated from `seed`.

    `size` problems are for training, and `held_out_size` further problems are held out. All other arguments go to the
    config of each task. Reward: `rlora.rewards.gym:gym_answer`. Columns for rewards: `task`, and the task's
    `difficulty`.
    """

    def __init__(
        self, tasks: str | Sequence[str], size: int = 2000, held_out_size: int = 200, seed: int = 0, **args: Any
    ) -> None:
        self._tasks = listed(tasks)
        for task in self._tasks or [""]:
            if task not in TASKS:
                reason = _UNSUPPORTED.get(task, f"there is no such task; use some of {', '.join(sorted(TASKS))}")
                raise RloraError(f"env_args.tasks = {tasks!r}: {task!r} can't be graded: {reason}")
        if size < 1 or held_out_size < 0:
            raise RloraError(
                f"env_args.size = {size}, env_args.held_out_size = {held_out_size}: use 1 or more for env_args.size, "
                "and 0 or more for env_args.held_out_size"
            )
        self._size, self._held_out_size, self._seed, self._args = size, held_out_size, seed, args

    def train(self) -> Iterator[Prompt]:
        """Yield the training problems, without problems whose text is also held out."""
        held_out = {prompt.text for prompt in self.held_out()}
        prompts = self._generate(self._held_out_size, self._held_out_size + self._size)
        return (prompt for prompt in prompts if prompt.text not in held_out)

    def held_out(self) -> Iterator[Prompt]:
        return self._generate(0, self._held_out_size)

    def _generate(self, start: int, end: int) -> Iterator[Prompt]:
        """Yield the problems with the numbers from `start` to `end` - 1."""
        try:
            reasoning_gym = importlib.import_module("reasoning_gym")
        except ImportError as error:
            raise RloraError(
                f"env: rlora.envs.gym needs reasoning_gym, which can't be imported ({error}); run "
                "pip install 'rlora[gym]'"
            ) from error
        try:
            sources = [
                reasoning_gym.create_dataset(task, seed=self._seed, size=self._size + self._held_out_size, **self._args)
                for task in self._tasks
            ]
        except Exception as error:  # raised by the task's config
            raise RloraError(
                f"env_args.tasks: {', '.join(self._tasks)} do not accept {self._args!r} ({error}); change or remove "
                "these arguments in env_args"
            ) from error
        for number in range(start, end):
            task = self._tasks[number % len(sources)]
            problem = sources[number % len(sources)][number]
            columns = {"task": task, "difficulty": str(problem["metadata"].get("difficulty", ""))}
            text = f"{problem['question'].strip()}\n{INSTRUCTION}"
            yield Prompt(text, answer=str(problem["answer"]), columns=columns)
