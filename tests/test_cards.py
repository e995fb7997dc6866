"""Detection of GPUs by nvidia-smi and the division of their memory, with fake cards."""

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, ray_head

from rlora import cards
from rlora.cards import GIB, Card, LearnerMemory
from rlora.cluster.resources import assign_gpus, check_sampling_on_gpu
from rlora.device import check_usable, hardware
from rlora.records import RloraError
from rlora.settings import Config

MakeConfig = Callable[..., Config]
H100 = "NVIDIA H100 80GB HBM3, GPU-1, 81559, 80994, 580.65.06, 9.0, Disabled"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts an nvidia-smi on the path that prints the given lines."""

    def install(*lines: str, code: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text("\n".join(["#!/bin/sh", *(f"echo '{line}'" for line in lines), f"exit {code}"]))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


def test_cards_are_what_nvidia_smi_lists(smi: Callable[..., None]) -> None:
    smi(
        H100,
        "NVIDIA A100, with a comma, GPU-2, 40960, 40000, 535.54, 8.0, Enabled",
        "GB10, GPU-3, [N/A], [N/A], 580, 12.1, [N/A]",
    )
    one, two, three = cards.list_cards()
    assert one == Card("NVIDIA H100 80GB HBM3", "GPU-1", 81559 * 2**20, 80994 * 2**20, "580.65.06", (9, 0), False)
    assert (two.name, two.is_divided, two.capability) == ("NVIDIA A100, with a comma", True, (8, 0))
    assert (three.total, three.capability) == (0, (12, 1))


def test_a_node_without_nvidia_smi_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cards.list_cards() == []
    cards.check_cpu_is_intended(0, wanted=True)


def test_a_driver_that_fails_raises_an_error(smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    smi("Failed to initialize NVML: Driver/library version mismatch", code=18)
    assert cards.list_cards() == []  # this machine has no card
    monkeypatch.setattr("rlora.cards.Path.exists", lambda _: True)
    with pytest.raises(RloraError, match=r"nvidia-smi failed .*version mismatch.*reboot the node"):
        cards.list_cards()


@pytest.mark.parametrize(
    ("visible", "remedy"),
    [(None, "--num-gpus"), ("", r"CUDA_VISIBLE_DEVICES is ''; unset the"), ("-1", "CUDA_VISIBLE_DEVICES is '-1'")],
)
def test_no_run_goes_to_the_cpu_in_silence(
    smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch, visible: str | None, remedy: str
) -> None:
    smi(H100)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(RloraError, match=f"this machine has 1 .*H100.* Ray sees none: .*{remedy}"):
        cards.check_cpu_is_intended(0, wanted=True)
    cards.check_cpu_is_intended(0, wanted=False)  # the config asks for the CPU
    cards.check_cpu_is_intended(1, wanted=True)


@pytest.mark.parametrize(
    ("built_for", "driver", "reason"),
    [
        (None, "580.65", "built for CPUs; install rlora with the extra cuda"),
        ("13.0", "535.54.03", r"CUDA 13.0, which needs driver 580 or later; update the driver \(535.54.03\)"),
        ("12.9", "470.1", "needs driver 525 or later"),
        ("13.0", "580.65", "torch.cuda.init"),
    ],
)
def test_a_card_that_torch_cannot_use(
    smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch, built_for: str | None, driver: str, reason: str
) -> None:
    smi(H100.replace("580.65.06", driver))
    monkeypatch.setattr(torch.version, "cuda", built_for)
    with pytest.raises(RloraError, match=f"Ray gave this process a GPU.*{reason}"):
        check_usable()


def test_a_card_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(RloraError, match=r"Tesla T4 has compute capability 7\.5; bfloat16 needs 8\.0"):
        check_usable()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    check_usable()


def test_the_driver_names_a_card_without_a_context(smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    smi(H100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("a context was taken"))
    assert hardware().endswith(", NVIDIA H100 80GB HBM3")


def test_the_learners_share_is_what_it_reserved() -> None:
    share, description = cards.share_of_learner(79 * GIB, 79 * GIB, 0.5, "H100")
    assert share == 79 * GIB // 2 - GIB
    assert description == "0.5 (learner.gpus) of H100 with 79.0 GiB"
    assert cards.share_of_learner(79 * GIB, 79 * GIB, 2.0, "H100")[0] == 78 * GIB
    with pytest.raises(RloraError, match=r"only 20\.0 GiB are free: another process holds memory"):
        cards.share_of_learner(20 * GIB, 79 * GIB, 0.5, "H100")  # two runs on one card


def test_an_engine_takes_what_the_learner_leaves() -> None:
    def budget(total: int, gpus: float, learners: LearnerMemory, free: int | None = None, eager: bool = True) -> float:
        return cards.budget_of_engine((free or total) * GIB, total * GIB, gpus, learners, eager, "H100") / GIB

    learner = LearnerMemory(30 * GIB, 0.5)
    assert budget(80, 0.5, learner, free=50) == 80 - 30 - 2  # two contexts
    assert budget(80, 0.5, learner, free=50, eager=False) == 80 - 30 - 3.5
    assert budget(80, 0.25, learner, free=50) == (80 - 31) / 2 - 1  # two engines on the learner's card
    assert budget(80, 1.0, LearnerMemory()) == 79
    assert budget(80, 0.5, LearnerMemory()) == 39  # a learner may start later
    with pytest.raises(RloraError, match="nothing is left for an engine"):
        budget(24, 0.5, LearnerMemory(23 * GIB, 0.5))
    with pytest.raises(RloraError, match=r"share of H100 is 48\.0 GiB, and only 10\.0 are free"):
        budget(80, 0.5, learner, free=10)


def test_a_base_that_does_not_fit_is_refused_with_what_would() -> None:
    cards.check_fits(20 * GIB, 15 * GIB, 2**17, 4096, "L4")
    with pytest.raises(RloraError, match="a context of 32768 tokens would fit"):
        cards.check_fits(20 * GIB, 15 * GIB, 2**17, 40_960, "L4")
    with pytest.raises(RloraError, match=r"needs 16\.5: 15\.0 for the base.*use a smaller model"):
        cards.check_fits(12 * GIB, 15 * GIB, 2**17, 4096, "L4")


@pytest.mark.parametrize(
    ("gpus", "changes", "engine", "learner"),
    [
        (0, {}, 0.0, 0.0),
        (1, {}, 0.5, 0.5),
        (2, {}, 1.0, 1.0),  # one card each
        (2, {"engine": {"replicas": 3}}, 0.5, 0.5),
        (8, {"engine": {"tensor_parallel_size": 4}}, 1.0, 1.0),
        (3, {"learner": {"replicas": 2}}, 1.0, 1.0),
        (1, {"engine": {"gpus": 0.25}, "learner": {"gpus": 0.75}}, 0.25, 0.75),
        (1, {"engine": {"gpus": 0.0}, "learner": {"gpus": 0.0}}, 0.0, 0.0),
    ],
)
def test_who_reserves_how_much(
    config: MakeConfig, gpus: int, changes: dict[str, object], engine: float, learner: float
) -> None:
    resolved = assign_gpus(config(**changes), gpus)
    assert (resolved.engine.gpus, resolved.learner.gpus) == (engine, learner)


@pytest.mark.vllm
def test_a_run_on_a_card_that_cannot_be_used_ends_before_anything_is_loaded(
    smi: Callable[..., None], tmp_path: Path
) -> None:
    """Real Ray: it sees no GPU although the machine has one, or a GPU that a torch for CPUs can't use."""
    smi(H100)
    home = Path(tempfile.mkdtemp(prefix="ray-"))  # a short path, for Ray's sockets
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(Path.home() / ".cache"), "PYTHONPATH": str(ROOT)}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

    def train(name: str, *options: str, **more: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "rlora", "train", str(ROOT / "launch" / "arithmetic.toml"), *options]
        process = subprocess.run(
            [*command, "--run-dir", str(tmp_path / name)], env=environment | more, capture_output=True, text=True,
            check=False, timeout=300,
        )  # fmt: skip
        return process.returncode, process.stderr

    code, errors = train("hidden", RAY_ADDRESS="local", CUDA_VISIBLE_DEVICES="")
    assert code == 1
    assert "this machine has 1 (NVIDIA H100 80GB HBM3), and Ray sees none: CUDA_VISIBLE_DEVICES is ''" in errors
    with ray_head(home, environment, "--num-gpus=1") as address:
        code, errors = train("no-cuda", RAY_ADDRESS=address)
    assert code == 1
    assert "Ray gave this process a GPU, but torch" in errors
    assert "torch is built for CPUs; install rlora with the extra cuda" in errors


@pytest.mark.parametrize(
    ("gpus", "changes", "message"),
    [
        (2, {"engine": {"tensor_parallel_size": 2, "gpus": 0.5}}, r"engine.gpus = 0\.5: .*each part needs a whole GPU"),
        (4, {"learner": {"replicas": 2, "gpus": 0.5}}, r"learner.gpus = 0\.5: .*NCCL requires a GPU for each"),
        (2, {"engine": {"tensor_parallel_size": 4}}, "4.5 in total, and Ray has 2; lower engine.replicas"),
        (1, {"engine": {"replicas": 3}}, "2 in total, and Ray has 1"),
    ],
)
def test_what_the_cards_are_too_few_for(
    config: MakeConfig, gpus: int, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(RloraError, match=message):
        assign_gpus(config(**changes), gpus)


@pytest.mark.parametrize(
    ("policies", "reason"),
    [
        ([{"top_k": 50, "top_p": 0.9}, {"top_k": 512}], None),
        ([{}, {}], None),
        (
            [{"top_k": 50, "top_p": 0.9}, {"top_p": 0.8}],
            r"sampling\.top_k = 0, with top_p = 0\.8 and min_p = 0\.0: on a GPU",
        ),
        ([{"min_p": 0.1}], r"top_p = 1\.0 and min_p = 0\.1: .*set sampling\.top_k, for example to 512"),
        ([{}, {"top_k": 50}], r"sampling\.top_k = 0, with top_p = 1\.0"),
    ],
)
def test_what_engines_on_gpus_can_sample(
    config: MakeConfig, policies: list[dict[str, object]], reason: str | None
) -> None:
    configs = [config(sampling=sampling) for sampling in policies]
    if reason is None:
        check_sampling_on_gpu(*configs)
        return
    with pytest.raises(RloraError, match=reason):
        check_sampling_on_gpu(*configs)
