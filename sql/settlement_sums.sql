-- What each class comes to, by currency: the gateway's money by its currency, ours by ours.
WITH alike AS (
    SELECT class, operation, gateway_currency, our_currency, gateway_status IS NOT DISTINCT FROM 'settled' AS settled,
           operation_key IS NOT NULL AS ours, count(*) AS count, sum(gateway_amount) AS gateway_amount,
           sum(our_amount) AS our_amount
    FROM settlement_findings
    GROUP BY class, operation, gateway_currency, our_currency, settled, ours
),
side AS (
    SELECT a.class, s.currency, s.count, sign.factor * s.gateway AS gateway, sign.factor * s.ours AS ours
    FROM alike a
    CROSS JOIN LATERAL (VALUES (CASE WHEN a.operation = 'refund' THEN -1 ELSE 1 END)) AS sign (factor)
    CROSS JOIN LATERAL (VALUES
        (coalesce(a.gateway_currency, a.our_currency), a.count,
         CASE WHEN a.settled THEN a.gateway_amount ELSE 0 END,
         CASE WHEN a.ours AND a.our_currency = coalesce(a.gateway_currency, a.our_currency)
              THEN a.our_amount ELSE 0 END),
        (CASE WHEN a.ours AND a.our_currency <> a.gateway_currency THEN a.our_currency END, 0, 0, a.our_amount)
    ) AS s (currency, count, gateway, ours)
    WHERE s.currency IS NOT NULL
)
SELECT class, currency, sum(count)::bigint AS count, sum(gateway) AS gateway_net, sum(ours) AS our_net
FROM side
GROUP BY class, currency
