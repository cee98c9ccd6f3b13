-- Deletes one batch of keys that are finished and expired. An unfinished key is never deleted: it still
-- stands between a retry and a second charge. SKIP LOCKED lets several processes expire side by side.
WITH batch AS (
    SELECT id
    FROM idempotency_keys
    WHERE expires_at <= %(now)s AND response_body IS NOT NULL
    ORDER BY expires_at
    LIMIT %(batch_size_max)s
    FOR UPDATE SKIP LOCKED
),
deleted AS (
    DELETE FROM idempotency_keys k USING batch WHERE k.id = batch.id RETURNING k.id
)
SELECT count(*) AS deleted FROM deleted
