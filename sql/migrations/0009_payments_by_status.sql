-- no-transaction
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_payments_status_new ON payments (status, payment_id)
    WHERE status <> 'COMPLETED'
