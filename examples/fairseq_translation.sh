#!/usr/bin/env bash
# PS-KD in fairseq: --user-dir and --criterion over the command that you already have. Numbers in words, English to German.
#   bash examples/fairseq_translation.sh [FOLDER]
set -euo pipefail
folder=${1:-work_dirs/fairseq_example}
plugin=$(python -c 'import selfkd_fairseq; print(selfkd_fairseq.__path__[0])')  # from a clone: plugins/selfkd_fairseq

python "$(dirname "$0")/../tools/make_toy_data.py" number-words "$folder" --train-size "${TRAIN_SIZE:-4000}"
fairseq-preprocess -s en -t de --trainpref "$folder/train" --validpref "$folder/valid" --destdir "$folder/bin"
fairseq-train "$folder/bin" --user-dir "$plugin" --save-dir "$folder/run" --cpu \
    --criterion pskd_label_smoothed_cross_entropy --pskd-alpha 0.3 --label-smoothing 0.1 \
    --arch transformer --encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 64 --decoder-embed-dim 64 \
    --encoder-ffn-embed-dim 128 --decoder-ffn-embed-dim 128 --encoder-attention-heads 4 --decoder-attention-heads 4 \
    --optimizer adam --lr 0.002 --lr-scheduler inverse_sqrt --warmup-updates 200 --max-tokens 1000 \
    --max-epoch "${EPOCHS:-10}" --update-epoch-batch-itr True --no-epoch-checkpoints --log-format simple
