-- What is not settled, oldest first: of one payment, or all.
SELECT r.*, extract(epoch FROM now() - r.found_at)::double precision AS age_seconds
FROM recoveries r
WHERE r.state IN ('OPEN', 'LATE')
  AND (%(payment_id)s::bigint IS NULL OR r.payment_id = %(payment_id)s::bigint)
ORDER BY r.found_at
LIMIT %(count_max)s::bigint
