"""What follows a charge: reads by id, pages of the list, replays and refunds over HTTP, of payments charged before."""

from contextlib import ExitStack
from typing import Any

from benchmarks.stage import Stage

OPERATIONS = ("read", "page", "replay", "refund")
CHARGE_CONNECTIONS = 128

REFUNDED = """
SELECT count(*)
FROM payments p
WHERE status = 'REFUNDED' AND refunded_amount = amount AND refund_pending = 0
  AND (SELECT count(*) FROM refunds f WHERE f.payment_id = p.payment_id AND f.status = 'COMPLETED') = 1
  AND (SELECT count(*) FROM transactions t WHERE t.payment_id = p.payment_id) = 5
"""


class Operating(Stage):
    """Measures operations on a database of its own."""

    async def over_http(self, connections: int, seconds: int) -> list[dict[str, Any]]:
        """Charges payments, then measures each operation on them by wrk: the charges too, for what follows them is
        compared with those of the same minute. The relay runs beside all of it."""
        with ExitStack() as stack:
            stack.enter_context(self.peer())
            stack.enter_context(self.running("relay"))
            address = stack.enter_context(self.serving())
            charged = self.wrk(address, "charge.lua", seconds=2 * seconds, connections=CHARGE_CONNECTIONS)
            told = [{"operation": "charge", **charged}]
            await self.execute("VACUUM ANALYZE")
            # Orders and payments up to this number are there: the last of wrk's requests may not have been sent.
            payments = await self.value("SELECT count(*) AS n FROM payments") - CHARGE_CONNECTIONS
            for operation in OPERATIONS:
                environment = {"OPERATION": operation, "PAYMENTS": str(payments)}
                told.append(
                    {
                        "operation": operation,
                        **self.wrk(address, "operation.lua", seconds=seconds, connections=connections, **environment),
                    }
                )
        refunds = told[-1]["requests"] - told[-1]["errors"]
        unaccounted = await self.value(REFUNDED) - refunds
        assert 0 <= unaccounted <= connections, f"{unaccounted} refunds more are booked than acknowledged"
        return told
