-- Notes that the gateway took money for an attempt that was booked otherwise, unless it is the one that was captured.
-- What an earlier attempt was worth is known only where it was recovered; no other can have been overtaken.
INSERT INTO recoveries AS r (
    payment_id, attempt, amount, currency, payment_method, begun_at, state, late_reference, last_result
)
SELECT p.payment_id, %(attempt)s::bigint, p.amount, p.currency, p.payment_method, p.updated_at,
       'LATE', %(late_reference)s::text, 'approved after it was booked otherwise'
FROM payments p
WHERE p.payment_id = %(payment_id)s::bigint
  AND (
      (p.attempt = %(attempt)s::bigint AND p.captured_at IS NULL AND p.status <> 'PROCESSING')
      OR (p.attempt <> %(attempt)s::bigint AND EXISTS (
          SELECT FROM recoveries known
          WHERE known.payment_id = p.payment_id AND known.attempt = %(attempt)s::bigint AND known.refund_id IS NULL
      ))
  )
ON CONFLICT (payment_id, attempt) WHERE refund_id IS NULL DO UPDATE SET
    state = 'LATE',
    late_reference = EXCLUDED.late_reference,
    last_result = EXCLUDED.last_result,
    next_look_at = now(),
    lease_id = NULL,
    ended_at = NULL
WHERE r.late_reference IS NULL
RETURNING recovery_id
