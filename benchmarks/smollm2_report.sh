#!/usr/bin/env bash
# Makes the report of docs/results.md, with the real model on real texts:
#
#     bash benchmarks/smollm2_report.sh DATA OUT
#
# DATA holds pg19/*.txt (books), and longbench/ and longbench_config/ in LongBench's form. Results are written into OUT, a
# directory for each run. After an interruption, the same command continues. On one CPU core it took 2 h 5 min.
set -euo pipefail
data=$1 out=$2
mkdir -p "$out"

paper=() # the full cache, and the policies that the paper compares
for spec in full corm streaming_llm scissorhands h2o; do
    paper+=(--policy "$spec")
done
capped=corm:window=256,recent=32,sinks=4
grid=(--policy full)
for window in 64 128 256 512; do
    for recent in 16 32 64; do
        grid+=(--policy "corm:window=$window,recent=$recent")
    done
done

bench=(--data "$data/longbench" --length 1000 --chat --limit 2 --chunk 64)
corm eval longbench "${bench[@]}" --policy full --blind --out "$out/longbench-blind"
corm eval longbench "${bench[@]}" --budget 0.3 "${paper[@]}" --out "$out/longbench"
for budget in 0.1 0.3; do
    corm eval agreement --text "$data/pg19" --tokens 1024 --limit 2 --budget $budget --policy full --policy corm \
        --policy $capped "${paper[@]:4}" --policy snapkv --out "$out/agreement-$budget"
done
corm eval perplexity --text "$data/pg19" --tokens 2048 --limit 1 --chunk 64 "${grid[@]}" --out "$out/grid"
recall=(--text "$data/pg19/860.txt" --length 512 --limit 2 --task passkey --task needle --task multikey --task repeat)
corm eval recall "${recall[@]}" --policy full --blind --out "$out/recall-blind"
corm eval recall "${recall[@]}" --budget 0.3 "${paper[@]}" --policy snapkv --out "$out/recall"
corm analyse --text "$data/pg19" --out "$out/analysis.json"
runs=("$out"/{agreement-0.1,agreement-0.3,grid,recall,recall-blind,longbench,longbench-blind})
corm report "${runs[@]}" --out "$out/report.md"
corm report "${runs[@]}" --against corm --out "$out/report-against-corm.md"
