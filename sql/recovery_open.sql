-- What is not settled, the oldest first: of one payment, or all.
SELECT r.recovery_id, r.payment_id, r.refund_id, r.state, r.looks, r.last_result,
       extract(epoch FROM now() - r.found_at)::double precision AS age_seconds
FROM recoveries r
WHERE r.state IN ('OPEN', 'LATE')
  AND (%(payment_id)s::bigint IS NULL OR r.payment_id = %(payment_id)s::bigint)
ORDER BY r.found_at
LIMIT %(count_max)s::bigint
