-- Counts keys that should have been deleted before an instant, as far as it takes to know that they are many.
SELECT count(*) AS expired
FROM (
    SELECT
    FROM idempotency_keys
    WHERE expires_at <= %(before)s::timestamptz AND response_body IS NOT NULL
    LIMIT %(count_max)s::bigint
) AS found
