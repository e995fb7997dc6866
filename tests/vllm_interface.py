"""Checks that vLLM's sources have each name and signature that rlora uses, without importing them.

    python tests/vllm_interface.py vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl

Takes a wheel, or a directory that contains the folder `vllm`. Prints a line for each name that is missing, and exits
with 1 if there is any. To extend the range of versions in pyproject.toml, run it on the wheel of the next version.
"""

import ast
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

# By module and name: the members of a class, and the parameters of a function or constructor, that rlora uses.
# Parameters before "/" are passed by position, so they must come first.
MEMBERS = {
    "vllm:LLMEngine": "from_engine_args add_request step abort_request add_lora remove_lora list_loras apply_model "
    "collective_rpc reset_prefix_cache model_config vllm_config engine_core",
    "vllm:RequestOutput": "",
    "vllm.outputs:RequestOutput": "request_id prompt_token_ids prompt_logprobs outputs finished",
    "vllm.outputs:CompletionOutput": "token_ids logprobs finish_reason sampling_mask",
    "vllm.outputs:SamplingMask": "token_ids",
    "vllm.logprobs:Logprob": "logprob",
    "vllm.lora.request:LoRARequest": "lora_int_id",
    "vllm.sampling_params:RequestOutputKind": "FINAL_ONLY",
    "vllm.v1.engine.core_client:InprocClient": "engine_core",
    "vllm.v1.engine.core:EngineCore": "scheduler",
    "vllm.v1.core.sched.scheduler:Scheduler": "kv_cache_manager",
    "vllm.v1.core.kv_cache_manager:KVCacheManager": "usage",
    "vllm.usage.usage_lib:UsageContext": "LLM_CLASS ENGINE_CONTEXT",
    "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead": "quant_method",
    "vllm.model_executor.models.utils:WeightsMapper": "get_rename_mapper",
    "vllm.lora.model_manager:LoRAModelManager": "modules packed_modules lora_index_to_id lora_config",
    "vllm.config.lora:LoRAConfig": "lora_dtype",
    "vllm.config.cache:CacheConfig": "num_gpu_blocks block_size",
    "vllm.config.model:ModelConfig": "hf_config enforce_eager",
    "vllm.model_executor.layers.attention.attention:Attention": "attn_backend",
    "vllm.v1.attention.backend:AttentionBackend": "get_name",
    "vllm.lora.layers.column_parallel_linear:MergedColumnParallelLinearWithLoRA": "lora_a_stacked lora_b_stacked "
    "expand_packed_lora slice_lora_a slice_lora_b tp_size",
    "vllm.lora.layers.row_parallel_linear:RowParallelLinearWithLoRA": "lora_a_stacked lora_b_stacked slice_lora_a "
    "slice_lora_b tp_size",
    "vllm.lora.layers.logits_processor:LogitsProcessorWithLoRA": "lora_a_stacked lora_b_stacked",
    "vllm.v1.worker.gpu_worker:Worker": "reload_weights",
}
PARAMETERS = {
    "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm": "layer remove_weight",
    "vllm:EngineArgs": "model dtype max_model_len max_num_seqs seed logprobs_mode generation_config "
    "tensor_parallel_size gpu_memory_utilization disable_log_stats use_tqdm_on_load enable_lora max_lora_rank "
    "enable_mixed_moe_lora_format lora_target_modules kv_cache_memory_bytes max_num_batched_tokens "
    "max_loras max_cpu_loras enforce_eager block_size distributed_executor_backend "
    "return_sampling_mask",
    "vllm:LLMEngine.from_engine_args": "cls engine_args / usage_context",
    "vllm:LLMEngine.add_request": "self request_id prompt params / lora_request",
    "vllm:LLMEngine.abort_request": "self request_ids /",
    "vllm:LLMEngine.add_lora": "self lora_request /",
    "vllm:LLMEngine.remove_lora": "self lora_id /",
    "vllm:LLMEngine.apply_model": "self func /",
    "vllm:LLMEngine.collective_rpc": "self method / kwargs",
    "vllm:SamplingParams": "n temperature top_k top_p min_p max_tokens stop_token_ids stop detokenize "
    "skip_special_tokens logprobs prompt_logprobs output_kind",
    "vllm.inputs:TokensPrompt": "prompt_token_ids",
    "vllm.lora.request:LoRARequest": "lora_name lora_int_id lora_path / is_3d_lora_weight",
    "vllm.lora.utils:parse_fine_tuned_lora_name": "name weights_mapper /",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.reload_weights": "weights_path",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.reload_weights": "weights_path",
}
ON_CPU = {  # only imported on a CPU
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU": "update_metadata add_lora_linear add_lora_logits "
    "token_lora_indices sampler_indices",
    "vllm.platforms.cpu:CpuPlatform": "get_punica_wrapper",
    "vllm.v1.sample.ops.topk_topp_sampler:TopKTopPSampler": "forward_cpu logprobs_mode",
    "vllm.v1.sample.sampler:batched_count_greater_than": "",
    "vllm.v1.outputs:ModelRunnerOutput": "sampling_masks",
    "vllm.v1.outputs:SamplingMaskLists": "token_ids offsets",
    "vllm.v1.core.sched.scheduler:Scheduler": "return_sampling_mask",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": "sample_tokens",
}
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class Definition(NamedTuple):
    module: str
    node: ast.stmt


class Sources:
    """The parsed modules of vLLM. `read` returns a file's text by its path, or None."""

    def __init__(self, read: Callable[[str], str | None]) -> None:
        self.module = cache(lambda name: self._parse(read, name))

    @staticmethod
    def _parse(read: Callable[[str], str | None], name: str) -> tuple[ast.Module, bool] | None:
        path = name.replace(".", "/")
        for file, is_package in ((f"{path}/__init__.py", True), (f"{path}.py", False)):
            if (text := read(file)) is not None:
                return ast.parse(text), is_package
        return None

    def find(self, module: str, name: str) -> Definition | None:
        """The definition of a module's name, followed through imports within vLLM."""
        parsed = self.module(module)
        if not parsed:
            return None
        tree, is_package = parsed
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | _Function) and node.name == name:
                return Definition(module, node)
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.find(_absolute(module, is_package, node), alias.name)
            if isinstance(node, ast.Assign) and any(_is_name(target, name) for target in node.targets):
                if isinstance(node.value, ast.Name) and node.value.id != name:  # an alias of a class
                    return self.find(module, node.value.id)
                return Definition(module, node)
            if isinstance(node, ast.Assign) and any(_is_name(target, "MODULE_ATTRS") for target in node.targets):
                lazy: dict[str, str] = ast.literal_eval(node.value)  # vllm/__init__.py imports lazily
                if name in lazy:
                    submodule, _, attribute = lazy[name].partition(":")
                    return self.find(module + submodule, attribute)
        return None

    def lineage(self, definition: Definition) -> Iterator[tuple[str, ast.ClassDef]]:
        """A class and its base classes in vLLM."""
        if isinstance(definition.node, ast.ClassDef):
            yield definition.module, definition.node
            for base in definition.node.bases:
                name = base.value if isinstance(base, ast.Subscript) else base
                if isinstance(name, ast.Name) and (parent := self.find(definition.module, name.id)):
                    yield from self.lineage(parent)

    def members(self, definition: Definition) -> set[str]:
        """Methods, fields, and attributes that any method sets on `self`."""
        names = set()
        for _, node in self.lineage(definition):
            for child in ast.walk(node):
                if isinstance(child, _Function):
                    names.add(child.name)
                target = child.targets[0] if isinstance(child, ast.Assign) else getattr(child, "target", None)
                if isinstance(target, ast.Name):
                    names.add(target.id)
                elif isinstance(target, ast.Attribute) and _is_name(target.value, "self"):
                    names.add(target.attr)
        return names

    def parameters(self, definition: Definition) -> list[str]:
        """Parameters of a function or of a class's __init__; without one, the fields of the class."""
        if isinstance(definition.node, _Function):
            arguments = definition.node.args
            return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        fields: list[str] = []
        for _, node in self.lineage(definition):
            for child in node.body:
                if isinstance(child, _Function) and child.name == "__init__":
                    return [argument.arg for argument in (*child.args.args, *child.args.kwonlyargs)][1:]
            fields = [_field_name(child) for child in node.body if isinstance(child, ast.AnnAssign)] + fields
        return fields

    def missing(self) -> list[str]:
        """One line per name or parameter that rlora uses and vLLM lacks."""
        lines = []
        for key, names in (MEMBERS | ON_CPU).items():
            if definition := self.find(*key.split(":")):
                lines += [f"{key}.{name} is missing" for name in names.split() if name not in self.members(definition)]
            else:
                lines.append(f"{key} is missing")
        for key, names in PARAMETERS.items():
            module, _, name = key.partition(":")
            name, _, method = name.partition(".")
            definition = self.find(module, name)
            if definition and method:
                definition = self._method(definition, method)
            if not definition:
                lines.append(f"{key} is missing")
                continue
            actual, expected = self.parameters(definition), names.split()
            first = expected.index("/") if "/" in expected else 0
            if actual[:first] != expected[:first]:
                lines.append(f"{key}: its first parameters are {actual[:first]}, not {expected[:first]}")
            lines += [f"{key}: no parameter {name}" for name in expected if name not in [*actual, "/"]]
        return lines

    def _method(self, definition: Definition, name: str) -> Definition | None:
        for module, node in self.lineage(definition):
            for child in node.body:
                if isinstance(child, _Function) and child.name == name:
                    return Definition(module, child)
        return None


def read_sources(path: Path) -> Sources:
    """The sources in a wheel, or in a directory like site-packages."""
    if path.is_dir():
        return Sources(lambda file: (path / file).read_text() if (path / file).is_file() else None)
    wheel = zipfile.ZipFile(path)
    names = set(wheel.namelist())
    return Sources(lambda file: wheel.read(file).decode() if file in names else None)


def _absolute(module: str, is_package: bool, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _field_name(node: ast.AnnAssign) -> str:
    return node.target.id if isinstance(node.target, ast.Name) else ""


if __name__ == "__main__":
    lines = read_sources(Path(sys.argv[1])).missing()
    print("\n".join(lines) or "nothing is missing")
    sys.exit(bool(lines))
