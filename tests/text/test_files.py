import json
from pathlib import Path

import pytest

from fedveil.base.refusal import Refusal
from fedveil.text import files
from fedveil.text.files import Fields, TextRecord, clients_of, read_texts

SECRET = "my number is 7132"


def written(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal_of(path: Path, fields: Fields | None = None) -> str:
    with pytest.raises(Refusal) as refusal:
        read_texts(path, fields or Fields())
    text = str(refusal.value)
    assert "\n" not in text and "7132" not in text
    return text.partition(f"{path}")[2]


def test_each_file_and_folder_is_a_client(tmp_path: Path) -> None:
    written(tmp_path / "ann.txt", "Dear Bob,\nthe sea is calm.\n")
    written(tmp_path / "bob.jsonl", '{"text": "one"}\n\n{"text": "two"}\n')
    written(tmp_path / "cy" / "b.txt", "second")
    written(tmp_path / "cy" / "a" / "deep.TXT", "first")
    written(tmp_path / ".hidden.txt", "hidden")
    written(tmp_path / "cy" / ".git" / "x.txt", "hidden")
    paths = clients_of(tmp_path)
    assert [path.name for path in paths] == ["ann.txt", "bob.jsonl", "cy"]
    texts = [[record.text for record in read_texts(path, Fields())] for path in paths]
    assert texts == [["Dear Bob,\nthe sea is calm.\n"], ["one", "two"], ["first", "second"]]
    assert clients_of(paths[0]) == [paths[0]]
    assert len(clients_of(tmp_path, [tmp_path / "bob.jsonl"])) == 2


def test_fields_have_the_names_of_the_keys(tmp_path: Path) -> None:
    records = [{"body": "one", "from": 7, "mood": True}, {"body": "two", "from": " ann ", "mood": "sad"}]
    path = written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))
    assert read_texts(path, Fields("body", "from", "mood")) == [
        TextRecord("one", "7", "True"),
        TextRecord("two", "ann", "sad"),
    ]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    text = written(tmp_path / "a.txt", b"\xef\xbb\xbfgr\xc3\xbc\xc3\x9fe")
    line = written(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n')
    assert read_texts(text, Fields()) == [TextRecord("grüße")]
    assert read_texts(line, Fields()) == [TextRecord("a")]


@pytest.mark.parametrize(
    ("second", "remedy"),
    [
        (f'"{SECRET}"', 'is no JSON object; write {"text": "..."}'),
        (f'{{"text": "{SECRET}"', 'is no JSON object; write {"text": "..."}'),
        (f'{{"text": "a", "text": "{SECRET}"}}', 'is no JSON object; write {"text": "..."}'),
        (f'{{"words": "{SECRET}"}}', "has no text in the field 'text'; add it, or set task.text_field"),
        ('{"text": 7132}', "has no text in the field 'text'; add it, or set task.text_field"),
        ('{"text": " \\n"}', "holds an empty text; remove it"),
        ('{"text": "7132 \\ud800"}', "holds half of a surrogate pair; write the character itself"),
        (b'{"text": "7132 \xff"}', "is no UTF-8; save it with that encoding"),
        ('{"text": "' + 30 * "7132" + '"}', "is longer than 100 bytes; divide it into several texts"),
    ],
)
def test_a_mistake_names_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: bytes | str, remedy: str
) -> None:
    monkeypatch.setattr(files, "LONGEST", 100)
    line = second.encode() if isinstance(second, str) else second
    path = written(tmp_path / "a.jsonl", b'{"text": "fine"}\n' + line + b"\n")
    assert refusal_of(path) == f", line 2': {remedy}"


@pytest.mark.parametrize("name", ["person", "label"])
def test_a_missing_person_or_label_is_refused(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "a.jsonl", f'{{"text": "{SECRET}", "who": ""}}')
    remedy = "has no word or number in the field 'who'; add it"
    assert refusal_of(path, Fields(**{name: "who"})) == f", line 1': {remedy}"
    plain = written(tmp_path / "a.txt", SECRET)
    remedy = "has no fields for a person or a label; write it as .jsonl"
    assert refusal_of(plain, Fields(**{name: "who"})) == f"': {remedy}"


def test_an_empty_or_long_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal_of(written(tmp_path / "a.txt", "")) == ", line 1': holds an empty text; remove it"
    assert refusal_of(written(tmp_path / "a.jsonl", "\n")).startswith("': holds no text")
    assert refusal_of(tmp_path / "none").startswith("': does not exist")
    monkeypatch.setattr(files, "LONGEST", 10)
    assert "longer than 10 bytes" in refusal_of(written(tmp_path / "b.txt", 3 * SECRET))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "a.txt", "text")
    other = written(tmp_path / "b.docx", SECRET)
    with pytest.raises(
        Refusal, match=r"is no text that is read; write it as \.txt or \.jsonl, or move it away"
    ):
        clients_of(tmp_path)
    other.unlink()
    (tmp_path / "b.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(Refusal, match="is no text that is read"):
        clients_of(tmp_path)


def test_a_folder_without_texts_is_refused(tmp_path: Path) -> None:
    for folder, fault in ((tmp_path, "holds no text"), (tmp_path / "none", "does not exist")):
        with pytest.raises(Refusal, match=f"{fault}; name a folder of"):
            clients_of(folder)
