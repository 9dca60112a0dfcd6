"""Kernels under a mesh, on 8 fake devices."""

import pytest

from tests.mesh.collectives import Collective, collectives


@pytest.mark.parametrize("what", ["losses", "attention", "refusals"])
def test_on_8_devices(on_devices, what):
    on_devices("kernels_on_mesh", what)


def test_collectives_are_found_with_their_loops():
    text = """
%region_0.1 (a: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %a)
}

%body.2 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %x = (f32[8,4]{1,0}, f32[2]{0}) all-reduce(%a, %b), to_apply=%region_0.1
}

ENTRY %main (p: f32[8]) -> f32[64] {
  %w = (s32[], f32[8,4]) while(%t), condition=%cond, body=%body.2
  ROOT %g = bf16[64]{0} all-gather-start(%p), dimensions={0}
}
"""
    assert collectives(text) == [
        Collective("all-reduce", 32, True), Collective("all-gather", 64, False),
    ]  # fmt: skip
