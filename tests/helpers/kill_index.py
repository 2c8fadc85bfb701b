"""Kills builds of an index again and again, on one folder; tests/information/index/test_on_disk.py runs it.

    python kill_index.py FOLDER

Every child goes on with the build of the one before. After each kill the index is copied to FOLDER/after-<n>; what must
hold of the copies is asserted by the test. Children are forked before LanceDB, which starts threads, is imported.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np

ROWS, DIM, BATCH, COMMIT = 3000, 8, 20, 60
COLUMNS = {"label": int, "text": str}
IDENTITY = {"weights": "abc"}


def stream():
    rng = np.random.default_rng(0)
    order = rng.permutation(ROWS)  # training loaders shuffle
    vectors = rng.standard_normal((ROWS, DIM)).astype(np.float32)
    for at in range(0, ROWS, BATCH):
        some = order[at : at + BATCH]
        yield some, vectors[some], {"label": some % 10, "text": [f"it's {i}" for i in some]}


def create(path):
    from stride_lightning.information.index.on_disk import InformationIndex

    return InformationIndex.create(path, DIM, identity=IDENTITY, columns=COLUMNS, exist_ok=True)


def build(path, send, stop):
    """Build, tell of every batch once something new was committed, and wait to be killed after `stop` batches."""
    index = create(path)
    there = len(index)

    def told():
        for number, batch in enumerate(stream()):
            if number == stop:
                time.sleep(120)
            if len(index) > there:
                os.write(send, b"!")
            yield batch

    index.build(told(), rows_per_commit=COMMIT, show_progress=False)


def main(root):
    rng, killed = random.Random(0), []
    for trial in range(3):
        receive, send = os.pipe()
        pid = os.fork()
        if not pid:
            status = 1
            try:
                build(root / "index", send, stop=(trial + 1) * ROWS // BATCH // 4)
                status = 0
            finally:
                os._exit(status)
        os.close(send)
        os.read(receive, 1)
        time.sleep(rng.uniform(0, 0.05))  # some 10 ms for a commit: kills fall within one and between two
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(receive)
        killed.append(os.WIFSIGNALED(status))
        shutil.copytree(root / "index", root / f"after-{trial}")
    print(json.dumps({"killed": killed, "lancedb imported": "lancedb" in sys.modules}))


if __name__ == "__main__":
    # Here once, and not in every child.
    import pyarrow  # noqa: F401
    import pydantic  # noqa: F401

    import stride_lightning.information.index.base  # noqa: F401

    main(Path(sys.argv[1]))
