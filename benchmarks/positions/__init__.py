"""The study of positions: see `benchmarks/positions_study.py`."""
