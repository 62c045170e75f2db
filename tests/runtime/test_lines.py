"""Lines of a file whose writer was killed, or is writing now."""

from pretrain.runtime.lines import complete_lines, json_lines


def test_a_last_line_that_was_cut_is_not_read_and_others_are_reported_by_number():
    invalid, incomplete = [], []
    lines = [b'{"a": 1}\n', b"\n", b"{\n", b'"\xff"\n', b"[" * 100_000 + b"\n", b"7\n", b'{"a": "\xc3']
    found = json_lines(lines, on_invalid=invalid.append, on_incomplete=incomplete.append)
    assert list(found) == [(1, {"a": 1}), (6, 7)]
    assert (invalid, incomplete) == ([3, 4, 5], [7])


def test_a_value_that_only_lacks_its_line_end_is_complete():
    assert list(json_lines([b'{"a": 1}'])) == [(1, {"a": 1})]


def test_lines_of_text():
    assert complete_lines("a\r\nb\nc\r\nd", "\r\n") == ["a", "b\nc"]
    assert complete_lines("", "\n") == complete_lines("a", "\n") == []
