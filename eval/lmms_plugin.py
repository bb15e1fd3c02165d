"""llava-skip models in lmms-eval: `python -m lmms_eval --model llava_skip --model_args pretrained=DIR --tasks ...`.

lmms-eval finds `manifest` through the entry-point group `lmms_eval.models`; nothing here is imported without it.
Written against lmms-eval 0.7.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from eval.answering.generate import Generator, numerics
from eval.answering.models import check_model
from llava_skip.vision.rgb import to_rgb
from llava_skip_base.errors import UserError

MAX_NEW_TOKENS = 1024


def manifest() -> ModelManifest:
    """The entry of this model in the table of lmms-eval."""
    return ModelManifest("llava_skip", chat_class_path=f"{LlavaSkip.__module__}.{LlavaSkip.__name__}")


class LlavaSkip(lmms):
    """A saved model with lmms-eval's chat interface, greedy; `accelerate launch` starts one process for each GPU."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        dtype: str | None = None,
        attn: str | None = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        """Load the model.

        Args:
            pretrained: folder of a saved model.
            batch_size: questions answered at once.
            dtype: number format; bfloat16 on GPUs and float32 otherwise by default.
            attn: attention implementation of transformers.
            device: what lmms-eval passes on; each process takes its own GPU, or the CPU if there is none.
            **unknown: refused, except for what lmms-eval always passes.

        Raises:
            UserError: the folder is no saved model, or an argument is unknown.
        """
        super().__init__()
        surplus = {name: value for name, value in unknown.items() if name != "max_batch_size"}
        if surplus:
            raise UserError(f"unknown --model_args: {', '.join(surplus)}; expected pretrained, dtype, attn.")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.batch_size = int(batch_size)
        self.generator = Generator(
            check_model(Path(pretrained).expanduser()), numerics(dtype, attn), self.accelerator.local_process_index
        )

    @property
    def device(self) -> Any:
        """The device of the model."""
        return self.generator.model.device

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answers to requests, in their order; batches have one limit each, the longest questions are first."""
        order = sorted(range(len(requests)), key=lambda n: (_limit(requests[n]), -len(requests[n].args[0])))
        answers = [""] * len(requests)
        with tqdm(total=len(requests), unit="question", disable=self.rank != 0 or None) as progress:
            for batch in _batches(order, requests, self.batch_size):
                conversations = [self._conversation(requests[n]) for n in batch]
                texts = self.generator.reply(conversations, _limit(requests[batch[0]]))
                for n, text in zip(batch, texts, strict=True):
                    answers[n] = _cut(text, requests[n].args[2].get("until"))
                    self.cache_hook.add_partial("generate_until", requests[n].args[:3], answers[n])
                progress.update(len(batch))
        return answers

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refuse tasks of several rounds."""
        raise NotImplementedError("llava_skip answers tasks of one round; remove the others from --tasks.")

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refuse tasks that compare likelihoods."""
        raise NotImplementedError("llava_skip answers by generating; remove loglikelihood tasks from --tasks.")

    def _conversation(self, request: Instance) -> list[dict[str, Any]]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        _, videos, audios = messages.extract_media()
        if videos or audios:
            raise UserError(f"task {task} has videos or sounds; llava_skip takes images and text.")
        conversation = messages.to_hf_messages()
        for turn in conversation:
            for part in turn["content"]:
                if part["type"] == "image":
                    part["image"] = to_rgb(part["image"])
        return conversation


def _limit(request: Instance) -> int:
    return int(request.args[2].get("max_new_tokens", MAX_NEW_TOKENS))


def _batches(order: Sequence[int], requests: Sequence[Instance], size: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for n in order:
        if batches and len(batches[-1]) < size and _limit(requests[batches[-1][0]]) == _limit(requests[n]):
            batches[-1].append(n)
        else:
            batches.append([n])
    return batches


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """An answer up to its first stop string; empty ones stop nothing."""
    for stop in [until] if isinstance(until, str) else until or []:
        text = text.partition(stop)[0] if stop else text
    return text.strip()
