"""PLC bridges: Redis subscribers that drive a PLC the way PLC people expect; no part passes without its own OK."""
