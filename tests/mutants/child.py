"""What a process forked for a mutant runs: pytest over the copy of the tree that has the bug.

Nothing of ours may be imported before the fork, or the copy would not be what is tested.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# What most tests import besides, eight seconds of a core: once, before the forks. transformers imports what it is asked
# for, so one of its towers stands for what all of them need.
PRELOADED = ["pytest", "hypothesis", "torch", "transformers.models.qwen3_vl.modeling_qwen3_vl"]


def test(tree: Path, root: Path, command: list[str], output: Path) -> None:
    """Runs pytest with these arguments in `tree`, a copy of `root`, and exits as it does; `output` has what it says."""
    written = os.open(output, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)  # for what the tests start themselves
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path) != root)]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "bench", "fused_vit")]:
        del sys.modules[name]  # this one, of the root
    import pytest

    sys.exit(pytest.main(command))
