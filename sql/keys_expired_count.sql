-- Counts the keys that keys_expire would delete.
SELECT count(*) AS expired
FROM idempotency_keys
WHERE expires_at <= %(now)s AND response_body IS NOT NULL
