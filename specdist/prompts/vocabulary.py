# SPDX-License-Identifier: Apache-2.0
"""The tokens worth drafting: the most frequent ones where the prompts are supervised."""

import numpy as np
import torch
from torch import Tensor

from specdist.core.errors import ConfigError
from specdist.prompts.corpus import Corpus


def frequent_tokens(corpus: Corpus, size: int, target_size: int) -> tuple[Tensor, float]:
    """The `size` most frequent supervised tokens, of those trained on, of a target with `target_size`; ties and unseen
    ones by lowest id.

    Returns int64 [size], ascending, and the share of supervised tokens among them: a ceiling of the acceptance rate.
    Raises ConfigError: `size` is not between 1 and `target_size`. DataError: the prompts hold tokens that the target
    does not have.
    """
    if not 0 < size <= target_size:
        raise ConfigError(f"draft vocab_size={size}: the target has {target_size} tokens, so give 1 to {target_size}")
    corpus.check_vocabulary(target_size)
    counts = np.zeros(target_size, dtype=np.int64)
    for tokens in corpus.supervised_tokens():
        counts += np.bincount(tokens, minlength=target_size)
    chosen = np.sort(np.argsort(-counts, kind="stable")[:size])
    return torch.from_numpy(chosen), float(counts[chosen].sum() / max(counts.sum(), 1))
