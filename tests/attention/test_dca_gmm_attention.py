"""Location-relative attention: the two families written out, the prior, and what an alignment does not depend on."""

import importlib.util
import math
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight import testing
from crosslight.attention.dca_gmm_attention import prior
from crosslight.engines import dense
from crosslight.errors import CrosslightError

N, M, DIM, H = 7, 30, 16, 2
FORMS = ("dca", "gmm-v2b", "gmm-v2", "gmm-v1", "gmm-v0")


def make(form="dca", *, fresh: bool = False, **options):
    torch.set_default_dtype(torch.double)
    try:
        options = {"dim": DIM, "heads": H, "hidden": 8, "form": form, **options}
        attn = crosslight.create("dca-gmm-attention", **options)
    finally:
        torch.set_default_dtype(torch.float)
    if not fresh:
        with torch.no_grad():
            for p in attn.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return attn


def streams(m: int = M):
    return torch.randn(2, N, DIM, dtype=torch.double), torch.randn(2, m, DIM, dtype=torch.double)


def test_the_prior_is_the_beta_binomial_with_a_mean_step_of_one():
    betabinom = pytest.importorskip("scipy.stats").betabinom
    p = prior(11, 0.1, 0.9).double()
    expected = torch.tensor(betabinom.pmf(range(11), 10, 0.1, 0.9))
    torch.testing.assert_close(p, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close((p * torch.arange(11)).sum(), torch.tensor(1.0).double(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_dca_equals_its_equations_filter_by_filter():
    attn, (x, z) = make(), streams()
    align, p = attn.alignment, prior(11, 0.1, 0.9).double()
    rows = attn.weights(x, z)
    for b in range(2):
        for h in range(H):
            last = torch.zeros(M, dtype=torch.double)
            last[0] = 1
            for i in range(N):
                hidden = align.query(x[b, i]).view(H, -1)[h].tanh()
                filters = (hidden @ align.dynamic[h]).view(21, 8)
                energy = torch.zeros(M, dtype=torch.double)
                for j in range(M):
                    f, g = torch.zeros(8, dtype=torch.double), torch.zeros(8, dtype=torch.double)
                    for t in range(max(0, j - 10), min(M, j + 11)):
                        f = f + align.static[h, t - j + 10] * last[t]
                        g = g + filters[t - j + 10] * last[t]
                    ahead = sum(p[k] * last[j - k] for k in range(11) if j >= k)
                    inner = f @ align.from_static[h] + g @ align.from_dynamic[h] + align.bias[h, 0]
                    energy[j] = inner.tanh() @ align.v[h, :, 0] + math.log(max(float(ahead), 1e-6))
                last = energy.softmax(0)
                torch.testing.assert_close(rows[b, h, i], last, atol=1e-6, rtol=1e-5)


def coqui():
    """coqui-tts' attention, without the package's own imports (of torchaudio and others)."""
    found = importlib.util.find_spec("TTS")
    if found is None or found.origin is None:
        pytest.skip("coqui-tts is not installed")
    root, before = Path(found.origin).parent, dict(sys.modules)
    try:
        for name in ("TTS", "TTS.tts", "TTS.tts.layers", "TTS.tts.layers.tacotron"):
            package = types.ModuleType(name)
            package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = package
        try:
            return importlib.import_module("TTS.tts.layers.tacotron.attentions")
        except ImportError as error:
            pytest.skip(f"coqui-tts: {error}")
    finally:
        for name in set(sys.modules) - set(before):
            if name.startswith("TTS"):
                del sys.modules[name]


def test_equals_coqui_with_the_same_weights():
    theirs = coqui().MonotonicDynamicConvolutionAttention(DIM, DIM, 8, 8, 21, 8, 21).double()
    attn, (x, z) = make(heads=1), streams()
    align = attn.alignment
    with torch.no_grad():
        theirs.query_layer.load_state_dict(align.query.state_dict())
        # They hold one filter after the other.
        theirs.key_layer.weight.copy_(align.dynamic[0].view(8, 21, 8).transpose(1, 2).reshape(8, 168).T)
        theirs.static_filter_conv.weight.copy_(align.static[0].T.unsqueeze(1))
        theirs.static_filter_layer.weight.copy_(align.from_static[0].T)
        theirs.dynamic_filter_layer.weight.copy_(align.from_dynamic[0].T)
        theirs.dynamic_filter_layer.bias.copy_(align.bias[0, 0])
        theirs.v.weight.copy_(align.v[0].T)
        theirs.init_states(z)
        theirs.attention_weights = theirs.attention_weights.double()
        rows = attn.weights(x, z)[:, 0]
        for i in range(N):
            read = theirs(x[:, i], z, None, None)
            torch.testing.assert_close(theirs.attention_weights, rows[:, i], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(read, (rows[:, i : i + 1] @ z)[:, 0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS[1:])
def test_gmm_equals_its_equations_component_by_component(form):
    attn, (x, z) = make(form), streams()
    align, rows = attn.alignment, attn.weights(x, z)
    for b in range(2):
        for h in range(H):
            mu = [0.0] * 5
            for i in range(N):
                raw = (align.query(x[b, i]).view(H, -1)[h].tanh() @ align.out[h]).view(3, 5) + align.bias[h, 0]
                expected = torch.zeros(M, dtype=torch.double)
                for k in range(5):
                    if form == "gmm-v0":
                        w, step = raw[0, k].exp(), raw[1, k].exp()
                        sigma, z_k = ((-raw[2, k]).exp() / 2).sqrt(), 1.0
                    else:
                        w = raw[0].softmax(0)[k]
                        step = raw[1, k].exp() if form == "gmm-v1" else F.softplus(raw[1, k])
                        sigma = raw[2, k].exp().sqrt() if form == "gmm-v1" else F.softplus(raw[2, k])
                        z_k = (2 * math.pi * sigma**2).sqrt()
                    mu[k] = mu[k] + step
                    j = torch.arange(M)
                    expected = expected + w / z_k * (-((j - mu[k]) ** 2) / (2 * sigma**2)).exp()
                torch.testing.assert_close(rows[b, h, i], expected)


def test_v2b_starts_with_steps_of_one_and_widths_of_ten():
    attn = make("gmm-v2b", fresh=True)
    with torch.no_grad():
        attn.alignment.out.zero_()
    _, step, rate = attn.alignment.parameters_of(streams()[0], torch.double)
    torch.testing.assert_close(step, torch.ones_like(step))
    torch.testing.assert_close((1 / (2 * rate)).sqrt(), torch.full_like(rate, 10.0))


@pytest.mark.parametrize("form", FORMS[1:])
def test_the_means_only_move_forward(form):
    attn, (x, z) = make(form), streams()
    means = [attn.align(x[:, : i + 1], attn.alignment.start(z), None, M)[1] for i in range(N)]
    assert (torch.stack(means).diff(dim=0) > 0).all()


def test_under_the_prior_alone_no_mass_moves_back():
    attn, x = make(), streams()[0]
    with torch.no_grad():
        attn.alignment.v.zero_()
    start = torch.zeros(2, H, M, dtype=torch.double)
    start[..., 12] = 1
    rows, _ = attn.align(x[:, :1], start, None, M)
    assert rows[..., :12].max() < 2e-6
    assert rows[..., 23:].max() < 2e-6
    p = prior(11, 0.1, 0.9).double()
    torch.testing.assert_close(rows[0, 0, 0, 12:23], p, atol=3e-5, rtol=0)


@pytest.mark.parametrize("form", ["dca", "gmm-v2b"])
def test_a_shifted_start_shifts_all_that_follows(form):
    attn, m = make(form), 200
    x = streams()[0]
    if form == "dca":
        start = torch.zeros(2, H, m, dtype=torch.double)
        first, second = start.clone(), start.clone()
        first[..., 50], second[..., 57] = 1, 1
    else:
        first = torch.full((2, H, 5), 50.0, dtype=torch.double)
        second = first + 7
    one, two = (attn.align(x[:, :3], start, None, m)[0] for start in (first, second))
    # In dca the floor of the prior lets a little through everywhere, also to where the start of the memory is.
    torch.testing.assert_close(two[..., 7:], one[..., :-7], atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_what_the_memory_holds_does_not_count(form):
    attn, (x, z) = make(form), streams()
    torch.testing.assert_close(attn.weights(x, z), attn.weights(x, torch.randn_like(z)))
    assert (attn.weights(x, z) - attn.weights(x.flip(1), z)).abs().max() > 1e-3


def test_later_states_do_not_count_in_any_pattern():
    attn, (x, z) = make(), streams()
    later = torch.cat([x[:, :4], torch.randn(2, 3, DIM)], 1)
    torch.testing.assert_close(attn(later, z)[:, :4], attn(x, z)[:, :4])


def test_many_queries_are_taken_in_chunks(monkeypatch):
    attn, (x, z) = make(), streams()

    def run():
        y = attn(x, z)
        return y, *torch.autograd.grad(y.square().sum(), list(attn.parameters()))

    whole = run()
    monkeypatch.setattr(dense, "CHUNK", 3 * 2 * H * M * (21 + 2 * 8))
    torch.testing.assert_close(run(), whole)


@pytest.mark.parametrize("form", ["dca", "gmm-v0"])
def test_the_other_forms_keep_the_contract(form):
    # A thousand steps of a recurrence under a meter, and whole graphs of it, take long.
    testing.check("dca-gmm-attention", options={"form": form}, skip={"work_grows_as_declared", "compiles"})


def test_dca_compiles_whole():
    attn, (x, z) = make(), streams()
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x[:, :2], z), attn(x[:, :2], z))


def test_bad_options_are_refused():
    with pytest.raises(CrosslightError, match="form: got 'gmm'"):
        make("gmm")
    with pytest.raises(CrosslightError, match="prior: got 12"):
        make(prior=12)
    with pytest.raises(CrosslightError, match="length: got 20"):
        make(length=20)
