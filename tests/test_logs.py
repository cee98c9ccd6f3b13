"""Log lines: each is one JSON object, whatever it is given to tell."""

import json
import logging

import pytest

from eci_pay.logs import JsonLines


class Unshowable:
    """Cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize("value", ["\u00e9\ud800", b"\xff", {1, 2}, object(), Unshowable(), {("a", "b"): 1}])
def test_no_value_costs_a_line(value: object) -> None:
    record = logging.makeLogRecord(
        {"name": "some", "levelname": "INFO", "msg": "%d\nlines", "args": (2,), "told": value}
    )
    line = JsonLines().format(record)
    assert line.isascii()
    assert "\n" not in line
    event = json.loads(line)
    assert (event["event"], event["level"], event["logger"]) == ("2\nlines", "info", "some")
    assert {"told", "timestamp"} <= set(event)
