-- Notes that the gateway made a refund that was booked as not made.
INSERT INTO recoveries AS r (
    payment_id, attempt, refund_id, amount, currency, payment_method, begun_at, state, late_reference, last_result
)
SELECT p.payment_id, p.attempt, f.refund_id, f.amount, p.currency, p.payment_method, f.created_at,
       'LATE', %(late_reference)s::text, 'approved after it was booked otherwise'
FROM refunds f
JOIN payments p USING (payment_id)
WHERE f.refund_id = %(refund_id)s::bigint AND f.status = 'FAILED'
ON CONFLICT ON CONSTRAINT idx_recoveries_refund_id DO UPDATE SET
    state = 'LATE',
    late_reference = EXCLUDED.late_reference,
    last_result = EXCLUDED.last_result,
    next_look_at = now(),
    lease_id = NULL,
    ended_at = NULL
WHERE r.late_reference IS NULL
RETURNING recovery_id
