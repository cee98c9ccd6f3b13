-- All API keys, without what would prove one.
SELECT key_id, name, scopes, created_by, created_at, expires_at, revoked_at, revoked_by, last_used_at
FROM api_keys
ORDER BY api_key_id
