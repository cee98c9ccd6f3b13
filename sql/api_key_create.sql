-- Keeps a new API key; its secret is not among it.
INSERT INTO api_keys (key_id, name, scopes, secret_hash, created_by, created_at, expires_at)
VALUES (
    %(key_id)s::text, %(name)s::text, %(scopes)s::text[], %(secret_hash)s::bytea, %(created_by)s::text,
    %(created_at)s::timestamptz, %(expires_at)s::timestamptz
)
RETURNING key_id, name, scopes, created_by, created_at, expires_at, revoked_at, revoked_by, last_used_at
