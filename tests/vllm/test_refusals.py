"""Settings that do not work are refused before a model loads, by name and with the cure."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from llava_skip_base.errors import UserError
from tests.support.small_models import SKIP
from tests.vllm.engines import save


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    rope = {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}}
    forgets = save(root / "forgets", SKIP)
    text = {"text_config": {**_config(forgets)["text_config"], **rope}}
    cut = {"skip": None, "reduction": {"method": "fastv", "tokens": 6}}
    return {
        "forgets": forgets,
        "keeps": save(root / "keeps", replace(SKIP, forget_cache=False)),
        "dense": save(root / "dense", architecture="llava"),
        "yarn": save(root / "yarn", SKIP, **text),
        "in the decoder": save(root / "cut", architecture="llava", **cut),
    }


def _config(folder):
    from llava_skip_base.files import read_json

    return read_json(folder / "config.json")


FULL = {"compilation_config": {"cudagraph_mode": "FULL"}}
TRANSFER = {"kv_transfer_config": {"kv_connector": "SharedStorageConnector", "kv_role": "kv_both"}}
DRAFT = {"speculative_config": {"method": "medusa", "model": "nothing", "num_speculative_tokens": 2}}


@pytest.mark.parametrize(
    ("name", "settings", "named", "cure"),
    [
        ("dense", {"enable_lora": True}, "enable_lora", "merge"),
        ("dense", {"pipeline_parallel_size": 2}, "pipeline_parallel_size", "tensor_parallel_size"),
        ("keeps", FULL, "cudagraph_mode FULL", "PIECEWISE"),
        ("forgets", FULL, "cudagraph_mode FULL", "PIECEWISE"),
        ("keeps", {"enable_mm_embeds": True}, "enable_mm_embeds", "send images"),
        ("forgets", {"attention_config": {"backend": "FLASHINFER"}}, "FLASHINFER", "FLASH_ATTN"),
        ("forgets", TRANSFER, "kv_transfer_config", "leave it out"),
        ("yarn", {}, "'yarn'", "max_model_len to 128"),
        ("in the decoder", {}, "fastv:6", "llava-skip serve"),
    ],
)
def test_a_setting_is_refused_with_its_cure(folders, name, settings, named, cure):
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError) as raised:  # vLLM makes one of its own of a UserError
        EngineArgs(model=str(folders[name]), dtype="float32", **settings).create_engine_config()
    assert named in str(raised.value) and cure in str(raised.value)


def test_settings_that_work_are_not_refused(folders):
    from vllm.engine.arg_utils import EngineArgs

    yarn = EngineArgs(model=str(folders["yarn"]), dtype="float32", max_model_len=128).create_engine_config()
    assert yarn.model_config.hf_config.text_config.max_position_embeddings == 256
    decode = EngineArgs(
        model=str(folders["dense"]), dtype="float32", compilation_config={"cudagraph_mode": "FULL"}
    ).create_engine_config()
    assert decode.cache_config.enable_prefix_caching


def test_another_language_model_and_a_method_that_guesses(folders):
    from serve.vllm.config import check_model, refusals

    config = SimpleNamespace(text_config=SimpleNamespace(model_type="gpt_neox"), reduction_config=None, forgets=False)
    with pytest.raises(UserError, match="gpt_neox.*llama, mistral"):
        check_model(config)
    settings = SimpleNamespace(
        lora_config=None,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        model_config=SimpleNamespace(multimodal_config=None),
        speculative_config=SimpleNamespace(method="eagle"),
        compilation_config=SimpleNamespace(cudagraph_mode=None),
    )
    (message,) = refusals(settings, SimpleNamespace(skip={}, forgets=False))
    assert "'eagle'" in message and "ngram" in message


@pytest.mark.parametrize(
    ("given", "expected"),
    [("FULL_AND_PIECEWISE", "PIECEWISE"), ("FULL_DECODE_ONLY", "PIECEWISE"), (None, "PIECEWISE"), ("NONE", "NONE")],
)
def test_graphs_of_whole_steps_are_left_out(given, expected):
    from vllm.config.compilation import CUDAGraphMode

    from serve.vllm.config import _choose_graphs

    compilation = SimpleNamespace(cudagraph_mode=None if given is None else CUDAGraphMode[given])
    _choose_graphs(SimpleNamespace(compilation_config=compilation))
    assert compilation.cudagraph_mode == CUDAGraphMode[expected]


def test_a_backend_that_does_not_say_where_sequences_begin(monkeypatch):
    from serve.vllm import model

    metadata = type("FlashInferMetadata", (), {})()
    monkeypatch.setattr(model, "get_forward_context", lambda: SimpleNamespace(attn_metadata={"layer": metadata}))
    with pytest.raises(RuntimeError, match="FlashInferMetadata.*FLASH_ATTN"):
        model._sequence_starts()
