"""Errors of Redis: which of them pass, which are final for the record, and what the log says to do."""

from __future__ import annotations

import pytest
import redis
from redis.connection import DefaultParser

from pipeline.refusals import REMEDIES, WAIT, code_of, is_final, remedy_of

PASSING = [
    "OOM command not allowed when used memory > 'maxmemory'.",
    "READONLY You can't write against a read only replica.",
    "MISCONF Valkey is configured to save RDB snapshots, but it's currently unable to persist to disk.",
    "LOADING Valkey is loading the dataset in memory",
    "CLUSTERDOWN The cluster is down",
    "MOVED 1234 127.0.0.1:6379",
    "ASK 1234 127.0.0.1:6379",
    "TRYAGAIN Multiple keys request during rehashing of slot",
    "MASTERDOWN Link with MASTER is down",
    "NOREPLICAS Not enough good replicas to write.",
    "NOPERM User default has no permissions to run the 'xadd' command",
    "NOAUTH Authentication required.",
    "WRONGPASS invalid username-password pair or user is disabled.",
]


@pytest.mark.parametrize("text", PASSING, ids=[text.partition(" ")[0] for text in PASSING])
def test_what_speaks_of_the_server_passes(text: str) -> None:
    """Each is known by its code, has a remedy of its own, and costs no record; inside a transaction too."""
    error = DefaultParser.parse_error(text)
    assert not is_final(error)
    assert code_of(error) == text.partition(" ")[0]
    assert remedy_of(error) == REMEDIES[code_of(error)]
    error.args = (f"Command # 3 (XADD dmdd:{{l}}:rejects OOM) of pipeline caused error: {error.args[0]}",)
    assert not is_final(error)
    assert code_of(error) == text.partition(" ")[0]


@pytest.mark.parametrize(
    "text",
    [
        "WRONGTYPE Operation against a key holding the wrong kind of value",
        "ERR The ID specified in XADD is equal or smaller than the target stream top item",
        "ERR syntax error",
    ],
)
def test_what_speaks_of_the_record_is_final(text: str) -> None:
    """Sent again it would be refused again, and hold up all behind it."""
    assert is_final(DefaultParser.parse_error(text))


@pytest.mark.parametrize("text", ["ERR unknown command 'XADD'", "ERR max number of clients reached", "NEWCODE what"])
def test_what_is_not_known_passes(text: str) -> None:
    """In doubt a record is kept."""
    assert not is_final(DefaultParser.parse_error(text))


@pytest.mark.parametrize("error", [redis.ConnectionError("reset"), redis.TimeoutError(), redis.InvalidResponse("?")])
def test_no_answer_passes(error: Exception) -> None:
    """Nobody knows what became of the record."""
    assert not is_final(error)
    assert remedy_of(error) == WAIT


def test_a_value_that_cannot_be_sent_is_final() -> None:
    """The client itself refuses it."""
    assert is_final(redis.DataError("Invalid input of type"))
