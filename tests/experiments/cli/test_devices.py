"""The flag that the programs give XLA: which convolutions it computes in another way, and whose choice wins."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from fr_jax.experiments._cli.devices import set_xla_flags

OURS = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
PROGRAM = """
import sys
import jax, jax.numpy as jnp
from fr_jax.experiments._cli.devices import request_devices

if "set" in sys.argv:
    request_devices(2)
images, kernel = jnp.ones((128, 16, 16, 16)), jnp.ones((3, 3, 16, 16))
def convolved(kernel):
    axes = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=axes).sum()
compiled = jax.jit(jax.grad(convolved)).lower(kernel).compile().as_text()
print(len(jax.devices()), "%ynn_fusion" in compiled)
"""


@pytest.mark.parametrize(
    ("given", "set_to"),
    [
        (None, OURS),
        ("--xla_dump_to=there", f"--xla_dump_to=there {OURS}"),
        ("--xla_cpu_experimental_ynn_fusion_type=-reduce", "--xla_cpu_experimental_ynn_fusion_type=-reduce"),
    ],
)
def test_is_added_to_what_is_given(monkeypatch, given, set_to):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if given is not None:
        monkeypatch.setenv("XLA_FLAGS", given)
    set_xla_flags()
    assert os.environ["XLA_FLAGS"] == set_to
    set_xla_flags()
    assert os.environ["XLA_FLAGS"] == set_to


def test_not_for_a_version_that_may_not_know_it(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99.0")
    monkeypatch.setenv("XLA_FLAGS", "")
    set_xla_flags()
    assert os.environ["XLA_FLAGS"] == ""


def test_xla_takes_it_from_a_program_that_has_imported_jax(program_env):
    """Where this fails because XLA's own choice has become another, the flag may have become useless: measure."""

    def compiled(*words, **flags):
        command = [sys.executable, "-c", PROGRAM, *words]
        env = {name: value for name, value in program_env.items() if name != "XLA_FLAGS"} | flags
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=100).stdout.split()

    assert compiled("set") == ["2", "False"]
    assert compiled("set", XLA_FLAGS=OURS.replace("-individual", "+individual")) == ["2", "True"]
