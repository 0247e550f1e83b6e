"""What no linter holds."""

import io
import re
import tokenize

import pytest
from helpers import ROOT

WIDTH = 120
CLAUSE_ENDS = re.compile(r'[.,;:?!)|>\]}]\s*$|\\n\s*$|^\W*$')


def early_splits(source):
    """Lines of a text in several literals that end within a clause, though the next word has room."""
    kinds = (tokenize.NL, tokenize.COMMENT)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in kinds]
    for first, second in zip(tokens, tokens[1:]):
        if first.type == second.type == tokenize.STRING and not first.string.startswith(('r', '"""')):
            text, following = (re.sub(r'^[a-zA-Z]*["\']|["\']$', '', token.string) for token in (first, second))
            word = re.match(r'(\{.*?\}|\S)* ?', following)[0]  # what is put in by a format is one word
            prefix = '{' in word and not first.string.startswith('f')
            room = first.end[1] + prefix + len(word) <= WIDTH
            if room and not CLAUSE_ENDS.search(text) and not following.startswith(('(', '[', '-')):
                yield f'line {first.start[0]}: {text!r} | {following!r}'


def test_what_an_early_split_is():
    def of(first, second):
        return list(early_splits(f'message = (\n    {first!r}\n    f{second!r}\n)\n'))

    assert of('an ', 'epoch-based loop')
    assert not of('an epoch-based loop: ', 'remove it')
    assert not of('refused ', '(why)')
    assert of('word ' * 20, 'is')
    assert not of('word ' * 20, 'disestablishment')
    assert not of('one of ', '{", ".join(name_of(kind) for kind in KINDS)}' + 80 * '.')


@pytest.mark.parametrize('folder', ['plugins', 'tools', 'tests'])
def test_messages_are_split_where_a_clause_ends_or_the_line_is_full(folder):
    found = [
        f'{path.relative_to(ROOT)} {split}'
        for path in sorted((ROOT / folder).rglob('*.py'))
        for split in early_splits(path.read_text())
    ]
    assert not found, '\n'.join(found)


def test_a_paragraph_of_a_page_is_one_line():
    """No wrapped lines, outside code and tables, on any page."""
    for path in [*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')]:
        text = re.sub(r'^ *```.*?^ *```$', '', path.read_text(), flags=re.DOTALL | re.MULTILINE)
        prose = r'(?![ ]{4}|\||#|<| *[-*] | *\d+\. )'
        wrapped = re.search(rf'^{prose}.*\S\n {{0,3}}(?=\w){prose}.*', text, re.MULTILINE)
        item = re.search(r'^ *(?:[-*]|\d+\.) .*\n {2,3}\w.*', text, re.MULTILINE)
        assert not wrapped, f'{path.name}: {wrapped[0]}'
        assert not item, f'{path.name}: {item[0]}'
