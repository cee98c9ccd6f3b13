-- Notes what another file settles than the one of its day: what this one has, awaited or not.
INSERT INTO settlements_awaited AS a (
    operation_key, payment_id, refund_id, recovery_id, booked_at, run_id, settled_run_id
)
SELECT f.operation_key, f.payment_id, f.refund_id, f.recovery_id, f.booked_at, %(run_id)s::bigint, %(run_id)s::bigint
FROM settlement_findings f
LEFT JOIN settlements_awaited known USING (operation_key)
WHERE f.line IS NOT NULL AND f.class <> 'pending' AND f.operation_key ~ '^[PRL]' AND f.booked_at IS NOT NULL
  AND (known.operation_key IS NOT NULL
       OR f.booked_at < %(period_from)s::timestamptz OR f.booked_at > %(cut_off)s::timestamptz)
ON CONFLICT (operation_key) DO UPDATE SET settled_run_id = coalesce(a.settled_run_id, EXCLUDED.settled_run_id)
