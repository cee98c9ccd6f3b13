-- The API key that a request names, with what proves it.
SELECT name, scopes, secret_hash, expires_at, revoked_at, last_used_at
FROM api_keys
WHERE key_id = %(key_id)s::text
