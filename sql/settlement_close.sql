-- Ends all that runs have left open of a payment: an operator has settled it by hand.
WITH awaited AS (
    UPDATE settlements_awaited SET closed_at = %(at)s::timestamptz, closed_by = %(operator)s::text
    WHERE payment_id = %(payment_id)s::bigint AND settled_run_id IS NULL AND closed_at IS NULL
    RETURNING 1
),
pending AS (
    UPDATE settlement_lines_pending l SET closed_at = %(at)s::timestamptz, closed_by = %(operator)s::text
    FROM payments p
    WHERE p.payment_id = %(payment_id)s::bigint AND l.transaction_id = p.transaction_id
      AND l.ended_run_id IS NULL AND l.closed_at IS NULL
    RETURNING 1
)
SELECT (SELECT count(*) FROM awaited) + (SELECT count(*) FROM pending) AS closed
