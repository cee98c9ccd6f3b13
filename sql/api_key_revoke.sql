-- Ends an API key; one that was revoked before keeps its moment.
UPDATE api_keys SET revoked_at = coalesce(revoked_at, %(at)s::timestamptz)
WHERE key_id = %(key_id)s::text
RETURNING key_id, name, scopes, created_by, created_at, expires_at, revoked_at, last_used_at
