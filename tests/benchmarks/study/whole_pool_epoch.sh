#!/bin/sh
# Full fine-tuning on the whole mixed pool for one epoch instead of three, judged on banking77, with the seconds of
# twelve updates on the same day beside it. From the project's folder: sh tests/benchmarks/study/whole_pool_epoch.sh
set -eu
data=tests/benchmarks/study/data out=study/whole-pool-epoch
train="p2d train -m $data/model --scope full --data $data/mixed/whole_pool.jsonl --batch-size 8 --template plain --dtype float32"
judge="p2d eval --template plain --dtype float32 --data $data/mixed/banking77/test.jsonl --metric exact_match,token_f1 --max-new-tokens 32"
$train --epochs 1 --out $out/adapter/one-epoch
$train --epochs 3 --max-steps 12 --out $out/adapter/cut-short
for run in one-epoch cut-short; do
    $judge -m $out/adapter/$run --out $out/evaluation/$run
done
p2d report-aer $out/evaluation/one-epoch --reference $out/evaluation/cut-short --allow-mixed --out $out/report
python tests/benchmarks/study/collect.py $out whole_pool_epoch
