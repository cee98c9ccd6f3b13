-- Lets recovery look once more at what was booked as never happened, because the gateway tells that it did happen.
UPDATE recoveries r SET state = 'CHECKING', next_look_at = now(), lease_id = NULL, ended_at = NULL
FROM payments p
LEFT JOIN refunds f ON f.refund_id = %(refund_id)s::bigint AND f.payment_id = p.payment_id
WHERE p.payment_id = %(payment_id)s::bigint
  AND r.payment_id = p.payment_id
  AND r.state IN ('CHECKING', 'DONE') AND r.late_reference IS NULL
  AND CASE
      WHEN %(refund_id)s::bigint IS NOT NULL THEN r.refund_id = f.refund_id AND f.status = 'FAILED'
      ELSE r.refund_id IS NULL AND r.attempt = %(attempt)s::bigint
           AND NOT (p.attempt = r.attempt AND p.captured_at IS NOT NULL)
  END
RETURNING r.recovery_id
