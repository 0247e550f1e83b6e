"""The token bank on data sets that are not fairseq's plain text, found by what they have: speech, several corpora."""

import random

import numpy as np
import pytest
import torch

SPEECH = '--criterion pskd_label_smoothed_cross_entropy --label-smoothing 0.1 --pskd-alpha 0.8 --lr 0.01'
BANK = f'{SPEECH} --pskd-teacher bank --pskd-top-k 4 --disable-validation'
LETTERS, CHANNELS = 'abcdefgh', 20
CONFIG = f"""
vocab_filename: dict.txt
input_feat_per_channel: {CHANNELS}
input_channels: 1
shuffle: true
"""
MASKED = """
transforms: {_train: [specaugment]}
specaugment: {freq_mask_N: 1, freq_mask_F: 4, time_mask_N: 1, time_mask_T: 4, time_mask_p: 0.5, time_wrap_W: 0}
"""


@pytest.fixture(scope='module')
def speech(fairseq):
    """Letters 'spoken' as eight frames each, as features that fairseq reads; two corpora for training."""
    folder = fairseq.folder / 's2t'
    folder.mkdir()
    rng, noise = random.Random(0), np.random.RandomState(0)
    sounds = noise.randn(len(LETTERS), CHANNELS)
    (folder / 'dict.txt').write_text(''.join(f'{letter} 1\n' for letter in [*LETTERS, '<lang:en>']))
    for split, sentences in (('train', 60), ('train_more', 20), ('valid', 10)):
        lines = ['id\taudio\tn_frames\ttgt_text\tspeaker\ttgt_lang\n']
        for i in range(sentences):
            words = [rng.randrange(len(LETTERS)) for _ in range(rng.randint(2, 6))]
            frames = sounds[words].repeat(8, axis=0)
            path = folder / f'{split}{i}.npy'
            np.save(path, (frames + 0.1 * noise.randn(*frames.shape)).astype(np.float32))
            lines.append(f'{split}{i}\t{path}\t{len(frames)}\t{" ".join(LETTERS[w] for w in words)}\tx\ten\n')
        (folder / f'{split}.tsv').write_text(''.join(lines))
    (folder / 'config.yaml').write_text(CONFIG)
    (folder / 'masked.yaml').write_text(CONFIG + MASKED)
    (folder / 'tagged.yaml').write_text(f'{CONFIG}prepend_tgt_lang_tag: true\n')
    (folder / 'joining.yaml').write_text(f'{CONFIG}dataset_transforms: {{_train: [concataugment]}}\n')
    return lambda *args, **kwargs: fairseq.train(*args, model='s2t', data='s2t', **kwargs)


def bank_of(fairseq, path):
    return fairseq.checkpoint(path)['extra_state']['train_iterator']['selfkd']['past']['bank']


@pytest.mark.parametrize('options', ['', '--config-yaml tagged.yaml --ignore-prefix-size 1'])
def test_speech_translation_with_the_bank(fairseq, speech, difference, options):
    """Batches are sorted by frames, not by the target. What is kept is exact when resumed within an epoch."""
    straight, resumed = f'speech{len(options)}', f'speech{len(options)}-resumed'
    log = speech(straight, BANK, options, '--max-epoch 4 --save-interval-updates 4')
    first, *_, last = log.stats('train')
    assert first['train_pskd_soft'] == 0 < last['train_pskd_soft']
    assert last['train_nll_loss'] < first['train_nll_loss']
    bank, tokens = bank_of(fairseq, f'{straight}/checkpoint4.pt'), int(first['train_wpb'] * first['train_num_updates'])
    assert bank['seen'].sum() == tokens - 60 * bool(options)  # of a prefix nothing is learnt
    path = fairseq.first(f'{straight}/checkpoint_2_*')
    speech(resumed, BANK, options, '--max-epoch 4', f'--restore-file {path}')
    assert difference(fairseq.weights(straight), fairseq.weights(resumed)) == 0


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('--train-subset train,train_more', 'ConcatDataset: in it an id is not that of one sample (several corpora'),
        ('--config-yaml joining.yaml', 'SpeechToTextDataset: concataugment joins other sentences each time'),
    ],
)
def test_data_whose_ids_do_not_name_one_sentence(speech, options, message):
    log = speech('speech-refused', BANK, options, '--max-epoch 2 --no-save', fails=True)
    assert message in log
    assert 'use --pskd-teacher snapshot or ema' in log
    speech('speech-snapshot', SPEECH, options, '--max-epoch 2 --no-save --disable-validation')


def test_a_look_at_the_data_draws_nothing(fairseq, speech, difference):
    """Before training, of samples that are drawn (masked at random): plain weights, bit for bit, as with alpha 0."""
    for name, alpha in (('with', 1e-12), ('without', 0)):
        options = f'{BANK} --pskd-alpha {alpha} --max-epoch 2 --config-yaml masked.yaml'
        speech(f'look-{name}', options)
    assert difference(fairseq.weights('look-with'), fairseq.weights('look-without')) < 1e-6


class Sized(torch.utils.data.Dataset):
    """A data set of its own class, whose sizes are those of its sources."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def size(self, index):
        return self.sizes[index]

    def __getitem__(self, index):
        return index

    def collater(self, samples):
        target = torch.full((len(samples), 9), 1)
        for row, index in enumerate(samples):
            target[row, : 2 + index] = 5
        return {'id': torch.tensor(samples), 'target': target}


def test_lengths_are_what_the_samples_show():
    """One more than the sizes say here, and not at all what they say there."""
    from fairseq.data import Dictionary

    from selfkd_fairseq.past import target_lengths

    class Task:
        cfg, target_dictionary = object(), Dictionary()
        has_sharded_data = staticmethod(lambda split: False)

    assert target_lengths(Task, Sized([(30, 1), (40, 2), (20, 3)])).tolist() == [2, 3, 4]
    with pytest.raises(ValueError, match='Sized: its sizes do not say .*, or its collater moves samples; use --pskd-t'):
        target_lengths(Task, Sized([30, 40, 20]))
