-- no-transaction
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_payments_created_at ON payments (created_at, payment_id)
