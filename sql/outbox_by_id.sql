-- One message.
SELECT *, lease_id IS NOT NULL AND next_attempt_at > now() AS in_delivery
FROM outbox
WHERE message_id = %(message_id)s::bigint
