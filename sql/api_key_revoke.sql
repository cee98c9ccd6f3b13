-- Ends an API key; of one that was revoked before, nothing changes.
UPDATE api_keys SET
    revoked_by = CASE WHEN revoked_at IS NULL THEN %(revoked_by)s::text ELSE revoked_by END,
    revoked_at = coalesce(revoked_at, %(at)s::timestamptz)
WHERE key_id = %(key_id)s::text
RETURNING key_id, name, scopes, created_by, created_at, expires_at, revoked_at, revoked_by, last_used_at
