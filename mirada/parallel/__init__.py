"""One model on several devices, each with a share of every layer: plans of what is divided, and the group that computes.

Tensor parallelism over plain shards (Megatron-LM, arXiv 1909.08053): a matrix that widens is cut by outputs, the one that
narrows again by inputs, and one sum over all ranks follows. Experts are divided whole. Modules know of it only by their sizes.
"""
