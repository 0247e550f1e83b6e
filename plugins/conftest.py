"""The examples in a plugin's modules run where its toolkit is installed; not every environment has all of them."""

from importlib.util import find_spec

collect_ignore = [f'selfkd_{name}' for name in ('detectron2', 'lightning', 'transformers') if not find_spec(name)]
