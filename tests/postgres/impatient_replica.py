"""`catbus run`, except that it soon announces members as gone that are lost with their replica.

python -m tests.postgres.impatient_replica run --config FILE
"""

from __future__ import annotations

from catbus.cli import main
from catbus.presence import mirror

mirror.LOST_GRACE = 1.0

main()
