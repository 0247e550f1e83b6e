"""fairseq as the promises drive it: its own programs, on a small parallel corpus."""

import glob
import itertools
import os
import re
import signal

import torch

PLAIN = '--criterion label_smoothed_cross_entropy'
SMOOTHING = '--label-smoothing 0.1 --dropout 0.1'
TOKENS = 1000
KILLED_AT = 9
MOVES = """
import selfkd_fairseq
from fairseq.data import LanguagePairDataset

collater = LanguagePairDataset.collater


def moved(self, samples, pad_to_length=None):
    batch = collater(self, samples, pad_to_length)
    return batch and {**batch, 'id': batch['id'].roll(1)}


LanguagePairDataset.collater = moved
"""
count = itertools.count()


class Driver:
    """Trains a row's criterion, or the plain one."""

    batch, epochs = TOKENS, 4
    batching = 0.1  # halves of a batch of tokens are not the same sentences, so epochs have not quite as many updates

    def __init__(self, row, request, folder):
        self.row, self.fairseq = row, request.getfixturevalue('fairseq')

    def config(self, *, on=True, settings=None, loop='epoch', batch=TOKENS):
        """Arguments of fairseq-train."""
        method = (settings or self.row.options)['args'] if on else PLAIN
        length = f'--max-epoch {self.epochs}' if loop == 'epoch' else '--max-update 40'
        return dict(args=f'{method} {SMOOTHING} {length} --max-tokens {batch}', save=f'promise{next(count)}')

    def killable(self, cfg):
        return cfg

    def accumulate(self, cfg):
        return {**cfg, 'args': cfg['args'] + ' --update-freq 2'}

    def shuffle_within_batches(self, cfg):
        """A --user-dir with a collate function that gives each sentence the next one's id."""
        folder = self.fairseq.folder / 'moves_sentences'
        folder.mkdir(exist_ok=True)
        (folder / '__init__.py').write_text(MOVES)
        return {**cfg, 'args': f'{cfg["args"]} --user-dir {folder}'}

    def train(self, cfg, *, processes=1, kill_at=None, resume=False):
        args, save = cfg['args'] + ' --save-interval-updates 2', cfg['save']
        if kill_at is not None:
            return self._kill(save, args)
        if resume:
            files = sorted(glob.glob(str(self.fairseq.folder / save / 'checkpoint_2_*')), key=os.path.getmtime)
            args, save = f'{args} --restore-file {files[0]}', f'{save}-resumed'
        if processes > 1:
            logs = self.fairseq.train_together(save, args, processes=processes)
            return [self._result(save, logs[0], resume)] * processes  # one saves for all, and logs
        return self._result(save, self.fairseq.train(save, args), resume)

    def _kill(self, save, args):
        """In the third epoch."""
        pid, log = self.fairseq.start(*self.fairseq.train_args(save, args), killed_at=KILLED_AT)
        assert self.fairseq.wait(pid) == -signal.SIGKILL, log.read_text()[-3000:]
        assert re.search(r'begin training epoch 3\b', log.read_text())

    def _result(self, save, log, resumed):
        epochs = [{'loss': entry['train_loss'], 'alpha': entry.get('train_alpha')} for entry in log.stats('train')]
        return {
            'weights': self.fairseq.weights(save),
            'steps': epochs[1:] if resumed else epochs,  # one resumed within is not logged as a whole
            'bank': None,  # banks and copies show in what they teach: the weights
            'teacher': None,
            'checkpoint': str(self.fairseq.folder / save / 'checkpoint_last.pt'),
        }

    def total(self, step):
        return step['loss']

    def trained(self, weights):
        return list(weights)

    def publish(self, trained, target):
        """fairseq's own checkpoint is the plain model's already."""
        os.link(trained['checkpoint'], target)
        return trained['weights'], 0

    def load_strictly(self, cfg, weights):
        """fairseq loads strictly itself, see :meth:`predictions`."""

    def predictions(self, cfg, checkpoint):
        """In this process, which knows nothing of the criterion."""
        from fairseq import checkpoint_utils

        (model,), args, task = checkpoint_utils.load_model_ensemble_and_task(
            [checkpoint], arg_overrides={'data': str(self.fairseq.folder / 'bin')}
        )
        task.load_dataset('test')
        sample = task.dataset('test').collater([task.dataset('test')[i] for i in range(4)])
        generator = task.build_generator([model.eval()], args['generation'])
        found = task.inference_step(generator, [model], sample)
        return torch.cat([hypotheses[0]['positional_scores'] for hypotheses in found]), tuple(task.tgt_dict.symbols)

    @property
    def classes(self):
        from fairseq.data import Dictionary

        return tuple(Dictionary.load(str(self.fairseq.folder / 'bin/dict.en.txt')).symbols)
