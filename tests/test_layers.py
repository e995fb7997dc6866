"""Imports go downward only, and heavy ones have one home each (see the layers in the README)."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

LAYERS = [
    {"records", "plugin", "config", "machine", "storage", "episodes", "model_files"},
    {"lora", "advantage", "loss", "attention", "base", "sharding", "thin_product", "template", "scratch"},
    {"head", "optimizer", "chat", "golds"},
    {"policy", "peft_format", "batch", "task", "delivery", "scoring", "grading", "check", "trial"},
    {"algorithm", "agent_loop"},
    {"learner", "merge", "rollout", "runs", "checkpoint", "resume", "saving", "slots", "vllm_cpu"},
    {"engine", "evaluate", "metrics", "replay", "history", "export"},
    {"cluster", "train", "options", "cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PURE = {"lora", "advantage", "loss", "attention", "head"}
MODULES = sorted((ROOT / "rlora").glob("[!_]*.py"))


def imports(path: Path) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif node.module == "rlora":
            names |= {f"rlora.{alias.name}" for alias in node.names}
        else:
            names.add(str(node.module))
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_go_down(path: Path) -> None:
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("rlora.")} - {"rewards"}
    assert all(LEVEL[name] <= LEVEL[path.stem] for name in ours), ours
    others = {name.split(".")[0] for name in imports(path)}
    assert ("vllm" in others) <= (path.stem in {"engine", "slots", "vllm_cpu"})
    assert ("ray" in others) <= (path.stem == "cluster")
    assert not {"learner", "engine"} <= ours | {path.stem} or path.stem in {"train", "cluster"}  # they never meet
    if path.stem in PURE:
        assert ours <= {"records", "lora"}


PLUGINS = [(room, path) for room in ("envs", "rewards") for path in sorted((ROOT / room).glob("*.py"))]


@pytest.mark.parametrize(("room", "path"), PLUGINS, ids=lambda each: getattr(each, "stem", each))
def test_plugins_import_records_and_their_own_room_only(room: str, path: Path) -> None:
    core = {name for name in imports(path) if name.startswith("rlora.") and not name.startswith(f"rlora.{room}")}
    assert core <= {"rlora.records", "rlora.plugin"}
