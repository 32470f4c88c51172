"""Functions of Keras's torch backend that have no public name, wherever the installed Keras keeps them.

Keras 3.15 has them in ``keras.src.backend.torch.core`` and beside it, Keras 3.16 in ``keras.src.backend.torch.ops``.
"""

from __future__ import annotations

from keras.src.backend import torch as torch_backend
from keras.src.backend.common import dtypes
from keras.src.models import functional

_modules = torch_backend if hasattr(torch_backend, "core") else torch_backend.ops
core, nn, numpy = _modules.core, _modules.nn, _modules.numpy

convert_to_numpy = core.convert_to_numpy
convert_to_tensor = core.convert_to_tensor
get_device = core.get_device
to_torch_dtype = core.to_torch_dtype

# What Keras on torch computes in where it is asked for 64 bits: a dict by dtype.
narrower_dtypes = dtypes.BIT64_TO_BIT32_DTYPE

# What a Functional model calls in place of an operation: Keras 3.15 passes arguments like ``training`` on by it.
operation_fn = getattr(functional, "operation_fn", lambda operation, **context: operation)
