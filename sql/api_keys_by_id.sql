-- The API keys that requests name, with what proves them.
SELECT key_id, name, scopes, secret_hash, expires_at, revoked_at, last_used_at
FROM api_keys
WHERE key_id = ANY (%(key_ids)s::text[])
