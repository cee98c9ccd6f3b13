"""What docs/SCALING.md claims to have looked at."""

import re
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_no_statement_is_left_out_where_all_are_held_against_distributed_sql() -> None:
    text = (ROOT / "docs" / "SCALING.md").read_text(encoding="utf-8")
    section = text.partition("\n### 7 ")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([a-z_*]+)`", section))
    there = {file.stem for file in (ROOT / "sql").glob("*.sql")}
    assert {name for name in there if not any(fnmatch(name, pattern) for pattern in named)} == set()
