"""Arguments of requests, checked by vLLM's own validation for engines that return the tokens that top-k kept."""

from types import SimpleNamespace
from typing import Any

import pytest

from rlora.records import Sampling

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]  # importing vLLM warns


def requests() -> dict[str, dict[str, Any]]:
    from rlora.engine.outputs import params_of

    return {
        "training": params_of(Sampling(8, 0.7, 4, top_k=50, top_p=0.9)),
        "greedy": params_of(Sampling(8, 0.0, stop=("=",))),
        "canary": {"max_tokens": 1, "prompt_logprobs": 0},
    }


def validate(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM checks of a request in an engine with `return_sampling_mask`, which its CPU build can't have."""
    from vllm import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    monkeypatch.setattr(SamplingParams, "verify", lambda *_: None)  # needs a model, and reads no mask
    processor: Any = SimpleNamespace(
        model_config=SimpleNamespace(return_sampling_mask=True, is_diffusion=False),
        vllm_config=SimpleNamespace(
            reasoning_config=None, use_v2_model_runner=True, cache_config=SimpleNamespace(kv_sharing_fast_prefill=False)
        ),
        speculative_config=None,
        structured_outputs_config=None,
        tokenizer=None,
        validate_logits_processors_params=lambda _: None,
        resolve_watermarking=lambda _: False,
    )
    InputProcessor._validate_params(processor, SamplingParams(**params), ("generate",))


@pytest.mark.parametrize("kind", ["training", "greedy", "canary"])
def test_an_engine_that_returns_kept_tokens_accepts_every_kind_of_request(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlora.engine.outputs import with_top_k

    params = requests()[kind]
    if kind != "training":
        with pytest.raises(ValueError, match="sampling distribution replay requires"):
            validate(params, monkeypatch)
    changed = with_top_k(params)
    validate(changed, monkeypatch)
    assert {name for name in changed if changed[name] != params.get(name)} == (
        set() if kind == "training" else {"temperature", "top_k"}
    )
    assert kind == "training" or (changed["temperature"], changed["top_k"]) == (1.0, 1)  # the most probable token
