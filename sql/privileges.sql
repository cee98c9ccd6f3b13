-- What a role may do with our tables and their sequences, with the schema and the database, held against what it needs:
-- whether by itself, through PUBLIC or through roles that it is a member of; and whether PUBLIC may do anything with a
-- table. What it inherits from nobody but may have by SET ROLE is too much, and does not help. What does not exist is
-- the schema's fault.
WITH member AS (
    SELECT oid, rolname = %(role)s::name AS is_itself
    FROM pg_roles
    WHERE pg_has_role(%(role)s::name, oid, 'MEMBER')
),
needed AS (
    SELECT to_regclass(name) AS relation, string_to_array(privileges, ', ') AS privileges
    FROM unnest(%(relations)s::text[], %(privileges)s::text[]) AS n (name, privileges)
),
of_table AS (
    SELECT relation, privileges FROM needed
    UNION ALL
    -- Identity columns need no privilege on their sequence; whoever has one can set it back.
    SELECT d.objid::regclass, '{}'
    FROM needed
    JOIN pg_depend d ON d.refobjid = relation AND d.refclassid = 'pg_class'::regclass
    WHERE d.classid = 'pg_class'::regclass AND d.deptype = 'i' AND d.objid NOT IN (
        SELECT relation FROM needed WHERE relation IS NOT NULL
    )
),
object AS (
    SELECT CASE relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END AS kind, relation::text AS name, oid, privileges,
           CASE relkind
               WHEN 'S' THEN '{USAGE,SELECT,UPDATE}'::text[]
               ELSE '{SELECT,INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER}'::text[]
                    || CASE WHEN current_setting('server_version_num')::integer >= 170000 THEN '{MAINTAIN}'::text[] END
           END AS known,
           EXISTS (SELECT FROM aclexplode(relacl) WHERE grantee = 0) OR EXISTS (
               SELECT FROM pg_attribute, aclexplode(attacl) WHERE attrelid = relation AND grantee = 0
           ) AS is_public
    FROM of_table
    JOIN pg_class ON oid = relation
    UNION ALL
    SELECT 'SCHEMA', quote_ident(nspname), oid, '{USAGE}', '{USAGE,CREATE}', false
    FROM pg_namespace
    WHERE nspname = current_schema()
    UNION ALL
    -- A reconciliation copies the gateway's file into a temporary table.
    SELECT 'DATABASE', quote_ident(datname), oid, '{CONNECT,TEMPORARY}', '{CONNECT,CREATE,TEMPORARY}', false
    FROM pg_database
    WHERE datname = current_database()
),
compared AS (
    SELECT kind, name, is_public, privilege, n, privilege = ANY (privileges) AS is_needed,
           bool_or(is_held) FILTER (WHERE is_itself) AS is_held, bool_or(is_held) AS is_in_reach
    FROM object
    CROSS JOIN unnest(known) WITH ORDINALITY AS p (privilege, n)
    CROSS JOIN member
    CROSS JOIN LATERAL (
        SELECT CASE kind
            WHEN 'SEQUENCE' THEN has_sequence_privilege(member.oid, object.oid, privilege)
            WHEN 'SCHEMA' THEN has_schema_privilege(member.oid, object.oid, privilege)
            WHEN 'DATABASE' THEN has_database_privilege(member.oid, object.oid, privilege)
            ELSE has_table_privilege(member.oid, object.oid, privilege)
                 OR (privilege = ANY ('{SELECT,INSERT,UPDATE,REFERENCES}') AND NOT privilege = ANY (privileges)
                     AND has_any_column_privilege(member.oid, object.oid, privilege))
        END
    ) AS h (is_held)
    GROUP BY kind, name, is_public, privilege, n, privileges
)
SELECT kind, name, is_public,
       string_agg(privilege, ', ' ORDER BY n) FILTER (WHERE is_needed) AS needed,
       string_agg(privilege, ', ' ORDER BY n) FILTER (WHERE is_needed AND NOT is_held) AS lacking,
       string_agg(privilege, ', ' ORDER BY n) FILTER (WHERE is_in_reach AND NOT is_needed) AS excess
FROM compared
GROUP BY kind, name, is_public
HAVING bool_or(is_needed AND NOT is_held OR is_in_reach AND NOT is_needed) OR is_public
ORDER BY kind, name
