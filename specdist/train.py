# SPDX-License-Identifier: Apache-2.0
"""What every rank of a run executes.

torchrun --nproc-per-node N -m specdist.train --config configs/X.yaml [key=value ...]
"""

import logging
import signal
import time
import traceback
from collections.abc import Sequence

from specdist.core.errors import ConfigError, Dismissed, UserError, say
from specdist.core.imports import uncollected
from specdist.core.launch_env import Attempt, RankFacts, keep_compiled, rank_arguments
from specdist.core.stop import end_with_launcher, leave
from specdist.core.troubleshooting import linked


def main(argv: Sequence[str] | None = None) -> int:
    began = time.time()
    end_with_launcher()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `StopFlag` is there, Ctrl-C ends a rank without a traceback
    args = rank_arguments("specdist.train", __doc__, argv)

    with uncollected():
        import torch

        from specdist.core.attempts import AttemptRecord
        from specdist.core.config import Sources
        from specdist.job.config import home, job_of
        from specdist.run.context import Start
        from specdist.run.rank_log import RankLog
        from specdist.run.runtime import run
        from specdist.run.start_up import Part, StartUp

    try:
        facts, attempt = RankFacts.from_environment(), Attempt.from_environment()
        sources = Sources(args.config, args.overrides)
        job = job_of(sources)
        record = AttemptRecord(attempt.directory(home(job, attempt)))
        try:
            log = RankLog(record.directory, facts)
        except OSError as error:
            raise ConfigError.at("run.dir", f": {job.run.dir} cannot be written on {facts.host}: {error}") from error
    except UserError as error:
        say(linked(error))
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=log.file)
    logging.getLogger("torch.distributed").setLevel(logging.WARNING)
    start = Start(attempt, record, log, StartUp(Part("importing", began)))
    try:
        with sources.naming():
            keep_compiled(job.run.compile_cache, torch.__version__)
            run(job, facts, start)
    except Dismissed as error:
        print(f"specdist: {error}", file=log.file)
        return 0
    except UserError as error:
        print(f"specdist: {error}", file=log.file)
        start.report(error, facts)
        return 2
    except Exception as error:  # noqa: BLE001 - a defect or an outside failure: show it whole and leave
        traceback.print_exc(file=log.file)
        start.report(error, facts)
        return 1
    return 0


if __name__ == "__main__":
    leave(main())
