-- Marks unfinished keys whose gateway outcome is unknown: a replay answers 202 until it is settled.
UPDATE idempotency_keys SET status_code = 202
WHERE id = ANY (%(key_id)s::bigint[]) AND response_body IS NULL
