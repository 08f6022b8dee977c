"""deploy/kuberay: manifests that fit together, and run what compose.yaml runs.

No cluster is here. `kubectl kustomize` builds both overlays where kubectl is installed.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from deploy_files import KUBERAY, ROOT, command_of, documents, manifest, run

from treadle.config import load_settings
from treadle.config.sources import field_docs

SECRETS = {"treadle-store": {"url"}, "treadle-s3": {"access-key-id", "secret-access-key"}, "treadle-admin": {"key"}}


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod's spec, by a name for messages."""
    cluster = manifest("RayCluster", "treadle-ray")["spec"]
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]
    yield "server", manifest("Deployment", "treadle")["spec"]["template"]["spec"]


def flags(name: str) -> dict[str, str]:
    """`ray start`'s flags of a service of compose.yaml."""
    words = [word for word in command_of(name) if word.startswith("--")]
    return {word[2:].partition("=")[0]: word.partition("=")[2] for word in words}


def test_ray_nodes_are_started_as_in_compose() -> None:
    """KubeRay makes the command out of rayStartParams, and adds address, head, port and block by itself."""
    cluster = manifest("RayCluster", "treadle-ray")["spec"]
    groups = {group["groupName"]: group["rayStartParams"] for group in cluster["workerGroupSpecs"]}
    by_kuberay = {"head", "address", "port", "block"}
    for service, params in (
        ("ray-head", cluster["headGroupSpec"]["rayStartParams"]),
        ("ray-worker", groups["cpu"]),
        ("ray-worker-gpu", groups["gpu"]),
    ):
        wanted = {name: value or "true" for name, value in flags(service).items() if name not in by_kuberay}
        wanted.pop("num-cpus", None) if service != "ray-head" else None  # from the limits of the container
        assert params == wanted, service
    assert (
        cluster["rayVersion"]
        == re.search(r"^ray==(\S+)", (ROOT / "docker/requirements.txt").read_text(), flags=re.MULTILINE)[1]
    ), "the version of the images"  # type: ignore[index]


def test_servers_are_started_as_in_compose() -> None:
    [container] = manifest("Deployment", "treadle")["spec"]["template"]["spec"]["containers"]
    settings = load_settings(KUBERAY / "base/treadle.toml")
    in_compose = command_of("gateway")
    here = [*container["command"], *container["args"]]
    assert here == [word.replace("ray-head:", "treadle-ray-head-svc:") for word in in_compose]
    assert settings.executor.ray_address == here[1]
    [port] = container["ports"]
    assert port["containerPort"] == settings.server.port
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert mounted["/etc/treadle"] == "config"
    assert mounted[str(settings.data_dir)] == "data"
    assert str(settings.auth.bootstrap_key_file) == "/run/treadle/keys/admin"
    assert mounted["/run/treadle/keys"] == "admin-key"


def test_pods_are_what_a_restricted_namespace_admits() -> None:
    for name, spec in pods():
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["runAsUser"] == 10001, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
        assert "serviceAccountName" not in spec, name
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert "memory" in container["resources"]["limits"], name
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert "exec" in container[probe] or "httpGet" in container[probe], f"{name}: {probe}"
            volumes = {volume["name"] for volume in spec["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes, name


def test_secrets_are_named_and_never_there() -> None:
    example = {one["metadata"]["name"]: set(one["stringData"]) for one in documents() if one["kind"] == "Secret"}
    assert example == SECRETS
    kustomization = yaml.safe_load((KUBERAY / "base/kustomization.yaml").read_text())
    assert not [name for name in kustomization["resources"] if "secret" in name], "an example is not applied"
    known = {doc.variable for doc in field_docs()} | {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"}
    # KubeRay's own, by the cluster's name.
    secrets = SECRETS | {"treadle-ray": {"auth_token"}}
    for name, spec in pods():
        for container in spec["containers"]:
            for variable in container.get("env", []):
                if "value" in variable:
                    assert variable == {"name": "RAY_AUTH_MODE", "value": "token"}
                    continue
                assert variable["name"] in known, f"{name}: {variable['name']}"
                reference = variable["valueFrom"]["secretKeyRef"]
                assert reference["key"] in secrets[reference["name"]], name
        has_bucket = [variable["name"] for variable in spec["containers"][0].get("env", [])]
        assert ("AWS_ACCESS_KEY_ID" in has_bucket) == (name != "head"), name
    text = "".join(path.read_text() for path in KUBERAY.rglob("*.*"))
    assert not re.search(r"tml-[0-9a-f]{32}", text)


def test_only_pods_of_treadle_reach_ray() -> None:
    cluster = manifest("RayCluster", "treadle-ray")["spec"]
    policy = manifest("NetworkPolicy", "treadle-ray")["spec"]
    selected = policy["podSelector"]["matchLabels"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert selected.items() <= group["template"]["metadata"]["labels"].items()
    server = manifest("Deployment", "treadle")["spec"]["template"]["metadata"]["labels"]
    first = policy["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    assert first.items() <= server.items()
    assert all(rule.get("from") for rule in policy["ingress"])
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        # KubeRay's Services select by labels of its own, which a pod's would replace.
        assert "app.kubernetes.io/name" not in group["template"]["metadata"]["labels"]


def test_drain_ends_before_the_pod_is_killed() -> None:
    spec = manifest("Deployment", "treadle")["spec"]["template"]["spec"]
    assert spec["terminationGracePeriodSeconds"] > load_settings(KUBERAY / "base/treadle.toml").server.drain_s + 10


def test_overlay_for_gpus_sets_settings_that_exist() -> None:
    overlay = yaml.safe_load((KUBERAY / "gpu/kustomization.yaml").read_text())
    operations = [step for patch in overlay["patches"] for step in yaml.safe_load(patch["patch"])]
    values = [step["value"] for step in operations if isinstance(step["value"], dict)]
    assert {value["name"] for value in values} <= {doc.variable for doc in field_docs()}
    groups = manifest("RayCluster", "treadle-ray")["spec"]["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == ["cpu", "gpu"], "the patches count on this order"
    for step in operations:
        assert isinstance(step["value"], dict) or re.fullmatch(r"/spec/workerGroupSpecs/[01]/replicas", step["path"])
    assert tomllib.loads((KUBERAY / "base/treadle.toml").read_text())["executor"]["kind"] == "ray"


@pytest.mark.parametrize("folder", ["base", "gpu"])
def test_kustomize_builds_it(folder: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = run(["kubectl", "kustomize", str(KUBERAY / folder)])
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    images = set(re.findall(r"image: (\S+)", done.stdout))
    assert images == {"registry.example/treadle:0.1.0-cpu", "registry.example/treadle:0.1.0-gpu"}
    assert {one["metadata"].get("namespace", "treadle") for one in built} == {"treadle"}
    [cluster] = [one for one in built if one["kind"] == "RayCluster"]
    replicas = [group["replicas"] for group in cluster["spec"]["workerGroupSpecs"]]
    assert replicas == ([1, 0] if folder == "base" else [0, 2])
