"""What is read from a compiled program's text."""

from tinyllama_jax.planning.collectives import Collective, collectives

# ruff: noqa: E501
TEXT = """
HloModule m

%region_0.1 (a: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %a)
}

%inner.1 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %s = f32[1,4]{1,0} reduce-scatter(f32[8,4]{1,0} %a), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%region_0.1
}

%body.2 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %x = (bf16[8,4]{1,0}, bf16[2]{0}) all-reduce(bf16[8,4]{1,0} %a, bf16[2]{0} %b), channel_id=1, replica_groups=[2,8]<=[16], to_apply=%region_0.1
  %g2 = ((bf16[2]{0}, bf16[4]{0}), (bf16[4]{0}, bf16[8]{0})) all-gather-start(%p, %q), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_0'}, dimensions={0}
  %w = (s32[], f32[8,4]) while(%t), condition=%cond, body=%inner.1, backend_config={"known_trip_count":{"n":"3"}}
}

ENTRY %main (p: f32[8]) -> f32[64] {
  %w = (s32[], f32[8,4]) while(%t), condition=%cond, body=%body.2, backend_config={"known_trip_count":{"n":"22"}}
  %d = f32[64]{0} all-gather-done(%g)
  %r2 = (bf16[16]{0}, bf16[4]{0}) all-reduce-start(%p, %q), channel_id=8, replica_groups={}, to_apply=%region_0.1
  %r3 = ((bf16[32]{0}), bf16[32]{0}) all-reduce-start(%p), channel_id=9, replica_groups={}, to_apply=%region_0.1
  ROOT %g = (f32[8]{0}, f32[64]{0}) all-gather-start(f32[8]{0} %p), channel_id=3, replica_groups={}, dimensions={0}
}
"""


def test_collectives_are_found_with_their_loops_and_groups():
    assert sorted(collectives(TEXT)) == [
        Collective("all-gather", 8, 24, in_loop=True, times=22, group=(0, 8)),
        Collective("all-gather", 64, 256, in_loop=False),
        Collective("all-reduce", 16, 40, in_loop=False),
        Collective("all-reduce", 32, 64, in_loop=False),  # as jax 0.11 writes it
        Collective("all-reduce", 32, 68, in_loop=True, times=22, group=tuple(range(8))),
        Collective("reduce-scatter", 32, 128, in_loop=True, times=66, group=(0, 1)),
    ]


def test_groups_across():
    line = "ENTRY %m (p: f32[8]) -> f32[8] {{\n %r = f32[8] all-reduce(%p), replica_groups={}\n}}\n"
    for groups, expected in [
        ("[8,2]<=[2,8]T(1,0)", (0, 8)),
        ("[2,8]<=[16]", tuple(range(8))),
        ("{{0,8},{1,9}}", (0, 8)),
        ("mesh['a'=2,'b'=4,'c'=2] {'b','c'}", tuple(range(8))),
        ("mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'a'}", tuple(range(8))),
        ("mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'b'}", (0, 8)),
        ("{}", ()),
    ]:
        (found,) = collectives(line.format(groups))
        assert found.group == expected, groups


def test_a_program_without_any():
    assert collectives("ENTRY %main (p: f32[8]) -> f32[8] {\n  ROOT %n = f32[8] neg(%p)\n}\n") == []
