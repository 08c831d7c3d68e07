"""Remedies against stale gradients: wrappers of optimizers, optimizers for late stages, and weights for a late pass.

Stage k of K uses gradients that are late by :func:`delay` updates: K-k, or with M micro-batches for one update
ceil((K-k)/M). tau_k is their mean, (K-k)/M. Each remedy is independent of the others, and has a value that gives back
the plain method to the bit:

    shrink_gradients     beta^{K-k} g_k                              factor=1       FDG, Zhuang et al. 2021
    accumulate           the mean of m gradients, one update         every=1        ADL, Zhuang et al. 2021
    rescheduled          u_k / tau_k^p, p falls from 1 to 0          updates=0      PipeMare T1, Yang et al. 2021
    spike_compensation   a_k v + b_k g, for SGD with momentum        K=1            Kosson et al. 2021
    nadam                Nesterov's Adam, b1 rises with tau_k        late_b1=b1     AsyncPP, Ajanthan et al. 2025
    muon                 orthogonalized updates of matrices                         Jordan et al. 2024
    predicted            forward pass at w_k + s (last update)       strength=0     SpecTrain, Chen et al. 2018
      with momentum=b    forward pass at w_k + (b + .. + b^s) (..)   momentum=1     FTPipe, Eliad et al. 2021
    corrected            replay at w_k - tau_k (mean update)         decay=1        PipeMare T2, Yang et al. 2021

The first three wrap optimizers, the next three make them; all return what a method takes as ``optimizer``
(``accumulate`` for one stage, the others for K). The last two are pure functions of weights and of what
:func:`remember_update` or :func:`remember_trend` keeps in the optimizer's state; methods call them. They pull in
opposite directions, the first takes the forward pass to the weights of the replay, the second the replay back to those
of the forward pass, so use one of them.

The error feedback of Zmushko et al. 2026 (arXiv:2606.30634) is not here: no source within reach states its equation.
"""

from __future__ import annotations

from fr_jax.algorithms.staleness._delays import delay, mean_delay
from fr_jax.algorithms.staleness._gradients import (
    AccumulateState,
    RescheduledState,
    accumulate,
    rescheduled,
    shrink_gradients,
)
from fr_jax.algorithms.staleness._optimizers import muon, nadam, spike_compensation
from fr_jax.algorithms.staleness._weights import (
    RememberTrendState,
    RememberUpdateState,
    corrected,
    predicted,
    remember_trend,
    remember_update,
)

__all__ = [
    "AccumulateState",
    "RememberTrendState",
    "RememberUpdateState",
    "RescheduledState",
    "accumulate",
    "corrected",
    "delay",
    "mean_delay",
    "muon",
    "nadam",
    "predicted",
    "remember_trend",
    "remember_update",
    "rescheduled",
    "shrink_gradients",
    "spike_compensation",
]
