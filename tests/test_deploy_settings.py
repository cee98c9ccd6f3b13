"""What the environment is called, wherever it stands: in the code, the README, the image, compose and Kubernetes."""

import re
from collections.abc import Iterator

import pytest

from eci_pay.settings import Settings, load_settings
from server.run import MULTIPROCESS_DIRECTORY
from tests.dockerfile import ROOT, Stage, stages
from tests.manifests import BASE, HA, KUSTOMIZATIONS, MINIKUBE, containers, examples, one, pod_templates
from tests.test_deploy_compose import OURS

KNOWN = {name.upper() for name in Settings.model_fields}
PYTHONS_OWN = {"PATH", "PYTHONDONTWRITEBYTECODE"}
OF_THE_SAMPLES = {"ECI_PAY_URL"}
"""Where the scripts of sample_requests find a server."""
DOCUMENTS = ["README.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md")))]


def table_of_settings() -> set[str]:
    """The variables that the README's table has; `..._FILE` stands for the one before it with that ending."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Settings\n")[2].partition("\n## ")[0]
    found: set[str] = set()
    for cell in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE):
        names = re.findall(r"`([^`]+)`", cell)
        found |= {names[0] + name.removeprefix("...") if name.startswith("...") else name for name in names}
    return found


def final_stage() -> Stage:
    """That of the image itself."""
    return stages()[-1]


def environments() -> Iterator[tuple[str, dict[str, str]]]:
    """What our containers are started with, by where that stands; the Secrets' values are those of the examples."""
    for name, service in OURS.items():
        yield f"docker-compose.yml {name}", service.get("environment", {})
    for kustomization in KUSTOMIZATIONS:
        for app, template in pod_templates(kustomization).items():
            if app == "payment-db":
                continue
            (container,) = containers(template)
            environment: dict[str, str] = {}
            for source in container.get("envFrom", ()):
                environment |= one(kustomization, "ConfigMap", source["configMapRef"]["name"])["data"]
            for variable in container["env"]:
                environment[variable["name"]] = variable.get("value") or example(kustomization, variable["valueFrom"])
            yield f"{kustomization} {app}", environment


def example(kustomization: str, source: dict[str, dict[str, str]]) -> str:
    """The example's value; what CloudNativePG makes has none."""
    reference = source["secretKeyRef"]
    secrets = examples(kustomization)
    if reference["name"] not in secrets:
        return "postgresql://eci_pay:made@payment-db-rw:5432/payments"
    return str(secrets[reference["name"]]["stringData"][reference["key"]])


def test_every_setting_is_in_the_readmes_table_and_nothing_else() -> None:
    assert table_of_settings() == KNOWN


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_no_variable_that_nobody_reads(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert set(re.findall(r"\bECI_PAY_[A-Z_]*[A-Z]\b", text)) <= KNOWN | OF_THE_SAMPLES


def test_the_image_sets_nothing_that_is_read() -> None:
    names = set(re.findall(r"(\w+)=", " ".join(final_stage().all("ENV"))))
    assert names == PYTHONS_OWN
    assert not names & (KNOWN | {MULTIPROCESS_DIRECTORY})


def test_containers_are_started_with_settings_that_are_known_and_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    started = dict(environments())
    assert len(started) == len(OURS) + 2 * len(KUSTOMIZATIONS)
    assert {where: set(environment) - KNOWN for where, environment in started.items()} == {
        where: set() for where in started
    }
    for where, environment in started.items():
        with monkeypatch.context() as patched:
            for name in KNOWN:
                patched.delenv(name, raising=False)
            for name, text in environment.items():
                patched.setenv(name, text)
            assert (load_settings().database_url is None) == where.endswith(" peers")


@pytest.mark.parametrize("kustomization", [BASE, MINIKUBE, HA])
def test_the_services_are_told_but_in_minikube_where_they_are_not(kustomization: str) -> None:
    urls = {name for name in one(kustomization, "ConfigMap")["data"] if name.endswith("_SERVICE_URL")}
    told = {"ORDER_SERVICE_URL", "INVENTORY_SERVICE_URL", "NOTIFICATION_SERVICE_URL"}
    assert urls == (set() if kustomization == MINIKUBE else told)


def test_the_example_of_stripes_secrets_has_the_files_that_the_configuration_speaks_of() -> None:
    text = (ROOT / "k8s" / "configmap.yaml").read_text(encoding="utf-8")
    spoken_of = dict(re.findall(r"(ECI_PAY_STRIPE_\w+_FILE): /run/secrets/payment-gateway/(\w+)", text))
    assert set(spoken_of) == {name for name in KNOWN if re.fullmatch("ECI_PAY_STRIPE_.*_FILE", name)}
    assert set(spoken_of.values()) == set(examples(BASE)["payment-gateway"]["stringData"])
