"""What an error of Redis means: worth another attempt, or final for the one record; and what to do about it."""

from __future__ import annotations

import re
from typing import Final

import redis

FINAL: Final = frozenset({"ERR", "WRONGTYPE"})
"""Answers that come again however often the record is sent. Any other says something of the server, not of the record,
and passes: memory, disk, role, rights, loading, a slot that moves, too few replicas."""
BEHIND: Final = "equal or smaller"
"""XADD's answer to an id that is not above the stream's newest."""
MISSING: Final = ("unknown command", "max number of clients")
"""Texts of ERR that speak of the server all the same."""

REMEDIES: Final = {
    "OOM": "its memory is full: raise maxmemory, or shorten redis.blob_ttl_s and verdicts_maxlen",
    "READONLY": "it is a replica: give the master's address, or redis.mode = 'sentinel'",
    "MISCONF": "it cannot write its disk: free it, see its log",
    "LOADING": "it is reading its data; wait",
    "CLUSTERDOWN": "the cluster has lost a part: see CLUSTER INFO",
    "MOVED": "it is a cluster: redis.mode = 'cluster'",
    "ASK": "the slot of the line's keys is being moved; wait",
    "TRYAGAIN": "the slot of the line's keys is being moved; wait",
    "MASTERDOWN": "it is a replica without a master: see its replication",
    "NOREPLICAS": "min-replicas-to-write is not met: bring its replicas back",
    "NOPERM": "the ACL of the line's user lacks a command or key: see deploy/redis",
    "NOAUTH": "it asks for a password: redis.password_file or redis.credential",
    "WRONGPASS": "user or password is wrong: redis.username, redis.password_file",
}
WAIT: Final = "bring Redis back; records are kept in the spool until then"


def code_of(error: Exception) -> str:
    """The word that Redis's answer begins with; empty for a lost or silent connection."""
    code = getattr(error, "status_code", None)
    if code:
        return str(code)
    text = re.sub(r"^Command # .*? of pipeline caused error: ", "", str(error), flags=re.DOTALL)
    if not isinstance(error, redis.ResponseError):  # a server that was the wrong one: the text tells its answer
        found = re.search(rf"\b({'|'.join(REMEDIES)})\b", text)
        return found[1] if found else ""
    word = text.partition(" ")[0]
    return word if re.fullmatch(r"[A-Z]{3,}", word) else "ERR"


def is_final(error: Exception) -> bool:
    """Whether sending the same record again would come to the same."""
    if type(error) is redis.ResponseError:  # the errors that pass have classes of their own, or codes of their own
        return code_of(error) in FINAL and not any(text in str(error) for text in MISSING)
    return isinstance(error, redis.DataError)


def remedy_of(error: Exception) -> str:
    """What to do, in words."""
    return REMEDIES.get(code_of(error), WAIT)


def _own_code(text: str) -> str:
    word = text.partition(" ")[0]
    return word if re.fullmatch(r"[A-Z]{3,}", word) else ""
