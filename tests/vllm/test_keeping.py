"""A model that keeps every key is an ordinary one for vLLM: chunks, prefix cache, guessed tokens; a first token."""

import pytest

from llava_skip import SkipConfig
from tests.vllm.engines import answers, engine, greedy, prompts, questions, save, tokens


def test_chunks_through_images_prefixes_and_guessed_tokens(tmp_path):
    folder = save(tmp_path / "keeps", SkipConfig(5, 7, forget_cache=False))
    guess = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    asked, settings = questions(6), {"enable_prefix_caching": True, "enable_chunked_prefill": True}
    settings |= {"max_num_batched_tokens": 33, "max_num_seqs": 4}
    with engine(folder, own_process=True, speculative_config=guess, **settings) as llm:
        expected = answers(folder, asked)
        for _ in range(2):
            outputs = llm.generate(prompts(folder, asked), greedy(), use_tqdm=False)
            assert tokens(outputs) == expected
        assert sum(output.num_cached_tokens for output in outputs) > 0


@pytest.mark.parametrize("forgets", [True, False])
def test_text_behind_an_image_begins_as_in_the_library(tmp_path, forgets):
    """A tokenizer that begins a text with a space takes the text behind an image for a new one."""
    folder = save(tmp_path / "spaces", SkipConfig(5, 7, forget_cache=forgets), tokenizer=spacing_tokenizer())
    asked = questions(4)
    with engine(folder) as llm:
        assert tokens(llm.generate(prompts(folder, asked), greedy(), use_tqdm=False)) == answers(folder, asked)


def spacing_tokenizer():
    """Letters, with a space in front of each text, as SentencePiece has it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [chr(n) for n in range(33, 127)]
    words = ["<unk>", "<s>", "</s>", "<image>", "\u2581", *letters]
    tokenizer = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in words[:4]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
