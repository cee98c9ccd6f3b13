-- What a role may do beyond all privileges, by itself or by SET ROLE; no row where there is no such role.
SELECT bool_or(m.rolsuper) AS is_superuser, bool_or(m.rolcreaterole) AS makes_roles,
       bool_or(
           m.rolreplication OR m.rolname = ANY ('{pg_execute_server_program,pg_read_server_files,pg_write_server_files}')
       ) AS passes_by,
       EXISTS (
           SELECT
           FROM unnest(%(relations)s::text[]) AS n (name)
           JOIN pg_class c ON c.oid = to_regclass(n.name)
           WHERE pg_has_role(r.oid, c.relowner, 'MEMBER')
       ) AS is_owner,
       pg_has_role(r.oid, current_user, 'MEMBER') AS may_act_as_us
FROM pg_roles r
JOIN pg_roles m ON pg_has_role(r.oid, m.oid, 'MEMBER')
WHERE r.rolname = %(role)s::name
GROUP BY r.oid
