"""Other architectures, on the same footing: same inputs, head, biases, loss, data code and training loop.

Chosen by `model.architecture`. Plain PyTorch over padded histories, for comparison: they keep no user state, so nothing
can be appended to them, and they recommend and serve nothing. `ksa train` and `ksa evaluate` read them.

- `sasrec`: full causal attention with learned positions (SASRec, arXiv 1808.09781).
- `hstu`: pointwise SiLU attention with a relative bias of position and time (HSTU, arXiv 2402.17152).
- `mean-pooled`: an old chunk is the mean of its events' inputs (the idea of KuaiFormer, arXiv 2411.10057).
- `segment-tokens`: an old chunk is read by learned tokens once, below the layers (the idea of PerSRec).

What differs from the papers is said in each file.
"""
