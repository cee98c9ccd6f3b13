-- What is not settled, the oldest first: of one payment, or all. How old it is counts from its begin, or from when it
-- was found where the clock of whoever began it was ahead.
SELECT r.recovery_id, r.payment_id, r.refund_id, r.state, r.looks, r.last_result,
       greatest(
           extract(epoch FROM now() - r.found_at), extract(epoch FROM %(now)s::timestamptz - r.begun_at)
       )::double precision AS age_seconds
FROM recoveries r
WHERE r.state IN ('OPEN', 'LATE')
  AND (%(payment_id)s::bigint IS NULL OR r.payment_id = %(payment_id)s::bigint)
ORDER BY age_seconds DESC
LIMIT %(count_max)s::bigint
