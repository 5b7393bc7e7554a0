"""Changes that were drawn and change nothing that a guest, an administrator or the disk could tell: why, one by one."""

EQUIVALENT: dict[str, str] = {}
