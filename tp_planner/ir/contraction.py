"""What a layer contracts, as labels on the dims of its tensors.

A layer such as Dense computes ``...i,io->...o``. Which dims are contracted and which come out decides what
sharding one of them means; the passes read it off these labels and never ask for a layer's class.
"""

from __future__ import annotations

from dataclasses import dataclass

UNLABELLED = "."  # a dim that stands for no index, such as a broadcast dim of size 1


@dataclass(frozen=True, slots=True)
class Contraction:
    """``input,weights->output`` with one letter per dim.

    ``input`` and ``output`` may begin with "..." for leading dims that pass through. ``weights`` maps the keys
    of the variables to their labels, the main weight first. ``bias`` is the variable added after the
    contraction. ``lookup`` says that the main weight's first dim is indexed by the input, as in an embedding.
    ``nonlinear`` says that the layer itself applies more than bias and activation to the contracted value.
    """

    input: str
    output: str
    weights: tuple[tuple[str, str], ...]
    bias: str | None = None
    has_activation: bool = False
    lookup: bool = False
    nonlinear: bool = False

    @property
    def main_weight(self) -> str:
        return self.weights[0][0]

    def labels(self, variable: str) -> str:
        return dict(self.weights)[variable]


def label_dim(labels: str, label: str, ndim: int) -> int | None:
    """Return the dim of a tensor of ``ndim`` dims that carries ``label``, or None.

    >>> label_dim("...o", "o", 3)
    2
    """
    position = labels.replace("...", "").find(label)
    if position < 0:
        return None
    before = labels.find("...")
    if before < 0 or labels.find(label) < before:
        return position
    return ndim - len(labels.replace("...", "")) + position
