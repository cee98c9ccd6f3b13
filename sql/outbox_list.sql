-- A page of the messages that are not delivered, oldest first. Pending and dead ones are looked up each by
-- their own index, so that the delivered ones do not count.
(
    SELECT m.*, m.lease_id IS NOT NULL AND m.next_attempt_at > now() AS in_delivery
    FROM outbox m
    WHERE m.delivered_at IS NULL AND m.dead_at IS NULL AND %(pending)s::boolean
      AND m.destination = ANY (%(destinations)s::text[]) AND m.message_id > %(after)s::bigint
    ORDER BY m.message_id
    LIMIT %(count_max)s::bigint
)
UNION ALL
(
    SELECT m.*, m.lease_id IS NOT NULL AND m.next_attempt_at > now() AS in_delivery
    FROM outbox m
    WHERE m.dead_at IS NOT NULL AND %(dead)s::boolean
      AND m.destination = ANY (%(destinations)s::text[]) AND m.message_id > %(after)s::bigint
    ORDER BY m.message_id
    LIMIT %(count_max)s::bigint
)
ORDER BY message_id
LIMIT %(count_max)s::bigint
