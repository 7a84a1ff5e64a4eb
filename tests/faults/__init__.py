"""Random faults while indexes are made, changed and asked, and a load on the explorer's API; `run.py` counts them."""
