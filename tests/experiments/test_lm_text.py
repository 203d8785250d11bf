"""Coloured text: every character once and in order, in the colour of its expert."""

import doctest
import html.parser
import io
import re

import numpy as np
import pytest

from experiments import _lm_rules, _lm_text

PIECES = [
    b"def ",
    b"\xe2\x82",
    b"\xac",
    b"\n",
    b"\x1b[2J",
    b"<b>",
    b"",
    b"\xff",
    b"end",
]
NAMES = ["expert-py", "expert-man"]


def detokenize(tokens):
    return b"".join(PIECES[t] for t in tokens).decode(errors="replace")


def test_examples_run():
    for module in (_lm_text, _lm_rules):
        assert doctest.testmod(module).failed == 0
        assert doctest.testmod(module).attempted > 0


def test_token_texts_are_the_text():
    tokens = [0, 1, 2, 3, 4, 5, 6, 7, 8, 1]
    texts = _lm_text.token_texts(tokens, detokenize)
    assert len(texts) == len(tokens)
    assert "".join(texts) == detokenize(tokens)
    assert texts[:4] == ["def ", "", "€", "\n"]


def test_the_largest_weight_or_the_likeliest():
    weights = [[0.9, 0.1], [0.5, 0.5], [0.0, 1.0]]
    log_probs = [[-9.0, -1.0], [-1.0, -1.0], [None, None]]
    chosen, lead = _lm_text.choices(weights, log_probs, moves=True)
    assert chosen.tolist() == [0, 0, 1]
    np.testing.assert_allclose(lead, [0.8, 0.0, 1.0])
    chosen, lead = _lm_text.choices(weights, log_probs, moves=False)
    assert chosen.tolist() == [1, 0, 0]
    assert lead[0] > 0.99
    assert lead[1:].tolist() == [0.0, 0.0]  # a tie says nothing, nor do two zeros
    assert _lm_text.choices([], [], moves=True)[0].shape == (0,)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("cut", [1, 3, 100])
def test_a_painter_loses_nothing_however_text_settles(cut):
    tokens = [0, 1, 2, 5, 8]
    texts = _lm_text.token_texts(tokens, detokenize)
    stream = Terminal()
    painter = _lm_text.Painter(stream, colour=True)
    whole = "".join(texts)
    painter.add(texts, [0, 1, 1, 0, 1])
    for start in range(0, len(whole), cut):
        painter.write(whole[start : start + cut])
    painter.write("more than was announced")
    out = stream.getvalue()
    plain = re.sub(r"\x1b\[[\d;]*m", "", out)
    assert plain == whole + "more than was announced"
    colours, colour = [], ""
    for escape, character in re.findall(r"\x1b\[([\d;]*)m|([^\x1b])", out):
        colour = escape or colour
        if character:
            colours.append(colour)
    first, second = (_lm_text.paint("", i).split("m")[0][2:] for i in range(2))
    runs = [first] * 4 + [second] + [first] * 3 + [second] * 3
    assert colours[: len(whole)] == runs
    assert set(colours[len(whole) :]) == {"0"}  # what nobody announced is plain


def test_a_model_cannot_steer_the_terminal():
    stream = Terminal()
    painter = _lm_text.Painter(stream, colour=False)
    painter.write("a\x1b]0;title\x07\x9b2J\n\tb")
    assert stream.getvalue() == "a␛]0;title␇\ufffd2J\n\tb"
    plain = io.StringIO()
    _lm_text.Painter(plain, colour=False).write("a\x1b")
    assert plain.getvalue() == "a\x1b"  # a file gets what there is


def passage(**changes):
    return {
        "rule": "emselect",
        "moves": True,
        "prompt": 'a <script>alert("1")</script>',
        "token_texts": ["def ", "", "<i>&", "\n"],
        "log_probs": [-0.1, -0.2, -0.3, None],
        "weights": [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]],
        "expert_log_probs": [[-1.0, -2.0], [-1.0, None], [-1.0, -1.0], [None, -1.0]],
        **changes,
    }


class Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.spans, self.tags, self.text = [], set(), ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "span":
            self.spans.append(dict(attrs))

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_text_as_text():
    reader = Reader()
    page = _lm_text.html_page([passage()], NAMES, title="<t>")
    reader.feed(page)
    assert "script" not in reader.tags
    assert 'alert("1")</script>def <i>&' in reader.text
    tokens = [span for span in reader.spans if "title" in span]
    assert [span["class"] for span in tokens] == ["e0", "e1", "e1", "e0"]
    tip = tokens[1]["title"].split("\n")
    assert tip == ["fused: 81.9 %", "py: weight 0.00, 36.8 %", "man: weight 1.00, 0 %"]
    assert "py 50 %" in reader.text
    assert not re.search(r"https?://|src=|<link", page)  # nothing is loaded


def test_in_print_each_run_of_tokens_names_its_expert():
    text = _lm_text.show(passage(prompt="p: "), NAMES, colour=False)
    assert text == "p: ⟦py⟧def ⟦man⟧<i>&⟦py⟧\n"
    coloured = _lm_text.show(passage(prompt="p: "), NAMES, colour=True)
    assert "def " in coloured
    assert "⟦" not in coloured
