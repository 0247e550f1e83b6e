"""What the documentation site has from outside docs/: the README as its front page, other pages of the root, and an API
page per public module.

mkdocs calls the functions (mkdocs.yml names this file); griffe, which reads the docstrings without importing anything,
calls the class.
"""

import re
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = {  # file in the repository: page of the site
    'README.md': 'index.md',
    **{f'{name}.md': f'{name}.md' for name in ('CONTRIBUTING', 'CODE_OF_CONDUCT', 'CHANGELOG', 'RELEASE', 'SECURITY')},
}
# Not for users: the timings, which have a command line, and details of the two backends of a convolution.
INTERNAL = ('benchmark', 'cli', 'depthwise', 'loss_benchmark')


def modules():
    """Dotted names of the public modules: those of the core, and each plugin as a whole."""
    core = ROOT / 'plugins/selfkd'
    yield from (f'selfkd.{path.stem}' for path in sorted(core.glob('[a-z]*.py')) if path.stem not in INTERNAL)
    yield from sorted(path.parent.name for path in core.parent.glob('selfkd_*/__init__.py'))


def on_files(files, config):
    """Adds the generated pages."""
    pages = []
    for module in modules():
        page = f'api/{module}.md'
        pages.append({module: page})
        body = f'# {module}\n\n::: {module}\n'
        if module == 'selfkd_fairseq':  # it registers criteria, and exports nothing
            body += ''.join(f'\n::: {module}.{part}\n' for part in ('criterions', 'cskd'))
        files.append(File.generated(config, page, content=body))
    next(part for part in config['nav'] if 'API' in part)['API'] = pages
    for name, page in TOP_LEVEL.items():
        files.append(File.generated(config, page, content=from_the_root((ROOT / name).read_text())))
    return files


def from_the_root(text):
    """A page of the root with its links as they are in the site; those to other files are no links."""

    def inside(link):
        shown, target = link.groups()
        if '://' in target or target.startswith('#'):
            return link[0]
        if target.startswith('docs/'):
            return f'[{shown}]({target[5:]})'
        return f'[{shown}]({TOP_LEVEL[target]})' if target in TOP_LEVEL else shown

    return re.sub(r'\[([^\]]+)\]\(([^)]+)\)', inside, text)


def on_page_markdown(markdown, page, config, files):
    """Links that lead out of docs/ go to the page made of the file, or are no links."""
    folder = (ROOT / 'docs' / page.file.src_uri).parent

    def inside(link):
        text, target = link.groups()
        if (folder / target).resolve().is_relative_to(ROOT / 'docs'):
            return link[0]
        name = target.lstrip('./')
        assert (ROOT / name).exists(), f'{page.file.src_uri}: {target}'
        return f'[{text}]({TOP_LEVEL[name]})' if name in TOP_LEVEL else text

    return re.sub(r'\[([^\]]+)\]\((\.\./[^)#]+)\)', inside, markdown)


class Formulas(griffe.Extension):
    """Formulas as MathML, which browsers draw by themselves, and literal blocks as Markdown has them."""

    def on_object(self, *, obj, loader, **kwargs):
        if obj.is_alias or not obj.docstring:
            return
        text = re.sub(r'^Example:$', 'Examples:', obj.docstring.value, flags=re.MULTILINE)
        text = re.sub(r':math:`([^`]+)`', lambda formula: convert(formula.group(1)), text)
        obj.docstring.value = re.sub(r'::(\n\n +)', r':\1', text)
