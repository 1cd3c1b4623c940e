"""The Docker files agree with each other and with the rest of the repository; the wheel has what the image needs. What the files
do when they are run is test_stack.py's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from tests.docker.compose import BASE, GPU, SERVICES
from tests.docker.dockerfile import DOCKER, ROOT, Stage, read_dockerfile

BUILD, FINAL = read_dockerfile({"PATH": "/usr/bin"})


def runs(stage: Stage) -> list[str]:
    return [rest for name, _, rest in stage.steps if name == "RUN"]


def test_the_image_is_built_with_the_uv_that_makes_the_development_environment() -> None:
    (version,) = re.findall(r"^UV_VERSION=(\S+)$", (ROOT / "scripts" / "setup.sh").read_text(), re.MULTILINE)
    assert BUILD.args["UV_VERSION"] == version


def test_the_context_holds_what_is_copied_and_nothing_else() -> None:
    copied = {word for name, flags, rest in BUILD.steps if name == "COPY" and not flags for word in rest.split()[:-1]}
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert all((ROOT / path).exists() for path in copied)
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*wheel["packages"], *wheel["force-include"]} <= copied


def test_the_image_runs_as_nobody_in_particular() -> None:
    uid, gid = FINAL.notes["USER"].split(":")
    assert int(uid) and int(gid)


def test_one_port_from_the_server_to_prometheus() -> None:
    port = FINAL.notes["EXPOSE"]
    assert FINAL.entrypoint == ["mmv1", "serve", "--host", "0.0.0.0", "--port", port]
    assert f"http://127.0.0.1:{port}/health" in FINAL.healthcheck[-1]
    assert [entry.split(":")[-1] for entry in SERVICES["mmv1"]["ports"]] == [port]
    (job,) = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert [target for config in job["static_configs"] for target in config["targets"]] == [f"mmv1:{port}"]


def test_a_model_may_follow_the_entry_point(tmp_path: Path) -> None:
    (model,) = GPU["services"]["mmv1"]["command"]
    command = [sys.executable, "-m", *FINAL.entrypoint, model]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"'{model}'" in done.stderr and "hub" in done.stderr, done.stderr


def test_redis_is_reached_by_the_server_and_by_nobody_else() -> None:
    assert urlsplit(SERVICES["mmv1"]["environment"]["REDIS_URL"]).netloc == "redis:6379"
    assert "ports" not in SERVICES["redis"]
    assert BASE["networks"]["store"] == {"internal": True}
    assert [name for name, service in SERVICES.items() if "store" in service["networks"]] == ["mmv1", "redis"]
    assert SERVICES["redis"]["networks"] == ["store"]


def test_nothing_is_published_beyond_this_host() -> None:
    for service in SERVICES.values():
        assert all(entry.startswith("127.0.0.1:") for entry in service.get("ports", []))


def test_every_service_is_fenced_in() -> None:
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"] is True, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert {"memory", "pids"} == set(service["deploy"]["resources"]["limits"]), name
        assert "healthcheck" in service, name


def test_foreign_images_are_of_one_version() -> None:
    for name, service in SERVICES.items():
        if "build" not in service:
            assert re.search(r":v?\d+\.\d+", service["image"]), name


def test_redis_keeps_within_its_container() -> None:
    command, limit = SERVICES["redis"]["command"], SERVICES["redis"]["deploy"]["resources"]["limits"]["memory"]
    assert command[command.index("--maxmemory") + 1] == "1gb"
    assert limit == "1536m"


def test_what_is_mounted_is_there() -> None:
    volumes = [volume for service in SERVICES.values() for volume in service.get("volumes", [])]
    for volume in volumes:
        if volume["type"] == "bind":
            assert (DOCKER / volume["source"]).exists(), volume
            assert volume["read_only"] is True, volume
        else:
            assert volume["source"] in BASE["volumes"]


def test_what_a_gpu_server_downloads_and_compiles_is_kept() -> None:
    assert GPU["services"].keys() == {"mmv1"}
    volumes = GPU["services"]["mmv1"]["volumes"]
    assert {volume["source"] for volume in volumes} == GPU["volumes"].keys()
    kept = {volume["target"] for volume in volumes}
    assert kept == {FINAL.env["HF_HOME"], FINAL.env["TRITON_CACHE_DIR"]}
    # A new volume has the owner of the directory it covers.
    (owned,) = re.findall(r"install --directory --owner=mmv1 --group=mmv1 (.*)", "\n".join(runs(FINAL)))
    assert set(owned.split()) == kept
    # tmpfs are mounted noexec; what is compiled is executed.
    assert not kept & set(SERVICES["mmv1"]["tmpfs"])


def test_the_image_can_compile_kernels() -> None:
    (install,) = [run for run in runs(FINAL) if "apt-get install" in run]
    assert {"gcc", "libc6-dev"} <= set(install.split())
    assert "--no-install-recommends" in install and install.endswith("rm -rf /var/lib/apt/lists/*")


def test_the_lock_has_every_dependency_of_the_image() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=\[; ]", line)[0] for line in dependencies}
    locked = set(re.findall(r"^([a-z0-9-]+)(?:\[.*\])?==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    assert names <= locked


def test_the_wheel_has_the_small_model_and_no_tests(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("mmv1-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        stored = archive.read("mmv1/demo_model/model.safetensors")
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert stored == (ROOT / "demo_model" / "qwen2.5-vl-demo" / "model.safetensors").read_bytes()
    assert {"mmv1/demo_model/config.json", "mmv1/demo_model/tokenizer.json"} <= names
    assert {name.split("/")[0] for name in names} == {"mmv1", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}
    module, _, function = re.search(r"^mmv1 = (\S+)$", entry_points, re.MULTILINE)[1].partition(":")  # type: ignore[index]
    assert module.replace(".", "/") + ".py" in names and function == "main"


def test_grafana_finds_its_source_and_its_dashboards() -> None:
    targets = {volume["target"]: volume["source"] for volume in SERVICES["grafana"]["volumes"]}
    (provider,) = yaml.safe_load((DOCKER / "grafana" / "dashboards.yml").read_text())["providers"]
    folder = provider["options"]["path"]
    dashboard_path = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert dashboard_path.startswith(folder + "/")
    dashboard = DOCKER / targets[folder] / dashboard_path.removeprefix(folder + "/")
    (source,) = yaml.safe_load((DOCKER / "grafana" / "datasources.yml").read_text())["datasources"]
    used = set(re.findall(r'"type": "prometheus",\s*"uid": "(\w+)"', dashboard.read_text()))
    assert used == {source["uid"]}
    assert urlsplit(source["url"]).hostname in SERVICES
    panels = json.loads(dashboard.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
