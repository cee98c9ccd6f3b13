"""The Kubernetes manifests: valid for the API, safe to roll out, to drain and to reach, and true to the settings."""

import ipaddress
import json
import re
import tomllib
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import jsonschema_rs
import kubernetes_validate
import pytest
import yaml

from eci_pay.database import ANSWER_MARGIN_SECONDS
from eci_pay.settings import Settings
from server.routes import ROUTES
from tests.dockerfile import PORT, stages
from tests.manifests import (
    BASE,
    HA,
    KUSTOMIZATIONS,
    MINIKUBE,
    OUR_IMAGE,
    ROOT,
    Object,
    containers,
    examples,
    of_kind,
    one,
    pod_templates,
    rendered,
    server,
)

OPERATOR_GROUP = "postgresql.cnpg.io/v1"
NEWEST = ".".join(kubernetes_validate.latest_version().split(".")[:2])
TAKEN_BY = [("1.25", (BASE, MINIKUBE)), ("1.27", (HA,)), (NEWEST, KUSTOMIZATIONS)]
"""The oldest with schemas here, the oldest whose PodDisruptionBudgets let pods go that are not ready, the newest."""
POSTGRESQL_CONNECTIONS_MAX, POSTGRESQL_RESERVED = 100, 3
"""PostgreSQL's defaults: max_connections, superuser_reserved_connections."""
OPERATORS_OWN_SECRETS = {"payment-db-app"}
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

every_kustomization = pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)


def settings_of(kustomization: str) -> Settings:
    """The settings of a server, as its ConfigMap and the defaults have them."""
    return Settings.model_validate(
        {name.lower(): text for name, text in one(kustomization, "ConfigMap")["data"].items()}
    )


def slowest_charge_seconds(settings: Settings) -> float:
    """How long a charge may take from its request to its end: a place at the gateway, the latest moment at which it is
    sent, the gateway's answer, and booking that, the last try of which may still wait for a connection and a statement.
    """
    return (
        settings.eci_pay_gateway_wait_seconds
        + settings.eci_pay_send_deadline_seconds
        + settings.eci_pay_gateway_timeout_seconds
        + settings.eci_pay_settle_retry_seconds
        + settings.eci_pay_database_pool_timeout_seconds
        + settings.eci_pay_statement_timeout_seconds
        + ANSWER_MARGIN_SECONDS
    )


def check(resource: Object, version: str) -> None:
    """Raises ValidationError for what that version of Kubernetes would not take."""
    kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize(("version", "kustomizations"), TAKEN_BY)
def test_kubernetes_takes_every_object(version: str, kustomizations: tuple[str, ...]) -> None:
    objects = [each for name in kustomizations for each in (*rendered(name), *examples(name).values())]
    different = {json.dumps(each, sort_keys=True): each for each in objects}
    for each in different.values():
        if each["apiVersion"] != OPERATOR_GROUP:
            check(each, version)


def test_a_field_that_kubernetes_does_not_know_would_be_noticed() -> None:
    wrong = one(BASE, "Service") | {"spec": {**one(BASE, "Service")["spec"], "clusterIp": "None"}}
    with pytest.raises(kubernetes_validate.ValidationError, match="clusterIp"):
        check(wrong, NEWEST)


def test_cloudnative_pg_takes_its_resources() -> None:
    schemas = yaml.safe_load((ROOT / "tests" / "cloudnative_pg.yml").read_text(encoding="utf-8"))
    resources = [each for each in rendered(HA) if each["apiVersion"] == OPERATOR_GROUP]
    assert {each["kind"] for each in resources} == set(schemas)
    for each in resources:
        jsonschema_rs.validator_for(schemas[each["kind"]]).validate(each["spec"])
    template = one(HA, "Pooler", "payment-db-pooler")["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pooler"}, "spec": template["spec"]}
    check(pod, NEWEST)


@every_kustomization
def test_the_service_leads_to_the_servers_alone(kustomization: str) -> None:
    service = one(kustomization, "Service")["spec"]
    pods = pod_templates(kustomization)
    led_to = [app for app, template in pods.items() if matches(service["selector"], template["metadata"]["labels"])]
    assert led_to == ["payment-service"]
    (port,) = service["ports"]
    assert port["port"] == 80
    listening = {each["name"]: each["containerPort"] for each in server(kustomization)["ports"]}
    assert listening[port["targetPort"]] == int(PORT)
    assert service.get("type", "ClusterIP") == ("NodePort" if kustomization == MINIKUBE else "ClusterIP")


@every_kustomization
def test_a_server_listens_where_the_image_says_and_is_asked_on_paths_that_there_are(kustomization: str) -> None:
    serving = server(kustomization)
    assert serving["args"] == ["serve", "--host", "0.0.0.0", "--port", stages()[-1].one("EXPOSE")]
    probes = {name: serving[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    paths = {name: probe["path"] for name, probe in probes.items()}
    assert paths == {"startup": "/health/startup", "readiness": "/health/ready", "liveness": "/health/live"}
    assert {probe["port"] for probe in probes.values()} == {"http"}
    assert set(paths.values()) <= {route.path for route in ROUTES}


@every_kustomization
def test_a_server_that_is_stopped_has_time_for_its_slowest_charge(kustomization: str) -> None:
    settings = settings_of(kustomization)
    spec = pod_templates(kustomization)["payment-service"]["spec"]
    *_, pause = server(kustomization)["lifecycle"]["preStop"]["exec"]["command"]
    pause_seconds = float(pause.removeprefix("import time; time.sleep(").removesuffix(")"))
    longest = max(slowest_charge_seconds(settings), settings.eci_pay_shutdown_timeout_seconds)
    assert spec["terminationGracePeriodSeconds"] > pause_seconds + longest


@every_kustomization
def test_either_the_deployment_or_the_autoscaler_says_how_many_servers_there_are(kustomization: str) -> None:
    deployment = one(kustomization, "Deployment")
    scalers = of_kind(kustomization, "HorizontalPodAutoscaler")
    assert set(scalers) == ({"payment-service"} if kustomization == HA else set())
    assert ("replicas" in deployment["spec"]) == (not scalers)
    for scaler in scalers.values():
        target = {"apiVersion": deployment["apiVersion"], "kind": "Deployment", "name": "payment-service"}
        assert scaler["spec"]["scaleTargetRef"] == target
        assert "cpu" in server(kustomization)["resources"]["requests"]  # of which its target is a share
    assert servers(kustomization)[0] >= 2


def servers(kustomization: str) -> tuple[int, int]:
    """How many there are, at least and at most, while none is replaced."""
    scalers = of_kind(kustomization, "HorizontalPodAutoscaler")
    if scalers:
        spec = scalers["payment-service"]["spec"]
        return spec["minReplicas"], spec["maxReplicas"]
    replicas = one(kustomization, "Deployment")["spec"]["replicas"]
    return replicas, replicas


@every_kustomization
def test_a_node_can_be_drained_without_the_last_server_going(kustomization: str) -> None:
    (budget,) = of_kind(kustomization, "PodDisruptionBudget").values()
    assert budget["spec"]["selector"] == one(kustomization, "Deployment")["spec"]["selector"]
    assert 0 < budget["spec"]["maxUnavailable"] < servers(kustomization)[0]
    assert "minAvailable" not in budget["spec"]


def test_servers_that_miss_the_database_do_not_hold_the_node_that_it_has_to_leave() -> None:
    assert one(HA, "PodDisruptionBudget")["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


@every_kustomization
def test_a_roll_out_takes_no_server_away_before_another_is_ready(kustomization: str) -> None:
    strategy = one(kustomization, "Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxUnavailable": 0, "maxSurge": 1}
    spread = pod_templates(kustomization)["payment-service"]["spec"]["topologySpreadConstraints"]
    selector = one(kustomization, "Deployment")["spec"]["selector"]
    assert {each["topologyKey"] for each in spread} == {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}
    # Else the last node that is left could take none.
    assert all((each["labelSelector"], each["whenUnsatisfiable"]) == (selector, "ScheduleAnyway") for each in spread)


@every_kustomization
def test_each_release_has_a_migration_of_its_own(kustomization: str) -> None:
    (job,) = of_kind(kustomization, "Job").values()
    assert job["metadata"]["name"] == f"payment-migrate-{VERSION.replace('.', '-')}"
    ours = [each for template in pod_templates(kustomization).values() for each in containers(template)]
    images = [each["image"] for each in ours if each["image"].startswith(OUR_IMAGE)]
    assert images == [f"{OUR_IMAGE}:{VERSION}"] * 2
    assert pod_templates(kustomization)["payment-migrate"]["spec"]["containers"][0]["args"] == ["migrate"]


@pytest.mark.parametrize(
    "file", ["Dockerfile", "README.md", "docker-compose.yml", "deploy/overlays/minikube/kustomization.yaml"]
)
def test_who_builds_the_image_is_told_the_name_that_the_manifests_have(file: str) -> None:
    named = re.findall(rf"\b{OUR_IMAGE}:(\d[\w.]*\w)", (ROOT / file).read_text(encoding="utf-8"))
    assert set(named) == {VERSION}


@every_kustomization
def test_the_servers_connect_as_a_role_to_which_the_migration_as_another_grants(kustomization: str) -> None:
    (migrate,) = pod_templates(kustomization)["payment-migrate"]["spec"]["containers"]
    environment = {each["name"]: each for each in migrate["env"]}
    secret = {each["name"]: each for each in server(kustomization)["env"]}["DATABASE_URL"]["valueFrom"]["secretKeyRef"]
    url = urlsplit(examples(kustomization)[secret["name"]]["stringData"][secret["key"]])
    assert url.username == environment["ECI_PAY_SERVICE_ROLE"]["value"]
    owners = environment["DATABASE_URL"]["valueFrom"]["secretKeyRef"]
    assert owners["name"] != secret["name"]
    if kustomization == HA:
        cluster = one(HA, "Cluster", "payment-db")
        assert url.hostname == one(HA, "Pooler", "payment-db-pooler")["metadata"]["name"]
        assert owners == {"name": "payment-db-app", "key": "uri"}
        assert url.path == f"/{cluster['spec']['bootstrap']['initdb']['database']}"
        (role,) = cluster["spec"]["managed"]["roles"]
        password = examples(HA)[role["passwordSecret"]["name"]]["stringData"]
        assert (role["name"], password) == (url.username, {"username": url.username, "password": url.password})
    else:
        migrates_as = urlsplit(examples(kustomization)[owners["name"]]["stringData"][owners["key"]])
        made_with = examples(kustomization)["payment-db"]["stringData"]
        assert made_with == {"POSTGRES_PASSWORD": migrates_as.password, "SERVICE_PASSWORD": url.password}
        assert (url.hostname, url.path) == (migrates_as.hostname, migrates_as.path) == ("payment-db", "/payments")
        assert (
            f"CREATE ROLE {url.username} "
            in one(kustomization, "ConfigMap", "payment-db-init")["data"]["service-role.sh"]
        )


@every_kustomization
def test_no_secret_comes_with_the_manifests_and_each_one_that_they_want_has_an_example(kustomization: str) -> None:
    assert of_kind(kustomization, "Secret") == {}
    known = examples(kustomization)
    for template in pod_templates(kustomization).values():
        for variable in [each for container in containers(template) for each in container.get("env", ())]:
            reference = variable.get("valueFrom", {}).get("secretKeyRef")
            if reference and reference["name"] not in OPERATORS_OWN_SECRETS:
                assert reference["key"] in known[reference["name"]]["stringData"]
        for volume in template["spec"].get("volumes", ()):
            if "secret" in volume and not volume["secret"].get("optional"):
                assert volume["secret"]["secretName"] in known


@every_kustomization
def test_the_database_has_connections_enough_for_all_servers(kustomization: str) -> None:
    surge = one(kustomization, "Deployment")["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
    wanted = (servers(kustomization)[1] + surge) * settings_of(kustomization).eci_pay_database_pool_size
    one_more = 1  # the migration's, or what an operator runs
    if kustomization == HA:
        cluster, pooler = one(HA, "Cluster", "payment-db"), one(HA, "Pooler", "payment-db-pooler")
        limits = {name: int(text) for name, text in pooler["spec"]["pgbouncer"]["parameters"].items()}
        assert wanted <= limits["max_client_conn"]
        poolers = pooler["spec"]["instances"] + 1  # while one is replaced
        allowed = int(cluster["spec"]["postgresql"]["parameters"]["max_connections"])
        assert poolers * limits["default_pool_size"] + one_more <= allowed - POSTGRESQL_RESERVED
    else:
        assert wanted + one_more <= POSTGRESQL_CONNECTIONS_MAX - POSTGRESQL_RESERVED


def test_a_pooler_in_transaction_mode_carries_what_the_servers_prepare() -> None:
    pgbouncer = one(HA, "Pooler", "payment-db-pooler")["spec"]["pgbouncer"]
    assert pgbouncer["poolMode"] == "transaction"
    statements = len(list((ROOT / "sql").glob("*.sql")))
    assert settings_of(HA).eci_pay_prepare_statements
    assert int(pgbouncer["parameters"]["max_prepared_statements"]) >= statements


def test_the_pooler_finds_a_new_primary_as_soon_as_the_runbook_says() -> None:
    runbook = (ROOT / "docs" / "OPERATIONS.md").read_text(encoding="utf-8").partition("### Behind PgBouncer")[2]
    told = dict(re.findall(r"^(\w+) = (\d+)", runbook.partition("[pgbouncer]")[2].partition("```")[0], re.MULTILINE))
    parameters = one(HA, "Pooler", "payment-db-pooler")["spec"]["pgbouncer"]["parameters"]
    for name in ("server_login_retry", "server_connect_timeout", "query_wait_timeout", "max_prepared_statements"):
        assert parameters[name] == told[name]


def test_the_role_has_the_bounds_that_a_pooler_drops() -> None:
    settings = settings_of(HA)
    made = one(HA, "Cluster", "payment-db")["spec"]["bootstrap"]["initdb"]["postInitSQL"]
    for name in ("lock_timeout", "statement_timeout"):
        seconds = getattr(settings, f"eci_pay_{name}_seconds")
        assert f"ALTER ROLE eci_pay_service SET {name} = '{seconds:.0f}s'" in made


def test_no_committed_payment_is_lost_with_one_server_of_the_database() -> None:
    spec = one(HA, "Cluster", "payment-db")["spec"]
    assert spec["instances"] == 3
    assert spec["postgresql"]["synchronous"] == {"method": "any", "number": 1, "dataDurability": "required"}
    assert spec["affinity"]["podAntiAffinityType"] == "required"
    assert of_kind(HA, "StatefulSet") == {}


@every_kustomization
def test_access_is_controlled(kustomization: str) -> None:
    assert one(kustomization, "ConfigMap")["data"]["ECI_PAY_AUTH"] == "on"


@every_kustomization
def test_pods_keep_to_the_restricted_pod_security_standard(kustomization: str) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted, and beyond it a root file system
    that is read-only and no token of the API server."""
    templates = pod_templates(kustomization)
    assert set(templates) == {"payment-service", "payment-migrate", *([] if kustomization == HA else ["payment-db"])}
    for template in templates.values():
        spec = template["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        kinds = {kind for volume in spec.get("volumes", ()) for kind in volume if kind != "name"}
        assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        for container in containers(template):
            own = container["securityContext"]
            expected = {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert own == expected
            assert not any("hostPort" in port for port in container.get("ports", ()))
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert "memory" in container["resources"]["limits"]


@every_kustomization
def test_a_server_runs_as_the_images_user_and_may_write_under_tmp(kustomization: str) -> None:
    spec = pod_templates(kustomization)["payment-service"]["spec"]
    user, _, group = stages()[-1].one("USER").partition(":")
    assert (spec["securityContext"]["runAsUser"], spec["securityContext"]["runAsGroup"]) == (int(user), int(group))
    (mount,) = [each for each in server(kustomization)["volumeMounts"] if each["mountPath"] == "/tmp"]
    (volume,) = [each for each in spec["volumes"] if each["name"] == mount["name"]]
    assert "emptyDir" in volume


# Who may talk to whom.

SERVER, MIGRATION, DATABASE = {"app": "payment-service"}, {"app": "payment-migrate"}, {"app": "payment-db"}
# As CloudNativePG labels them: a pooler's pods have their cluster's name, too.
CLUSTER = {"cnpg.io/cluster": "payment-db", "cnpg.io/podRole": "instance"}
POOLER = {"cnpg.io/poolerName": "payment-db-pooler", "cnpg.io/cluster": "payment-db", "cnpg.io/podRole": "pooler"}
ORDER_SERVICE, CHECKOUT = {"app": "order-service"}, {"app": "checkout"}
OURS, KUBE_SYSTEM, MONITORING, OPERATOR, ELSEWHERE = "ours", "kube-system", "monitoring", "cnpg-system", "elsewhere"
INTERNET = "203.0.113.7"

Pod = tuple[str, dict[str, str]]
"""Its namespace and its labels."""


def matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Whether labels have all that is selected."""
    return selector.items() <= labels.items()


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """As `matches`, for selectors with expressions; only `In` is known here."""
    expressions = selector.get("matchExpressions", ())
    assert all(each["operator"] == "In" for each in expressions)
    return matches(selector.get("matchLabels", {}), labels) and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )


def is_meant(peer: Object, who: Pod | str) -> bool:
    """Whether a rule's `from` or `to` means this pod, or this address."""
    if isinstance(who, str):
        block = peer.get("ipBlock", {"cidr": "0.0.0.0/32"})
        address = ipaddress.ip_address(who)
        exceptions = [ipaddress.ip_network(network) for network in block.get("except", ())]
        return address in ipaddress.ip_network(block["cidr"]) and not any(address in each for each in exceptions)
    namespace, labels = who
    if "ipBlock" in peer:
        return False
    namespaces = peer.get("namespaceSelector")
    in_reach = (
        namespace == OURS if namespaces is None else selects(namespaces, {"kubernetes.io/metadata.name": namespace})
    )
    return in_reach and selects(peer.get("podSelector", {}), labels)


def is_let(policies: Iterable[Object], direction: str, pod: Pod | str, other: Pod | str, port: int) -> bool:
    """Whether the pod's policies let this pass, all rules of all of them together; nobody else's bind an address."""
    if isinstance(pod, str) or pod[0] != OURS:
        return True
    binding = [
        policy["spec"]
        for policy in policies
        if selects(policy["spec"]["podSelector"], pod[1]) and direction in policy["spec"]["policyTypes"]
    ]
    rules: list[Any] = [rule for spec in binding for rule in spec.get(direction.lower(), ())]
    side = "from" if direction == "Ingress" else "to"
    return not binding or any(
        (side not in rule or any(is_meant(peer, other) for peer in rule[side]))
        and ("ports" not in rule or port in [each["port"] for each in rule["ports"]])
        for rule in rules
    )


def may_connect(kustomization: str, source: Pod | str, target: Pod | str, port: int) -> bool:
    """Whether both sides' policies let it."""
    policies = of_kind(kustomization, "NetworkPolicy").values()
    return is_let(policies, "Egress", source, target, port) and is_let(policies, "Ingress", target, source, port)


DNS: Pod = (KUBE_SYSTEM, {"k8s-app": "kube-dns"})
PROMETHEUS: Pod = (MONITORING, {"app": "prometheus"})


@every_kustomization
def test_the_servers_reach_what_they_need_and_are_reached_by_who_needs_them(kustomization: str) -> None:
    server_pod, migration = (OURS, SERVER), (OURS, MIGRATION)
    behind = {HA: (POOLER, CLUSTER)}.get(kustomization, (DATABASE, DATABASE))
    for source, target, port in (
        ((OURS, CHECKOUT), server_pod, 8006),
        (PROMETHEUS, server_pod, 8006),
        (server_pod, DNS, 53),
        (server_pod, "169.254.20.10", 53),
        (server_pod, (OURS, behind[0]), 5432),
        (server_pod, (OURS, ORDER_SERVICE), 8080),
        (migration, DNS, 53),
        (migration, (OURS, behind[1]), 5432),
    ):
        assert may_connect(kustomization, source, target, port), (source, target, port)


@every_kustomization
def test_nobody_else_reaches_anything(kustomization: str) -> None:
    database = (OURS, CLUSTER if kustomization == HA else DATABASE)
    for source, target, port in (
        ((OURS, SERVER), INTERNET, 443),
        ((OURS, SERVER), (ELSEWHERE, ORDER_SERVICE), 80),
        ((OURS, MIGRATION), (OURS, SERVER), 8006),
        ((OURS, CHECKOUT), (OURS, MIGRATION), 8006),
        ((OURS, CHECKOUT), database, 5432),
        ((OURS, CHECKOUT), (OURS, SERVER), 5432),
        ((ELSEWHERE, SERVER), database, 5432),
        (INTERNET, database, 5432),
    ):
        assert not may_connect(kustomization, source, target, port), (source, target, port)
    strangers = may_connect(kustomization, (ELSEWHERE, CHECKOUT), (OURS, SERVER), 8006)
    assert strangers == (kustomization == MINIKUBE)  # as the port of the node


def test_the_way_out_to_stripe_that_stands_ready_leads_to_no_private_network() -> None:
    text = (ROOT / BASE / "network-policies.yaml").read_text(encoding="utf-8")
    opened = list(yaml.safe_load_all(re.sub(r"^    # (- to:|  )", r"    \1", text, flags=re.MULTILINE)))
    for policy in opened:
        check(policy, NEWEST)
    leads_to = [
        (address, port)
        for address in (INTERNET, "10.0.0.7", "169.254.169.254", "192.168.1.1")
        for port in (80, 443, 5432)
        if is_let(opened, "Egress", (OURS, SERVER), address, port)
    ]
    assert leads_to == [(INTERNET, 443)]


def test_the_databases_servers_reach_each_other_and_are_reached_by_their_operator() -> None:
    for source, port in (
        ((OURS, CLUSTER), 5432),
        ((OURS, CLUSTER), 8000),
        ((OPERATOR, {}), 8000),
        ((OURS, POOLER), 5432),
    ):
        assert may_connect(HA, source, (OURS, CLUSTER), port), (source, port)
    for stranger, target in ((SERVER, CLUSTER), (CHECKOUT, POOLER), (MIGRATION, POOLER)):
        assert not may_connect(HA, (OURS, stranger), (OURS, target), 5432), (stranger, target)
    assert may_connect(HA, (OURS, CLUSTER), INTERNET, 443)
