-- One message.
SELECT * FROM outbox WHERE message_id = %(message_id)s::bigint
