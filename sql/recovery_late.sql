-- Notes that the gateway took money for an attempt that was booked otherwise, unless it is the one that was captured.
INSERT INTO recoveries AS r (
    payment_id, attempt, amount, currency, payment_method, state, late_reference, last_result
)
SELECT p.payment_id, %(attempt)s::bigint, %(amount)s::numeric, %(currency)s::text, %(payment_method)s::text,
       'LATE', %(late_reference)s::text, 'approved after it was booked otherwise'
FROM payments p
WHERE p.payment_id = %(payment_id)s::bigint
  AND NOT (p.attempt = %(attempt)s::bigint AND p.captured_at IS NOT NULL)
ON CONFLICT (payment_id, attempt) WHERE refund_id IS NULL DO UPDATE SET
    state = 'LATE',
    late_reference = EXCLUDED.late_reference,
    last_result = EXCLUDED.last_result,
    next_look_at = now(),
    lease_id = NULL,
    ended_at = NULL
WHERE r.late_reference IS NULL
RETURNING recovery_id
