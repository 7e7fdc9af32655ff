# SPDX-License-Identifier: MIT
"""MT-SAC, a baseline: results/fast.py whose environments append the task's one-hot to the observation.

With the options below its networks are residual MLPs that read both, since a module has only one source:

    python results/mtsac.py --env-id MT10 --routing model --parallel-modules 1 --num-modules 3 \
        --encoder-widths 128 128 --router-widths 8 --no-resrouting --no-sample-k
"""

import warnings

import fast
from fast import d2r
from metaworld.wrappers import OneHotWrapper

make_env = d2r.make_env
warnings.filterwarnings("ignore", ".*precision lowered by casting to float32")  # of the wrapper's bounds


def make_one_hot_env(task, args, seed):
    return OneHotWrapper(make_env(task, args, seed), args.tasks.index(task), len(args.tasks))


if __name__ == "__main__":
    fast.install()
    d2r.Args.__doc__ = __doc__
    d2r.make_env = make_one_hot_env
    d2r.main()
