-- How much is not settled, by state, what has no look scheduled yet included.
WITH unsettled AS (
    SELECT r.state,
           greatest(
               extract(epoch FROM now() - r.found_at), extract(epoch FROM %(now)s::timestamptz - r.begun_at)
           )::double precision AS age_seconds
    FROM recoveries r
    WHERE r.state IN ('OPEN', 'LATE')
    UNION ALL
    SELECT 'OPEN', extract(epoch FROM %(now)s::timestamptz - p.updated_at)::double precision
    FROM payments p
    WHERE p.status = 'PROCESSING' AND p.updated_at <= %(before)s::timestamptz
      AND NOT EXISTS (
          SELECT FROM recoveries r
          WHERE r.payment_id = p.payment_id AND r.attempt = p.attempt AND r.refund_id IS NULL
      )
    UNION ALL
    SELECT 'OPEN', extract(epoch FROM %(now)s::timestamptz - f.created_at)::double precision
    FROM refunds f
    WHERE f.status = 'PROCESSING' AND f.created_at <= %(before)s::timestamptz
      AND NOT EXISTS (SELECT FROM recoveries r WHERE r.refund_id = f.refund_id)
)
SELECT count(*) FILTER (WHERE state = 'OPEN') AS open, count(*) FILTER (WHERE state = 'LATE') AS late,
       count(*) FILTER (WHERE age_seconds > %(alert_seconds)s::double precision) AS overdue,
       coalesce(max(age_seconds), 0)::double precision AS oldest_seconds
FROM unsettled
