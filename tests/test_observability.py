"""The alerts, the dashboard and the runbook: they are valid, and what they name exists."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from typer.core import TyperGroup
from typer.main import get_command

from cli.commands import app
from cli.deferred import DeferredCommand
from eci_pay.gateways import GatewayUnavailable
from eci_pay.payments import Payments
from tests.support import Books, RecordingGateway
from tests.test_serving import charge

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "deploy" / "observability"
RUNBOOK = "docs/OPERATIONS.md"
OPERATIONS = (ROOT / RUNBOOK).read_text(encoding="utf-8")
UNKNOWN_AMOUNT = "4000.09"
KEYWORDS = {"and", "or", "unless", "offset"}
FROM_PROMETHEUS = {"job": "eci-pay", "instance": "a"}
SELECTOR = re.compile(r"(?<!\w)([a-zA-Z_]\w*)\b(?!\s*\()\s*(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|on)\s*\(([^)]*)\)")

Labels = dict[str, str]
Scrape = dict[str, list[Labels]]


@dataclass(frozen=True)
class Query:
    """An expression, and the labels that a person is shown of its result."""

    text: str
    shown: frozenset[str] = frozenset()


def alerts() -> dict[str, dict[str, Any]]:
    """The alerts by name."""
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    found = {rule["alert"]: rule for rule in rules}
    assert len(found) == len(rules)
    return found


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    found: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
    return found


def panels() -> list[dict[str, Any]]:
    """Those that ask something."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> list[Query]:
    """All expressions of the alerts and of the dashboard, its variables filled in."""
    annotations = dashboard()["annotations"]["list"]
    targets = [target for panel in panels() for target in panel["targets"]]
    of_dashboard = [(each["expr"], each.get("legendFormat", "")) for each in [*annotations, *targets]]
    return [
        *(Query(alert["expr"]) for alert in alerts().values()),
        *(
            Query(
                text.replace("$job", FROM_PROMETHEUS["job"]).replace("$__rate_interval", "1m"),
                frozenset(re.findall(r"\{\{(\w+)\}\}", legend)),
            )
            for text, legend in of_dashboard
        ),
    ]


def promtool(*arguments: str) -> None:
    """Runs it; fails with what it says."""
    if (command := shutil.which("promtool")) is None:
        pytest.skip("promtool, of Debian's package prometheus, is not installed")
    done = subprocess.run([command, *arguments], check=False, cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def faults(query: Query, scrape: Scrape) -> Iterator[str]:
    """What a query names that was not scraped: metrics, labels and their values."""
    grouped = {label.strip() for group in GROUPING.findall(query.text) for label in group.split(",")}
    known: set[str] = set()
    for name, matchers in SELECTOR.findall(GROUPING.sub(" ", query.text)):
        if name in KEYWORDS:
            continue
        series = scrape.get(name, [])
        known.update(*series)
        for label, operator, value in MATCHER.findall(matchers):
            wanted = value.split("|") if "~" in operator else [re.escape(value)]
            values = {each[label] for each in series if label in each}
            yield from (
                f'{name}{{{label}="{one}"}}' for one in wanted if not any(re.fullmatch(one, each) for each in values)
            )
            excludes = operator.startswith("!")
            series = [
                each for each in series if any(re.fullmatch(one, each.get(label, "")) for one in wanted) != excludes
            ]
        if not series:
            yield name
    yield from (f"by ({label})" for label in grouped - known)
    yield from (f"{{{{{label}}}}}" for label in query.shown - (grouped or known))


@pytest.fixture
async def scrape(api: httpx.AsyncClient, gateway: RecordingGateway, monkeypatch: pytest.MonkeyPatch) -> Scrape:
    """What Prometheus knows after payments, refunds, an unknown outcome, a silent gateway and a defect."""
    assert (await charge(api, 1, key="1")).status_code == 201
    refund = {"amount": "1.00", "reason": "Damaged in transit"}
    assert (await api.post("/v1/payments/1/refund", json=refund)).status_code == 200
    assert (await charge(api, 2, key="2", amount=UNKNOWN_AMOUNT)).status_code == 202

    async def unreachable(*_: object) -> None:
        raise GatewayUnavailable("connection refused")

    async def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(gateway, "refund", unreachable)
    assert (await api.post("/v1/payments/1/refund", json=refund)).status_code == 503
    monkeypatch.setattr(Payments, "by_id", broken)
    assert (await api.get("/v1/payments/1")).status_code == 500
    found: Scrape = {
        "up": [FROM_PROMETHEUS],
        "ALERTS": [{"alertname": name, "alertstate": "firing"} for name in alerts()],
    }
    for family in text_string_to_metric_families((await api.get("/metrics")).text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append({**sample.labels, **FROM_PROMETHEUS})
    return found


async def test_every_metric_label_and_value_that_is_asked_for_is_scraped(scrape: Scrape) -> None:
    assert len(queries()) > len(alerts())
    assert {query.text: found for query in queries() if (found := [*faults(query, scrape)])} == {}


async def test_what_is_not_scraped_is_found_out(scrape: Scrape) -> None:
    wrong = {
        "max by (job) (eci_pay_recovery_overdone) > 0": {"eci_pay_recovery_overdone", "by (job)"},
        'sum(rate(payments_by_status{state="COMPLETED"}[5m]))': {
            'payments_by_status{state="COMPLETED"}',
            "payments_by_status",
        },
        'up == 1 and payments_by_status{status=~"COMPLETED|PAID"}': {'payments_by_status{status="PAID"}'},
        "sum by (job, peer) (payments_by_status)": {"by (peer)"},
    }
    assert {text: {*faults(Query(text), scrape)} for text in wrong} == wrong
    assert [*faults(Query("sum by (status) (payments_by_status)", frozenset({"method"})), scrape)] == ["{{method}}"]


def test_prometheus_takes_the_configuration_and_the_rules() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "alerts.yml")


def test_each_alert_fires_when_it_should() -> None:
    promtool("test", "rules", "alerts_test.yml")


def test_each_alert_is_seen_to_fire_and_to_be_silent() -> None:
    tests = yaml.safe_load((FOLDER / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    tried = {(each["alertname"], bool(each["exp_alerts"])) for test in tests for each in test["alert_rule_test"]}
    assert tried == {(name, fires) for name in alerts() for fires in (True, False)}


def test_the_dashboards_queries_are_promql(tmp_path: Path) -> None:
    rules = [{"record": f"query:{n}", "expr": query.text} for n, query in enumerate(queries())]
    file = tmp_path / "queries.json"  # which is YAML, too
    file.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}), encoding="utf-8")
    promtool("check", "rules", str(file))


def test_the_dashboard_can_be_imported_anywhere() -> None:
    found = dashboard()
    assert (found["uid"], found["title"]) == ("eci-pay", "eci-pay")
    assert [each["name"] for each in found["templating"]["list"]] == ["datasource", "job"]
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert all(each["datasource"] == chosen for panel in panels() for each in [panel, *panel["targets"]])
    numbers = [panel["id"] for panel in found["panels"]]
    assert len(set(numbers)) == len(numbers)
    taken = [
        (place["x"] + x, place["y"] + y)
        for place in (panel["gridPos"] for panel in found["panels"])
        for x in range(place["w"])
        for y in range(place["h"])
    ]
    assert len(set(taken)) == len(taken)
    assert max(x for x, _ in taken) < 24


def anchor(heading: str) -> str:
    """What a link to a heading ends with."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def sections() -> dict[str, str]:
    """The texts below each heading of the runbook, by anchor."""
    parts = re.split(r"^#+ (.+)\n", OPERATIONS, flags=re.MULTILINE)[1:]
    found = {anchor(heading): text.strip() for heading, text in zip(parts[::2], parts[1::2], strict=True)}
    assert len(found) == len(parts) // 2
    return found


@pytest.mark.parametrize("name", alerts())
def test_each_alert_has_a_section_of_the_runbook(name: str) -> None:
    alert = alerts()[name]
    file, _, section = alert["annotations"]["runbook_url"].partition("#")
    assert file == RUNBOOK
    assert section.replace("-", "") == name.removeprefix("EciPay").lower()
    text = sections()[section]
    assert text.startswith(f"*{alert['labels']['severity']}.* ")
    assert [part for part in ("- Look: ", "- Repair: ", "- Wake: ") if part not in text] == []


def test_the_runbook_has_no_section_of_an_alert_that_is_gone() -> None:
    told = {section for section, text in sections().items() if text.startswith("*")}
    assert told == {alert["annotations"]["runbook_url"].partition("#")[2] for alert in alerts().values()}


def test_the_runbooks_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", OPERATIONS)
    files = {link.partition("#")[0] for link in links} - {""}
    assert [file for file in files if not (ROOT / "docs" / file).exists()] == []
    assert {link[1:] for link in links if link.startswith("#")} <= {*sections()}


def commands(text: str) -> list[str]:
    """What is given to `eci-pay` in a document's code."""
    code = "\n".join(re.findall(r"`+([^`]+)`+", text))
    return [found.strip() for found in re.findall(r"\beci-pay[ \t]+([^|&#\n]+)", code)]


def parse(command_line: str) -> None:
    """Reads a command line as the CLI does, without doing what it says."""
    rest = shlex.split(command_line)
    command: Any = get_command(app)
    name = "eci-pay"
    while isinstance(command, TyperGroup | DeferredCommand):
        if isinstance(command, DeferredCommand):
            command = command.load()
        else:
            name = rest.pop(0)
            command = command.commands[name]
    command.make_context(name, rest)


@pytest.mark.parametrize("command_line", sorted({*commands(OPERATIONS)}))
def test_each_command_of_the_runbook_exists(command_line: str) -> None:
    parse(command_line)


@pytest.mark.parametrize(
    "command_line",
    ["repair", "recover --twice", "outbox mend 1", "outbox list --limit many", "reconcile history --all", "show 1 2"],
)
def test_commands_that_do_not_exist_are_found_out(command_line: str) -> None:
    with pytest.raises(Exception, match=r"No such option|Got unexpected|a valid integer|^'(repair|mend)'$"):
        parse(command_line)


def test_code_is_told_from_prose() -> None:
    text = "eci-pay is here: `eci-pay list | wc`\n```sh\n. /etc/eci-pay/env && eci-pay relay   # it\n```\n"
    assert commands(text) == ["list", "relay"]
    assert len(commands(OPERATIONS)) > 20


async def test_numbers_move_on_after_a_restore(api: httpx.AsyncClient, books: Books) -> None:
    assert (await charge(api, 1, key="1")).json()["payment_id"] == 1
    (statements,) = re.findall(r"```sql\n(.+?)```", OPERATIONS, re.DOTALL)
    for statement in statements.strip().splitlines():
        await books.rows(statement.strip())
    assert (await charge(api, 2, key="2")).json()["payment_id"] == 1_000_002
