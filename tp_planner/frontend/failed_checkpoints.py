"""Failed checkpoints: torch 2.11 keeps the hooks of a ``checkpoint`` that failed, as long as one has the error.

All that is saved for a backward pass in the meantime, of any model, is then saved for the failed function's.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

import torch.utils.checkpoint


@contextlib.contextmanager
def ending_what_failed() -> Iterator[None]:
    """Inside, ``torch.utils.checkpoint.checkpoint`` is called once; its hooks are gone after an error, too."""
    try:
        yield
    except BaseException as error:
        at = error.__traceback__
        while at is not None:
            if at.tb_frame.f_code.co_filename == torch.utils.checkpoint.__file__:
                for generator in filter(inspect.isgenerator, at.tb_frame.f_locals.values()):
                    generator.close()
                break  # those inside of it have been ended before
            at = at.tb_next
        raise
