-- Running totals of the books, so that a scrape of the metrics counts no payments.
--
-- Every statement that changes payments or refunds adds what it changes to total_changes, in the same commit; now and
-- then they are added up into totals. What is true is the sum of both.
CREATE TABLE totals (
    metric varchar(20) NOT NULL
        CONSTRAINT totals_metric_known CHECK (metric IN ('status', 'method', 'completed', 'failed', 'refunds', 'errors')),
    label varchar(20) NOT NULL,
    count bigint NOT NULL,
    amount numeric NOT NULL,
    CONSTRAINT totals_pkey PRIMARY KEY (metric, label)
);

CREATE TABLE total_changes (
    metric varchar(20) NOT NULL
        CONSTRAINT total_changes_metric_known
            CHECK (metric IN ('status', 'method', 'completed', 'failed', 'refunds', 'errors')),
    label varchar(20) NOT NULL,
    count bigint NOT NULL,
    amount numeric NOT NULL
);

COMMENT ON COLUMN totals.metric IS
    'payments now in a status, payments by method, completed ones by currency, failed attempts, completed refunds by '
    'currency, unexpected errors';
COMMENT ON COLUMN totals.amount IS 'of completed payments and refunds, in major units';

-- What is added up is deleted: a small table whose dead rows go soon.
ALTER TABLE total_changes SET (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_insert_threshold = -1
);

ALTER TABLE payments
    ADD COLUMN previous_status varchar(20),
    ADD COLUMN previous_method varchar(20);

COMMENT ON COLUMN payments.previous_status IS 'of the payment that this attempt has taken over; NULL for a first one';
COMMENT ON COLUMN payments.previous_method IS 'as previous_status';

INSERT INTO totals (metric, label, count, amount)
SELECT 'status', status, count(*), 0 FROM payments GROUP BY status
UNION ALL
SELECT 'method', payment_method, count(*), 0 FROM payments GROUP BY payment_method
UNION ALL
SELECT 'completed', currency, count(*), sum(amount) FROM payments
WHERE status IN ('COMPLETED', 'REFUNDED') GROUP BY currency
UNION ALL
SELECT 'failed', '', count(*), 0 FROM transactions WHERE transaction_type = 'PAYMENT' AND status = 'FAILED'
HAVING count(*) > 0
UNION ALL
SELECT 'refunds', p.currency, count(*), sum(f.amount) FROM refunds f JOIN payments p USING (payment_id)
WHERE f.status = 'COMPLETED' GROUP BY p.currency;
