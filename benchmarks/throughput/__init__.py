"""Training steps of whole models under several ways to batch the same samples; `benchmarks.train_throughput` is the command."""
