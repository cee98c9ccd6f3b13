"""The demonstration for docker compose: valid, closed to other machines, wired together, and monitored."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from eci_pay.messages import Destination
from tests.dockerfile import PORT, ROOT
from tests.manifests import BASE, OUR_IMAGE, one
from tests.test_deploy_kubernetes import VERSION, settings_of, slowest_charge_seconds

FILE = ROOT / "docker-compose.yml"
OBSERVABILITY = ROOT / "deploy" / "observability"
COMPOSE: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"].startswith(OUR_IMAGE)}


def mounted(service: str) -> dict[str, Path]:
    """The files of the checkout that a service sees, by where it sees them."""
    found = [volume.split(":") for volume in SERVICES[service]["volumes"] if volume.startswith("./")]
    assert all(mode == "ro" for _, _, mode in found)
    return {target: ROOT / source for source, target, _ in found}


def test_the_file_is_what_the_compose_specification_allows() -> None:
    program = str(Path(sys.executable).parent / "check-jsonschema")
    done = subprocess.run(
        [program, "--builtin-schema", "vendor.compose-spec", str(FILE)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_what_services_wait_for_and_keep_is_there() -> None:
    for service in SERVICES.values():
        waited_for = service.get("depends_on", {})
        assert set(waited_for) <= set(SERVICES)
        for name in waited_for:
            if isinstance(waited_for, dict) and waited_for[name]["condition"] == "service_healthy":
                assert SERVICES[name]["healthcheck"]["test"]
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith("./") else source in COMPOSE["volumes"]


def test_only_this_machine_reaches_it_and_the_api_where_the_readme_says() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published["payment-service"] == [f"127.0.0.1:8086:{PORT}"]
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert "payment-db" not in published


def test_that_access_is_not_controlled_is_said_at_the_top() -> None:
    assert SERVICES["payment-service"]["environment"]["ECI_PAY_AUTH"] == "off"
    head = FILE.read_text(encoding="utf-8").partition("\nname:")[0]
    assert "ECI_PAY_AUTH=off" in head


def test_our_containers_may_write_nothing_but_under_tmp() -> None:
    assert set(OURS) == {"payment-service", "migrate", "peers"}
    for service in OURS.values():
        assert service["image"] == f"{OUR_IMAGE}:{VERSION}"
        assert (service["read_only"], service["tmpfs"], service["cap_drop"]) == (True, ["/tmp"], ["ALL"])


def test_the_image_is_built_once_and_asked_of_no_registry() -> None:
    builds = {name: service["build"] for name, service in OURS.items() if "build" in service}
    assert builds == {"payment-service": {"context": ".", "args": {"VERSION": VERSION}}}
    assert {OURS[name].get("pull_policy") for name in set(OURS) - set(builds)} == {"never"}


def test_the_schema_is_there_before_the_service() -> None:
    waits = {name: each["condition"] for name, each in SERVICES["payment-service"]["depends_on"].items()}
    assert waits["migrate"] == "service_completed_successfully"
    assert SERVICES["migrate"]["command"] == ["migrate"]
    assert SERVICES["migrate"]["depends_on"] == {"payment-db": {"condition": "service_healthy"}}


def test_the_service_and_the_migration_connect_as_roles_that_the_database_is_made_with() -> None:
    database = SERVICES["payment-db"]["environment"]
    serves, migrates = (
        urlsplit(SERVICES[name]["environment"]["DATABASE_URL"]) for name in ("payment-service", "migrate")
    )
    assert (migrates.username, migrates.password) == (database["POSTGRES_USER"], database["POSTGRES_PASSWORD"])
    assert serves.username == SERVICES["migrate"]["environment"]["ECI_PAY_SERVICE_ROLE"]
    assert serves.password == database["SERVICE_PASSWORD"]
    assert serves.path == migrates.path == f"/{database['POSTGRES_DB']}"
    assert {serves.hostname, migrates.hostname} <= set(SERVICES)
    script = mounted("payment-db")["/docker-entrypoint-initdb.d/service-role.sh"].read_text(encoding="utf-8")
    assert f"CREATE ROLE {serves.username} " in script
    image = one(BASE, "StatefulSet", "payment-db")["spec"]["template"]["spec"]["containers"][0]["image"]
    assert SERVICES["payment-db"]["image"] == image


def test_each_peer_is_where_the_service_looks_for_it() -> None:
    command = SERVICES["peers"]["command"]
    first = int(command[command.index("--port") + 1])
    for number, peer in enumerate(Destination):
        url = SERVICES["payment-service"]["environment"][f"{peer.upper()}_SERVICE_URL"]
        assert url == f"http://peers:{first + number}"


def test_the_service_has_time_for_its_slowest_charge() -> None:
    # Its settings are those of the manifests as far as times are concerned: the defaults.
    seconds = int(SERVICES["payment-service"]["stop_grace_period"].removesuffix("s"))
    assert seconds > slowest_charge_seconds(settings_of(BASE))


def test_prometheus_scrapes_the_service_by_the_name_that_the_alerts_want(tmp_path: Path) -> None:
    files = mounted("prometheus")
    ours, usual = (
        yaml.safe_load(file.read_text(encoding="utf-8"))
        for file in (files["/etc/prometheus/prometheus.yml"], OBSERVABILITY / "prometheus.yml")
    )
    assert ours["scrape_configs"][0].pop("static_configs") == [{"targets": [f"payment-service:{PORT}"]}]
    del usual["scrape_configs"][0]["static_configs"]
    assert ours == usual
    for target, file in files.items():
        shutil.copy(file, tmp_path / Path(target).name)
    promtool("check", "config", str(tmp_path / "prometheus.yml"))


def test_prometheus_takes_the_configuration_for_kubernetes(tmp_path: Path) -> None:
    configuration = yaml.safe_load((OBSERVABILITY / "prometheus-kubernetes.yml").read_text(encoding="utf-8"))
    (job,) = configuration["scrape_configs"]
    (discovery,) = job.pop("kubernetes_sd_configs")
    pods = one(BASE, "Deployment")["spec"]["template"]
    assert discovery["selectors"] == [{"role": "pod", "label": f"app={pods['metadata']['labels']['app']}"}]
    port, *_ = job["relabel_configs"]
    assert port["regex"] == pods["spec"]["containers"][0]["ports"][0]["name"]
    assert (job["job_name"], set(job["authorization"])) == ("eci-pay", {"credentials_file"})
    # Debian's promtool is built without the discovery of pods; nor are the files there that are in Prometheus' own pod.
    job["static_configs"] = []
    file = tmp_path / "prometheus.json"  # which is YAML, too
    file.write_text(json.dumps(configuration), encoding="utf-8")
    promtool("check", "config", "--syntax-only", str(file))


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    files = mounted("grafana")
    provisioning = files["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text(encoding="utf-8"))[
        "datasources"
    ]
    assert (source["type"], urlsplit(source["url"]).hostname) == ("prometheus", "prometheus")
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "eci-pay.yml").read_text(encoding="utf-8"))["providers"]
    shown = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert shown.parent == Path(provider["options"]["path"])
    assert json.loads(files[str(shown)].read_text(encoding="utf-8"))["title"] == "eci-pay"


def promtool(*arguments: str) -> None:
    """Runs it; fails with what it says."""
    if (command := shutil.which("promtool")) is None:
        pytest.skip("promtool, of Debian's package prometheus, is not installed")
    done = subprocess.run([command, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
