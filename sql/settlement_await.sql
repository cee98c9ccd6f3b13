-- Notes what another file settles than the one of its day: what is still awaited.
INSERT INTO settlements_awaited (operation_key, payment_id, refund_id, recovery_id, booked_at, run_id)
SELECT operation_key, payment_id, refund_id, recovery_id, booked_at, %(run_id)s::bigint
FROM settlement_findings
WHERE class = 'pending' AND line IS NULL
ON CONFLICT (operation_key) DO NOTHING
