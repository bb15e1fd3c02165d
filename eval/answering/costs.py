"""What answering cost, as it was measured: a line for each batch on disk, and its summary for the result.

The times differ from run to run, so they are in a file of their own, beside the answers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from llava_skip_base.errors import UserError
from llava_skip_base.files import json_lines, parse_json, write_json_lines, writing


@dataclass(frozen=True)
class BatchCost:
    """What a batch of questions cost.

    Attributes:
        questions: number of questions.
        prefill_seconds: from the inputs on the device to the logits of the first new token, with the vision tower.
        decode_seconds: from there to the end of the longest answer.
        new_tokens: tokens of all answers, each with the one that ends it.
        peak_memory_bytes: the most memory that was taken at one time.
        peak_memory: what `peak_memory_bytes` is.
        device: name of the device.
        warm: False for the first batch after a model was loaded, which pays for things that later ones do not.
    """

    questions: int
    prefill_seconds: float
    decode_seconds: float
    new_tokens: int
    peak_memory_bytes: int
    peak_memory: str
    device: str
    warm: bool


class CostLog:
    """A JSON-lines file with what each batch cost."""

    def __init__(self, folder: Path, keep: bool) -> None:
        """Read the log of a folder.

        Args:
            folder: the folder of the answers, which exists and is locked by this process.
            keep: whether the answers there continue; otherwise the log starts over.
        """
        self.path = folder / "costs.jsonl"
        self.batches = _read(self.path) if keep else []
        with writing(self.path):
            if self.batches:
                write_json_lines(self.path, map(asdict, self.batches))  # without half a line of a kill
            else:
                self.path.unlink(missing_ok=True)

    def append(self, cost: BatchCost) -> None:
        """Add a batch.

        Raises:
            UserError: it cannot be written.
        """
        with writing(self.path), self.path.open("ab", buffering=0) as file:
            file.write(json_lines([asdict(cost)]).encode())
        self.batches.append(cost)

    def summary(self, batch_size: int) -> dict[str, Any] | None:
        """The `costs` of a result; None if nothing was measured.

        Times are the median of the batches, so that other work on the machine changes them little. Batches that came
        first after a load are left out where there are others.
        """
        measured = [batch for batch in self.batches if batch.warm] or self.batches
        if not measured:
            return None
        questions = sum(batch.questions for batch in measured)
        return {
            "batch_size": batch_size,
            "batches": len(measured),
            "questions": questions,
            "prefill_seconds_a_question": median(batch.prefill_seconds / batch.questions for batch in measured),
            "decode_seconds_a_question": median(batch.decode_seconds / batch.questions for batch in measured),
            "new_tokens_a_question": sum(batch.new_tokens for batch in measured) / questions,
            "peak_memory_bytes": max(batch.peak_memory_bytes for batch in measured),
            "peak_memory": ", ".join(sorted({batch.peak_memory for batch in measured})),
            "device": ", ".join(sorted({batch.device for batch in measured})),
        }


def _read(path: Path) -> list[BatchCost]:
    """The batches of a log; lines that are none, as after a kill, are left out."""
    try:
        lines: Sequence[bytes] = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); remove it.") from error
    batches = []
    for line in lines:
        try:
            batch = BatchCost(**parse_json(line.decode()))
        except (ValueError, TypeError):
            continue
        if all(type(value) in _KINDS[name] for name, value in asdict(batch).items()) and batch.questions > 0:
            batches.append(batch)
    return batches


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("questions", "new_tokens", "peak_memory_bytes"), (int,)),
    **dict.fromkeys(("prefill_seconds", "decode_seconds"), (int, float)),
    **dict.fromkeys(("peak_memory", "device"), (str,)),
    "warm": (bool,),
}
