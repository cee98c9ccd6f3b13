-- Who was told of payments lately: what a process that is configured for fewer services should know.
SELECT DISTINCT destination
FROM (SELECT destination FROM outbox ORDER BY message_id DESC LIMIT 1000) latest
