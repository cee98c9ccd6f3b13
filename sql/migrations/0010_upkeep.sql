-- In the order of a list's pages, and without the status that nearly all have: of that, the primary key finds a page.
DROP INDEX idx_payments_status;
ALTER INDEX idx_payments_status_new RENAME TO idx_payments_status;

-- The tables that grow are vacuumed by their work, not by their size: by default that would be after a fifth of all rows
-- has changed, and the planner would learn as late what has changed.

ALTER TABLE payments SET (
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_vacuum_threshold = 10000,
    autovacuum_vacuum_insert_scale_factor = 0.05,
    autovacuum_analyze_scale_factor = 0.02
);
ALTER TABLE transactions SET (
    autovacuum_vacuum_insert_scale_factor = 0.05,
    autovacuum_analyze_scale_factor = 0.02
);
ALTER TABLE idempotency_keys SET (
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_vacuum_threshold = 10000,
    autovacuum_vacuum_insert_scale_factor = 0.05,
    autovacuum_analyze_scale_factor = 0.02
);

COMMENT ON COLUMN recoveries.state IS
    'OPEN: no outcome yet; CHECKING: booked as never happened, still watched; LATE: the gateway acted after that';
