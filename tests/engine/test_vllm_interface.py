"""The installed vLLM has everything that rlora uses, and vllm_interface.py lists all of it."""

import ast
import importlib.util
from pathlib import Path

import pytest
from conftest import ROOT
from vllm_interface import MEMBERS, ON_CPU, PARAMETERS, Sources, read_sources

ENGINE = sorted((ROOT / "rlora" / "engine").rglob("*.py"))


@pytest.fixture(scope="module")
def installed() -> Path:
    spec = importlib.util.find_spec("vllm")
    if not spec or not spec.origin:
        pytest.skip("needs vllm")
    return Path(spec.origin).parent.parent


def test_the_installed_vllm_has_it_all(installed: Path) -> None:
    assert read_sources(installed).missing() == []


def test_the_list_is_complete() -> None:
    """It has each import from vLLM, each engine method, and each parameter of LLMEngine, sampling and LoRA requests."""
    listed = {*MEMBERS, *ON_CPU, *PARAMETERS}
    called = set()
    for path in ENGINE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    assert f"{node.module}:{alias.name}" in listed, path.name
            match node:
                case ast.Attribute(value=ast.Name(id="llm") | ast.Attribute(attr="llm"), attr=name):
                    assert name in MEMBERS["vllm:LLMEngine"].split(), path.name
                case ast.Call(func=ast.Name(id="EngineArgs" | "SamplingParams" | "LoRARequest" as name)):
                    names = next(value for key, value in PARAMETERS.items() if key.endswith(f":{name}")).split()
                    assert {keyword.arg for keyword in node.keywords if keyword.arg} <= set(names), name
                    called.add(name)
    assert len(called) == 3


@pytest.mark.parametrize(
    ("text", "replacement", "line"),
    [
        ("def get_rename_mapper", "def get_unstacked_mapper", "WeightsMapper.get_rename_mapper is missing"),
        ("    enable_mixed_moe_lora_format:", "    mixed:", "EngineArgs: no parameter enable_mixed_moe_lora_format"),
        ("    is_3d_lora_weight:", "    is_3d:", "vllm.lora.request:LoRARequest: no parameter is_3d_lora_weight"),
        ("self.packed_modules:", "self.packed:", "LoRAModelManager.packed_modules is missing"),
        ("class RequestOutputKind", "class OutputKind", "vllm.sampling_params:RequestOutputKind is missing"),
        (
            "(self, request_ids",
            "(self, ids",
            "its first parameters are ['self', 'ids'], not ['self', 'request_ids']",
        ),
    ],
)
def test_missing_names_are_reported(text: str, replacement: str, line: str, installed: Path) -> None:
    def read(file: str) -> str | None:
        path = installed / file
        return path.read_text().replace(text, replacement) if path.is_file() else None

    assert any(reported.endswith(line) for reported in Sources(read).missing())
