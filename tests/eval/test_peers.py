"""Rules with a peer's name against what the peer's own code made of the same prediction file.

`peers.json` holds questions and odd answers that were made for this, and for each rule the headline and the questions
that VLMEvalKit (its code of 2026-05 with the letter rule of 2026-06, on xlsx files) or lmms-eval 0.7.3 count as right;
by the official rules of ScienceQA, VQAv2, VizWiz and DocVQA those that LLaVA's or the official code counts as right.
`skip` are the answers for which lmms-eval draws a letter.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks import BENCHMARKS, get_benchmark
from eval.score import score_file

PEERS: dict[str, Any] = json.loads(Path(__file__).with_name("peers.json").read_text())
RULES = [(name, rule) for name, peer in PEERS.items() for rule in peer["rules"]]


@pytest.mark.parametrize(("name", "rule"), RULES)
def test_every_question_counts_as_in_the_peers_code(write_tsv: Callable[..., Path], name: str, rule: str) -> None:
    columns, *cells = PEERS[name]["table"]
    rows = [dict(zip(columns, row, strict=True)) for row in cells]
    path, peer, benchmark = write_tsv(rows), PEERS[name]["rules"][rule], get_benchmark(name, rule)
    score = score_file(benchmark, path, None, False, None)
    ids = [sample.id for sample in benchmark.load(path, with_images=False)]
    keys = {id_: row["id" if name == "mmmu" else "index"] for id_, row in zip(ids, rows, strict=True)}
    shares = peer["right"] if isinstance(peer["right"], dict) else dict.fromkeys(peer["right"], 1)
    found = {
        keys[id_]: value for id_, value in score.per_sample.items() if value and keys[id_] not in peer.get("skip", ())
    }
    assert found == {key: pytest.approx(share) for key, share in shares.items() if key not in peer.get("skip", ())}
    if peer["score"] is not None:
        assert score.score == pytest.approx(peer["score"])


def test_every_rule_with_a_peers_name_is_compared() -> None:
    checked = {pair for pair in RULES if pair[1] != "official"}
    # MM-Vet's grades come from a judge; lmms-eval before 0.7.3 differs in open questions alone.
    # LLaVA's rule for SEED-Bench is equality.
    others = {("mmvet", "vlmevalkit"), ("mmmu", "lmms-eval-0.7.2"), ("seedimage", "llava")}
    named = {(name, rule) for name in BENCHMARKS for rule in get_benchmark(name).rules if rule != "official"}
    assert named - others == checked
