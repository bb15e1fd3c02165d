import pytest
from PIL import Image

from llava_skip import LlavaSkipProcessor, SkipConfig
from tests.support.conversations import byte_tokenizer
from tests.support.interrupted import Attempts
from tests.support.small_models import small_config


@pytest.fixture
def images(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (10, 6), "red").save(tmp_path / name)
    return tmp_path


@pytest.fixture
def processor():
    config = small_config(SkipConfig(5, 7), vocab_size=400)
    config.image_token_index = 3
    return LlavaSkipProcessor.for_config(config, byte_tokenizer(), "v1")


@pytest.fixture(scope="module")
def attempt():
    """Makes attempts at runs in forks of one process, see `Attempts`."""
    attempts = Attempts()
    yield attempts
    attempts.close()
