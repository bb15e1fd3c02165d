"""Rows of an engine, by hand: what an image's rows carry, positions, which prompts are whole, who sees whom."""

import pytest
import torch

from llava_skip import SkipConfig
from serve.vllm.rows import Block, check_whole, expand, mark, pack, positions, unpack

SKIP = SkipConfig(2, 5, ffn_tail=1)  # retained 0, 1, summary 2, skipped 3-6, exempt 7, summary 8
BLOCK = Block.of(SKIP)


def test_the_places_of_a_block():
    assert (BLOCK.kept, BLOCK.skipped) == ((0, 1, 2, 7, 8), (3, 4, 5, 6))
    assert (BLOCK.length, BLOCK.carried, BLOCK.growth) == (9, 1, 2)
    assert Block.of(SkipConfig(1, 6)).carried == 2  # 6 on the shoulders of 3
    assert Block.of(SkipConfig(4, 2)).growth == 2  # 8 of 6: positions can be more than rows


@pytest.mark.parametrize("skip", [SKIP, SkipConfig(1, 6), SkipConfig(1, 7), SkipConfig(2, 3, summaries=())])
def test_packing_loses_nothing(skip):
    block, blocks = Block.of(skip), torch.randn(3, skip.length, 4)
    packed = pack(blocks, block)
    assert packed.shape == (3, len(block.kept), 4 * (1 + block.carried))
    kept, skipped = unpack(packed.flatten(0, 1), block, 4)
    torch.testing.assert_close(kept, blocks[:, block.kept].flatten(0, 1), rtol=0, atol=0)
    torch.testing.assert_close(skipped, blocks[:, block.skipped].flatten(0, 1), rtol=0, atol=0)


def test_a_mark_says_which_rows_skip():
    marked = mark(torch.randn(2, 9, 4), SKIP)
    assert marked.shape == (2, 9, 5)
    assert marked[:, :, -1].tolist() == [[0, 0, 0, 1, 1, 1, 1, 0, 0]] * 2


def test_positions_are_those_of_the_whole_sequence():
    # one word, an image, another one beside it, two words; and two generated tokens
    found, added = positions(15, [1, 6], 13, BLOCK)
    first, second = [1, 2, 3, 8, 9], [10, 11, 12, 17, 18]
    assert found[0].tolist() == [0, *first, *second, 19, 20, 21, 22]
    assert found[1].tolist() == found[2].tolist() == [-13] * 13 + [21, 22]
    assert added == 8  # the next row, number 15, is at 23


def test_positions_of_text_alone():
    found, added = positions(3, [], 0, BLOCK)
    assert found.tolist() == [[0, 1, 2]] * 3
    assert added == 0


def test_a_prompt_in_parts_is_found():
    whole, text = [-4, -4, -4, -4, 9], [0, 1]  # four rows of a prompt and a generated one; text
    starts = torch.tensor([0, 5, 7])
    assert check_whole(torch.tensor([*whole, *text]), starts).tolist() == []
    assert check_whole(torch.tensor([-4, -4, -4, 0, 1]), torch.tensor([0, 3, 5])).tolist() == [0]  # begun
    assert check_whole(torch.tensor([5, -4, 7]), torch.tensor([0, 1, 2, 3])).tolist() == [1]  # its end alone
    assert check_whole(torch.tensor([5, -3, -3]), torch.tensor([0, 1, 1, 1])).tolist() == []  # padding behind the last


def by_hand(kinds, text_sees):
    """Who sees whom in rows of (image or 0, skipped, generated)."""
    return [
        [
            j <= i and (not skipped or (image == kinds[i][0] if not text_sees else not kinds[i][2]))
            for j, (image, skipped, _) in enumerate(kinds)
        ]
        for i in range(len(kinds))
    ]


@pytest.mark.parametrize("text_sees", [True, False])
@pytest.mark.parametrize("generated", [0, 2])
def test_skipped_rows_come_back_between_the_kept_ones(text_sees, generated):
    """A decode step, then a prompt of two images and text, then another step, then padding."""
    block = Block(BLOCK.kept, BLOCK.skipped, text_sees)
    length = 13 + generated
    place, marks = torch.zeros(length + 4, dtype=torch.long), torch.zeros(length + 4, dtype=torch.long)
    found, _ = positions(length, [1, 6], 13, block)
    place[1 : 1 + length], marks[1 : 1 + length] = found[0], found[1]
    place[0], place[1 + length] = 40, 3
    is_image = torch.zeros(length + 4, dtype=torch.bool)
    is_image[2:12] = True
    starts = torch.tensor([0, 1, 1 + length, 2 + length])
    made = expand(place, marks, is_image, starts, block)

    rows = [0, 1, 2, 3, 4, "a", "b", "c", "d", 5, 6, 7, 8, 9, "e", "f", "g", "h", 10, 11]
    rows += [12 + n for n in range(2 + generated)] + [length + 1, length + 2, length + 3]
    names = [*range(length + 4), *"abcdefgh"]
    assert [names[index] for index in made.order.tolist()] == rows
    assert [rows[index] for index in made.kept.tolist()] == list(range(length + 4))
    assert made.positions[1 : 22 + generated].tolist() == list(range(21 + generated))

    ((first, end, mask),) = made.sequences
    assert (first, end) == (1, 22 + generated)
    if text_sees and not generated:
        assert mask is None
        return
    image = [(0, False)] + [(n, 3 <= p <= 6) for n in (1, 2) for p in range(9)] + [(0, False)] * 2
    kinds = [(n, skipped, False) for n, skipped in image] + [(0, False, True)] * generated
    assert mask.tolist() == by_hand(kinds, text_sees)
