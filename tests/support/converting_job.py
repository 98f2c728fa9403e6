"""One process of a `jax.distributed` job that converts a checkpoint together with the others.

python -m tests.support.converting_job PORT COUNT INDEX SOURCE TARGET
"""

import sys

import jax

from bridge.checkpoint.conversion import convert
from bridge.checkpoint.job import Job

if __name__ == "__main__":
    port, count, index, source, target = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", int(count), int(index))
    with Job.of_jax() as job:
        assert (job.rank, job.count) == (int(index), int(count))
        convert(source, target, to="nnx", max_memory=6 << 20, job=job)
