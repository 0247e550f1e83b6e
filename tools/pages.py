"""Writes the generated sections of the pages: options, costs, versions, commands and examples.

    python tools/pages.py

Run it after a change of a signature, of docs/performance.md, of requirements/, of a command's help or of examples/.
A test compares the pages with what this would write. It reads the sources and imports no toolkit.
"""

import ast
import inspect
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

from selfkd import cli, defaults
from selfkd.files import replacing

ROOT = Path(__file__).resolve().parent.parent
SECTION = re.compile(r'<!-- (\w+): (\S+) -->\n.*?<!-- end -->', re.DOTALL)

# What each option means. One text for all toolkits: an option has the same name and meaning everywhere.
PSKD = {
    'num_classes': 'Number of classes, for the bank. By default it is read from the first loss.',
    'max_epochs': 'Length of the training in epochs. alpha grows until its end.',
    'max_steps': 'Length of the training in batches, in place of `max_epochs`.',
    'alpha': 'Final share of the past prediction in the target, in [0, 1]. It grows linearly from 0.',
    'teacher': "Where past predictions come from: `'bank'`, `'snapshot'`, `'ema'`, or `'auto'` ([which one](pskd.md)).",
    'teacher_mode': "How a past copy predicts: `'train'`, as the network does in training (with dropout, batch norm by "
    "the batch), or `'eval'`.",
    'interval': 'Steps between two refreshes of the snapshot; for `ema`, the length of the first period. '
    'By default one pass over the training set.',
    'ema_decay': 'Share of the moving average that stays in each step of the optimizer. It starts lower.',
    'keep_hard': "If true, the label's loss keeps its whole weight, 1 instead of `1 - alpha`.",
    'background': 'Two-stage detectors: if false, background regions keep their hard label.',
    'top_k': 'Probabilities of each prediction that the bank keeps: by default all; of tokens 8, some of them drawn.',
    'bank_dtype': "Number format of the bank: `'float32'`, `'float16'`, or `'log8'` (a byte for each probability, "
    'right on average).',
    'bank_device': "Where the bank lies. By default on the model's device, for tokens on the CPU.",
    'bank_momentum': 'The bank keeps `m * past + (1 - m) * prediction`, an average over epochs.',
    'model': 'For a past copy: the module that computes the logits. Own loops give the module, Lightning its name.',
    'fused': 'Causal language models: the loss is computed without ever having the logits of all tokens.',
    'outputs': 'For a past copy: a function that gets the logits from what the model returns.',
    'loss': 'Name of the sub-module that computes the loss, if it is not `F.cross_entropy`.',
}
COPIES = {  # of detectors and segmentors, where no bank is possible
    **PSKD,
    'teacher': "The past copy: `'snapshot'` (the weights when the period began) or `'ema'` (a moving average of the "
    "weights). `'auto'` takes the snapshot.",
}
CSKD = {
    'weight': 'Weight of the KL divergence.',
    'temperature': 'Temperature T of the KL divergence.',
    'model': 'The module that the loop calls; in Lightning the name of the sub-module that computes the logits.',
    'loss': 'Name of the sub-module that computes the loss, if it is not `F.cross_entropy`.',
    'labels': "Class of each training sample. By default the data set's `targets`.",
    'inputs': "A function that gets the model's input from a batch. By default the batch's first entry.",
    'outputs': 'A function that gets the logits from what the model returns.',
    'seed': 'Seed for drawing partners.',
}
FRSKD = {
    'layers': 'Names of the sub-modules whose outputs are the feature maps, fine to coarse. By default they are found.',
    'num_classes': 'Number of classes. By default that of the logits.',
    'model': 'In Lightning: name of the sub-module that computes the logits.',
    'loss': 'Name of the sub-module that computes the loss, if it is not `F.cross_entropy`.',
    'alpha': "Weight of the KL divergence from the self-teacher's prediction.",
    'beta': 'Weight of the feature loss. 0 distils predictions only.',
    'temperature': 'Temperature T of the KL divergence.',
    'feature_loss': "`'attention'`, `'hint'` (FitNet) or `'overhaul'` (margin ReLU). The last two need another `beta`.",
    'example': "A batch of inputs, to find the maps' channels. By default one image of zeros, 3 x 224 x 224.",
    'width': "Channels of the self-teacher, as a multiple of the network's.",
    'depth': 'Separable convolutions per fusion in the self-teacher.',
    'repeats': 'Passes of the self-teacher.',
    'sla': 'Weight of self-supervised label augmentation (released: 1). It trains on five times the images.',
    'base_type': "The config's former type, if it was a class of your own. That class goes on doing what it did.",
    'in_index': 'Which feature maps, two or more, fine to coarse. By default all, or one of each size.',
    'in_channels': 'Channels of the maps. By default found by running the network on an empty image.',
    'channels': "Channels between the classifier's convolutions.",
    'warmup': 'Share of training before the two distillation terms act.',
}
FLAGS = {'report_ece': 'Logs the calibration error of the tokens in validation, in percent.'}
INTERNAL = {'loader', 'in_channels', 'num_classes', 'loss_module', 'args', 'kwargs'}


class Options(NamedTuple):
    """Where a table of options comes from.

    Attributes:
        source: file under plugins/ and class.
        meanings: of the options, by name.
        shown: how an option is written in that toolkit.
        hidden: parameters that are not for users.
        extra: options that are not in the signature: name -> default.
    """

    source: str
    meanings: Dict[str, str]
    shown: Callable[[str], str] = lambda name: name
    hidden: Any = frozenset({'loader', 'args', 'kwargs', 'options'})
    extra: Dict[str, str] = {}


def _flag(name: str) -> str:
    return f'--{name.replace("_", "-")}'


OPTIONS = {
    'selfkd_torch.PSKD': Options('selfkd_torch/pskd.py:PSKD', PSKD),
    'selfkd_torch.CSKD': Options('selfkd_torch/cskd.py:CSKD', CSKD),
    'selfkd_torch.FRSKD': Options('selfkd_torch/frskd.py:FRSKD', FRSKD, hidden={'model'}),
    'selfkd_lightning.PSKD': Options('selfkd_lightning/pskd.py:PSKD', PSKD),
    'selfkd_lightning.CSKD': Options('selfkd_lightning/cskd.py:CSKD', CSKD),
    'selfkd_lightning.FRSKD': Options('selfkd_lightning/frskd.py:FRSKD', FRSKD),
    'selfkd_transformers.PSKDArguments': Options(
        'selfkd_transformers/pskd.py:PSKDArguments', {f'pskd_{name}': text for name, text in PSKD.items()}
    ),
    'selfkd_transformers.CSKDArguments': Options(
        'selfkd_transformers/cskd.py:CSKDArguments', {f'cskd_{name}': text for name, text in CSKD.items()}
    ),
    'selfkd_transformers.FRSKDArguments': Options(
        'selfkd_transformers/frskd.py:FRSKDArguments', {f'frskd_{name}': text for name, text in FRSKD.items()}
    ),
    'selfkd_mmpretrain.PSKDHook': Options('selfkd_mmpretrain/pskd_hook.py:PSKDHook', PSKD),
    'selfkd_mmpretrain.CSKDHook': Options('selfkd_mmpretrain/cskd_hook.py:CSKDHook', CSKD),
    'selfkd_mmpretrain.FRSKDImageClassifier': Options(
        'selfkd_mmpretrain/frskd.py:SelfTeacher',
        {**FRSKD, 'stages': "Names of the backbone's modules that give the feature maps, fine to coarse."},
        hidden=INTERNAL,
        extra={'stages': 'found', 'base_type': '`ImageClassifier`'},
    ),
    'selfkd_mmdet.PSKDHook': Options('selfkd_mmdet/pskd_hook.py:PSKDHook', COPIES),
    'selfkd_mmdet.CSKDHook': Options('selfkd_mmdet/cskd_hook.py:CSKDHook', CSKD),
    'selfkd_mmdet.FRSKDRoIHead': Options('selfkd_mmdet/frskd_head.py:FRSKDRoIHead', FRSKD),
    'selfkd_mmseg.PSKDHook': Options('selfkd_mmseg/pskd_hook.py:PSKDHook', COPIES),
    'selfkd_mmseg.FRSKDEncoderDecoder': Options(
        'selfkd_mmseg/frskd.py:SelfTeacher',
        {**FRSKD, 'width': 'Channels of the self-teacher.'},
        hidden={'kwargs'},
        extra={'in_channels': 'found', 'base_type': '`EncoderDecoder`'},
    ),
    'selfkd_detectron2.PSKD': Options(
        'selfkd_detectron2/hooks.py:PSKDHook', COPIES, lambda name: f'SELFKD.PSKD.{name.upper()}'
    ),
    'selfkd_detectron2.CSKD': Options(
        'selfkd_detectron2/hooks.py:CSKDHook', CSKD, lambda name: f'SELFKD.CSKD.{name.upper()}'
    ),
    'selfkd_detectron2.FRSKD': Options(
        'selfkd_detectron2/frskd.py:SelfTaught', FRSKD, lambda name: f'SELFKD.FRSKD.{name.upper()}', hidden=INTERNAL
    ),
    'selfkd_fairseq.PSKD': Options(
        'selfkd_fairseq/criterions.py:PSKDConfig', {**{f'pskd_{n}': t for n, t in PSKD.items()}, **FLAGS}, _flag
    ),
    'selfkd_fairseq.CSKD': Options(
        'selfkd_fairseq/cskd.py:CSKDLabelSmoothedCrossEntropyCriterionConfig',
        {f'cskd_{name}': text for name, text in CSKD.items()},
        _flag,
    ),
}


def parameters(source: str) -> Iterator[Tuple[str, Any]]:
    """Names and defaults of a class's options: of its constructor, or of the fields of a dataclass."""
    file, _, name = source.partition(':')
    tree = ast.parse((ROOT / 'plugins' / file).read_text())
    (node,) = (part for part in tree.body if isinstance(part, ast.ClassDef) and part.name == name)
    constructor = next((p for p in node.body if isinstance(p, ast.FunctionDef) and p.name == '__init__'), None)
    if constructor is None:
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.value, ast.Call):
                yield from _field(part)
        return
    given = constructor.args
    positional = [None] * (len(given.args) - len(given.defaults)) + list(given.defaults)
    for argument, default in [*zip(given.args, positional), *zip(given.kwonlyargs, given.kw_defaults)]:
        if argument.arg != 'self':
            yield argument.arg, _value(default)


def _field(part: ast.AnnAssign) -> Iterator[Tuple[str, Any]]:
    """A dataclass's field, unless it is a constant, an old name or another part's setting."""
    if 'ClassVar' in ast.unparse(part.annotation):
        return
    assert isinstance(part.target, ast.Name)
    assert isinstance(part.value, ast.Call)
    call = part.value
    if ast.unparse(call.func) == 'II' or 'old name' in ast.unparse(call):
        return
    default = next((k.value for k in call.keywords if k.arg == 'default'), None) or call.args[0]
    yield part.target.id, _value(default)


def _value(node: Optional[ast.expr]) -> Any:
    if node is None:
        return inspect.Parameter.empty
    return eval(ast.unparse(node), {name: getattr(defaults, name) for name in defaults.__all__})


def options(name: str) -> str:
    """A table: option, default, meaning."""
    table = OPTIONS[name]
    found = {option: _shown(default) for option, default in parameters(table.source) if option not in table.hidden}
    lines = ['| option | default | meaning |', '| --- | --- | --- |']
    for option, default in {**found, **table.extra}.items():
        if option not in table.meanings:
            raise ValueError(f'{table.source}: say in tools/pages.py what the option {option} means')
        lines.append(f'| `{table.shown(option)}` | {default} | {table.meanings[option]} |')
    return '\n'.join(lines)


def _shown(default: Any) -> str:
    if default is inspect.Parameter.empty:
        return 'required'
    if default is None:
        return ''
    return '2/3' if default == 2 / 3 else f'`{default!r}`'


def cost(name: str) -> str:
    """Time and memory of a training step, from the tables of that name on docs/performance.md.

    Raises:
        ValueError: no costs are found there.
    """
    page = (ROOT / 'docs/performance.md').read_text()
    body = page.split(f'<!-- {name} -->\n')[1].split(f'<!-- end {name} -->')[0]
    tables = []
    for block in re.split(r'^(?=[^|\n].*\n\nMeasured on )', body, flags=re.MULTILINE)[1:]:
        rows = re.findall(r'^\| ([^|]+) \| [\d.]+ \| ([\d.]+) \| ([\d.]+) \|', block, re.MULTILINE)
        lines = [f'| {block.splitlines()[0]} | time | memory of its tensors |', '| --- | --- | --- |']
        tables.append('\n'.join([*lines, *(f'| {row} | {time} | {memory} |' for row, time, memory in rows)]))
    if not all(table.count('\n') > 2 for table in tables) or not tables:  # a plain row and another
        raise ValueError(f'docs/performance.md, {name}: there are no costs, or not all of them were understood')
    return '\n\n'.join(tables)


PACKAGES = ('torch', 'numpy', 'mmengine', 'mmcv', 'mmcv-lite', 'mmpretrain', 'mmdet', 'mmsegmentation', 'fairseq-fixed')
PACKAGES += ('fairseq', 'lightning', 'transformers', 'accelerate')
PINNED = {
    '`make test`, Python 3.11': 'constraints.txt',
    '`make test-latest`, Python 3.11': 'constraints-latest.txt',
    'fairseq on Python 3.10': 'constraints-py310.txt',
}


def versions(_: str) -> str:
    """The versions that requirements/ pins, a column for each environment."""
    pins = [
        dict(re.findall(r'^([\w-]+)==(\S+)', (ROOT / 'requirements' / file).read_text(), re.MULTILINE))
        for file in PINNED.values()
    ]
    lines = [f'| package | {" | ".join(PINNED)} |', '| --- ' * (len(PINNED) + 1) + '|']
    for package in PACKAGES:
        if any(package in pin for pin in pins):
            lines.append(f'| {package} | {" | ".join(pin.get(package, "") for pin in pins)} |')
    return '\n'.join(lines)


def commands(_: str) -> str:
    """What each command does and an example, from the docstrings that ``selfkd COMMAND --help`` shows."""
    parts = []
    for name, (where, _does) in cli.COMMANDS.items():
        module, function = where.split(':')
        tree = ast.parse((ROOT / 'plugins' / f'{module.replace(".", "/")}.py').read_text())
        (node,) = (part for part in tree.body if isinstance(part, ast.FunctionDef) and part.name == function)
        text = re.sub(r'(?<=\S)\n(?=\S)', ' ', ast.get_docstring(node) or '')  # a paragraph is one line on the pages
        parts.append(f'## selfkd {name}\n\n{text}')
    return '\n\n'.join(parts)


def example(file: str) -> str:
    """The whole of a file in examples/."""
    language = {'py': 'python', 'yaml': 'yaml', 'sh': 'shell'}[file.rsplit('.', 1)[1]]
    # "py" and not "python": tests/test_docs.py runs the blocks of the pages, tests/test_examples.py the files.
    language = language.replace('python', 'py')
    return f'```{language}\n{(ROOT / "examples" / file).read_text().rstrip()}\n```'


KINDS = {'options': options, 'cost': cost, 'versions': versions, 'commands': commands, 'example': example}


def rewritten(text: str) -> str:
    """A page with its generated sections made anew."""

    def section(match):
        kind, name = match.groups()
        if kind not in KINDS:
            return match[0]
        return f'<!-- {kind}: {name} -->\n{KINDS[kind](name)}\n<!-- end -->'

    return SECTION.sub(section, text)


def pages() -> List[Path]:
    return [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


def main() -> None:
    for page in pages():
        before = page.read_text()
        after = rewritten(before)
        if after != before:
            with replacing(page) as beside:
                beside.write_text(after)
            print(f'{page.relative_to(ROOT)}: written')


if __name__ == '__main__':
    main()
