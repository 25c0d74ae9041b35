"""The independent streams of a seed's key: what is folded into it for each."""

INIT, PRETRAIN, RETRAIN, PRUNE, SCRATCH, SHARES, CLASSIFIER = range(7)
