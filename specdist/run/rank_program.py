# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a world execute that does not train: the doctor's part, and answers by the target."""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from specdist.core.errors import UserError, say
from specdist.core.files import unfailing
from specdist.core.launch_env import RankFacts, rank_arguments
from specdist.core.stop import end_with_launcher, leave
from specdist.core.troubleshooting import linked
from specdist.job.config import JobConfig, load_job


def rank_status(
    part: Callable[[JobConfig, RankFacts], int], module: str, text: str | None, argv: Sequence[str] | None = None
) -> int:
    """Take this rank's `part` in a world; returns the exit status. `module` and `text` are for `--help`."""
    end_with_launcher()
    sys.stdout, sys.stderr = (unfailing(s.fileno()) for s in (sys.stdout, sys.stderr))  # who reads them may be gone
    args = rank_arguments(module, text, argv)
    logging.getLogger("torch.distributed").setLevel(logging.WARNING)
    try:
        return part(load_job(args.config, args.overrides), RankFacts.from_environment())
    except UserError as error:
        say(linked(error))
        return 2


def leave_with(main: Callable[[], int]) -> NoReturn:
    """End this process with the status of `main`, without finalisers (`leave`). A defect is shown whole."""

    def defect(*error: Any) -> None:
        sys.stderr = sys.__stderr__  # torch.distributed's hook would show what is written once this one returns
        sys.__excepthook__(*error)
        leave(1)

    sys.excepthook = defect
    leave(main())
