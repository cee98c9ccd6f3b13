-- Notes that the gateway tells of its own accord to have done what was booked as never happened: to be put right.
UPDATE recoveries r SET
    state = 'LATE',
    late_reference = %(late_reference)s::text,
    last_result = 'approved after all, as the gateway tells',
    next_look_at = now(),
    lease_id = NULL,
    ended_at = NULL
FROM payments p
LEFT JOIN refunds f ON f.refund_id = %(refund_id)s::bigint AND f.payment_id = p.payment_id
WHERE p.payment_id = %(payment_id)s::bigint
  AND r.payment_id = p.payment_id
  AND r.state IN ('CHECKING', 'DONE') AND r.late_reference IS NULL
  AND CASE
      WHEN %(refund_id)s::bigint IS NOT NULL THEN r.refund_id = f.refund_id AND f.status = 'FAILED'
      ELSE r.refund_id IS NULL AND r.attempt = %(attempt)s::bigint
           AND p.status <> 'PROCESSING' AND NOT (p.attempt = r.attempt AND p.captured_at IS NOT NULL)
  END
RETURNING r.recovery_id
