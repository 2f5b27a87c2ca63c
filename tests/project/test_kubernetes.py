"""Manifests in config/kubernetes: valid for Kubernetes, and consistent with one another and with the proxy."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from proxy import __version__
from proxy.config import Config
from tests.conftest import needs
from tests.support.paths import ROOT
from tests.support.proxy_process import command

MANIFESTS = ROOT / "config" / "kubernetes"
FOLDERS = ("replicas", "sidecar", "monitoring")
WITH_PROXY = ("replicas", "sidecar")
VERSIONS = ("1.29", "1.37")  # the oldest with native sidecars, and the newest with available schemas
MOUNTED = "/etc/sp-api-proxy"
TIMEOUTS = type(Config().timeouts)
Manifest = dict[str, Any]

PROXIES = ("replicas", "sidecar")


@pytest.fixture(scope="module", name="built")
def built_by_kustomize() -> dict[str, list[Manifest]]:
    """The output of `kubectl kustomize` for every folder."""
    kubectl = shutil.which("kubectl")
    needs(kubectl is not None, "kubectl")
    assert kubectl is not None
    built = {}
    for folder in FOLDERS:
        done = subprocess.run(
            [kubectl, "kustomize", MANIFESTS / folder], capture_output=True, check=False, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, ""), folder
        built[folder] = list(yaml.safe_load_all(done.stdout))
    return built


def named(built: list[Manifest], kind: str, name: str) -> Manifest:
    """Return the one manifest of a kind and a name."""
    (found,) = (each for each in built if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


def pods(built: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Yield the pod of every workload, with the workload's name."""
    for manifest in built:
        if manifest["kind"] in {"Deployment", "Job"}:
            yield manifest["metadata"]["name"], manifest["spec"]["template"]


def containers(pod: Manifest) -> list[Manifest]:
    """Return the containers of a pod, including sidecars."""
    return [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]


def proxies(built: list[Manifest]) -> list[tuple[Manifest, Manifest]]:
    """Return every proxy, as its pod and its container."""
    return [(pod, each) for _, pod in pods(built) for each in containers(pod) if each["name"] == "sp-api-proxy"]


def config_of(built: list[Manifest]) -> dict[str, Any]:
    """Return the proxy's configuration in a ConfigMap."""
    (text,) = (each["data"]["config.yaml"] for each in built if each["kind"] == "ConfigMap")
    settings: dict[str, Any] = yaml.safe_load(text)
    return settings


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


# As Kubernetes parses them.


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", WITH_PROXY)
def test_every_manifest_follows_the_schema_of_kubernetes(
    built: dict[str, list[Manifest]], folder: str, version: str
) -> None:
    assert len(built[folder]) > 2
    for manifest in built[folder]:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_the_pod_monitor_follows_the_schema_of_the_operator(built: dict[str, list[Manifest]]) -> None:
    from cloudcoil.models.prometheus_operator.v1 import PodMonitor  # noqa: PLC0415 - it takes seconds

    (monitor,) = built["monitoring"]
    # Unknown fields are dropped by the model.
    assert PodMonitor.model_validate(monitor).model_dump(by_alias=True, exclude_unset=True, mode="json") == monitor


def test_every_file_belongs_to_a_kustomization() -> None:
    for folder in FOLDERS:
        listed = yaml.safe_load((MANIFESTS / folder / "kustomization.yaml").read_text())
        generated = [name for each in listed.get("configMapGenerator", ()) for name in each["files"]]
        there = {path.name for path in (MANIFESTS / folder).iterdir()} - {"kustomization.yaml"}
        assert there == {*listed["resources"], *generated}, folder


# Settings of the proxy.


@pytest.mark.parametrize("folder", PROXIES)
async def test_the_configuration_is_valid_with_the_mounted_secrets(
    built: dict[str, list[Manifest]], folder: str, tmp_path: Path
) -> None:
    for number, (pod, proxy) in enumerate(proxies(built[folder])):
        root = tmp_path / str(number)
        mounted = {mount["name"]: mount["mountPath"] for mount in proxy["volumeMounts"]}
        for volume in pod["spec"]["volumes"]:
            where = root / Path(mounted[volume["name"]]).relative_to(MOUNTED)
            where.mkdir(parents=True)
            for name, text in files_of(volume, folder, built[folder]):
                (where / name).write_text(text.replace(MOUNTED, str(root)), encoding="utf-8")
                (where / name).chmod((volume.get("secret") or volume["configMap"])["defaultMode"])
        (said,) = (each["value"] for each in proxy["env"])
        path = str(root / Path(said).relative_to(MOUNTED))
        code, printed, errors = await command("check", environment={"SP_API_PROXY_CONFIG": path})
        assert (code, errors) == (0, ""), printed


def files_of(volume: Manifest, folder: str, built: list[Manifest]) -> Iterator[tuple[str, str]]:
    """Yield name and text of each file in a volume; secrets are made up for the keys in the folder's comment."""
    if "configMap" in volume:
        yield from named(built, "ConfigMap", volume["configMap"]["name"])["data"].items()
        return
    secret = volume["secret"]
    comment = (MANIFESTS / folder / "kustomization.yaml").read_text().replace("\\\n#", " ")
    (created,) = re.findall(rf"create secret generic {secret['secretName']} (.*)", comment)
    keys = re.findall(r"--from-literal=([\w.-]+)=", created)
    paths = {item["key"]: item["path"] for item in secret.get("items", [{"key": key, "path": key} for key in keys])}
    assert set(paths) <= set(keys)
    made_up = {"url": "redis://:made-up@127.0.0.1:6379/0", "key": "bWFkZS11cCwgYW5kIDMyIGJ5dGVzIGxvbmcuLi4uLi4="}
    for key, path in paths.items():
        yield path, made_up.get(key, f"made-up-{key}-0123456789")


@pytest.mark.parametrize("folder", WITH_PROXY)
def test_ports_and_probes_are_those_of_the_configuration(built: dict[str, list[Manifest]], folder: str) -> None:
    settings = config_of(built[folder])
    for _, proxy in proxies(built[folder]):
        ports = {port["name"]: port["containerPort"] for port in proxy["ports"]}
        assert ports["proxy-health"] == port_of(settings["health"])
        assert ports.get("http", port_of(settings["listen"])) == port_of(settings["listen"])
        probes = [probe["httpGet"] for name, probe in proxy.items() if name.endswith("Probe")]
        assert len(probes) > 1
        assert {probe["port"] for probe in probes} == {"proxy-health"}
        assert {probe["path"] for probe in probes} <= {"/startupz", "/readyz", "/livez"}


def test_a_sidecar_uses_no_port_that_its_pod_is_likely_to_need(built: dict[str, list[Manifest]]) -> None:
    settings = config_of(built["sidecar"])
    taken = {port_of(settings[name]) for name in ("listen", "admin", "health")}
    assert len(taken) == 3
    assert not taken & {3000, 5000, 8000, 8080, 8081, 8443, 9090, 9091}
    for _, pod in pods(built["sidecar"]):
        (app,) = pod["spec"]["containers"]
        assert {each["name"]: each["value"] for each in app["env"]}["SP_API_BASE_URL"].endswith(settings["listen"])


def test_a_sidecar_is_native_and_ready_before_containers_that_need_it(built: dict[str, list[Manifest]]) -> None:
    found = proxies(built["sidecar"])
    assert len(found) == 2
    for pod, proxy in found:
        assert pod["spec"]["initContainers"] == [proxy]
        assert proxy["restartPolicy"] == "Always"
        assert proxy["startupProbe"]["httpGet"]["path"] == "/readyz"


@pytest.mark.parametrize("folder", WITH_PROXY)
def test_the_grace_period_covers_the_shutdown_timeout(built: dict[str, list[Manifest]], folder: str) -> None:
    def seconds(name: str, otherwise: str) -> float:
        return float(config_of(built[folder]).get("timeouts", {}).get(name, otherwise).removesuffix("s"))

    for pod, _ in proxies(built[folder]):
        needed = seconds("shutdown", f"{TIMEOUTS().shutdown}s") + seconds("shutdown_delay", "0s")
        assert pod["spec"]["terminationGracePeriodSeconds"] > needed


@pytest.mark.parametrize("folder", WITH_PROXY)
def test_the_image_is_that_of_this_version(built: dict[str, list[Manifest]], folder: str) -> None:
    assert {proxy["image"] for _, proxy in proxies(built[folder])} == {
        f"registry.example.com/sp-api-proxy:{__version__}"
    }


# Privileges: the Pod Security Standard `restricted`, and more.


@pytest.mark.parametrize("folder", WITH_PROXY)
def test_every_container_has_minimal_privileges(built: dict[str, list[Manifest]], folder: str) -> None:
    for name, pod in pods(built[folder]):
        spec, whole = pod["spec"], pod["spec"]["securityContext"]
        assert spec["automountServiceAccountToken"] is False, name
        assert (whole["runAsNonRoot"], whole["seccompProfile"]) == (True, {"type": "RuntimeDefault"}), name
        for container in containers(pod):
            rights = {**whole, **container["securityContext"]}
            assert rights["runAsUser"] > 0, name
            assert not rights["allowPrivilegeEscalation"], name
            assert rights["readOnlyRootFilesystem"], name
            assert rights["capabilities"] == {"drop": ["ALL"]}, name
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), name
            assert "memory" in container["resources"]["limits"], name


@pytest.mark.parametrize("folder", WITH_PROXY)
def test_secrets_are_read_by_the_proxys_group_alone(built: dict[str, list[Manifest]], folder: str) -> None:
    for pod, proxy in proxies(built[folder]):
        rights = {**pod["spec"]["securityContext"], **proxy["securityContext"]}
        assert (rights["runAsUser"], rights["fsGroup"]) == (65532, 65532)
        secrets = [volume for volume in pod["spec"]["volumes"] if "secret" in volume]
        assert secrets
        assert {volume["secret"]["defaultMode"] for volume in secrets} == {0o440}
        hidden = {volume["name"] for volume in secrets}
        others = [each for each in containers(pod) if each is not proxy]
        assert not [each for each in others for mount in each.get("volumeMounts", ()) if mount["name"] in hidden]
        assert all(mount["readOnly"] and "subPath" not in mount for mount in proxy["volumeMounts"])


# References.


def test_every_selector_matches_a_pod(built: dict[str, list[Manifest]]) -> None:
    labels = [pod["metadata"]["labels"] for folder in WITH_PROXY for _, pod in pods(built[folder])]
    selectors = [
        *(each["spec"]["selector"] for each in built["replicas"] if each["kind"] == "Service"),
        *(each["spec"]["podSelector"]["matchLabels"] for each in built["replicas"] if each["kind"] == "NetworkPolicy"),
        named(built["replicas"], "PodDisruptionBudget", "sp-api-proxy")["spec"]["selector"]["matchLabels"],
        built["monitoring"][0]["spec"]["selector"]["matchLabels"],
    ]
    assert len(selectors) == 6
    for selector in selectors:
        assert [one for one in labels if selector.items() <= one.items()], selector


def test_every_port_name_exists(built: dict[str, list[Manifest]]) -> None:
    there = {port["name"] for _, pod in pods(built["replicas"]) for c in containers(pod) for port in c["ports"]}
    services = {port["targetPort"] for e in built["replicas"] if e["kind"] == "Service" for port in e["spec"]["ports"]}
    policies = [each["spec"] for each in built["replicas"] if each["kind"] == "NetworkPolicy"]
    let_in = {port["port"] for policy in policies for rule in policy["ingress"] for port in rule["ports"]}
    scraped = {endpoint["port"] for endpoint in built["monitoring"][0]["spec"]["podMetricsEndpoints"]}
    assert services == {"http", "redis"}
    assert services | let_in | scraped <= there


def test_the_proxy_can_reach_dns_amazon_and_redis_only(built: dict[str, list[Manifest]]) -> None:
    policy = named(built["replicas"], "NetworkPolicy", "sp-api-proxy")["spec"]
    assert sorted({port["port"] for rule in policy["egress"] for port in rule["ports"]}) == [53, 443, 6379]
    blocks = [to["ipBlock"] for rule in policy["egress"] for to in rule["to"] if "ipBlock" in to]
    assert {block["cidr"] for block in blocks} == {"0.0.0.0/0", "::/0"}
    assert "169.254.0.0/16" in blocks[0]["except"]
    assert all("from" in rule for rule in policy["ingress"])
    assert "egress" not in named(built["replicas"], "NetworkPolicy", "sp-api-proxy-redis")["spec"]


def test_there_are_three_replicas_and_some_are_always_available(built: dict[str, list[Manifest]]) -> None:
    deployment = named(built["replicas"], "Deployment", "sp-api-proxy")["spec"]
    assert deployment["replicas"] == 3
    assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert named(built["replicas"], "PodDisruptionBudget", "sp-api-proxy")["spec"]["maxUnavailable"] == 1


def test_the_proxy_accepts_the_host_names_of_its_service(built: dict[str, list[Manifest]]) -> None:
    service = named(built["replicas"], "Service", "sp-api-proxy")["metadata"]
    name, namespace = service["name"], service["namespace"]
    names = [name, f"{name}.{namespace}", f"{name}.{namespace}.svc", f"{name}.{namespace}.svc.cluster.local"]
    assert config_of(built["replicas"])["allowed_hosts"] == names
