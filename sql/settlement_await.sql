-- Leaves what was booked shortly before the end of the period to the next run.
INSERT INTO settlements_awaited (payment_id, refund_id, booked_at, run_id)
SELECT payment_id, refund_id, at, %(run_id)s::bigint
FROM settlement_findings
WHERE class = 'pending' AND line IS NULL
ON CONFLICT DO NOTHING
