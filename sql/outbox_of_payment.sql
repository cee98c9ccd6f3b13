-- The latest messages of one payment, and how many it has. They are found by idx_outbox_payment_sequence.
SELECT *, lease_id IS NOT NULL AND next_attempt_at > now() AS in_delivery, count(*) OVER () AS total
FROM outbox
WHERE payment_id = %(payment_id)s::bigint
ORDER BY sequence DESC
LIMIT %(count_max)s::bigint
