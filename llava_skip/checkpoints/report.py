"""What loading a checkpoint did, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LoadReport:
    """What a checkpoint did not have, had in addition, or had in another shape; everything else was taken as it is.

    Attributes:
        source: the checkpoint.
        layout: how it was recognised.
        loaded: number of the model's tensors that come from it.
        fresh: parameters that it does not have, with new initial values.
        unused: its tensors that the model does not have.
        reshaped: tensors that were resized, with both shapes.
        notes: settings that were inferred, or that have no counterpart here.
    """

    source: str
    layout: str = ""
    loaded: int = 0
    fresh: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_exact(self) -> bool:
        """Whether the checkpoint fits exactly."""
        return not (self.fresh or self.unused or self.reshaped or self.notes)

    def __str__(self) -> str:
        lines = [f"{self.source}: layout {self.layout}, {self.loaded} tensors loaded"]
        groups = {
            "not in the checkpoint, newly initialised": self.fresh,
            "in the checkpoint, not used": self.unused,
            "resized": self.reshaped,
            "notes": self.notes,
        }
        for title, entries in groups.items():
            if entries:
                lines += [f"{title} ({len(entries)}):", *(f"  {entry}" for entry in entries)]
        return "\n".join(lines)
