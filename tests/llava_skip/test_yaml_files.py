import pytest

from llava_skip_base.errors import UserError
from llava_skip_base.yaml_files import MOST_VALUES, read_yaml

NAMES = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 50_000, "nested too deep"),
        ("path: 2020-99-99", "month must be in 1..12"),
        ("path: " + "9" * 6000, "Exceeds the limit"),
        ("a: [", "is not valid YAML"),
        (f"a0: &a0 [x]\n{NAMES}\n", f"more than {MOST_VALUES:,} values"),
        ("sources: &a\n  x: *a\n", "or itself"),
    ],
)
def test_a_hostile_file_is_one_short_message(tmp_path, text, message):
    (path := tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_yaml(path)
    assert len(str(caught.value)) < 600


def test_repeats_are_read(tmp_path):
    (path := tmp_path / "mix.yaml").write_text("a: &a {x: 1}\nb: *a\n")
    assert read_yaml(path) == {"a": {"x": 1}, "b": {"x": 1}}
