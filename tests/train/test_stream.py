import itertools
import json

import pytest
from torch.utils.data import DataLoader

from tests.support.records import record
from train.data import ConversationStream, collate, read_sources


def write(folder, name, count, **fields):
    rows = [{**record(text=f"<image>\n{name}{i}"), "id": f"{name}{i}", **fields} for i in range(count)]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / f"{name}.jsonl")


def stream_of(folder, processor, text=None, **options):
    path = write(folder, "a", 20)
    if text:
        (folder / "mix.yaml").write_text(text)
        path = str(folder / "mix.yaml")
    return ConversationStream(read_sources(path, "" if text else str(folder)), processor, 500, **options)


def questions(processor, samples):
    texts = [processor.tokenizer.decode([t for t in s["input_ids"] if t != 3]) for s in samples]
    return [text.split("\n")[1].split(" ")[0] for text in texts]


def take(stream, count):
    return list(itertools.islice(iter(stream), count))


def test_a_pass_reads_every_record_in_an_order_that_changes(images, processor):
    found = questions(processor, take(stream_of(images, processor, shuffle_buffer=100), 40))
    first, second = found[:20], found[20:]
    assert sorted(first) == sorted(second) == sorted(f"a{i}" for i in range(20)) and first != second
    assert found == questions(processor, take(stream_of(images, processor, shuffle_buffer=100), 40))


def test_processes_and_workers_share_a_stream_without_overlap(images, processor):
    whole = questions(processor, take(stream_of(images, processor), 20))
    shares = []
    for rank in range(2):
        loader = DataLoader(
            stream_of(images, processor, rank=rank, processes=2), 1, num_workers=2, collate_fn=list
        )  # fmt: skip
        shares.append(questions(processor, [batch[0] for batch in itertools.islice(iter(loader), 10)]))
    assert not set(shares[0]) & set(shares[1]) and sorted(shares[0] + shares[1]) == sorted(whole)


def test_sources_are_drawn_by_weight(images, processor):
    write(images, "b", 20)
    text = "sources:\n  a: {path: a.jsonl, images: ., weight: 3}\n  b: {path: b.jsonl, images: .}\n"
    found = questions(processor, take(stream_of(images, processor, text), 200))
    assert 0.65 < sum(name[0] == "a" for name in found) / 200 < 0.85


def test_faulty_records_stop_a_stream_or_are_skipped(images, processor, caplog):
    stream = stream_of(images, processor)
    lines = (images / "a.jsonl").read_text().splitlines()
    lines[3] = json.dumps({**json.loads(lines[3]), "image": "gone.png"})
    (images / "a.jsonl").write_text("\n".join(lines) + "\n{broken")
    with pytest.raises(ValueError, match="of the stream, of a .*(gone.png|not valid JSON)"):
        take(stream, 40)
    stream.drop_faulty = True
    samples = take(stream, 38)
    assert "a3" not in questions(processor, samples)
    assert sum(sample["faulty"] for sample in samples) == collate(samples, 0)["faulty"].item() >= 2
    assert "gone.png" in caplog.text and "not valid JSON" in caplog.text


def test_a_stream_of_nothing_but_faults_ends(images, processor):
    stream = stream_of(images, processor, drop_faulty=True)
    (images / "a.png").unlink()
    with pytest.raises(ValueError, match="a.png"):
        take(stream, 1)
