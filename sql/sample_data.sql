-- Payments of every status and method, with the audit rows and refunds that lead there.
WITH sample (order_id, user_id, amount, currency, payment_method, status, refunded_amount, refund_pending, age) AS (
    VALUES
    (9001, 501, 1499.00, 'INR', 'CREDIT_CARD', 'COMPLETED', 0.00, 0.00, interval '9 days'),
    (9002, 502, 249.50, 'INR', 'DEBIT_CARD', 'COMPLETED', 49.50, 0.00, interval '8 days'),
    (9003, 503, 899.00, 'INR', 'UPI', 'REFUNDED', 899.00, 0.00, interval '7 days'),
    (9004, 501, 4000.02, 'INR', 'CREDIT_CARD', 'FAILED', 0.00, 0.00, interval '6 days'),
    (9005, 504, 12500.00, 'INR', 'NET_BANKING', 'COMPLETED', 0.00, 0.00, interval '5 days'),
    (9006, 505, 75.25, 'INR', 'WALLET', 'CANCELLED', 0.00, 0.00, interval '4 days'),
    (9007, 506, 650.00, 'INR', 'COD', 'PENDING', 0.00, 0.00, interval '3 days'),
    (9008, 507, 320.00, 'INR', 'COD', 'COMPLETED', 0.00, 0.00, interval '2 days'),
    (9009, 502, 59.90, 'EUR', 'CREDIT_CARD', 'COMPLETED', 9.90, 9.90, interval '1 day'),
    (9010, 508, 4000.08, 'INR', 'CREDIT_CARD', 'PROCESSING', 0.00, 0.00, interval '1 hour')
)
INSERT INTO payments (
    order_id, user_id, amount, currency, payment_method, status, transaction_id, begin_id, reference,
    authorization_code, gateway_response, created_at, updated_at, completed_at, captured_at,
    refunded_amount, refund_pending
)
SELECT order_id, user_id, amount, currency, payment_method, status,
       'TXN01SAMPLE' || lpad(order_id::text, 18, '0'),
       'TXN01SAMPLE' || lpad(order_id::text, 18, '0'),
       'REF' || lpad(order_id::text, 12, '0'),
       CASE WHEN status IN ('COMPLETED', 'REFUNDED') AND payment_method <> 'COD'
            THEN 'AUTH' || lpad(order_id::text, 12, '0') END,
       CASE status WHEN 'COMPLETED' THEN 'Approved' WHEN 'REFUNDED' THEN 'Approved'
            WHEN 'FAILED' THEN 'card_declined: The card was declined.' END,
       now() - age, now() - age,
       CASE WHEN status IN ('COMPLETED', 'REFUNDED') THEN now() - age END,
       CASE WHEN status IN ('COMPLETED', 'REFUNDED') AND payment_method <> 'COD' THEN now() - age END,
       refunded_amount, refund_pending
FROM sample
ORDER BY order_id;

INSERT INTO refunds (
    payment_id, amount, reason, status, gateway_reference, gateway_response, created_at, updated_at, completed_at
)
SELECT payment_id, refunded_amount, 'Returned by the customer',
       CASE WHEN refund_pending > 0 THEN 'PROCESSING' ELSE 'COMPLETED' END,
       CASE WHEN refund_pending = 0 THEN 'RFND' || lpad(order_id::text, 12, '0') END,
       CASE WHEN refund_pending = 0 THEN 'Approved' END,
       updated_at, updated_at,
       CASE WHEN refund_pending = 0 THEN updated_at END
FROM payments
WHERE refunded_amount > 0
ORDER BY payment_id;

-- The audit rows: how each payment began, how it went on, and its refund's.
WITH step (step, status, transaction_type, transaction_status, description) AS (
    VALUES
    (1, 'PENDING', 'PAYMENT', 'PENDING', 'Cash on delivery is awaited'),
    (1, 'CANCELLED', 'PAYMENT', 'PENDING', 'Payment created'),
    (2, 'CANCELLED', 'PAYMENT', 'CANCELLED', 'Payment cancelled'),
    (1, 'PROCESSING', 'PAYMENT', 'PROCESSING', 'Charge begun'),
    (1, 'FAILED', 'PAYMENT', 'PROCESSING', 'Charge begun'),
    (2, 'FAILED', 'PAYMENT', 'FAILED', 'Charge failed: card_declined'),
    (1, 'COMPLETED', 'PAYMENT', 'PROCESSING', 'Charge begun'),
    (2, 'COMPLETED', 'PAYMENT', 'COMPLETED', 'Charge approved'),
    (1, 'REFUNDED', 'PAYMENT', 'PROCESSING', 'Charge begun'),
    (2, 'REFUNDED', 'PAYMENT', 'COMPLETED', 'Charge approved'),
    (3, 'COMPLETED', 'REFUND', 'PROCESSING', 'Refund begun: Returned by the customer'),
    (3, 'REFUNDED', 'REFUND', 'PROCESSING', 'Refund begun: Returned by the customer'),
    (4, 'COMPLETED', 'REFUND', 'REFUNDED', 'Refund approved'),
    (4, 'REFUNDED', 'REFUND', 'REFUNDED', 'Refund approved'),
    (5, 'REFUNDED', 'PAYMENT', 'REFUNDED', 'Payment refunded in full')
)
INSERT INTO transactions (payment_id, transaction_type, amount, status, description, created_at)
SELECT p.payment_id, s.transaction_type,
       CASE s.transaction_type WHEN 'REFUND' THEN p.refunded_amount ELSE p.amount END,
       CASE WHEN p.payment_method = 'COD' AND s.step = 1 THEN 'PENDING' ELSE s.transaction_status END,
       CASE WHEN p.payment_method = 'COD' AND s.step = 1 THEN 'Cash on delivery is awaited'
            WHEN p.payment_method = 'COD' AND s.step = 2 THEN 'Status set to COMPLETED by hand'
            ELSE s.description END,
       p.created_at
FROM payments p
JOIN step s USING (status)
WHERE s.transaction_type = 'PAYMENT'
   OR (s.step = 3 AND p.refunded_amount > 0)
   OR (s.step = 4 AND p.refunded_amount > p.refund_pending)
ORDER BY p.payment_id, s.step;
