# SPDX-License-Identifier: Apache-2.0
"""torchrun that ends, and so do its ranks, when the process that started it is gone: `python -m specdist_launch.agent`.

Without this a killed `specdist train`, or a closed terminal, would leave a job behind that nobody sees.
"""

from torch.distributed.run import main

from specdist.stop import end_with_launcher

if __name__ == "__main__":
    end_with_launcher()
    main()
