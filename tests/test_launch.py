"""The recipes in launch/, and the files of launch/cluster as far as a machine without a cluster can check them."""

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, SHARED

from rlora.cli.overrides import parse_train
from rlora.cluster.resources import assign_gpus
from rlora.config import read
from rlora.rollout.task import load_task

CLUSTER = ROOT / "launch" / "cluster"


def containers(node: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = node["template"]["spec"]["containers"]
    return found


def test_the_ray_job_fits_its_schema() -> None:
    """The fields of RayJob v1 that it uses, and that each volume and resource is there."""
    job = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    known = {
        "entrypoint", "entrypointNumCpus", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit",
        "rayClusterSpec",
    }  # fmt: skip
    assert set(job["spec"]) == known
    image = (CLUSTER / "Containerfile").read_text()
    assert f"ray[default]=={job['spec']['rayClusterSpec']['rayVersion']}'" in image
    cluster = job["spec"]["rayClusterSpec"]
    for node in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert isinstance(node["rayStartParams"], dict)
        volumes = {volume["name"] for volume in node["template"]["spec"]["volumes"]}
        (container,) = containers(node)
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert container["resources"]["requests"].keys() == container["resources"]["limits"].keys()
        assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}
    (gpu,) = cluster["workerGroupSpecs"]
    assert containers(gpu)[0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_ray_job_runs_a_command_that_there_is() -> None:
    job = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())
    python, module, name, command, *arguments = job["spec"]["entrypoint"].split()
    assert [python, module, name, command] == ["python", "-m", "rlora", "train"]
    given = parse_train(arguments)
    config = given.config
    assert given.run_dir is not None
    (gpu,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    config = assign_gpus(config, gpu["replicas"])
    used = config.engine.replicas * float(config.engine.gpus) + config.learner.replicas * float(config.learner.gpus)
    assert used <= gpu["replicas"]


def test_the_cluster_of_ray_up_has_the_nodes_that_it_names() -> None:
    cluster = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] in types
    assert cluster["max_workers"] >= sum(each.get("max_workers", 0) for each in types.values())
    assert any("ray start --head" in each for each in cluster["head_start_ray_commands"])
    assert any("--address=$RAY_HEAD_IP" in each for each in cluster["worker_start_ray_commands"])
    for each in (*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]):
        subprocess.run(["bash", "-n", "-c", each], check=True)


@pytest.mark.parametrize("script", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_image_has_all_that_the_package_needs() -> None:
    copied = [
        line.split()[1:-1] for line in (CLUSTER / "Containerfile").read_text().splitlines() if line[:5] == "COPY "
    ]
    assert {"rlora", "envs", "rewards", "launch", "pyproject.toml"} <= {each for line in copied for each in line}


@pytest.mark.parametrize("path", [*sorted((ROOT / "launch").glob("*.toml"))], ids=lambda path: path.stem)
def test_no_prompt_of_a_recipe_is_too_long(path: Path) -> None:
    """Of those whose data is generated, or is among the shared data sets."""
    config = read(path)
    arguments = dict(config.env_args)
    if arguments.get("path") == "openai/gsm8k" and SHARED.is_dir():
        arguments |= {"path": str(SHARED / "data" / "gsm8k")} | ({"name": None} if "name" in arguments else {})
    if path.stem in ("competition-math", "dpo") or arguments.get("path") == "openai/gsm8k":
        pytest.skip("its data is not here")
    task = load_task(replace(config, env_args=arguments))
    assert task.prompts
    assert task.dropped == 0
