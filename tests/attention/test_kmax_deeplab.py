"""k-means cross-attention: the layer written out, scikit-learn's KMeans, and where gradients flow."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight import testing
from crosslight.attention.kmax_deeplab import assigned, gathered
from crosslight.errors import CrosslightError

DIM, GRID = 16, (5, 6)


def made(**options):
    attn = crosslight.create("kmax-deeplab", dim=DIM, **{"mask_dim": 12, "context_grid": GRID} | options)
    attn = attn.double().eval()
    with torch.no_grad():
        for p in attn.parameters():
            p.add_(0.3 * torch.randn_like(p))
        for name, b in attn.named_buffers():
            if name.endswith("running_mean"):
                b.normal_(std=0.3)
            elif name.endswith("running_var"):
                b.uniform_(0.5, 2)
    return attn


def streams(n=4, m=30):
    return torch.randn(2, n, DIM, dtype=torch.float64), torch.randn(2, m, DIM, dtype=torch.float64)


def norm(bn, t, axis=-1):
    shape = [1] * t.dim()
    shape[axis] = -1
    mean, var, weight, bias = (a.view(shape) for a in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
    return (t - mean) / (var + 1e-3).sqrt() * weight + bias


def dense(layer, t):
    y = t @ layer[0].weight.mT
    return norm(layer[1], y if layer[0].bias is None else y + layer[0].bias)


def by_hand(attn, x, z):
    """Logits and output by the authors' order of operations."""
    pixels, centres = F.gelu(dense(attn.pixel, F.gelu(z))), F.gelu(dense(attn.centre, x))
    image = F.pad(pixels.mT.unflatten(2, GRID), (2, 2, 2, 2))
    around = sum(
        attn.around.weight[:, 0, dy, dx, None, None] * image[:, :, dy : dy + GRID[0], dx : dx + GRID[1]]
        for dy in range(5)
        for dx in range(5)
    )
    feature = F.gelu(norm(attn.around_norm, around.flatten(2).mT))
    feature = dense(attn.feature, F.gelu(dense(attn.mix, feature)))
    feature = feature / feature.norm(dim=-1, keepdim=True)
    logits = torch.einsum("bmc,bnc->bnm", feature, dense(attn.kernel, centres))
    logits = norm(attn.logit_norm, logits.unsqueeze(1), 1).squeeze(1)
    values, read = dense(attn.v, pixels), torch.zeros_like(x)
    for b in range(len(x)):
        for j in range(z.shape[1]):
            read[b, logits[b, :, j].argmax()] += values[b, j]
    return logits, dense(attn.out, norm(attn.read_norm, read)), values


def test_equals_the_layer_written_out():
    attn, (x, z) = made(), streams()
    logits, y, values = by_hand(attn, x, z)
    torch.testing.assert_close(attn.logits(x, z), logits)
    torch.testing.assert_close(attn(x, z), y)
    weights = attn.weights(x, z)
    assert torch.equal(weights.sum(2), torch.ones(2, 1, 30, dtype=torch.float64))  # one centre a pixel
    assert ((weights == 0) | (weights == 1)).all()
    # What the centres gather is all there is.
    torch.testing.assert_close(gathered(values, assigned(logits), 4).sum(1), values.sum(1))
    soft = made(assign="softmax")
    torch.testing.assert_close(soft.weights(x, z)[:, 0], by_hand(soft, x, z)[0].softmax(-1))


def test_it_is_the_step_of_kmeans():
    """Plain values, no residual, division by counts: Lloyd's iterations, with the logits of nearest centres."""
    KMeans = pytest.importorskip("sklearn.cluster").KMeans
    f = F.normalize(torch.randn(1, 200, 6, dtype=torch.float64), dim=-1)
    centres = f[:, :5].clone()
    for steps in range(1, 7):
        logits = 2 * centres @ f.mT - (centres**2).sum(-1, keepdim=True)
        label = assigned(logits)
        centres = gathered(f, label, 5) / gathered(torch.ones_like(f), label, 5)
        theirs = KMeans(5, init=f[0, :5].numpy(), n_init=1, max_iter=steps, tol=0, algorithm="lloyd")
        theirs.fit(f[0].numpy())
        if theirs.n_iter_ == steps:
            torch.testing.assert_close(centres[0], torch.tensor(theirs.cluster_centers_))
    assert theirs.n_iter_ >= 5


def test_the_mask_head_learns_from_the_logits_alone():
    attn, (x, z) = made(), streams()
    head = [
        attn.kernel[0].weight,
        attn.feature[0].weight,
        attn.around.weight,
        attn.mix[0].weight,
        attn.logit_norm.weight,
    ]
    head += [attn.centre[0].weight]
    through_output = torch.autograd.grad(attn(x, z).sum(), head, allow_unused=True)
    assert all(g is None for g in through_output)
    mask_loss = F.cross_entropy(attn.logits(x, z), torch.randint(0, 4, (2, 30)))
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(mask_loss, head))
    assert torch.autograd.grad(attn(x, z).square().sum(), attn.v[0].weight)[0].abs().max() > 0


def test_a_step_of_training_counts_the_batch_once():
    attn, (x, z) = made().train(), streams()
    expected = attn.logits(x, z)
    before = {name: b.clone() for name, b in attn.named_buffers()}
    torch.testing.assert_close(attn.logits(x, z), expected)
    assert all(torch.equal(b, before[name]) for name, b in attn.named_buffers())
    attn(x, z)
    counts = [b for name, b in attn.named_buffers() if name.endswith("num_batches_tracked")]
    assert len(counts) == 10
    assert all(count == 1 for count in counts)
    pixels = attn.pixel[0](F.gelu(z)).flatten(0, 1)
    torch.testing.assert_close(
        attn.pixel[1].running_mean, 0.99 * before["pixel.1.running_mean"] + 0.01 * pixels.mean(0)
    )


def test_a_new_layer_changes_nothing():
    attn = crosslight.create("kmax-deeplab", dim=DIM, queries=7)
    y = attn(None, torch.randn(2, 30, DIM))
    assert torch.equal(y, attn.queries.expand(2, -1, -1))
    assert torch.equal(attn(torch.randn(2, 3, DIM), torch.randn(2, 30, DIM)), torch.zeros(2, 3, DIM))
    assert attn.logit_norm.weight.item() == pytest.approx(0.1)


def test_conforms_with_argmax():
    """All of the suite but the check that the output teaches every parameter, which the mask head contradicts."""
    report = testing.check("kmax-deeplab", options={"assign": "argmax"}, skip="parameters_learn")
    assert sum(outcome.result == "passed" for outcome in report) > 15


def test_bad_options_are_refused():
    for wrong in ({"assign": "hard"}, {"queries": 0}, {"mask_dim": 0}, {"heads": 2}):
        with pytest.raises(CrosslightError, match=next(iter(wrong))):
            made(**wrong)
    with pytest.raises(CrosslightError, match="context_grid"):
        made(context_grid=(3, 3))(*streams())
