-- Stores the answers of finished requests. A key that is finished already keeps its first answer, and
-- what it holds is returned, so that everybody who finishes a key tells the same. A key that was claimed
-- anew since is another's: it is left alone, and missing from the result. A late answer lives on as in charge_settle.
UPDATE idempotency_keys k SET
    response_body = coalesce(k.response_body, f.response_body),
    status_code = CASE WHEN k.response_body IS NULL THEN f.status_code ELSE k.status_code END,
    expires_at = CASE
        WHEN k.response_body IS NULL AND f.releases_key THEN to_timestamp(0)
        WHEN k.response_body IS NULL AND k.expires_at < f.at + interval '1 hour' THEN f.expires_at
        ELSE k.expires_at
    END
FROM unnest(
    %(key_id)s::bigint[], %(begin_id)s::text[], %(response_body)s::text[], %(status_code)s::bigint[],
    %(at)s::timestamptz[], %(expires_at)s::timestamptz[], %(releases_key)s::boolean[]
) AS f (key_id, begin_id, response_body, status_code, at, expires_at, releases_key)
WHERE k.id = f.key_id AND k.begin_id = f.begin_id
RETURNING k.id, k.response_body, k.status_code, k.payment_id, k.expires_at = to_timestamp(0) AS released
