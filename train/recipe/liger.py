"""`--use_liger_kernel true`: kernels of the package liger-kernel in the language model and for its loss.

The package's own function for a language model puts RMSNorm and SwiGLU into the modules of the given model, and its
rotary embedding into transformers' module of that kind of model. A model that it does not know by its type, as ours, it
would pass over in silence: so it is given the language model itself.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.decoder import language_models
from llava_skip.head import Head
from llava_skip_base.errors import UserError

if TYPE_CHECKING:
    from train.arguments import RunArguments

PACKAGE = "liger_kernel"
KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""Types of language models for which the package has a function, `apply_liger_kernel_to_<type>`."""


def check_liger(run: RunArguments, config: LlavaSkipConfig) -> None:
    """The kernels must fit the machine and the language model.

    Raises:
        UserError: they do not, or the package is missing.
    """
    if not run.use_liger_kernel:
        return
    if run.device.type != "cuda":
        raise UserError(
            f"--use_liger_kernel true is for CUDA and ROCm, and this run is on the {run.device.type}: leave it out."
        )
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError("--use_liger_kernel true needs a package: pip install '.[liger]' in a checkout.")
    kind, activation = config.text_config.model_type, getattr(config.text_config, "hidden_act", None)
    if kind not in KINDS:
        raise UserError(
            f"--use_liger_kernel true has kernels for language models of the types {', '.join(KINDS)}, not {kind}: "
            "leave it out."
        )
    if activation != "silu":
        raise UserError(
            f"--use_liger_kernel true has kernels for an FFN with silu, and this one has {activation}: leave it out."
        )


def use_liger(model: nn.Module, run: RunArguments) -> None:
    """Put the kernels into the language model of a model, and the fused cross entropy into its head.

    Norms (also of queries and keys), FFN and rotary embedding are the package's. Its fused cross entropy takes the
    supervised tokens alone, as the project's loss does; it adds gradients up in float32. In float16 the weight's
    gradient, a sum of many tokens, can be too large for it: there the project's own loss stays.
    """
    liger: Any = importlib.import_module(f"{PACKAGE}.transformers")
    for language_model in language_models(model):
        kind = language_model.config.model_type
        apply = getattr(liger, f"apply_liger_kernel_to_{kind}")
        home = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        classes = {name: value for name, value in vars(home).items() if isinstance(value, type)}
        # Its own fused cross entropy would replace the forward of a whole model of transformers.
        apply(model=language_model, rope=True, rms_norm=True, swiglu=True,
              cross_entropy=False, fused_linear_cross_entropy=False)  # fmt: skip
        for name, value in classes.items():  # it changes these, too: models that are made later are to have torch's
            setattr(home, name, value)
    for module in model.modules():
        if isinstance(module, Head) and not run.fp16:
            # As a function: a module in the head would be one more that ZeRO-3 looks after.
            loss = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
            module.fused = partial(loss)
    run.use_liger_kernel = False  # it is done: Trainer would look for the type of the whole model, and find none
