-- Answers where the database is there and has the tables.
SELECT EXISTS (SELECT FROM payments) AS has_payments
