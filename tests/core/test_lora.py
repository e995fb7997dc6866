import pytest
import torch
from conftest import TINY_CONFIGS, stir, tiny_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel

from rlora.core.lora import Bank, LoRALinear, Route, Spec, low_rank
from rlora.core.peft_format import masters
from rlora.records import OFF, RloraError


def over(base: nn.Linear, *specs: Spec, seed: int = 0) -> tuple[LoRALinear, Bank]:
    """The layer over one matrix, and its bank."""
    model = nn.Sequential(base)
    bank = Bank(model, specs, seed)
    layer = model[0]
    assert isinstance(layer, LoRALinear)
    return layer, bank


def filled(model: nn.Module, *specs: Spec) -> Bank:
    """A bank whose B is not 0."""
    bank = Bank(model, specs)
    stir(bank)
    return bank


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6.0 / 2), (True, 6.0 / 2**0.5)])
def test_forward_is_the_paper_equation(rslora: bool, scale: float) -> None:
    base = nn.Linear(3, 2)
    layer, bank = over(base, Spec(rank=2, alpha=6.0, rslora=rslora))
    x = torch.randn(5, 3)
    assert layer(x).equal(base(x))  # B = 0
    layer.factors.lora_B[0].data.normal_()
    merged = base.weight + scale * layer.factors.lora_B[0] @ layer.factors.lora_A[0]
    torch.testing.assert_close(layer(x), x @ merged.T + base.bias)
    with bank.serving(Route(OFF)):
        assert layer(x).equal(base(x))


def test_a_is_uniform_within_its_bound_and_follows_the_seed() -> None:
    first, again, other = (over(nn.Linear(400, 8), Spec(4), seed=seed)[0].factors.lora_A[0] for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
    bound = 1 / 400**0.5
    assert first.abs().max() <= bound
    assert first.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_a_may_start_orthonormal() -> None:
    a = over(nn.Linear(40, 8), Spec(4, init="orthonormal"))[0].factors.lora_A[0]
    torch.testing.assert_close(a @ a.T, torch.eye(4))


def test_forward_rounds_as_the_engine_does_and_gradients_reach_the_masters() -> None:
    layer, _ = over(nn.Linear(4, 3).bfloat16(), Spec(1, 3.0))
    a, b = layer.factors.lora_A[0], layer.factors.lora_B[0]
    b.data.normal_()
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    served_a, served_b = a.bfloat16(), b.bfloat16() * 3.0  # vLLM folds the scale into B, in bf16
    delta = (x @ served_a.T).float() @ served_b.T.float()  # added to the base's output before that is rounded again
    assert layer(x).equal((layer.base(x).float() + delta).bfloat16())
    layer(x).sum().backward()
    assert b.grad is not None
    assert b.grad.dtype == torch.float32


@pytest.mark.parametrize("mixed", [True, False])
def test_gradients_are_those_of_finite_differences(mixed: bool) -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (4, 5), (6, 4)))
    weight, bias = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    mask = torch.randint(2, (6, 4)).double() if mixed else None

    def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return low_rank(x, weight, bias, a, b, mask)

    assert torch.autograd.gradcheck(product, (x, a, b))


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_bank_in_one_forward_equals_its_adapters_apart_and_none_is_the_base(name: str) -> None:
    base = tiny_model(name)
    ids = torch.randint(97, (4, 6), generator=torch.Generator().manual_seed(0))
    if name == "qwen3_moe":
        base.set_experts_implementation("eager")  # others sum a token's experts in another order
    with torch.no_grad():
        pristine = base(ids).logits
    bank = filled(base, Spec(1), Spec(3, 8.0), Spec(8, rslora=True))
    own = torch.tensor([[0], [1], [2], [OFF]]).expand(4, 6)
    with torch.no_grad():
        with bank.serving(Route(own)):
            together = base(ids).logits
        for row, adapter in enumerate([0, 1, 2]):
            with bank.serving(Route(adapter)):
                torch.testing.assert_close(together[row], base(ids).logits[row], atol=1e-4, rtol=1e-4)
        # exactly; but an expert computes the rows of others with it, and how many those are decides its rounding
        off_by = 0.0 if name == "llama" else 1e-4
        torch.testing.assert_close(together[3], pristine[3], atol=off_by, rtol=off_by)


def test_a_row_gives_no_gradient_to_the_adapters_of_others(tiny_base: PreTrainedModel) -> None:
    bank = filled(tiny_base, Spec(2), Spec(2))
    ids = torch.randint(97, (2, 6), generator=torch.Generator().manual_seed(0))
    with bank.serving(Route(torch.tensor([[1], [OFF]]).expand(2, 6))):
        tiny_base(ids).logits.sum().backward()
    assert all(master.grad is None for master in masters(bank, 0).values())
    assert all(master.grad is not None and master.grad.any() for master in masters(bank, 1).values())


def names(bank: Bank) -> set[str]:
    return {matrix.key.rpartition(".")[2] for matrix, factors in bank.factors.items() if factors.ranks[0]}


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
    bank = Bank(tiny_base, [spec])
    assert names(bank) == expected
    trainable = [parameter for parameter in tiny_base.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trainable} >= {id(master) for master in masters(bank, 0).values()}
    assert sum(parameter.numel() for parameter in trainable) == sum(m.numel() for m in masters(bank, 0).values())


@pytest.mark.parametrize(("name", "shared_experts"), [("mixtral", set()), ("qwen3_moe", set()), ("qwen2_moe", MLP)])
def test_experts_are_adapted_and_routers_left_alone(name: str, shared_experts: set[str]) -> None:
    bank = Bank(tiny_model(name), [Spec(8)])
    assert names(bank) == ATTENTION | shared_experts | {"gate_up_proj", "down_proj"}
    for matrix, factors in bank.factors.items():
        fused = len(matrix.shape) == 3
        assert factors.ranks == [8 // 2 if fused else 8]  # 2 experts a token
        assert factors.lora_A[0].shape == ((4 * 4 if fused else 8), matrix.shape[-1])


def test_experts_in_another_layout_are_refused() -> None:
    config = GptOssConfig(
        vocab_size=97, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(RloraError, match=r"GptOssExperts: is_transposed, has_bias.*learner\.targets"):
        Bank(GptOssForCausalLM(config), [Spec()])
    assert names(Bank(GptOssForCausalLM(config), [Spec(targets="attention")])) == ATTENTION


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(RloraError, match=r"none of the 0 weight matrices .* of Sequential"):
        Bank(nn.Sequential(nn.Embedding(3, 2)), [Spec()])


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")  # PEFT asks modules, not parameters
@pytest.mark.parametrize("name", sorted(TINY_CONFIGS))
def test_gradients_equal_those_of_autograd_through_peft(name: str) -> None:
    """Logits and gradients, in fp64, with PEFT's own layers over the same matrices and the same numbers."""
    ours, theirs = tiny_model(name).double(), tiny_model(name).double()
    bank = filled(ours, Spec(2, 8.0))
    fused = [matrix for matrix in bank.factors if len(matrix.shape) == 3]
    modules = [matrix.key for matrix in bank.factors if len(matrix.shape) == 2]
    config = LoraConfig(
        r=2, lora_alpha=8.0, target_modules=modules,
        target_parameters=[matrix.key for matrix in fused] or None, rank_pattern={matrix.key: 1 for matrix in fused},
    )  # fmt: skip
    theirs.set_experts_implementation("eager")  # the others have no fp64
    peft = get_peft_model(theirs, config)
    of_peft = {n.replace(".default", ""): p for n, p in peft.named_parameters() if "lora_" in n}
    ours_by_name = masters(bank, 0)
    assert of_peft.keys() == ours_by_name.keys()
    for key, parameter in of_peft.items():
        parameter.data = ours_by_name[key].data.double()
    ids = torch.randint(97, (2, 7), generator=torch.Generator().manual_seed(0))
    for logits in (ours(ids).logits, peft(ids).logits):
        logits.log_softmax(-1)[..., 5].sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, peft(ids).logits, atol=1e-9, rtol=1e-9)
    for key, parameter in of_peft.items():
        expected, got = parameter.grad, ours_by_name[key].grad
        assert expected is not None
        assert got is not None
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)  # ours are cast to fp32
