import numpy as np
import pytest

from fr_jax.algorithms import staleness


def late_by(K, k, M):
    """Updates between forward pass and update of each micro-batch of the last mini-batch, stage k, event by event."""
    version, played, late, mini_batches = 0, [], [], K + 1
    for i in range(M * mini_batches + K):
        played.append(version)
        arrived = i - (K - k)  # its delta has come back
        if arrived < 0:
            continue
        late.append(version - played[arrived])
        if (arrived + 1) % M == 0:  # the last of its mini-batch: update
            version += 1
    return late[M * (mini_batches - 1) : M * mini_batches]


@pytest.mark.parametrize("M", [1, 2, 3, 4, 8, 11])
@pytest.mark.parametrize("K", [1, 2, 5, 8])
def test_delays_are_those_of_the_schedule(K, M):
    late = [late_by(K, k, M) for k in range(1, K + 1)]
    assert late == [[-((m - (K - k)) // M) for m in range(M)] for k in range(1, K + 1)]  # as documented
    assert staleness.delay(K, M) == tuple(map(max, late))
    np.testing.assert_allclose(staleness.mean_delay(K, M), np.mean(late, axis=1), rtol=1e-15)


@pytest.mark.parametrize("function", [staleness.delay, staleness.mean_delay])
def test_what_cannot_be_is_refused(function):
    for K, M, message in ((0, 1, "K = 0 was given"), (2, 0, "microbatches = 0"), (2, 1.0, r"microbatches = 1\.0")):
        with pytest.raises(ValueError, match=message):
            function(K, M)
    assert function(np.int64(3), np.int64(2))[-1] == 0
