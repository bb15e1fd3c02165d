"""Let a saved model answer in vLLM's engine: the same prompts, ends and texts as with `generate`."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # read while it is imported

import vllm
from transformers import GenerationConfig
from vllm.exceptions import VLLMValidationError

from eval.answering.generate import Generator, Inputs, Numerics, Turns, numerics, opened
from eval.answering.models import OWN_TYPE, SavedModel
from eval.answering.templates import render
from llava_skip.checkpoints.loading import check_native
from llava_skip_base.errors import UserError


@dataclass(frozen=True)
class VllmNumerics(Numerics):
    """How a model computes in vLLM.

    Attributes:
        engine: its name and version.
    """

    engine: str = f"vllm {vllm.__version__}"

    def load(self, model: SavedModel, rank: int) -> Generator:
        """A model in an engine of its own."""
        return VllmGenerator(model, self)


def vllm_numerics(dtype: str | None = None) -> VllmNumerics:
    """Number formats as `numerics` chooses them."""
    return VllmNumerics(**asdict(numerics(dtype)))


class VllmGenerator(Generator):
    """A model in vLLM's engine; what a batch costs is not measured, since its questions share the engine's steps."""

    def __init__(self, model: SavedModel, numerics: Numerics) -> None:
        """Start the engine.

        Args:
            model: the checked folder.
            numerics: the number format.

        Raises:
            UserError: no model of the library, one that the plug-in does not serve, or a broken folder.
        """
        if model.config.get("model_type") != OWN_TYPE:
            raise UserError(
                f"{model.folder}: --engine vllm is for models of the library, and this one is a "
                f"{model.config.get('model_type')!r}; convert it: llava-skip convert {model.folder} OUTPUT."
            )
        check_native(model.folder, model.reduction)
        ends, self._numerics = self._read_processor(model), numerics
        config = GenerationConfig.from_pretrained(model.folder)
        self._begin(model.folder, ends, config)
        self._penalty = config.repetition_penalty or 1.0
        self.answer_as(model)

    def answer_as(self, model: SavedModel) -> None:
        """From now on answer as the same folder with another reduction, or with none: in a new engine."""
        self.engine: Any = None  # frees its memory
        reduction = {} if model.reduction is None else {"reduction": model.reduction.to_dict()}
        self.engine = vllm.LLM(
            str(model.folder),
            dtype=self._numerics.dtype,
            hf_overrides=reduction,
            enforce_eager=self._numerics.device == "cpu",  # compiling takes longer than a benchmark
            seed=0,
        )

    def _prepare(self, conversations: Sequence[Turns]) -> Inputs:
        """Texts and opened images, which the plug-in tokenises and resizes as the library does."""
        texts, prompts = render(self.folder, self.processor, conversations), []
        for text, turns in zip(texts, map(opened, conversations), strict=True):
            parts = [part for turn in turns if isinstance(turn["content"], list) for part in turn["content"]]
            images = [part["image"] for part in parts if part["type"] == "image"]
            prompts.append({"prompt": text} | ({"multi_modal_data": {"image": images}} if images else {}))
        return {"prompts": prompts}

    def generate(self, inputs: Inputs, max_new_tokens: int) -> list[str]:
        """Answer a batch that is prepared.

        Raises:
            UserError: a question, with its answer, is too long for the model.
        """
        stops = {"stop_token_ids": sorted(self._stops), "stop": list(self.ends.strings), "ignore_eos": not self._stops}
        stops["repetition_penalty"] = self._penalty
        params = vllm.SamplingParams(temperature=0, max_tokens=max_new_tokens, **stops)
        try:
            outputs = self.engine.generate(inputs["prompts"], params, use_tqdm=False)
        except VLLMValidationError as error:
            raise UserError(f"{self.folder}: vLLM does not take a question: {error}") from error
        for output in outputs:
            answer = output.outputs[0]
            if answer.finish_reason == "length" and len(answer.token_ids) < max_new_tokens:
                raise UserError(
                    f"{self.folder}: vLLM cuts an answer after {len(answer.token_ids)} of {max_new_tokens} tokens, "
                    "where the model's positions end, and generate does not: answer with --engine transformers."
                )
        return self._texts([self._new_tokens(output.outputs[0].token_ids) for output in outputs])
