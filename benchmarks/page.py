"""The results of one machine as a Markdown page with pictures, from the JSON files that the benchmarks wrote.

python benchmarks/page.py FOLDER
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import bench
import communication
import memory
import plan_time
import vs_keras_nightly
from showing import pictures
from showing.report import (
    AUTOMATIC,
    HANDWRITTEN,
    KERAS_SHARD,
    PLANNED,
    REPLAYED,
    TARGETS,
    TORCH_SHARD,
    VERSION_HEAD,
    WORKS,
    version_rows,
)

Row = Mapping[str, Any]
Results = Mapping[str, Any]  # by benchmark, what it wrote

BENCHMARKS = ("step_time", "communication", "plan_time", "memory", "generation", "bench")
OURS = (PLANNED, REPLAYED, AUTOMATIC)
NOT_THE_GPT = (KERAS_SHARD, TORCH_SHARD)
MIB = 2**20


def write(folder: Path) -> None:
    """Draw the pictures of the results in ``folder`` and write its README.md."""
    results = read(folder)
    pictures.draw_step_time(results["step_time"], folder / "step_time.svg")
    pictures.draw_communication(results["communication"]["rows"], folder / "communication.svg")
    pictures.draw_memory(results["memory"]["rows"], folder / "memory.svg")
    (folder / "README.md").write_text("".join(f"{line}\n" for line in page(results)))


def read(folder: Path) -> Results:
    """Return the results in ``folder``; those of vs_keras_nightly.py may be missing."""
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name in BENCHMARKS}
    nightly = folder / "vs_keras_nightly.json"
    return {**results, "vs_keras_nightly": json.loads(nightly.read_text()) if nightly.exists() else []}


def page(results: Results) -> Iterator[str]:
    """Yield the lines of the page."""
    stated = results["memory"]
    yield f"# Results on {stated['cores']} cores of {stated['machine']}"
    yield ""
    yield "Written by `make bench`. [benchmarks/README.md](../../README.md) says what each figure means."
    yield ""
    versions = ("python", "torch", "keras", "keras-hub", "tp-planner")
    yield ", ".join(f"{name} {stated[name]}" for name in versions) + ". Two processes with gloo, one thread each."
    yield ""
    load = results["bench"]["load average before"]
    yield f"Before the run the load average of the machine was {load:.1f}; well above zero, something else was running."
    yield ""
    yield "## Targets"
    yield ""
    yield from markdown(("target", "measured", ""), targets(results))
    yield ""
    yield from step_time_section(results["step_time"])
    yield from communication_section(results["communication"]["rows"])
    yield from planning_section(results["plan_time"])
    yield from memory_section(results["memory"]["rows"])
    yield from generation_section(results["generation"])
    if results["vs_keras_nightly"]:
        yield from nightly_section(results["vs_keras_nightly"])


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(str(cell) for cell in row)} |"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


# Targets


def targets(results: Results) -> Iterator[Sequence[str]]:
    """Yield for each target what it is, what was measured, and whether that meets it, or why not."""
    yield _time_of_all(results["bench"])
    for sizes in results["step_time"]:
        yield from _step_targets(sizes)
    yield _never_slower(results["step_time"])
    rows = results["communication"]["rows"]
    yield (
        "communication in blocks: Megatron-LM's formula",
        communication.verdict(rows),
        "met but for what the section below names",
    )
    for size, measured in plan_rows(results["plan_time"]):
        if size.name in plan_time.SIZES:
            text, _, met = next(iter(plan_time.verdicts([(size, measured)]))).strip().rpartition(": ")
            yield (
                f"planning {size.name}",
                text.partition(": ")[2],
                "met" if met != "MISSED" else _missed(results["bench"]),
            )
    rows = results["memory"]["rows"]
    worst = max((memory.off(row) for row in rows), key=abs)
    missed = [row["model"] for row in rows if abs(memory.off(row)) > memory.TARGET]
    yield (
        f"memory: predicted peak within {memory.TARGET:.0%} of training by Keras",
        f"farthest {worst:+.1%}; beyond the target: {', '.join(missed) or 'none'}; "
        f"{memory.verdict(rows).splitlines()[1]}",
        "missed" if missed else "met",
    )
    yield "one GPU, training shapes: at most 1.05 times hand-written", "not measured", "needs a GPU: `make bench-gpu`"


def _time_of_all(run: Row) -> Sequence[str]:
    seconds = run["seconds"]
    minutes = sum(seconds.values()) / 60
    missing = [script for script, *_ in bench.COMMANDS if script not in seconds]
    if missing:
        return "`make bench` in under 15 minutes", f"{minutes:.1f} minutes without {', '.join(missing)}", "not measured"
    return "`make bench` in under 15 minutes", f"{minutes:.1f} minutes", "met" if minutes < 15 else _missed(run)


def _missed(run: Row) -> str:
    """Return that a time was missed, and whether other work may be why."""
    load = run["load average before"]
    return "missed" if load < 1 else f"missed, beside other work: the load average was {load:.1f}"


def _step_targets(sizes: Row) -> Iterator[Sequence[str]]:
    name, rows = sizes["size"]["name"], of_work(sizes, "step")
    target = TARGETS["step", name]
    for version in filter(rows.__contains__, OURS):
        ratio = ratios(rows, version)[1]
        yield (
            f"training step, {name}: at most {target:g} times (c)",
            f"{version} {ratio:.2f}, processor time {_cpu_ratio(rows, version):.2f}",
            "met" if ratio <= target else f"missed: {WHY_MISSED[version](sizes)}",
        )


def _cost_of_layers(sizes: Row) -> str:
    """Return what Keras's Python costs on one rank's shards, without tp_planner and without collectives."""
    rows = of_work(sizes, "step")
    keras_floor, torch_floor = (_cpu_ratio(rows, version) for version in (KERAS_SHARD, TORCH_SHARD))
    return (
        f"on one rank's shards, without tp_planner and collectives, plain Keras takes {keras_floor:.2f} times (c)'s "
        f"processor time, plain torch {torch_floor:.2f}; `jit_compile=True` goes without the layers' Python"
    )


def _cost_beyond_forward(version: str, sizes: Row) -> str:
    """Return how much of the gap is in the forward pass."""
    forward = ratios(of_work(sizes, "forward"), version)[1]
    return (
        f"its forward pass alone takes {forward:.2f} times (c)'s; the rest is in the backward pass, Keras's loss and "
        f"Keras's update, which are not replayed"
    )


WHY_MISSED = {
    PLANNED: _cost_of_layers,
    REPLAYED: functools.partial(_cost_beyond_forward, REPLAYED),
    AUTOMATIC: functools.partial(_cost_beyond_forward, AUTOMATIC),
}


def _never_slower(results: Sequence[Row]) -> Sequence[str]:
    faster = []
    for sizes in results:
        for work in WORKS:
            rows = of_work(sizes, work)
            best = min(ratios(rows, version)[1] for version in filter(rows.__contains__, OURS))
            faster += [
                f"{version} {work} {sizes['size']['name']}"
                for version in rows
                if version not in (*OURS, *NOT_THE_GPT, HANDWRITTEN) and ratios(rows, version)[1] < best
            ]
    alone = all(each.startswith(("(a)", "(f)")) for each in faster)
    why = "missed there: a single device sends nothing" if alone else "missed there"
    return (
        "step time: never slower than (a), (d), (e) and (f)",
        f"faster than the best of these (b): {', '.join(faster) or 'none'}",
        why if faster else "met",
    )


# Step time


def of_work(sizes: Row, work: str) -> dict[str, Row]:
    """Return the rows of one work by version."""
    return {row["version"]: row for row in sizes["rows"] if row["work"] == work}


def ratios(rows: Mapping[str, Row], version: str, figure: str = "times_ms") -> list[float]:
    """Return the quartiles of a version's times over those of the hand-written one in the same rounds."""
    pairs = zip(rows[version][figure], rows[HANDWRITTEN][figure], strict=True)
    return statistics.quantiles([one / other for one, other in pairs], n=4, method="inclusive")


def _cpu_ratio(rows: Mapping[str, Row], version: str) -> float:
    return ratios(rows, version, "cpu_ms")[1]


def step_time_section(results: Sequence[Row]) -> Iterator[str]:
    """Yield tables of all works at all sizes."""
    yield from ("## Step time", "", "![ratios to hand-written tensor parallelism](step_time.svg)", "")
    for sizes in results:
        yield f"### {', '.join(f'{name} {value}' for name, value in sizes['size'].items())}"
        yield f"\n{sizes['repetitions']} rounds, {sizes['blocks']} blocks, vocabulary {sizes['vocabulary']}, float32."
        for work, meaning in WORKS.items():
            yield f"\n{_capital(meaning)}:\n"
            yield from markdown(VERSION_HEAD, version_rows(list(of_work(sizes, work).values())))
        yield ""


# Communication


def communication_section(rows: Sequence[Row]) -> Iterator[str]:
    """Yield one line for each family and what it sends on each number of ranks."""
    yield from ("## Communication", "", "![sent bytes against the formula](communication.svg)", "")
    degrees = sorted({row["ranks"] for row in rows})
    ratio_heads = [f"sent / formula, {ranks} ranks" for ranks in degrees]
    head = (
        "family",
        "blocks",
        "in blocks: forward",
        "backward",
        "formula",
        *ratio_heads,
        "outside: forward",
        "backward",
    )
    by_family: dict[str, list[Row]] = {}
    for row in rows:
        by_family.setdefault(row["title"], []).append(row)
    yield from markdown(head, (_family_row(title, each) for title, each in by_family.items()))
    yield from ("", f"{communication.verdict(rows)}. What is beyond the formula:", "", BEYOND, "")
    yield from ("With the residual stream sharded over the sequence, on the fewest ranks:", "")
    head = (
        "family",
        "in blocks: forward",
        "backward",
        "sent / formula",
        "sent / without",
        "outside: sent bytes beyond",
    )
    yield from markdown(head, (_stream_row(row) for row in rows if row["ranks"] == degrees[0]))
    yield from ("", ON_STREAM, "")


def _stream_row(row: Row) -> Sequence[str]:
    """Return a family's cells with the residual stream sharded, beside those without."""
    stream, sent = row["sequence"], row["sequence"]["inside"]["sent_bytes"]
    return (
        row["title"],
        communication.kinds(stream["inside"]["forward"]),
        communication.kinds(stream["inside"]["backward"]),
        f"{sent / row['formula']['sequence_sent_bytes']:.3f}",
        f"{sent / row['inside']['sent_bytes']:.3f}",
        str(stream["outside"]["sent_bytes"] - row["outside"]["sent_bytes"]),
    )


ON_STREAM = """\
- ViT: its 17 positions do not divide, so nothing changes.
- BERT, RoBERTa: the first block reads the embedding whole, which every rank has; its gradient is reduced whole.
- Whisper: so does the first block of both stacks, and what decoder blocks read of the encoder is gathered once for all
  of them.
- T5: gradients of what the first blocks read, which every rank has whole, are reduced whole.
- Mixtral, Qwen 3 MoE: routers choose experts for whole tokens, so that the block of experts takes the stream gathered,
  and its sum is reduced whole and cut."""


BEYOND = """\
- Qwen 3, Qwen 3 MoE, Gemma 3: gradients of the norms of queries and keys, two of `head_dim` numbers in each block.
  Every rank has the sum over its own heads; Megatron-LM reduces them too, after the backward pass.
- Mixtral, Qwen 3 MoE: in each block the gradient of the routing weights is gathered, a number for each token and
  expert.
- Outside of the blocks, Megatron-LM reduces the embedding's output and the gradient at the head, as here. Logits are
  gathered here, for no loss is named; under a compiled cross-entropy they stay in shards, as Megatron-LM's do."""


def _family_row(title: str, rows: Sequence[Row]) -> Sequence[str]:
    """Return the row of one family; its collectives are the same on all numbers of ranks, or each is listed."""

    def each(part: str, phase: str) -> str:
        return " / ".join(dict.fromkeys(communication.kinds(row[part][phase]) for row in rows))

    return (
        title,
        str(rows[0]["blocks"]),
        each("inside", "forward"),
        each("inside", "backward"),
        f"{rows[0]['formula']['forward']} + {rows[0]['formula']['backward']}",
        *(f"{row['inside']['sent_bytes'] / row['formula']['sent_bytes']:.3f}" for row in rows),
        each("outside", "forward"),
        each("outside", "backward"),
    )


# Planning


def plan_rows(data: Row) -> list[tuple[plan_time.Size, plan_time.Measured]]:
    """Return the sizes with what their processes measured."""
    return [(plan_time.Size(**row["size"]), row["processes"]) for row in data["rows"]]


def planning_section(data: Row) -> Iterator[str]:
    """Yield plan_time's own table and the picture it drew."""
    yield from ("## Planning", "", "![planning time and memory by depth](plan_time.svg)", "")
    yield f"{data['processes for each size']} processes for each size, one core, mesh {data['mesh']}."
    yield from ("", "```", *plan_time.table(plan_rows(data)), "```", "")


# Memory


def memory_section(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line for what is predicted and one for what is measured of each model, on rank 0."""
    yield from ("## Memory", "", "![predicted and measured memory](memory.svg)", "")
    yield "MiB on rank 0 of 2; kinds are each at its own largest. In training by Keras, activations and gradients are"
    yield "not told from temporaries."
    yield ""
    head = ("model", "", "peak", *memory.KINDS, "peak by Keras", "off")
    yield from markdown(head, (each for row in rows for each in _memory_rows(row)))
    yield from ("", " ".join(f"{_capital(line)}." for line in memory.verdict(rows).splitlines()))


def _memory_rows(row: Row) -> Iterator[Sequence[str]]:
    for what in ("predicted", "measured"):
        figures = row["ranks"][0][what]
        by_keras = row["ranks"][0]["by_keras"]["peak_total"] / MIB
        yield (
            row["model"] if what == "predicted" else "",
            what,
            f"{figures['peak_total'] / MIB:.2f}",
            *(f"{figures['largest'][kind] / MIB:.2f}" for kind in memory.KINDS),
            *(("", "") if what == "predicted" else (f"{by_keras:.2f}", f"{memory.off(row):+.1%}")),
        )


# Generation


def generation_section(data: Row) -> Iterator[str]:
    """Yield a table of the versions for each size."""
    yield from ("", "## Generation", "", "One more token of a Llama with a cache of all positions before it:")
    for sizes in data["sizes"]:
        yield f"\n### {', '.join(f'{name} {value}' for name, value in sizes['size'].items())}\n"
        yield from markdown(VERSION_HEAD, version_rows(sizes["rows"]))


# Keras nightly's ModelParallel


def nightly_section(rows: Sequence[Row]) -> Iterator[str]:
    """Yield vs_keras_nightly's own tables, one for each size."""
    yield from (
        "",
        "## Against Keras nightly's ModelParallel",
        "",
        "Measured apart, by `make vs-keras-nightly`.",
        "",
        "```",
    )
    for _, of_size in groupby(rows, lambda row: row["size"]):
        of_one_size = list(of_size)
        yield from vs_keras_nightly.heading(of_one_size)
        for _, of_model in groupby(of_one_size, lambda row: row["model"]):
            yield from vs_keras_nightly.table(list(of_model))
    yield "```"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the JSON files")
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
