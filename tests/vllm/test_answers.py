"""The tokens of vLLM's engine are those of the library's own `generate`: a batch of mixed prompts, for each kind."""

import pytest

from llava_skip import SkipConfig
from tests.support.small_models import SKIP
from tests.vllm.engines import answers, engine, greedy, prompts, questions, save, tokens

KEEPS = SkipConfig(5, 7, forget_cache=False)
KINDS = {
    "forgets": {"skip": SKIP},
    "keeps every key": {"skip": KEEPS},
    "dense": {"architecture": "llava"},
    "dense of several lengths": {"architecture": "llava-hd"},
    "tiles": {"architecture": "sv-llava-hd"},
    "chain of sight": {"architecture": "sv-cos"},
    "text that sees less": {"skip": SkipConfig(5, 7, text_sees_skipped=False)},
    "some layers, some tokens": {"skip": SkipConfig(3, 11, layers=(1, 2), ffn_tail=1, ffn_every=3)},
    "no summaries": {"skip": SkipConfig(5, 7, summaries=(), forget_cache=False)},
    "qwen2": {"skip": SKIP, "kind": "qwen2"},
    "qwen3": {"skip": SKIP, "kind": "qwen3"},
    "mistral": {"skip": SKIP, "kind": "mistral"},
    "reduction": {"architecture": "llava", "reduction": {"method": "grid", "tokens": 4}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_generate(kind, tmp_path):
    folder = save(tmp_path / "model", **KINDS[kind])
    asked = questions(6)
    with engine(folder) as llm:
        assert tokens(llm.generate(prompts(folder, asked), greedy(), use_tqdm=False)) == answers(folder, asked)
