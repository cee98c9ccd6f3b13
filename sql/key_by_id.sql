-- Reads the answer that a key holds.
SELECT id, response_body, status_code, payment_id FROM idempotency_keys WHERE id = %(key_id)s
