"""The plan as users hold it: the decisions, and the forms in which people, programs and other ranks read them."""

from __future__ import annotations

from dataclasses import fields

from tp_planner.ir import plan as facts
from tp_planner.ir.plan_json import plan_from_json, plan_hash, plan_to_json
from tp_planner.report.text import plan_to_text


class Plan(facts.Plan):
    """All decisions for one model, layout and mesh; ``print`` shows them, ``to_json`` and ``from_json`` keep them."""

    __slots__ = ()

    @property
    def hash(self) -> str:
        """SHA-256 of the JSON form; equal on all ranks that made the same decisions."""
        return plan_hash(self)

    def to_json(self) -> str:
        """Return the plan as JSON text: sorted keys, versioned, byte-identical for equal plans."""
        return plan_to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that ``to_json`` wrote.

        Raises PlanError for text that is not a plan, or a plan of another format version.
        """
        found = plan_from_json(text)
        return cls(**{field.name: getattr(found, field.name) for field in fields(found)})

    def __str__(self) -> str:
        return plan_to_text(self)
