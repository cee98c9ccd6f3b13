-- Locks the payments that messages are about, as whoever writes further messages of them does.
SELECT payment_id
FROM payments
WHERE payment_id IN (SELECT payment_id FROM outbox WHERE message_id = ANY (%(message_ids)s::bigint[]))
ORDER BY order_id
FOR NO KEY UPDATE
