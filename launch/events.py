# SPDX-License-Identifier: Apache-2.0
"""`launch.on_event`: a command of the user's that hears how a start has ended."""

import os
import subprocess
import sys
from pathlib import Path

from specdist.core.attempts import AttemptRecord

_LIMIT_S = 60.0


def tell(command: str, run_dir: Path, record: AttemptRecord, reason: str) -> None:
    """Run `command` for the end of an attempt. What is wrong with it is said, and stops nothing."""
    ending = record.ending()
    event = "failed" if ending is None or record.failed() is not None else ending.state
    told = {"EVENT": event, "REASON": reason, "RUN_DIR": str(run_dir.absolute()), "ATTEMPT": record.name}
    environment = os.environ | {f"SPECDIST_{name}": value for name, value in told.items()}
    try:
        subprocess.run(command, shell=True, check=True, timeout=_LIMIT_S, env=environment, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"specdist: launch.on_event: {error}", file=sys.stderr)
