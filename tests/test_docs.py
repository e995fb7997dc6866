"""README and docs: every command, config, file and link is checked. The README's commands are run."""

import ast
import inspect
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import tomli_w
import tyro
from conftest import ROOT, case

from rlora.cli.arguments import COMMANDS, Check, Eval, Fork, Plan, Replay, Show, Submit
from rlora.cli.grammar import change
from rlora.cli.overrides import parse_source, parse_train
from rlora.cli.sweep import parse_sweep
from rlora.config import changed, read, read_table, validate
from rlora.model.tool_calls import ToolCall
from rlora.plugin import load
from rlora.rollout.task import bare_task, load_task
from rlora.rollout.toolset import toolset_of
from rlora.run.checkpoint import Bundle, bundle_path
from rlora.run.health import RULES
from rlora.run.source import split
from rlora.scoring.signatures import reward_function
from rlora.settings import ChatConfig
from rlora.store import write_directory
from rlora.sweeps.halving import Halving
from rlora.sweeps.members import members
from rlora.train import drive

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPE = ROOT / "launch" / "arithmetic.toml"


class Block(NamedTuple):
    page: Path
    language: str
    text: str

    @property
    def name(self) -> str:
        """The file name in the first line of the block; empty if there is none."""
        named = re.match(r"# (\S+\.(?:py|toml))\n", self.text)
        return named[1] if named else ""


BLOCKS = [
    Block(page, language, text)
    for page in PAGES
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
]


def commands(program: str) -> list[tuple[Path, list[str]]]:
    """The calls of a program in all blocks: page and arguments."""
    lines = ((block.page, line) for block in BLOCKS if not block.language for line in block.text.splitlines())
    return [(page, shlex.split(line, comments=True)[1:]) for page, line in lines if re.match(rf"{program} ", line)]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Callable[..., Bundle]) -> Path:
    """A working directory with the files of all blocks, and every run that a command names."""
    write_files(tmp_path)
    (tmp_path / "path" / "to" / "adapter").mkdir(parents=True)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    named = [split(word) for _, words in commands("rlora") for word in words if word.startswith("runs/")]
    for run, version in named:
        recipe = ROOT / "launch" / f"{run.name}.toml"
        config = read(recipe if recipe.is_file() else RECIPE)
        Path(run).mkdir(parents=True, exist_ok=True)
        (Path(run) / "config.toml").write_text(tomli_w.dumps(asdict(config)))
        if version is not None and not bundle_path(run, version).exists():
            write_directory(bundle_path(run, version), bundle(version, config=config).files)
    return tmp_path


def write_files(directory: Path) -> None:
    """Write the blocks that name a file."""
    for block in BLOCKS:
        if block.name:
            (directory / block.name).write_text(block.text)


def test_the_commands_are_understood(directory: Path) -> None:
    """The command line parses them; the files, runs and versions that they name exist."""
    parsers = {
        "train": parse_train, "submit": parse_submit, "sweep": parse_sweep, "fork": parse_fork,
        **{kind.__name__.lower(): partial(parse_source, kind, "rlora") for kind in (Eval, Check, Show, Replay, Plan)},
    }  # fmt: skip
    calls = commands("rlora")
    assert len(calls) > 30
    for page, (command, *arguments) in calls:
        try:
            if command in parsers:
                parsers[command](arguments)
            else:
                tyro.cli(COMMANDS[command], args=arguments)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page.name}: rlora {command} {shlex.join(arguments)}: {error}") from error


def parse_submit(arguments: list[str]) -> None:
    options, rest = tyro.cli(Submit, args=arguments, return_unknown_args=True)
    if options.follow is None:
        parse_train([str(options.file), *rest])


def parse_fork(arguments: list[str]) -> None:
    options = tyro.cli(Fork, args=arguments)
    assert all(map(change, options.changes))


def test_other_commands_name_what_there_is() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in PAGES:
        for names in re.findall(r"(?:rlora|\.)\[([\w,-]+)\]'", page.read_text()):
            assert set(names.split(",")) <= extras.keys(), page.name
        for name in re.findall(r"extras? `([\w-]+)`", page.read_text()):
            assert name in extras, f"{page.name}: {name}"
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {arguments[0] for _, arguments in commands("make")} <= targets
    for _, arguments in commands("python -m rlora"):
        parse_train(arguments[3:])


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "toml"], ids=lambda block: block.page.name
)
def test_the_configs_are_valid(block: Block, tmp_path: Path) -> None:
    table = tomllib.loads(block.text)
    if "over" in table:
        (tmp_path / "sweep.toml").write_text(block.text)
        options, tables = parse_sweep([str(tmp_path / "sweep.toml")])
        Halving.of(tables["halving"]).check(members(asdict(options.config), tables["over"], tables["members"]))
    elif "model" in table:
        validate(table)
    else:
        fields = {
            f"{name}.{key}": value
            for name, section in table.items()
            if isinstance(section, dict)
            for key, value in section.items()
        }
        validate(changed(read_table(RECIPE), fields | {k: v for k, v in table.items() if not isinstance(v, dict)}))


def test_the_python_is_valid() -> None:
    assert [ast.parse(block.text) for block in BLOCKS if block.language == "python"]
    for block in BLOCKS:
        assert block.language in ("", "python", "toml"), block.page.name


def test_the_files_do_what_is_said_of_them(directory: Path) -> None:
    assert {block.name for block in BLOCKS if block.name} == {
        "brief.py",
        "doubling.py",
        "doubling.toml",
        "echo.py",
        "judge.py",
        "math.toml",
        "mine.py",
        "ranks.toml",
        "shop.py",
    }
    task = load_task(read(Path("doubling.toml")))
    assert (task.prompts[1].text, task.prompts[1].answer) == ("What is twice 2?", 4)
    brief = reward_function("brief.py:brief", load("reward", "brief.py:brief"))
    scores = brief(case("It is 4.", "4", "5", answer=4), range(3))
    assert [score.value for score in scores] == [0.992, 0.999, -0.001]
    echo = load("env", "echo.py:Echo")()
    (prompt,) = echo.train()
    assert [echo.reply(prompt, message, {}) for message in ("7*8=", "It is 56.")] == ["56", None]
    shop = load("env", "shop.py:Shop")()
    chat = bare_task(replace(read(Path("doubling.toml")), chat=ChatConfig(template="hermes"))).chat
    tools = toolset_of(shop, chat)
    assert tools is not None
    schema = tools.schemas["price"]
    assert schema["function"]["description"] == "Look up the price of an item in coins."
    (call,) = tools.calls(chat.call_text(ToolCall("price", {"item": "cup"}), [schema]))
    assert shop.tools[0](**call.arguments) == 7


def test_a_reward_model_scores_prompt_and_completion(directory: Path, worded: str) -> None:
    file = directory / "judge.py"
    file.write_text(file.read_text().replace("path/or/hub-id", worded))
    judge = reward_function("judge.py:Judge", load("reward", "judge.py:Judge"))
    scores = judge(case("w1 w2", "w3", "w1 w2"), range(3))
    values = [score.value for score in scores]
    assert values[0] == values[2] != values[1]


def test_the_loop_of_the_readme_is_the_loop() -> None:
    shown = next(block.text for block in BLOCKS if "run.deliver()" in block.text)
    assert textwrap.indent(shown, " " * 8).strip() in inspect.getsource(drive)


def test_the_fields_of_other_frameworks_have_ours() -> None:
    """rlora's column in the tables of "Coming from TRL, verl or Tinker" names existing fields."""
    rows = [line for line in (ROOT / "docs" / "migration.md").read_text().splitlines() if line.startswith("| `")]
    fields = {name for line in rows for name in re.findall(r"`([a-z_.]+)(?:`| =)", line.split("|")[2])}
    assert len(fields) > 30
    config = asdict(read(RECIPE))
    for name in fields - {"tools", "reply"}:  # members of an env
        section, _, last = name.rpartition(".")
        assert last in (config[section] if section else config), name


def test_messages_of_troubleshooting_are_messages_of_rlora() -> None:
    """The parts between "..." in the first column are in the source, and health rules exist."""
    files = sorted(path for path in (ROOT / "rlora").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?r?"', "", "\n".join(path.read_text() for path in files))
    messages = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        if rule := re.fullmatch(r"step \.\.\.: (\w+): \.\.\.", message):
            assert rule[1] in RULES
            continue
        for part in (part.strip(" :=") for part in message.split("...")):
            assert part in source, f"{message}: {part!r}"


def test_the_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in target:
                continue
            file, _, anchor = target.partition("#")
            other = (page.parent / file).resolve() if file else page
            assert other.exists(), f"{page.name}: {target}"
            if anchor:
                heads = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, (
                    f"{page.name}: {target}"
                )


SMALL = ["--steps", "2", "--prompts-per-step", "4", "--group-size", "4", "--evaluate.prompts", "4",
         "--engine.kv-cache-gib", "1"]  # fmt: skip
SHORT = """
import rlora

train = rlora.train
small = {"steps": 2, "prompts_per_step": 4, "group_size": 4, "evaluate": {"prompts": 4}}
rlora.train = lambda *given, **changes: train(*given, **changes | small)
"""


def run_page(page: Path, directory: Path) -> list[str]:
    """Run the commands of a page in order, with fewer and smaller steps. Returns the output of each."""
    write_files(directory)
    outputs = []
    for block in (block for block in BLOCKS if block.page == page and not block.name):
        if block.language == "python" and "import rlora" in block.text:
            outputs.append(run_command([sys.executable, "-c", SHORT + block.text], directory))
        lines = block.text.splitlines() if not block.language else []
        for line in (line for line in lines if line.startswith("rlora ")):
            _, command, *arguments = shlex.split(re.sub(r"@\d+", "@1", line), comments=True)
            if command in ("train", "sweep") and "--resume" not in arguments:
                arguments += SMALL
            outputs.append(run_command([sys.executable, "-m", "rlora", command, *arguments], directory))
    return outputs


def run_command(command: list[str], directory: Path) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.vllm
def test_the_readme_from_top_to_bottom(tmp_path: Path) -> None:
    """In an empty directory, so that launch/arithmetic.toml is the recipe of the package."""
    output = "\n".join(run_page(ROOT / "README.md", tmp_path))
    assert "step 2/2" in output
    assert "bit for bit" in output
    assert "pass@8" in output
    assert (tmp_path / "policy" / "model.safetensors").is_file()
