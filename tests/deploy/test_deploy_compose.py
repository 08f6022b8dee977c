"""compose.yaml and docker/Dockerfile: what can be known about them without an engine.

That the services' commands work is the business of test_deploy_live.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from deploy_files import COMPOSE, DOCKERFILE, ROOT, command_of, compose, compose_program, run, services, stages
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from treadle.config import load_settings

OURS = ("secrets", "bucket", "ray-head", "ray-worker", "ray-worker-gpu", "gateway", "first-key", "metrics-key")
ONE_SHOT = ("secrets", "bucket", "first-key", "metrics-key")
# Extras that every image has.
EXTRAS = ("postgres", "object-store", "ray", "otel", "modelscope", "age")


def pins(name: str) -> dict[str, str]:
    text = (ROOT / "docker" / name).read_text()
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+) \\$", text, flags=re.MULTILINE))


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Where in the container -> which volume or file."""
    parts = (entry.split(":") for entry in service.get("volumes", []))
    return {part[1]: part[0] for part in parts}


def test_compose_itself_accepts_the_file() -> None:
    program = compose_program()
    if program is None:
        pytest.skip("docker compose is not installed")
    with_vllm = ["-f", "compose.yaml", "-f", "docker/vllm.yaml", "--env-file", "docker/gpu.env"]
    done = run([*program, *with_vllm, "config", "--format", "json"])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["services"]
    gpus = {
        name: found[name]["deploy"]["resources"]["reservations"]["devices"] for name in ("gateway", "ray-worker-gpu")
    }
    assert {name: [device["device_ids"] for device in devices] for name, devices in gpus.items()} == {
        "gateway": [["0"]],
        "ray-worker-gpu": [["1"]],
    }
    for arguments in ([], ["--profile", "*"], ["--env-file", "docker/gpu.env"]):
        done = run([*program, *arguments, "config", "--format", "json"])
        assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["services"]
    assert "ray-worker-gpu" in found
    assert found["gateway"]["environment"]["TREADLE_EXECUTOR__NUM_GPUS"] == "1"


def test_every_service_is_bounded_and_cannot_gain_privileges() -> None:
    for name, service in services().items():
        assert service["init"] is True, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert name == "first-key" or service["deploy"]["resources"]["limits"].keys() >= {"memory", "pids"}, name
        assert "privileged" not in service, name
        if name in OURS:
            assert service["cap_drop"] == ["ALL"], name
        assert service["restart"] == ("no" if name in ONE_SHOT else "unless-stopped"), name


def test_only_loopback_is_published() -> None:
    published = [port for service in services().values() for port in service.get("ports", [])]
    assert len(published) == 3
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_whatever_serves_says_when_it_is_well_and_others_wait_for_that() -> None:
    found = services()
    for name, service in found.items():
        if name in ONE_SHOT:
            assert service["healthcheck"] == {"disable": True}, name
        else:
            assert service["healthcheck"]["test"][0] == "CMD", name
        for other, wanted in service.get("depends_on", {}).items():
            is_over = other in ONE_SHOT
            assert wanted["condition"] == ("service_completed_successfully" if is_over else "service_healthy"), name
            assert found[other].get("profiles", []) in ([], service.get("profiles")), "it may not be started with it"
    assert set(found["gateway"]["depends_on"]) == {"postgres", "bucket", "ray-head", "ray-worker"}


def test_images_are_pinned_and_ours_is_built_once() -> None:
    builders = {}
    for name, service in services().items():
        image, tag = service["image"].rsplit(":", 1)
        if name in OURS:
            assert image == "treadle"
        else:
            assert re.search(r"\d+[.-]\d+", tag), f"{name}: {service['image']}"
        if "build" in service:
            assert service["image"] not in builders
            builders[service["image"]] = service["build"]
            assert service["build"]["target"] in stages()
    assert set(builders) == {"treadle:cpu", "treadle:gpu"}


def test_what_is_mounted_is_there_and_secrets_go_to_few() -> None:
    found = services()
    for name, service in found.items():
        for target, source in mounts(service).items():
            if source.startswith("./"):
                assert (ROOT / source).exists(), f"{name}: {source}"
            else:
                assert source in compose()["volumes"], f"{name}: {source}"
            assert target.startswith("/")
    who = {
        volume: {name for name, service in found.items() if volume in mounts(service).values()}
        for volume in ("postgres-secrets", "s3-secrets", "ray-secrets", "keys", "metrics-secrets")
    }
    assert who == {
        "postgres-secrets": {"secrets", "postgres", "gateway", "metrics-key"},
        "s3-secrets": {"secrets", "minio", "bucket", "ray-worker", "ray-worker-gpu", "gateway"},
        "ray-secrets": {"secrets", "ray-head", "ray-worker", "ray-worker-gpu", "gateway"},
        "keys": {"gateway", "first-key"},
        "metrics-secrets": {"metrics-key", "prometheus"},
    }
    environment = json.dumps([service.get("environment", {}) for service in found.values()])
    assert not re.search(r"(PASSWORD|SECRET|KEY)\"", environment), "secrets come in files, not in what inspect shows"


def test_services_and_the_servers_configuration_name_the_same_places() -> None:
    settings = load_settings(ROOT / "docker/treadle.toml")
    head = command_of("ray-head")
    assert settings.executor.ray_address == "ray-head:6379"
    assert "--port=6379" in head
    for name in ("ray-worker", "ray-worker-gpu"):
        assert f"--address={settings.executor.ray_address}" in command_of(name)
    assert command_of("gateway") == [
        "treadle-serve-on-ray", settings.executor.ray_address, "--config", "/etc/treadle/treadle.toml",
    ]  # fmt: skip
    assert command_of("bucket") == ["treadle-make-bucket", settings.blobs.url]
    assert command_of("first-key") == ["treadle-first-key", str(settings.auth.bootstrap_key_file)]
    file, folder = "/run/treadle/s3/credentials", "/run/treadle/s3"
    assert f"credentials_file={file}" in settings.blobs.url
    for name in ("gateway", "ray-worker", "ray-worker-gpu", "bucket"):
        assert mounts(services()[name])[folder] == "s3-secrets"
    assert "passfile=/run/treadle/postgres/pgpass" in settings.store.url


def test_environment_of_the_gateway_is_settings_and_empty_ones_count_as_not_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in os.environ if name.startswith("TREADLE_")]:
        monkeypatch.delenv(name)
    plain = load_settings(ROOT / "docker/treadle.toml")
    environment = {
        name: value for name, value in services()["gateway"]["environment"].items() if name.startswith("TREADLE_")
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, "" if value is None else str(value))
    assert load_settings(ROOT / "docker/treadle.toml") == plain
    for line in (ROOT / "docker/gpu.env").read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and name.startswith("TREADLE_"):
            assert name in environment, f"{name} does not reach the server"
            monkeypatch.setenv(name, value)
    assert load_settings(ROOT / "docker/treadle.toml").executor.num_gpus == 1


def test_vllm_is_where_the_server_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads Compose's own tag as what it is put on."""

    Loader.add_constructor(
        "!override",
        lambda loader, node: (
            loader.construct_mapping(node, deep=True)
            if isinstance(node, yaml.MappingNode)
            else loader.construct_sequence(node, deep=True)
        ),
    )
    text = (ROOT / "docker/vllm.yaml").read_text()
    gateway = yaml.load(text, Loader)["services"]["gateway"]
    assert gateway["build"]["target"] in stages()
    [variable] = [rest for word, rest in stages()["gpu-vllm"] if word == "ENV"]
    of_image, _, python = variable.partition("=")
    for name, value in {**gateway["environment"], of_image: python}.items():
        monkeypatch.setenv(name, value)
    settings = load_settings(ROOT / "docker/treadle.toml")
    assert (settings.sampler.kind, settings.worker.samplers) == ("vllm", 1)
    assert str(settings.sampler.vllm.python) == "/opt/vllm/bin/python"
    assert f"python -m venv {Path(python).parents[1]}" in dict(stages()["vllm-libraries"])["RUN"]


def test_images_run_as_nobody_special_and_say_how_they_are() -> None:
    found = stages()
    assert {"cpu", "gpu", "gpu-vllm"} <= set(found)
    assert found[""] == [("FROM", "cpu")], "what is built without a target needs no GPU"
    for name in ("cpu", "gpu"):
        words = dict(found[name])
        assert words["USER"] == "10001:10001", "a number, so that Kubernetes can tell that it is not root"
        assert "treadle-probe" in words["HEALTHCHECK"]
        assert words["ENTRYPOINT"] == '["treadle"]'
    assert [rest for word, rest in found["gpu-vllm"] if word == "USER"][-1] == "10001:10001"
    for stage in found.values():
        assert [word for word, _ in stage].count("FROM") == 1


def test_images_are_built_from_pinned_bases_and_wheels_with_hashes() -> None:
    found = stages()
    for stage in found.values():
        base = stage[0][1]
        assert base in found or re.search(r":\d+\.\d+\.\d+-[a-z]+-[a-z]+$", base), base
        for word, rest in stage:
            assert word != "ADD"
            if word == "RUN":
                for install in re.findall(r"pip install[^&]*", rest):
                    is_pinned = "--require-hashes" in install or "torch==" in install or "/wheels/*.whl" in install
                    assert is_pinned, install
                    assert "--no-deps" in install
                assert not re.search(r"(?i)password|token|secret=", rest)


def test_what_is_copied_exists_and_reaches_the_build() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored, "nothing but what is named"
    for stage in stages().values():
        for word, rest in stage:
            if word == "COPY" and "--from" not in rest:
                *sources, _ = [part for part in rest.split() if not part.startswith("--")]
                for source in sources:
                    assert (ROOT / source).exists(), source
                    patterns = [line[1:] for line in ignored if line.startswith("!")]
                    assert any(Path(source).match(pattern) for pattern in patterns), source
    assert {path.name for path in (ROOT / "docker/bin").iterdir() if not os.access(path, os.X_OK)} == set()


def test_pinned_wheels_are_what_the_project_asks_for() -> None:
    """Red after a change of pyproject.toml until scripts/lock_images has run."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned, gpu, vllm = (pins(f"requirements{name}.txt") for name in ("", "-gpu", "-vllm"))
    wanted = list(project["dependencies"])
    for extra in EXTRAS:
        wanted += project["optional-dependencies"][extra]
    for text in wanted:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        version = gpu[name] if name == "torch" else pinned.get(name)
        assert version is not None, f"{name} is in no image"
        assert requirement.specifier.contains(version), f"{name} {version}: run scripts/lock_images"
    for text in project["dependencies"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(vllm[canonicalize_name(requirement.name)]), text
    assert f"torch=={gpu['torch']}" in DOCKERFILE.read_text(), "both builds of torch are of one version"
    assert not set(gpu) & set(pinned)


def test_dockerfile_satisfies_hadolint() -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed")
    done = run(["hadolint", str(DOCKERFILE)])
    assert done.returncode == 0, done.stdout


def test_observability_is_provisioned_from_files_that_are_there() -> None:
    import yaml

    grafana = mounts(services()["grafana"])
    [provider] = yaml.safe_load((ROOT / "docker/grafana/provisioning/dashboards/treadle.yml").read_text())["providers"]
    folder = provider["options"]["path"]
    home = services()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home.startswith(folder)
    assert grafana[folder] == "./docker/grafana/dashboards"
    dashboard = ROOT / "docker/grafana/dashboards" / Path(home).name
    assert json.loads(dashboard.read_text())["title"]
    [source] = yaml.safe_load((ROOT / "docker/grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"

    scraping = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())
    [job] = scraping["scrape_configs"]
    assert job["static_configs"][0]["targets"] == ["gateway:8000"]
    key = job["authorization"]["credentials_file"]
    assert command_of("metrics-key")[2] == key
    prometheus = mounts(services()["prometheus"])
    assert prometheus[str(Path(key).parent)] == "metrics-secrets"
    for rules in scraping["rule_files"]:
        assert prometheus[str(Path(rules).parent)] == "./docker/prometheus"
        assert (ROOT / "docker/prometheus" / Path(rules).name).exists()
    assert COMPOSE.exists()
