"""Work of which nothing may be read, neither while it runs nor afterwards.

What a process prints and logs tells what it does, and so do the files that it keeps so as to be
quicker the next time: a compiled program is named after its shapes, of which the batch size is
one, and a choice among clipping engines tells for how many examples it was made.
"""

import logging
import os
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any


@contextmanager
def unseen(folder: Path) -> Generator[None]:
    """Has nothing printed or logged within a block, and what is kept to be quicker in a folder.

    For the whole process, all of its threads included, also where other languages than Python
    print.

    Args:
        folder: Where the caches go; somebody removes it. It is made if need be.
    """
    import jax  # only where something is trained
    from jax.experimental.compilation_cache import compilation_cache

    from trainer.clipping.choice import kept_in

    config: Any = jax.config  # without annotations
    before = config.jax_compilation_cache_dir
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(_silence())
        stack.enter_context(kept_in(folder / "clipping"))
        stack.callback(compilation_cache.reset_cache)
        stack.callback(config.update, "jax_compilation_cache_dir", before)
        config.update("jax_compilation_cache_dir", str(folder / "jax"))
        compilation_cache.reset_cache()  # it may be open already, in its old place
        yield


@contextmanager
def _silence() -> Generator[None]:
    disabled = logging.root.manager.disable
    with ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.callback(logging.disable, disabled)
        logging.disable(logging.CRITICAL)
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            kept = os.dup(number)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, number)
            os.dup2(nowhere.fileno(), number)
        # Python's own may lead elsewhere than to the files of these numbers.
        stack.enter_context(redirect_stdout(nowhere))
        stack.enter_context(redirect_stderr(nowhere))
        yield
