"""Routing attention: clusters and local windows written out token by token, and the centroids' moving average."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.engines import dense, sparse
from crosslight.errors import CrosslightError
from crosslight.testing import flops


@pytest.fixture(autouse=True)
def _tiles_at_any_length(monkeypatch):
    """Short calls would be computed densely."""
    monkeypatch.setattr(sparse, "TINY", 0)


def layer(**options):
    torch.manual_seed(2)
    options = {"dim": 24, "heads": 3, "local_heads": 0, "clusters": 4, "window": 5, **options}
    return crosslight.create("routing-transformer", **options).double().eval()


def tokens(n):
    return torch.randn(2, n, 24, dtype=torch.float64, requires_grad=True)


def heads(attn, projection, x):
    return projection(x).unflatten(-1, (attn.heads, attn.head_dim)).transpose(1, 2)


def norm(t):
    """LayerNorm without scale and shift, written out."""
    t = t - t.mean(-1, keepdim=True)
    return t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def attended(q, k, v, rows):
    """softmax attention of one head, with the keys of each query in a list; 0 where there are none."""
    out = []
    for i, read in enumerate(rows):
        if not read:
            out.append(torch.zeros_like(v[0]))
            continue
        p = torch.stack([q[i] @ k[j] for j in read]).div(q.shape[-1] ** 0.5).softmax(0)
        out.append(sum(a * v[j] for a, j in zip(p, read, strict=True)))
    return torch.stack(out)


def best(likeness, count):
    return sorted(likeness.topk(count).indices.tolist())


def balanced_by_hand(q, k, v, centroids, causal):
    """The paper's routing of one head: mean over the clusters that hold a query."""
    n, m, clusters = len(q), len(k), len(centroids)
    total, count = [torch.zeros_like(v[0]) for _ in range(n)], [0] * n
    for c in range(clusters):
        rows = best(centroids[c] @ q.T, -(-n // clusters))
        columns = best(centroids[c] @ k.T, -(-m // clusters))
        read = [[j for j in columns if not causal or j <= i] if i in rows else [] for i in range(n)]
        y = attended(q, k, v, read)
        for i in rows:
            total[i], count[i] = total[i] + y[i], count[i] + 1
    return torch.stack([t / max(c, 1) for t, c in zip(total, count, strict=True)])


def each(q, k, v, attn, by_hand):
    return torch.stack(
        [
            torch.stack([by_hand(q[b, h], k[b, h], v[b, h], attn.centroids[h]) for h in range(attn.heads)])
            for b in range(len(q))
        ]
    )


def same(attn, y, of_heads, x):
    expected = attn.out(of_heads.transpose(1, 2).flatten(2))
    torch.testing.assert_close(y, expected)
    goal, of = torch.randn_like(y), [x, *(attn.q.weight, attn.v.weight, attn.out.weight)]
    for a, b in zip(torch.autograd.grad(y, of, goal), torch.autograd.grad(expected, of, goal), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [24, 19, 3])
def test_balanced_clusters_of_the_paper(n, causal):
    attn, x = layer(lookahead=True), tokens(n)
    q, k, v = norm(heads(attn, attn.q, x)), norm(heads(attn, attn.k, x)), heads(attn, attn.v, x)
    k = q if causal else k
    expected = each(q, k, v, attn, lambda *qkvc: balanced_by_hand(*qkvc, causal))
    same(attn, attn(x, causal=causal), expected, x)


@pytest.mark.parametrize("window", [1, 5, 50])
def test_causal_clusters_by_the_nearest_centroid(window):
    attn, x = layer(window=window), tokens(40)
    q, v = norm(heads(attn, attn.q, x)), heads(attn, attn.v, x)

    def by_hand(q, k, v, centroids):
        cluster = (q @ centroids.T).argmax(-1).tolist()
        read = [[j for j in range(i + 1) if cluster[j] == cluster[i]][-window:] for i in range(40)]
        return attended(q, k, v, read)

    same(attn, attn(x, causal=True), each(q, q, v, attn, by_hand), x)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "computed again"])
@pytest.mark.parametrize("causal", [False, True])
def test_local_heads(causal, kept, monkeypatch):
    monkeypatch.setattr(dense, "CHUNK", dense.CHUNK if kept else 0)
    attn, x = layer(local_heads=2), tokens(23)
    q, k, v = (heads(attn, p, x)[:, :2] for p in (attn.q, attn.k, attn.v))
    weights = attn.weights(x, causal=causal)[:, :2]
    for h in range(2):
        for i in range(23):
            near = [j for j in range(23) if abs(i // 5 - j // 5) <= 1 and (not causal or j <= i)]
            scores = [q[0, h, i] @ (k[0, h, j] + attn.relative[h, i - j + 9]) for j in near]
            expected = torch.zeros(23, dtype=torch.float64)
            expected[near] = torch.stack(scores).div(8**0.5).softmax(0)
            torch.testing.assert_close(weights[0, h, i], expected)
    near, _ = attn._split_heads(x, x, crosslight.attention.base.How(causal=causal))
    y, expected = attn._near(*near, None, causal), weights @ v
    torch.testing.assert_close(y, expected)
    goal, of = torch.randn_like(y), [x, attn.q.weight, attn.k.weight, attn.v.weight, attn.relative]
    for a, b in zip(torch.autograd.grad(y, of, goal), torch.autograd.grad(expected, of, goal), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("lookahead", [False, True])
def test_one_cluster_is_dense_attention_with_shared_queries_and_keys(lookahead):
    attn, x = layer(clusters=1, window=30, lookahead=lookahead), tokens(30)
    q, v = norm(heads(attn, attn.q, x)), heads(attn, attn.v, x)
    y = F.scaled_dot_product_attention(q, q, v, is_causal=True)
    torch.testing.assert_close(attn(x, causal=True), attn.out(y.transpose(1, 2).flatten(2)))


def test_no_gradient_from_the_future_with_balanced_clusters():
    """Which tokens a cluster holds does look ahead, what they carry does not."""
    attn, x = layer(lookahead=True, local_heads=1), tokens(24)
    y = attn(x, causal=True)
    for i in (3, 11, 20):
        (by,) = torch.autograd.grad(y[:, i].square().sum(), x, retain_graph=True)
        assert not by[:, i + 1 :].any()


def test_causal_cross_reads_the_cluster_nearest_to_the_query():
    attn, x, z = layer(), tokens(9), tokens(22)
    q, k, v = norm(heads(attn, attn.q, x)), norm(heads(attn, attn.k, z)), heads(attn, attn.v, z)

    def by_hand(q, k, v, centroids):
        columns = [best(c @ k.T, 6) for c in centroids]
        return attended(q, k, v, [columns[c] for c in (q @ centroids.T).argmax(-1).tolist()])

    expected = attn.out(each(q, k, v, attn, by_hand).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x, z, causal=True), expected)
    both = each(q, k, v, attn, lambda *qkvc: balanced_by_hand(*qkvc, False))
    torch.testing.assert_close(attn(x, z), attn.out(both.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("masked", [False, True])
def test_centroids_follow_by_a_moving_average_and_have_no_gradient(masked):
    attn, x = layer(local_heads=1, decay=0.9), tokens(30)
    keep = torch.rand(2, 30) < 0.7 if masked else torch.ones(2, 30, dtype=torch.bool)
    before = attn.centroids.clone()
    attn(x)
    assert torch.equal(attn.centroids, before)
    attn.train()(x, mask=keep if masked else None)
    expected = before.clone()
    for h in (1, 2):
        for c in range(4):
            for projection in (attn.q, attn.k):
                t = norm(heads(attn, projection, x))[:, h][keep]
                members = t[(t @ before[h].T).argmax(-1) == c]
                if len(members):
                    expected[h, c] += 0.05 * (members.mean(0) - before[h, c])
    torch.testing.assert_close(attn.centroids, expected.detach())
    assert "centroids" in attn.state_dict()
    assert not attn.centroids.requires_grad


@pytest.mark.parametrize("window", [2, 5, 50])
def test_decoding(window):
    attn, x = layer(local_heads=1, window=window), tokens(33)
    expected, cache = attn(x, causal=True), None
    with torch.no_grad():
        for i in range(33):
            y, cache = attn.step(x[:, i : i + 1], cache)
            torch.testing.assert_close(y[:, 0], expected[:, i])
        start, cache = attn.step(x[:, :14])
        rest, _ = attn.step(x[:, 14:], cache)
    torch.testing.assert_close(torch.cat([start, rest], 1), expected)


def test_the_future_changes_no_cluster():
    attn, x = layer(local_heads=1), tokens(40)
    before = attn(x, causal=True)
    for cut in (3, 17, 30):
        changed = torch.cat([x[:, :cut], 10 * torch.randn_like(x[:, cut:])], 1)
        torch.testing.assert_close(attn(changed, causal=True)[:, :cut], before[:, :cut])


def test_masked_tokens_are_in_no_cluster():
    attn, x = layer(local_heads=1), tokens(40)
    keep = torch.rand(2, 40) < 0.6
    noisy = torch.where(keep[..., None], x, 10 * torch.randn_like(x))
    for causal in (False, True):
        y = attn(x, mask=keep, causal=causal)
        torch.testing.assert_close(attn(noisy, mask=keep, causal=causal)[keep], y[keep])


@pytest.mark.parametrize("causal", [False, True])
def test_work_grows_as_n_sqrt_n_with_sqrt_n_clusters(causal):
    work = []
    for n in (1024, 4096):
        root = int(n**0.5)
        attn = layer(dim=24, heads=1, head_dim=4, clusters=root, window=root).float()
        q, k, v = torch.randn(3, 1, 1, n, 4).unbind()
        if causal:
            work.append(flops.measure(lambda: attn._route_causal(q, v, None)).flops)  # noqa: B023
        else:
            work.append(flops.measure(lambda: attn._route_balanced(q, k, v, (None, None), False)).flops)  # noqa: B023
    assert 1.2 < flops.growth(*work, 4) < 1.65


def test_paper_defaults_and_bad_options():
    attn = crosslight.create("routing-transformer", dim=32, heads=4)
    assert (attn.local, attn.clusters, attn.decay) == (2, 16, 0.999)
    for wrong in ({"clusters": 0}, {"window": 0}, {"local_heads": 4}, {"decay": 2.0}):
        with pytest.raises(CrosslightError, match=next(iter(wrong))):
            crosslight.create("routing-transformer", dim=32, heads=4, **wrong)
