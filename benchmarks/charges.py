"""Charges: by pgbench with the very statements of a charge, one charge per pair of them, as the reference; and over
HTTP, with the relay in a process of its own.

After each step the database must hold exactly the charges that were acknowledged, with their audit rows, messages and
finished keys.
"""

import re
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.stage import Stage, found
from eci_pay.statements import statement

PLACEHOLDER = re.compile(rb"%\((\w+)\)s")
RESPONSE = "{" + "x" * 1100 + "}"
"""As long as the stored answer of a charge."""

BEGIN_VALUES = {
    "n": "0",
    "order_id": ":order_id",
    "user_id": "7",
    "amount": "100.00",
    "currency": "'INR'",
    "payment_method": "'UPI'",
    "reference": "'REFABCDEFGHIJKL'",
    "begin_id": "'TXN' || :order_id",
    "status": "'PROCESSING'",
    "description": "'Charge begun'",
    "at": "now()",
    "idempotency_key": "'bench-' || :order_id",
    "caller": "''",
    "request_hash": f"'{'0' * 64}'",
    "expires_at": "now() + interval '24 hours'",
    "actor": "NULL",
}
SETTLE_VALUES = {
    "n": "0",
    "order_id": ":order_id",
    "payment_id": ":payment_id",
    "attempt": ":attempt",
    "status": "'COMPLETED'",
    "authorization_code": "'AUTH0123456789AB'",
    "gateway_response": "'Approved'",
    "completed_at": "now()",
    "captured_at": "now()",
    "at": "now()",
    "transaction_log_id": ":settle_log_id",
    "description": "'Charge approved: AUTH0123456789AB'",
    "key_id": ":key_id",
    "response_body": f"'{RESPONSE}'",
    "status_code": "201",
    "expires_at": "now() + interval '24 hours'",
    "releases_key": "false",
    "message_count": "2",
    "request_id": f"'{'0' * 32}'",
    "traceparent": "NULL",
    "actor": "NULL",
}
MESSAGE_VALUES = {
    "message_n": ("0", "0"),
    "message_number": ("1", "2"),
    "message_destination": ("'order'", "'notification'"),
    "message_event": ("'payment.completed'", "'payment.completed'"),
    "message_payload": (
        """'{"payment_id": 1, "payment_status": "COMPLETED"}'""",
        """'{"user_id": 7, "type": "PAYMENT_SUCCESS", "message": "Your payment of 100.00 INR was received.", """
        """"channel": "EMAIL"}'""",
    ),
}

LATENCY_FIELD, LAG_FIELD = 2, 6
"""Of a line of pgbench's log, in microseconds: the latency, and at a given rate how much of it is behind schedule, for
which wrk, whose connections wait for their answers, knows nothing like it."""

WARM_UP_ORDER_ID = 10_000_000_000
BOOKED = """
SELECT count(*)
FROM payments p
WHERE status = 'COMPLETED' AND order_id < 10000000000
  AND (SELECT count(*) FROM transactions t WHERE t.payment_id = p.payment_id) = 2
  AND (SELECT count(*) FROM outbox o WHERE o.payment_id = p.payment_id) = 2
  AND EXISTS (SELECT FROM idempotency_keys k WHERE k.payment_id = p.payment_id AND k.response_body IS NOT NULL)
"""


def reference_script() -> str:
    """One charge as pgbench sends it: the statements of the product, with arrays of one row."""

    def filled(name: str, values: dict[str, str], **others: str) -> str:
        arrays = {key: f"ARRAY[{value}]" for key, value in values.items()}
        lists = {key: f"ARRAY[{', '.join(each)}]" for key, each in MESSAGE_VALUES.items()}
        all_values = {**arrays, **lists, **others}
        text = PLACEHOLDER.sub(lambda match: all_values[match[1].decode()].encode(), statement(name)).decode()
        return " ".join(text.split())

    begin = filled("charge_begin", BEGIN_VALUES, takes_over="true", lock_wait="NULL")
    settle = filled("charge_settle", SETTLE_VALUES, lock_wait="NULL")
    return f"\\set i :i + 1\n\\set order_id :first + :client_id * 10000000 + :i\n{begin} \\gset\n{settle};\n"


class Charging(Stage):
    """Measures charges on a database of its own."""

    async def reference(
        self, pgbench: str, clients: int, seconds: int, *, per_second: float | None = None
    ) -> dict[str, Any]:
        """Charges by pgbench, each as a pair of statements, as fast as they go or at a rate."""
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "charge.sql"
            script.write_text(reference_script())
            options = ["-n", "-M", "prepared", "-D", "i=0", "-D", "first=0", "-T", str(seconds), "-l"]
            if per_second is not None:
                options += ["-R", str(per_second)]
            told = subprocess.run(
                [pgbench, *options, "-c", str(clients), "-j", "1", "-f", script, self.url],
                capture_output=True,
                text=True,
                check=True,
                cwd=folder,
            ).stdout
            latencies = _latencies_ms(Path(folder))
        acknowledged = int(found(r"transactions actually processed: (\d+)", told))
        assert len(latencies) == acknowledged
        return {
            "clients": clients,
            "per_second": float(found(r"tps = ([\d.]+)", told)),
            "mean_ms": float(found(r"latency average = ([\d.]+)", told)),
            "p50_ms": median(latencies),
            "p99_ms": quantiles(latencies, n=100)[-1],
            "unaccounted": await self.value(BOOKED) - acknowledged,
        }

    async def over_http(
        self, connections: int, workers: int, seconds: int, *, per_second: float | None = None
    ) -> dict[str, Any]:
        """Charges by wrk, as fast as they go or at a rate. What it had under way at the end is booked and not
        acknowledged: at most its connections."""
        pace = {} if per_second is None else {"DELAY_MS": str(1000 * connections / per_second)}
        with ExitStack() as stack:
            stack.enter_context(self.peer())
            stack.enter_context(self.running("relay"))
            address = stack.enter_context(self.serving(workers=workers))
            self.wrk(address, "charge.lua", seconds=1, connections=connections, FIRST_ORDER_ID=str(WARM_UP_ORDER_ID))
            told = self.wrk(address, "charge.lua", seconds=seconds, connections=connections, **pace)
        unaccounted = await self.value(BOOKED) - told["requests"] + told["errors"]
        assert await self.value("SELECT count(*) AS n FROM payments WHERE status <> 'COMPLETED'") == 0
        assert 0 <= unaccounted <= connections, f"{unaccounted} charges more are booked than acknowledged"
        return {**told, "workers": workers}


def _latencies_ms(folder: Path) -> list[float]:
    """What pgbench has logged, in milliseconds."""
    lines = [
        [int(field) for field in line.split()]
        for log in folder.glob("pgbench_log.*")
        for line in log.read_text().splitlines()
    ]
    return [(line[LATENCY_FIELD] - sum(line[LAG_FIELD : LAG_FIELD + 1])) / 1000 for line in lines]
