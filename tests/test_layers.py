"""Imports go downward only, and heavy ones have one home each (see the layers in the README)."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

LAYERS = [
    {"records", "config", "machine"},
    {"lora", "advantage", "loss", "attention", "base", "sharding", "thin_product"},
    {"head", "optimizer"},
    {"policy", "peft_format", "batch", "task", "delivery"},
    {"algorithm"},
    {"learner", "merge", "rollout", "checkpoint", "slots", "vllm_cpu"},
    {"engine", "evaluate", "metrics"},
    {"cluster", "train", "cli", "__main__"},
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
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("rlora.")}
    assert all(LEVEL[name] <= LEVEL[path.stem] for name in ours), ours
    others = {name.split(".")[0] for name in imports(path)}
    assert ("vllm" in others) <= (path.stem in {"engine", "slots", "vllm_cpu"})
    assert ("ray" in others) <= (path.stem == "cluster")
    assert not {"learner", "engine"} <= ours | {path.stem} or path.stem in {"train", "cluster"}  # they never meet
    if path.stem in PURE:
        assert ours <= {"records", "lora"}


@pytest.mark.parametrize("path", sorted([*ROOT.glob("envs/*.py"), *ROOT.glob("rewards/*.py")]), ids=lambda p: p.stem)
def test_plugins_import_records_only(path: Path) -> None:
    assert {name for name in imports(path) if name.startswith("rlora")} <= {"rlora.records"}
