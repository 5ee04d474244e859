#!/usr/bin/env bash
# The report of docs/results.md, from the real model on real texts:
#
#     bash benchmarks/smollm2_report.sh DATA OUT
#
# DATA holds pg19/*.txt (books), and longbench/ and longbench_config/ as `corm analyse --text "$data/pg19" --out "$out/analysis.json"
corm eval longbench --data "$data/longbench" --length 1000 --chat --limit 3 --chunk 64 --policy full --blind \
    --out "$out/longbench-blind"
corm eval longbench --data "$data/longbench" --length 1000 --chat --limit 3 --chunk 64 --budget 0.3 "${few[@]}" \
    --out "$out/longbench"
corm report "$out"/{agreement-0.1,agreement-0.3,agreement-0.5,grid,recall,recall-blind,longbench,longbench-blind} \
    --out "$out/report.md"
