-- Answers where the database is there and has the tables; tells whether it takes writes.
SELECT EXISTS (SELECT FROM payments) AS has_payments,
       current_setting('transaction_read_only')::boolean AS is_read_only
