"""Tiny random models of many families of transformers, and batches for them: without a network, without processors."""
