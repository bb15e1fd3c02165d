"""Logits of saved models, each cut between the processes of this job: `FOLDER OUTPUT`, started by torchrun."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

import llava_skip  # noqa: F401
from tests.support.small_models import batch_of, mixed_samples


def main(folder: Path, output: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    for saved in sorted(path for path in folder.iterdir() if path.is_dir()):
        model = AutoModelForImageTextToText.from_pretrained(saved, tp_plan="auto").eval()
        projection = model.model.language_model.layers[0].self_attn.q_proj.weight
        shape = tuple(getattr(projection, "to_local", lambda weight=projection: weight)().shape)
        inputs = batch_of(mixed_samples(model), "left")
        with torch.no_grad():
            logits = model(**inputs).logits
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        results[saved.name] = {"shape": shape, "logits": logits, "tokens": model.generate(**inputs, **options)}
    if torch.distributed.get_rank() == 0:
        torch.save(results, output)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
