"""What rlora uses of vLLM is in the vLLM that is installed, and in the list that other versions are held against."""

import ast
import importlib.util
from pathlib import Path

import pytest
from conftest import ROOT
from vllm_interface import MEMBERS, ON_CPU, PARAMETERS, Sources, of_path

ENGINE = sorted((ROOT / "rlora" / "engine").rglob("*.py"))


@pytest.fixture(scope="module")
def installed() -> Path:
    spec = importlib.util.find_spec("vllm")
    if not spec or not spec.origin:
        pytest.skip("needs vllm")
    return Path(spec.origin).parent.parent


def test_the_installed_vllm_has_it_all(installed: Path) -> None:
    assert of_path(installed).missing() == []


def test_the_list_is_complete() -> None:
    """Each import of vLLM, each method of its engine, each parameter of its engine and of sampling."""
    listed = {*MEMBERS, *ON_CPU, *PARAMETERS}
    asked = set()
    for path in ENGINE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    assert f"{node.module}:{alias.name}" in listed, path.name
            match node:
                case ast.Attribute(value=ast.Name(id="llm") | ast.Attribute(attr="llm"), attr=name):
                    assert name in MEMBERS["vllm:LLMEngine"].split(), path.name
                case ast.Call(func=ast.Name(id="EngineArgs" | "SamplingParams" | "LoRARequest" as name)):
                    known = next(value for place, value in PARAMETERS.items() if place.endswith(f":{name}")).split()
                    assert {keyword.arg for keyword in node.keywords if keyword.arg} <= set(known), name
                    asked.add(name)
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("text", "other", "line"),
    [
        ("def get_rename_mapper", "def get_unstacked_mapper", "WeightsMapper.get_rename_mapper is not there"),
        ("    enable_mixed_moe_lora_format:", "    mixed:", "EngineArgs: no parameter enable_mixed_moe_lora_format"),
        ("    is_3d_lora_weight:", "    is_3d:", "vllm.lora.request:LoRARequest: no parameter is_3d_lora_weight"),
        ("self.packed_modules:", "self.packed:", "LoRAModelManager.packed_modules is not there"),
        ("class RequestOutputKind", "class OutputKind", "vllm.sampling_params:RequestOutputKind is not there"),
        (
            "(self, request_ids",
            "(self, ids",
            "its first parameters are ['self', 'ids'], and were ['self', 'request_ids']",
        ),
    ],
)
def test_what_a_version_lacks_is_told(text: str, other: str, line: str, installed: Path) -> None:
    def read(file: str) -> str | None:
        path = installed / file
        return path.read_text().replace(text, other) if path.is_file() else None

    assert any(told.endswith(line) for told in Sources(read).missing())
