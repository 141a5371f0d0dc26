#!/bin/sh
# The rows that p2d keeps where the target's own rows set the floor, instead of a tenth of the pool whatever they score:
# after the recipe of the same target, whose heads it takes and with whose runs it is compared. From the project's folder:
#     sh tests/benchmarks/study/whole_pool_floor.sh snips_parse
set -eu
target=$1 data=tests/benchmarks/study/data
mixed=$data/mixed whole=study/whole-pool-$1 out=study/whole-pool-floor-$1
case $target in banking77) longest=32 ;; *) longest=96 ;; esac
p2d mine-data -m $data/model --heads $whole/heads/readout-s0 --target $mixed/$target/query.jsonl --pool $mixed/whole_pool.jsonl \
    --relevance $mixed/$target/relevance.json --template plain --dtype float32 --shortlist 0.3 --background 250 \
    --floor-quantile 0.05 --out $out/subset
for scope in heads full; do
    case $scope in heads) how="--heads $whole/heads/readout-s0 --projections q,k,v,o --batch-size 4" ;; *) how="--batch-size 8" ;; esac
    p2d train -m $data/model --scope $scope $how --data $out/subset --template plain --dtype float32 --out $out/adapter/$scope
    case $scope in heads) which="-m $data/model --adapter $out/adapter/heads" ;; *) which="-m $out/adapter/full" ;; esac
    p2d eval $which --template plain --dtype float32 --data $mixed/$target/test.jsonl \
        --metric exact_match,token_f1 --max-new-tokens $longest --out $out/evaluation/$scope
done
others=$(find $whole/evaluation -mindepth 1 -maxdepth 1 ! -name full-full-s0 | sort)
p2d report-aer $out/evaluation/* $others --reference $whole/evaluation/full-full-s0 --out $out/report
python tests/benchmarks/study/collect.py $out whole_pool_$target
