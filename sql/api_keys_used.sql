-- Notes that API keys are used; whoever comes second in the same moment need not wait.
UPDATE api_keys SET last_used_at = %(at)s::timestamptz
WHERE api_key_id IN (
    SELECT api_key_id FROM api_keys WHERE key_id = ANY (%(key_ids)s::text[]) FOR NO KEY UPDATE SKIP LOCKED
)
