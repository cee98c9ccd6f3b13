"""How long a reconciliation takes: `make bench BENCH=reconcile`.

Loads a million payments of one day with their audit rows and keys, a tenth of them refunded in part, writes the
gateway's file of that day with a few differences of each kind, and reconciles it, alone and while charges go on. The
differences found must be those planted.
"""

import argparse
import asyncio
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.charges import Charging
from benchmarks.scale import CONNECTIONS, Scale
from benchmarks.stage import COMMAND, Template
from eci_pay.database import connect
from eci_pay.embedded import embedded_url
from eci_pay.settings import load_settings

MEGABYTE = 1_000_000
CHARGES_PER_SECOND = 1000
LOADS = {
    "payments (payment_id, order_id, user_id, amount, currency, payment_method, status, transaction_id, reference,"
    " authorization_code, gateway_response, created_at, updated_at, completed_at, captured_at, refunded_amount)": """
SELECT n, n, 1 + n % 1000000, 1 + n % 9000, 'INR', 'UPI', 'COMPLETED',
       'TXN01JD' || lpad(upper(to_hex(n)), 12, '0') || upper(left(md5(n::text), 10)), 'REF' || n,
       'AUTH' || upper(left(md5('auth' || n), 12)), 'Approved', at, at, at, at, 0.5 * (n % 10 = 0)::integer
FROM generate_series(1, {payments}) AS n,
     LATERAL (SELECT date_trunc('day', now(), 'UTC') - interval '1 day' + interval '20 hours' * (n::float8 / {payments})
              AS at) AS _
""",
    "transactions (payment_id, transaction_type, amount, status, description)": """
SELECT n, 'PAYMENT', 1 + n % 9000, status, 'Charge'
FROM generate_series(1, {payments}) AS n, (VALUES ('PROCESSING'), ('COMPLETED')) AS t (status)
UNION ALL
SELECT n, 'REFUND', 0.5, status, 'Refund'
FROM generate_series(10, {payments}, 10) AS n, (VALUES ('PROCESSING'), ('REFUNDED')) AS t (status)
""",
    "refunds (payment_id, amount, reason, status, gateway_reference, created_at, completed_at)": """
SELECT n, 0.5, 'Damaged', 'COMPLETED', 'RFND' || n, at, at
FROM generate_series(10, {payments}, 10) AS n,
     LATERAL (SELECT date_trunc('day', now(), 'UTC') - interval '4 hours' AS at) AS _
UNION ALL
SELECT n, 0.7, 'Damaged', 'FAILED', NULL, at, NULL
FROM generate_series(10, {payments}, 100) AS n,
     LATERAL (SELECT date_trunc('day', now(), 'UTC') - interval '4 hours' AS at) AS _
""",
}
PLANTED_EVERY = 10_000
FILE = f"""
SELECT authorization_code AS gateway_reference,
       CASE WHEN payment_id % {PLANTED_EVERY} = 1 THEN 'TXNUNKNOWN' || payment_id ELSE transaction_id END
           AS transaction_id,
       'charge' AS type, amount + (payment_id % {PLANTED_EVERY} = 2)::integer AS amount, currency, 0.02 * amount AS fee,
       CASE WHEN payment_id % {PLANTED_EVERY} = 3 THEN 'failed' ELSE 'settled' END AS status,
       to_char(captured_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS settled_at
FROM payments, generate_series(1, CASE payment_id % {PLANTED_EVERY} WHEN 4 THEN 2 WHEN 5 THEN 0 ELSE 1 END)
WHERE captured_at < date_trunc('day', now(), 'UTC')
UNION ALL
SELECT coalesce(gateway_reference, 'FAILED' || refund_id), transaction_id, 'refund', f.amount, currency, 0,
       CASE f.status WHEN 'FAILED' THEN 'failed' ELSE 'settled' END,
       to_char(f.created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
FROM refunds f JOIN payments USING (payment_id)
"""
"""Line by line what the gateway says; one in so many is not what our books say."""
PLANTED = {
    "missing_in_our_books": 1,
    "missing_at_gateway": 2,
    "amount_over": 1,
    "status_differs": 1,
    "duplicate_at_gateway": 1,
}
"""How often each class is to be found in `PLANTED_EVERY` payments."""


class Reconciling(Scale):
    """A database with a day's payments, and the gateway's file of that day."""

    loads = LOADS

    async def write_file(self, path: Path) -> None:
        """The gateway's."""
        copy = f"COPY ({FILE}) TO STDOUT WITH CSV HEADER".encode()
        # Block by block: what this process has held counts as memory of the command that it starts.
        with path.open("wb") as file:
            async with await connect(self.url) as connection, connection.cursor().copy(copy) as reading:
                async for block in reading:
                    file.write(block)

    def reconcile(self, file: Path, payments: int) -> dict[str, Any]:
        """Runs the command; how long it took, and the most memory that it had."""
        started = time.monotonic()
        process = subprocess.Popen(
            [COMMAND, "reconcile", str(file), "--json", "--csv", f"{file}.differences", "--report", f"{file}.html"],
            env=self.environment,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        document = json.loads(process.stdout.read())
        _, status, usage = os.wait4(process.pid, 0)
        took = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 1, process.returncode
        found = {each["class"]: each["count"] for each in document["sums"] if each["class"] != "matched"}
        expected = {name: times * payments // PLANTED_EVERY for name, times in PLANTED.items()}
        assert found == expected, (found, expected)
        assert document["fault_count"] == 0, document["fault_counts"]
        return {"seconds": round(took, 1), "megabytes": usage.ru_maxrss * 1024 // MEGABYTE, "lines": document["lines"]}


async def measure(server: str, payments: int, seconds: int) -> dict[str, Any]:
    """The whole run."""
    async with Template(server) as template, template.copy() as url:
        stage = Reconciling(url)
        await stage.load(payments)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "settlement.csv"
            await stage.write_file(file)
            alone = [stage.reconcile(file, payments) for _ in range(2)]
            print("alone", alone, flush=True)
            with stage.serving() as address:
                first = payments + 1
                charges_alone = await _charged(stage, address, first, seconds)
                charging = asyncio.create_task(_charged(stage, address, first + 100_000_000, seconds))
                beside = await asyncio.to_thread(stage.reconcile, file, payments)
                result = {"alone": alone, "beside": beside, "charges": charges_alone, "charges_beside": await charging}
    for name, figures in result.items():
        print(name, figures)
    return result


async def _charged(stage: Charging, address: str, first: int, seconds: int) -> dict[str, Any]:
    pace = {"DELAY_MS": str(1000 * CONNECTIONS / CHARGES_PER_SECOND), "FIRST_ORDER_ID": str(first)}
    return await asyncio.to_thread(
        lambda: stage.wrk(address, "charge.lua", seconds=seconds, connections=CONNECTIONS, **pace)
    )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reconcile", description=__doc__)
    parser.add_argument("--payments", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=int, default=30, help="of charges, alone and beside a reconciliation")
    arguments = parser.parse_args()
    server = embedded_url(load_settings().embedded_data_dir())
    asyncio.run(measure(server, arguments.payments, arguments.seconds))


if __name__ == "__main__":
    main()
