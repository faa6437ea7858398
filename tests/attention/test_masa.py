"""Matrix atoms: what a dictionary can express, what it counts, what its conversion loses."""

import pytest
import torch

import crosslight
from crosslight.attention.masa import MatrixAtomSharing
from crosslight.errors import CrosslightError

DIM, HEADS, DEPTH = 16, 4, 6
NAMES = ("q", "k", "v", "out")


def make(**options):
    return crosslight.create("masa", **{"dim": DIM, "heads": HEADS, **options}).double()


def stacked(depth, **options):
    return MatrixAtomSharing.stack(depth, **{"dim": DIM, "heads": HEADS, **options}).double()


def plain(count, **options):
    return [crosslight.create("softmax", dim=DIM, heads=HEADS, **options).double() for _ in range(count)]


def through(layers, x):
    for layer in layers:
        x = x + layer(x, causal=True)
    return x


@pytest.fixture
def x():
    return torch.randn(2, 7, DIM, dtype=torch.double)


def test_as_many_atoms_as_layers_and_the_identity_are_any_stack(x):
    layers = plain(DEPTH)
    shared = stacked(DEPTH, atoms=DEPTH)
    with torch.no_grad():
        for name in NAMES:
            atoms = torch.stack([getattr(layer, name).weight for layer in layers])
            getattr(shared[0], name).dictionary.atoms.copy_(atoms)
            for i, (mine, other) in enumerate(zip(shared, layers, strict=True)):
                getattr(mine, name).coefficients.copy_(torch.eye(DEPTH)[i])
                getattr(mine, name).bias.copy_(getattr(other, name).bias)
    assert torch.equal(through(shared, x), through(layers, x))


@pytest.mark.parametrize("kinds", ["qkvo", "qkv"])
def test_parameters_are_atoms_and_coefficients(kinds):
    atoms, context = 2, 12
    stack = stacked(DEPTH, atoms=atoms, bias=False, context_dim=context, kinds=kinds)
    widths = {"q": DIM, "k": context, "v": context, "o": DIM}
    expected = sum(
        atoms * DIM * width + DEPTH * atoms if kind in kinds else DEPTH * DIM * width for kind, width in widths.items()
    )
    assert sum(p.numel() for p in stack.parameters()) == expected


def test_a_third_of_the_layers_as_atoms_saves_two_thirds():
    count = sum(p.numel() for p in stacked(DEPTH, atoms=DEPTH // 3, bias=False).parameters())
    full = sum(p.numel() for layer in plain(DEPTH, bias=False) for p in layer.parameters())
    assert count - 4 * DEPTH * (DEPTH // 3) == full // 3


@pytest.mark.parametrize("atoms", [1, 3, DEPTH])
def test_conversion_loses_the_discarded_singular_values(atoms, x):
    layers = plain(DEPTH)
    shared = MatrixAtomSharing.converted(layers, atoms)
    for name in NAMES:
        before = torch.stack([getattr(layer, name).weight for layer in layers]).flatten(1)
        after = torch.stack([getattr(layer, name).weight for layer in shared]).flatten(1)
        lost = torch.linalg.svdvals(before)[atoms:].square().sum()
        assert torch.allclose((before - after).square().sum(), lost, atol=1e-10)
    if atoms == DEPTH:
        assert torch.allclose(through(shared, x), through(layers, x), atol=1e-10)


def test_groups_of_neighbours_have_their_own_atoms():
    layers = plain(4)
    shared = MatrixAtomSharing.converted(layers, 2, groups=2)
    assert shared[0].q.dictionary is shared[1].q.dictionary
    assert shared[0].q.dictionary is not shared[2].q.dictionary
    assert all(torch.allclose(a.v.weight, b.v.weight, atol=1e-12) for a, b in zip(shared, layers, strict=True))


def test_one_atom_with_coefficient_one_ties_all_layers():
    stack = stacked(3, atoms=1, bias=False)
    with torch.no_grad():
        for layer in stack:
            for projection in layer.combined():
                projection.coefficients.fill_(1)
    for name in NAMES:
        weights = [getattr(layer, name).weight for layer in stack]
        assert all(torch.equal(weight, weights[0]) for weight in weights)


def test_training_one_layer_moves_the_atoms_of_all(x):
    stack = stacked(3, atoms=2)
    before = stack[2].v.weight.detach().clone()
    stack[0](x).square().sum().backward()
    torch.optim.SGD(stack.parameters(), lr=0.1).step()
    assert not torch.equal(stack[2].v.weight, before)
    assert stack[2].v.coefficients.grad is None


def test_siblings_keep_their_dictionary_in_a_state_dict_and_a_copy(x):
    stack, other = stacked(3, atoms=2), stacked(3, atoms=2)
    other.load_state_dict(stack.state_dict())
    assert torch.equal(through(other, x), through(stack, x))
    assert other[0].k.dictionary.atoms is other[2].k.dictionary.atoms


def test_siblings_share_their_dictionaries_only(x):
    layer = make(position="relative")
    other, called = layer.sibling(), []
    shared = {id(p) for p in layer.parameters()} & {id(p) for p in other.parameters()}
    assert shared == {id(p.dictionary.atoms) for p in layer.combined()}
    layer.register_forward_hook(lambda *_: called.append(layer))
    other(x)
    assert not called


def test_layers_in_half_precision_are_converted():
    layers = [layer.bfloat16() for layer in plain(2)]
    shared = MatrixAtomSharing.converted(layers, 2)
    assert all(torch.allclose(a.q.weight, b.q.weight, atol=1e-2) for a, b in zip(shared, layers, strict=True))


@pytest.mark.parametrize("position", [None, "rope", "relative"])
def test_merged_is_plain_attention_with_the_same_output(position, x):
    layer = make(position=position).sibling()
    merged = layer.merged()
    assert type(merged.q) is torch.nn.Linear
    assert torch.allclose(merged(x, causal=True), layer(x, causal=True), atol=1e-12)


def test_weights_start_with_the_variance_of_a_plain_layer():
    layer, other = make(dim=256, atoms=8), crosslight.create("softmax", dim=256, heads=HEADS)
    ratio = torch.stack([layer.sibling().q.weight.var() for _ in range(64)]).mean() / other.q.weight.var()
    assert 0.7 < ratio < 1.4


def test_bad_options_are_named():
    with pytest.raises(CrosslightError, match="atoms: got 0"):
        make(atoms=0)
    with pytest.raises(CrosslightError, match="kinds: got 'qx'"):
        make(kinds="qx")
    with pytest.raises(CrosslightError, match="atoms: got 3, expected at most the 2 layers"):
        MatrixAtomSharing.converted(plain(4), 3, groups=2)
    with pytest.raises(CrosslightError, match="layers: got .*sigmoid-attention.*, expected layers of softmax"):
        MatrixAtomSharing.converted([crosslight.create("sigmoid-attention", dim=DIM, heads=HEADS)], 1)
