-- Messages that were not delivered: the dead ones, and those that have waited for too long. Each kind is looked up by
-- its own index, so that the delivered ones do not count.
(
    SELECT 'message_dead' AS check_name, message_id, payment_id,
           event || ' to ' || destination || coalesce(': ' || last_error, '') AS detail, count(*) OVER () AS count
    FROM outbox
    WHERE dead_at IS NOT NULL
    ORDER BY message_id
    LIMIT %(count_max)s::bigint
)
UNION ALL
(
    SELECT 'message_overdue', message_id, payment_id,
           event || ' to ' || destination || coalesce(': ' || last_error, ''), count(*) OVER ()
    FROM outbox
    WHERE delivered_at IS NULL AND dead_at IS NULL
      AND created_at < %(overdue_before)s::timestamptz
    ORDER BY message_id
    LIMIT %(count_max)s::bigint
)
