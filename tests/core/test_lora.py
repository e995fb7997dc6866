import pytest
import torch
from conftest import TINY_CONFIGS, adapted, stir, tiny_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel

from rlora.core.lora import Bank, LoRALinear, Pair, Spec, low_rank
from rlora.core.peft_format import masters
from rlora.records import RloraError


def adapted_linear(base: nn.Linear, spec: Spec, seed: int = 0) -> tuple[LoRALinear, Bank, Pair]:
    """A LoRA layer around `base`, its bank, and the factors of its adapter."""
    model = nn.Sequential(base)
    bank = adapted(model, spec, seed)
    layer = model[0]
    assert isinstance(layer, LoRALinear)
    return layer, bank, layer.factors.pairs["run"]


def filled(model: nn.Module, **specs: Spec) -> Bank:
    """A bank whose adapters have random B."""
    bank = Bank(model)
    for name, spec in specs.items():
        bank.add(name, spec)
    stir(bank)
    return bank


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6.0 / 2), (True, 6.0 / 2**0.5)])
def test_forward_is_the_paper_equation(rslora: bool, scale: float) -> None:
    base = nn.Linear(3, 2)
    layer, bank, pair = adapted_linear(base, Spec(rank=2, alpha=6.0, rslora=rslora))
    x = torch.randn(5, 3)
    assert layer(x).equal(base(x))  # B = 0
    pair.b.data.normal_()
    merged = base.weight + scale * pair.b @ pair.a
    torch.testing.assert_close(layer(x), x @ merged.T + base.bias)
    with bank.serving(None):
        assert layer(x).equal(base(x))


def test_a_is_uniform_within_its_bound_and_follows_the_seed() -> None:
    first, again, other = (adapted_linear(nn.Linear(400, 8), Spec(4), seed=seed)[2].a for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
    bound = 1 / 400**0.5
    assert first.abs().max() <= bound
    assert first.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_a_may_start_orthonormal() -> None:
    a = adapted_linear(nn.Linear(40, 8), Spec(4, init="orthonormal"))[2].a
    torch.testing.assert_close(a @ a.T, torch.eye(4))


def test_forward_rounds_as_the_engine_does_and_gradients_reach_the_masters() -> None:
    layer, _, pair = adapted_linear(nn.Linear(4, 3).bfloat16(), Spec(1, 3.0))
    a, b = pair.a, pair.b
    b.data.normal_()
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    served_a, served_b = a.bfloat16(), b.bfloat16() * 3.0  # vLLM folds the scale into B, in bf16
    delta = (x @ served_a.T).float() @ served_b.T.float()  # added to the base's output before that is rounded again
    assert layer(x).equal((layer.base(x).float() + delta).bfloat16())
    layer(x).sum().backward()
    assert b.grad is not None
    assert b.grad.dtype == torch.float32


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (4, 5), (6, 4)))
    weight, bias = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return low_rank(x, weight, bias, a, b)

    assert torch.autograd.gradcheck(product, (x, a, b))


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_adapters_come_and_go_and_never_affect_each_other(name: str) -> None:
    """Logits and gradients with an adapter are bit for bit those of a bank that holds only this adapter."""
    ids = torch.randint(97, (4, 6), generator=torch.Generator().manual_seed(0))
    specs = {"one": Spec(1), "two": Spec(3, 8.0, targets="attention"), "three": Spec(8, rslora=True)}

    def outputs(bank: Bank, adapter: str | None) -> tuple[Tensor, list[Tensor]]:
        with bank.serving(adapter):
            logits: Tensor = bank.model(ids).logits
        if adapter is None:
            return logits, []
        return logits.detach(), list(torch.autograd.grad(logits.sum(), list(bank.parameters_of(adapter).values())))

    with torch.no_grad():
        pristine = tiny_model(name)(ids).logits
    bank = Bank(tiny_model(name))
    bank.add("gone", Spec(2))
    for seed, (adapter, spec) in enumerate(specs.items()):
        bank.add(adapter, spec, seed)
    bank.remove("gone")
    for seed, (adapter, spec) in enumerate(specs.items()):
        alone = adapted(tiny_model(name), spec, seed)
        masters_together, masters_alone = bank.parameters_of(adapter), alone.parameters_of("run")
        assert masters_together.keys() == masters_alone.keys()
        for key, master in masters_together.items():
            assert master.equal(masters_alone[key])  # A
            if key.endswith("lora_B"):
                master.data.normal_(std=0.1)
                masters_alone[key].data.copy_(master.data)
        (logits, gradients), (expected, expected_gradients) = outputs(bank, adapter), outputs(alone, "run")
        assert logits.equal(expected)
        assert not logits.equal(pristine)
        assert all(a.equal(b) for a, b in zip(gradients, expected_gradients, strict=True))
    assert outputs(bank, None)[0].equal(pristine)
    assert set(bank.specs) == set(specs)
    assert not bank.pairs_of("gone")


def names(bank: Bank) -> set[str]:
    return {matrix.key.rpartition(".")[2] for matrix, factors in bank.factors.items() if factors.pairs}


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Spec(), ATTENTION | MLP),
        (Spec(targets="attention"), ATTENTION),
        (Spec(targets="mlp"), MLP),
        (Spec(targets="mlp", head=True), MLP | {"lm_head"}),
        (Spec(targets=frozenset({"model.layers.1.mlp.up_proj"})), {"up_proj"}),
    ],
)
def test_a_spec_chooses_its_matrices(tiny_base: PreTrainedModel, spec: Spec, expected: set[str]) -> None:
    bank = adapted(tiny_base, spec)
    assert names(bank) == expected
    assert not any(parameter.requires_grad for parameter in tiny_base.parameters())
    assert {id(parameter) for parameter in bank.parameters_of("run").values()} == {
        id(master) for master in masters(bank, "run").values()
    }


@pytest.mark.parametrize(("name", "shared_experts"), [("mixtral", set()), ("qwen3_moe", set()), ("qwen2_moe", MLP)])
def test_experts_are_adapted_and_routers_left_alone(name: str, shared_experts: set[str]) -> None:
    bank = adapted(tiny_model(name), Spec(8))
    assert names(bank) == ATTENTION | shared_experts | {"gate_up_proj", "down_proj"}
    for matrix, factors in bank.factors.items():
        fused = len(matrix.shape) == 3
        if matrix.kind != "head":
            assert bank.specs["run"].rank_of(matrix) == (8 // 2 if fused else 8)  # 2 experts per token
            assert factors.pairs["run"].a.shape == ((4 * 4 if fused else 8), matrix.shape[-1])


def test_experts_in_a_different_layout_are_refused() -> None:
    config = GptOssConfig(
        vocab_size=97, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(RloraError, match=r"GptOssExperts: is_transposed, has_bias.*learner\.targets"):
        adapted(GptOssForCausalLM(config), Spec())
    assert names(adapted(GptOssForCausalLM(config), Spec(targets="attention"))) == ATTENTION


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(RloraError, match=r"none of the 0 weight matrices .* of Sequential"):
        adapted(nn.Sequential(nn.Embedding(3, 2)), Spec())


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")  # PEFT asks modules, not parameters
@pytest.mark.parametrize("name", sorted(TINY_CONFIGS))
def test_gradients_equal_those_of_autograd_through_peft(name: str) -> None:
    """Logits and gradients, in fp64, with PEFT's layers over the same matrices and the same numbers."""
    model, peft_base = tiny_model(name).double(), tiny_model(name).double()
    bank = filled(model, run=Spec(2, 8.0))
    bank.serves.adapter = "run"
    fused = [matrix for matrix in bank.pairs_of("run") if len(matrix.shape) == 3]
    modules = [matrix.key for matrix in bank.pairs_of("run") if len(matrix.shape) == 2]
    config = LoraConfig(
        r=2, lora_alpha=8.0, target_modules=modules,
        target_parameters=[matrix.key for matrix in fused] or None, rank_pattern={matrix.key: 1 for matrix in fused},
    )  # fmt: skip
    peft_base.set_experts_implementation("eager")  # the other implementations do not support fp64
    peft = get_peft_model(peft_base, config)
    peft_parameters = {n.replace(".default", ""): p for n, p in peft.named_parameters() if "lora_" in n}
    parameters = masters(bank, "run")
    assert peft_parameters.keys() == parameters.keys()
    for key, parameter in peft_parameters.items():
        parameter.data = parameters[key].data.double()
    ids = torch.randint(97, (2, 7), generator=torch.Generator().manual_seed(0))
    for logits in (model(ids).logits, peft(ids).logits):
        logits.log_softmax(-1)[..., 5].sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, peft(ids).logits, atol=1e-9, rtol=1e-9)
    for key, parameter in peft_parameters.items():
        expected, gradient = parameter.grad, parameters[key].grad
        assert expected is not None
        assert gradient is not None
        torch.testing.assert_close(gradient.double(), expected, atol=1e-5, rtol=1e-5)  # the masters are fp32
