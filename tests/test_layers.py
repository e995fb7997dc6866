"""Imports go down between rooms, and heavy packages have one home each (see the table of folders in the README)."""

import ast
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from rlora.core.objectives import READY

FLOORS = [
    {"errors"}, {"records"}, {"cards"}, {"plugin", "machine"}, {"device"}, {"settings"}, {"config", "store"},
    {"model"},
    {"core", "scoring"}, {"engine", "rollout"}, {"telemetry"}, {"run"}, {"cluster", "trackers"},
    {"train", "primitives", "planning"}, {"sweeps"}, {"report"}, {"__init__"},
    {"cli"}, {"__main__"},
]  # fmt: skip
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
HOMES = {
    "vllm": {"engine"},
    "ray": {"cluster"},
    "numba": {"engine"},
    "tyro": {"cli"},
    "rich": {"cli", "telemetry", "sweeps"},
}
OF_CORE = {"torch", "transformers", "safetensors", "upath", "rlora"}  # what the mathematics may import
MOST_LINES_OF_CORE = 2700  # without objectives/; kernels and what counts memory are 420 of them
MOST_LINES_OF_AN_OBJECTIVE = 50
MOST_LINES_OF_A_FILE = 400
PLUGINS = ("envs", "rewards")
OF_PLUGINS = {"episodes.py": {"rlora.run"}}  # an env over the bundles of a run


def modules() -> list[Path]:
    """All of rlora but its links to the folders of plug-ins."""
    package = ROOT / "rlora"
    own = [path for path in sorted(package.iterdir()) if not path.is_symlink()]
    return [path for path in own if path.suffix == ".py"] + [
        file for path in own for file in sorted(path.rglob("*.py"))
    ]


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "rlora").with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """The modules that a file imports, at its top or in its functions."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif node.module == "rlora":
            names |= {f"rlora.{alias.name}" for alias in node.names if alias.name != "__version__"}
        else:
            names.add(str(node.module))
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    here = room_of(path)
    names = imports(path)
    rooms = {name.split(".")[1] for name in names if name.startswith("rlora.")} - {here}
    assert all(FLOOR[room] < FLOOR[here] for room in rooms), rooms
    others = {name.split(".")[0] for name in names}
    for package, homes in HOMES.items():
        assert package not in others or here in homes, package
    if here == "core":
        assert others - OF_CORE <= sys.stdlib_module_names


def test_the_mathematics_stays_small() -> None:
    files = (ROOT / "rlora" / "core").glob("*.py")
    assert sum(map(lines, files)) < MOST_LINES_OF_CORE
    assert all(
        lines(Path(sys.modules[of.__module__].__file__ or "")) <= MOST_LINES_OF_AN_OBJECTIVE for of in READY.values()
    )


def test_files_are_read_in_one_sitting() -> None:
    assert not [path for path in modules() if lines(path) > MOST_LINES_OF_A_FILE]


@pytest.mark.parametrize(
    "path",
    [path for room in PLUGINS for path in sorted((ROOT / room).rglob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_plugins_import_records_and_their_own_room_only(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    core = {name for name in imports(path) if name.startswith("rlora.") and not name.startswith(f"rlora.{room}")}
    assert core <= {"rlora.records", "rlora.plugin"} | OF_PLUGINS.get(path.name, set())
