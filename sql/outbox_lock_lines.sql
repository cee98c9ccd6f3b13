-- Locks every undelivered message of the lines to which some messages belong, so that no relay leases one meanwhile.
SELECT line.message_id
FROM outbox chosen
JOIN outbox line USING (payment_id, destination)
WHERE chosen.message_id = ANY (%(message_ids)s::bigint[]) AND line.delivered_at IS NULL
ORDER BY line.message_id
FOR UPDATE OF line
