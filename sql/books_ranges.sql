-- The numbers between which the payments and the keys are.
SELECT coalesce((SELECT min(payment_id) FROM payments), 1) AS first_payment_id,
       coalesce((SELECT max(payment_id) FROM payments), 0) AS last_payment_id,
       coalesce((SELECT min(id) FROM idempotency_keys), 1) AS first_key_id,
       coalesce((SELECT max(id) FROM idempotency_keys), 0) AS last_key_id
