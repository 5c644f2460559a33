"""The losses of G4G: hand-computed values, gradients against finite differences, where gradient may not go, half precision, two processes."""
import math
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from talkingface.core import InputError, ParamsError
from talkingface.data.audio import mel_frames, mel_window
from talkingface.data.clips import frame_mels
from talkingface.experts.base import frozen
from talkingface.experts.features import FeatureNet
from talkingface.experts.syncnet import LightSyncNet, SyncNet, SyncNetV2
from talkingface.layers import parameter_count
from talkingface.losses.adversarial import AdversarialLoss
from talkingface.losses.g4g import (CROP, NO_CLIP, AttributeLoss, ContrastiveLoss, FrameClipDiscriminator, LSAdversarialLoss,
                                    MouthPixelLoss, PatchDiscriminator, ScalesPerceptualLoss, Temperature, diagonal_loss,
                                    far_frames, further_sounds, gathered, inner_features, moments, mouth_masks, near_pairs,
                                    similarity_matrix)
from talkingface.losses.objective import LOSSES, build_loss
from talkingface.losses.perceptual import PerceptualLoss, VGG19Features
from talkingface.losses.reconstruction import LossTerm, check_loss, mouth_box, total_loss

torch.set_num_threads(1)
WEIGHTS = dict(attribute=1, perceptual_scales=2, ls_adversarial=3, mouth_pixel=4, contrastive=5)      # equation 24
TERMS = [*WEIGHTS]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Toy(nn.Module):
    "Keeps features of the frames that it is shown; its heads hear frame mels."
    def __init__(self, dim=8):
        super().__init__(); torch.manual_seed(3)
        self.look, self.heard, self.inner = nn.Linear(3*16, 3*dim), nn.Linear(80*16, dim), {}
    def embed_sounds(self, mel): return self.heard(mel.flatten(1))
    def forward(self, frames, batch):
        rows = F.adaptive_avg_pool2d(frames.to(self.look.weight.dtype).flatten(0, 1), 4).flatten(1)
        fused, aligned, visual = self.look(rows).chunk(3, -1)
        self.inner = dict(fused=fused, aligned=aligned, visual=visual, landmarks=batch.sketch, audio=self.embed_sounds(batch.mel.flatten(0, 1)))
        return frames


class Shown(LossTerm):
    "A term as a function of the frames, also where it looks at what the generator keeps."
    def __init__(self, term, toy): self.term, self.toy, self.name, self.needs = term, toy, term.name, term.needs
    def __call__(self, output, batch): self.toy(output, batch); return self.term(output, batch)
    @property
    def modules(self): return {**self.term.modules, 'toy': self.toy}


def store(clips=3, columns=320, seed=0):
    noise = np.random.default_rng(seed)
    return [SimpleNamespace(mel=noise.uniform(-4, 4, (80, columns)).astype(np.float32)) for _ in range(clips)]


def make_batch(clips=2, frames=5, dtype=torch.float32, size=96):
    columns = int(80*(frames - 5)/25) + 16
    return SimpleNamespace(target=draw(clips, frames, 3, size, size, dtype=dtype), sketch=draw(clips, 8, seed=4, dtype=dtype) - .5,
                           mel=8*draw(clips, frames, 80, 16, seed=2, dtype=dtype) - 4,
                           mel_window=8*draw(clips, 80, columns, seed=1, dtype=dtype) - 4,
                           clip=torch.arange(clips), start=torch.arange(clips)*7 + 3)


def make_term(name, dtype=torch.float32, **options):
    torch.manual_seed(0); toy = Toy().to(dtype)
    made = dict(attribute=lambda: AttributeLoss(toy, **options), perceptual_scales=lambda: ScalesPerceptualLoss(FeatureNet(5, width=4), **options),
                ls_adversarial=lambda: LSAdversarialLoss(**{'width': .0625, **options}), mouth_pixel=lambda: MouthPixelLoss(**options),
                contrastive=lambda: ContrastiveLoss(toy, SyncNet(.125), store(), **options))[name]()
    for module in made.modules.values():
        module.to(dtype)
        if not isinstance(module, Temperature):
            for p in module.parameters(): p.data.mul_(1.5)          # lively without training
    return Shown(made, toy)


# ---- every term

@pytest.mark.parametrize('name', TERMS)
def test_contract(name):
    shown = make_term(name)
    assert LOSSES[name] is type(shown.term) and shown.term.name == name and type(shown.term).__name__ in repr(shown.term)
    assert shown.term.to('cpu') is shown.term and 'generator' not in shown.term.modules
    check_loss(shown, make_batch())


@pytest.mark.parametrize('name', TERMS)
def test_gradient_against_finite_differences(name):
    "In float64, through a coarse picture of 2x2 values a frame."
    shown, batch = make_term(name, torch.double), make_batch(2, dtype=torch.double)
    coarse = draw(2, 5, 1, 2, 2, seed=3, dtype=torch.double).requires_grad_()
    faces = lambda x: F.interpolate(x.flatten(0, 1), (96, 96), mode='nearest').expand(-1, 3, -1, -1).unflatten(0, (2, 5))
    assert torch.autograd.gradcheck(lambda x: shown(faces(x), batch), coarse, eps=1e-7, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize('name', TERMS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    shown, batch, output = make_term(name), make_batch(), draw(2, 5, 3, 96, 96, seed=5)
    want, half = shown(output, batch).item(), output.to(dtype).requires_grad_()
    value = shown(half, batch); value.backward()
    assert value.dtype == torch.float32 and abs(value.item() - want) < .02*max(1, want)
    assert torch.isfinite(half.grad).all() and half.grad.abs().sum() > 0
    with torch.autocast('cpu', dtype): value = shown(output.requires_grad_(), batch)
    value.backward()
    assert torch.isfinite(value) and abs(value.item() - want) < .1*max(1, want) and torch.isfinite(output.grad).all()


@pytest.mark.parametrize('name', TERMS)
def test_a_step_down_the_gradient_lowers_the_loss(name):
    shown, batch, output = make_term(name), make_batch(), draw(2, 5, 3, 96, 96, seed=5).requires_grad_()
    value = shown(output, batch); slope, = torch.autograd.grad(value, output)
    assert shown(output - 1e-2*slope/slope.norm(), batch) < value


@pytest.mark.parametrize('name', TERMS)
def test_no_gradient_where_none_belongs(name):
    "Not into target, sound, expert, features or discriminators; into the generator and the temperatures where there are any."
    shown, batch, output = make_term(name), make_batch(), draw(2, 5, 3, 96, 96, seed=5).requires_grad_()
    if name not in ('attribute', 'contrastive'): batch.target.requires_grad_()
    batch.mel_window.requires_grad_(); shown(output, batch).backward()
    assert batch.mel_window.grad is None and output.grad.abs().sum() > 0
    for part, net in shown.term.modules.items():
        reached = [p.grad is not None for p in net.parameters()]
        assert all(reached) if part == 'learnable' else not any(reached), part
    if name in ('attribute', 'contrastive'): assert shown.toy.look.weight.grad.abs().sum() > 0


def test_the_total_of_equation_24():
    batch, output, toy = make_batch(), draw(2, 5, 3, 96, 96, seed=5), Toy()
    made = {name: make_term(name) for name in WEIGHTS}
    total, logs = total_loss(made, WEIGHTS, output, batch)
    assert total.item() == pytest.approx(sum(w*logs[name].item() for name, w in WEIGHTS.items()), rel=1e-5)
    assert build_loss('attribute', generator=toy).of == 'aligned' and build_loss('mouth_pixel', masks=1).masks == 1
    with pytest.raises(ParamsError, match='attribute: expected generator'): build_loss('attribute')
    with pytest.raises(ParamsError, match="did you mean 'mouth_pixel'"): build_loss('mouth_pixels')
    with pytest.raises(ParamsError, match="did you mean 'negatives'"): build_loss('contrastive', generator=toy, negative=3)


# ---- (19)

@pytest.mark.parametrize('angle', [0., 30., 90., 135., 180.])
def test_attribute_is_one_minus_the_cosine(angle):
    turn = math.radians(angle); frames = draw(2, 3, 3, 8, 8)
    kept = SimpleNamespace(inner=dict(aligned=7*torch.tensor([[math.cos(turn), math.sin(turn)]]*6), landmarks=torch.tensor([[.2, 0.]]*6)))
    assert AttributeLoss(kept)(frames, None).item() == pytest.approx(1 - math.cos(turn), abs=1e-6)


def test_attribute_of_the_printed_feature():
    toy, batch = Toy(), make_batch(); toy(batch.target, batch)
    by_hand = lambda name: (1 - F.cosine_similarity(toy.inner[name], batch.sketch.repeat_interleave(5, 0))).mean().item()
    for of in ('aligned', 'fused'): assert AttributeLoss(toy, of=of)(batch.target, None).item() == pytest.approx(by_hand(of), abs=1e-6)
    assert by_hand('aligned') != by_hand('fused')
    with pytest.raises(ParamsError, match="did you mean 'fused'"): AttributeLoss(toy, of='fuse')


def test_inner_features_are_of_the_frames_at_hand():
    toy, batch = Toy(), make_batch()
    for empty in (toy, nn.Linear(1, 1)):
        with pytest.raises(InputError, match='keeps nothing there'): inner_features(empty, batch.target, ('aligned',), 'attribute')
    toy(batch.target, batch)
    with pytest.raises(InputError, match="attribute reads aligned, landmarks .* keeps .*audio.* with its alignment"):
        toy.inner.pop('aligned'); AttributeLoss(toy)(batch.target, batch)
    toy(batch.target, batch)
    with pytest.raises(InputError, match='a row for each of 8 frames'): AttributeLoss(toy)(batch.target[:, :4], batch)
    toy.inner['aligned'] = torch.zeros(10, 9)
    with pytest.raises(InputError, match='9 channels, landmarks has 8'): AttributeLoss(toy)(batch.target, batch)


# ---- (20)

@pytest.mark.parametrize('features', [FeatureNet(5, width=4), VGG19Features()])
def test_perceptual_scales_term_by_term(features):
    "The sum of equation 20, each map divided by its own size."
    size = 32 if isinstance(features, VGG19Features) else 96
    one, other = draw(1, 2, 3, size, size), draw(1, 2, 3, size, size, seed=1)
    term = ScalesPerceptualLoss(features); N = len(features.stages(one[0])); total = 0.
    for real, made in ((one[0], other[0]), tuple(F.interpolate(x[0], scale_factor=.5, mode='bilinear') for x in (one, other))):
        for a, b in zip(features.stages(made), features.stages(real)):
            frames, channels, height, width = a.shape
            total += (a - b).abs().sum().item()/frames/(2*N*width*height*channels)
    assert term(other, SimpleNamespace(target=one)).item() == pytest.approx(total, rel=1e-4)
    assert N == (5 if isinstance(features, VGG19Features) else 4) and term(one, SimpleNamespace(target=one)) == 0


def test_perceptual_scales_guards():
    net, batch = FeatureNet(5, width=4), make_batch()
    assert ScalesPerceptualLoss(net, scales=1)(batch.target.flip(0), batch) == PerceptualLoss(net)(batch.target.flip(0), batch)
    with pytest.raises(ParamsError, match='scales'): ScalesPerceptualLoss(net, scales=0)
    with pytest.raises(InputError, match='like the target'): ScalesPerceptualLoss(net)(batch.target[:, :3], batch)
    with pytest.raises(InputError, match='needs a network with stages'): ScalesPerceptualLoss(nn.Linear(1, 1))


# ---- (21)

def test_patch_discriminator_has_the_published_layout():
    "Counted by hand: 4x4 kernels with bias to 128, 256, 256, 256 channels, and 1x1 to one."
    for channels in (3, 15):
        sizes = [channels, 128, 256, 256, 256]
        want = sum(16*a*b + b for a, b in zip(sizes, sizes[1:])) + 257
        net = PatchDiscriminator(channels); assert parameter_count(net) == want
    kinds = {type(m) for m in FrameClipDiscriminator(.0625).modules()} - {FrameClipDiscriminator, PatchDiscriminator, nn.ModuleList}
    assert kinds == {nn.Conv2d} and not any(hasattr(m, 'parametrizations') for m in net.modules())     # no norm, spectral neither


@pytest.mark.parametrize('blocks', [1, 2, 3, 4])
def test_patch_size_is_the_receptive_field(blocks):
    net = PatchDiscriminator(3, .0625, blocks).double(); size = net.patch + 2**(blocks - 1)
    x = draw(1, 3, size, size, dtype=torch.double).requires_grad_()
    scores = net(x); assert scores.shape == (1, 1, 2, 2)
    seen, = torch.autograd.grad(scores[0, 0, 0, 0], x); rows = seen.abs().sum((0, 1, 3)).nonzero().flatten()
    assert (rows.min(), rows.max() + 1) == (0, net.patch)
    with pytest.raises(InputError, match='fewer blocks'): net(x[..., :net.patch - 1])


@pytest.mark.parametrize('said', [-1., 0., .3, 1., 2.])
def test_least_squares_by_hand(said):
    term, faces = LSAdversarialLoss(.0625), draw(2, 5, 3, 64, 64)
    for judge in (term.discriminator.frame, term.discriminator.clip):
        nn.init.zeros_(judge.score.weight); nn.init.constant_(judge.score.bias, said)
    assert term(faces, None).item() == pytest.approx(2*(said - 1)**2, abs=1e-5)
    assert term.discriminator_loss(faces, faces).item() == pytest.approx((said - 1)**2 + said**2, abs=1e-5)


def test_ls_adversarial_is_mean_squared_error_of_both_judges():
    term, real, fake = make_term('ls_adversarial').term, draw(2, 7, 3, 64, 64), draw(2, 7, 3, 64, 64, seed=1)
    runs = lambda x: torch.stack([x[b, t:t + 5].flatten(0, 1) for b in range(2) for t in range(3)])
    judge = lambda x: [term.discriminator.frame(x.flatten(0, 1)), term.discriminator.clip(runs(x))]
    near = lambda x, to: sum(F.mse_loss(s, torch.full_like(s, to)) for s in judge(x)).item()
    assert term(fake, None).item() == pytest.approx(near(fake, 1.), rel=1e-5)
    assert term.discriminator_loss(real, fake).item() == pytest.approx(.5*near(real, 1.) + .5*near(fake, 0.), rel=1e-5)


def test_ls_adversarial_windows():
    "Shorter windows have no run of five; few frames may be judged alone, all are judged together."
    term, five = make_term('ls_adversarial').term, draw(1, 5, 3, 64, 64)
    assert [s.shape[0] for s in term.scores(five)] == [5, 1] and [s.shape[0] for s in term.scores(five[:, :4])] == [4]
    few = make_term('ls_adversarial', frames=2).term
    torch.testing.assert_close(few.scores(five)[0], term.scores(five)[0][[0, 4]]); torch.testing.assert_close(few.scores(five)[1], term.scores(five)[1])
    assert len(make_term('ls_adversarial', consecutive=0).term.scores(five)) == 1 and isinstance(term, AdversarialLoss)
    for wrong in (dict(frames=0), dict(consecutive=-1), dict(blocks=5)):
        with pytest.raises(ParamsError): LSAdversarialLoss(.0625, **wrong)
    with pytest.raises(InputError, match=r'expected faces \(B, T, 3, H, W\)'): term.discriminator(five[0])


def test_ls_discriminator_loss_cuts_the_graph_of_the_generator():
    term, fake = make_term('ls_adversarial').term, draw(1, 5, 3, 64, 64).requires_grad_()
    term.discriminator_loss(draw(1, 5, 3, 64, 64, seed=1), fake).backward()
    assert fake.grad is None and all(p.grad.abs().sum() > 0 for p in term.discriminator.parameters())


# ---- (22)

def test_masks_are_nested_and_where_they_should_be():
    sharp = mouth_masks(*CROP, feather=0.)[:, 0]
    assert sharp.sum((1, 2)).tolist() == [232*256, 192*192, 128*128]                 # the outer one is cut off by the crop
    for size in (26, 96, 97, 416):
        soft = mouth_masks(size, size); assert (soft[:-1] >= soft[1:]).all() and 0 <= soft.min() and soft.max() <= 1 + 1e-6
        assert soft[-1, 0].argmax() == soft[-1, 0].flatten().argmax() and abs(soft[2].sum().item()/size**2 - 128*128/416/320) < .01
    torch.testing.assert_close(mouth_masks(96, 96)[0].flip(-1), mouth_masks(96, 96)[0])
    inner = mouth_box(mouth_masks(96, 96)[0, 0]); assert inner.min() > .99           # the box of the metrics and the pixel loss lies inside
    assert mouth_masks(96, 96, 1).shape == (1, 1, 96, 96) and mouth_masks(96, 96, dtype=torch.double).dtype == torch.double


@pytest.mark.parametrize('feather', [2., 8., 20.])
def test_feather_is_a_gaussian(feather):
    "The slope of an edge is the normal density of that deviation."
    edge = mouth_masks(*CROP, count=3, feather=feather, dtype=torch.double)[2, 0, 312]                # a row through the middle
    x = torch.arange(319, dtype=torch.double) + 1
    density = lambda at: torch.exp(-(x - at)**2/(2*feather**2))/(feather*math.sqrt(2*math.pi))
    torch.testing.assert_close(edge.diff(), density(96) - density(224), atol=5e-3, rtol=0)


def test_mouth_pixel_by_hand():
    batch, term = make_batch(), MouthPixelLoss()
    assert term(batch.target, batch) == 0 and term(batch.target - .2, batch).item() == pytest.approx(.2, rel=1e-4)
    wrong = draw(2, 5, 3, 96, 96, seed=6); masks = mouth_masks(96, 96)
    by_hand = sum((m*(wrong - batch.target)).abs().sum()/m.expand_as(wrong).sum() for m in masks)/3
    assert term(wrong, batch).item() == pytest.approx(by_hand.item(), rel=1e-5)
    single, whole = MouthPixelLoss(masks=1)(wrong, batch), MouthPixelLoss(whole=3.)(wrong, batch)
    assert single.item() == pytest.approx(((masks[0]*(wrong - batch.target)).abs().sum()/masks[0].expand_as(wrong).sum()).item(), rel=1e-5)
    assert whole.item() == pytest.approx(by_hand.item() + 3*F.l1_loss(wrong, batch.target).item(), rel=1e-5)
    assert term.weights(wrong).sum().item() == pytest.approx(1., abs=1e-5)


def test_mouth_pixel_pulls_hardest_in_the_middle():
    batch = make_batch(1); output = (batch.target + .1).requires_grad_()
    MouthPixelLoss(feather=0.)(output, batch).backward(); slope = output.grad[0, 0, 0]
    inner, middle, outer, beside, above = (slope[r, c].item() for r, c in ((72, 48), (72, 24), (72, 14), (72, 4), (20, 48)))
    assert inner > middle > outer > 0 == beside == above
    areas = mouth_masks(96, 96, feather=0.).sum((1, 2, 3))
    assert inner == pytest.approx((1/areas).mean().item()/15, rel=1e-4) and outer == pytest.approx(1/areas[0].item()/3/15, rel=1e-4)


@pytest.mark.parametrize('wrong', [dict(masks=0), dict(masks=4), dict(feather=-1.), dict(whole=-1.)])
def test_mouth_pixel_refuses(wrong):
    with pytest.raises(ParamsError): MouthPixelLoss(**wrong)
    with pytest.raises(InputError, match='like the target'): MouthPixelLoss()(torch.zeros(2, 5, 3, 64, 64), make_batch())


# ---- (6-10, 23): the matrix

def vectors(n, m=None, dim=6, seed=0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=gen, dtype=dtype), torch.randn(m or n, dim, generator=gen, dtype=dtype)


@pytest.mark.parametrize('temperature', [.01, .07, .5])
@pytest.mark.parametrize('n', [1, 2, 9])
def test_diagonal_loss_is_cross_entropy_against_the_identity(n, temperature):
    v, a = vectors(n, dtype=torch.double); S = similarity_matrix(v, a)/temperature; own = torch.arange(n)
    want = (F.cross_entropy(S, own) + F.cross_entropy(S.T, own))/2
    torch.testing.assert_close(diagonal_loss(v, a, temperature), want); torch.testing.assert_close(diagonal_loss(a, v, temperature), want)
    p_rows, p_columns = S.exp()/S.exp().sum(1, keepdim=True), S.exp()/S.exp().sum(0, keepdim=True)      # (8), (9), (10) in the used form
    torch.testing.assert_close(diagonal_loss(v, a, temperature), -(p_rows.diag().log() + p_columns.diag().log()).mean()/2)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(diagonal_loss(v[order], a[order], temperature), want)


def test_diagonal_loss_by_hand():
    for n in (2, 8, 100):
        same, ideal = torch.ones(n, n), torch.eye(n)
        assert diagonal_loss(same, same).item() == pytest.approx(math.log(n), rel=1e-5)
        assert diagonal_loss(ideal, ideal, .5).item() == pytest.approx(math.log(1 + (n - 1)*math.exp(-2)), rel=1e-5)
        assert diagonal_loss(ideal, -ideal, .5).item() == pytest.approx(math.log(1 + (n - 1)*math.exp(2)), rel=1e-5)
    assert diagonal_loss(torch.ones(4, 3), torch.ones(10, 3)).item() == pytest.approx((math.log(10) + math.log(4))/2, rel=1e-6)


def test_further_negatives_count_for_rows_only():
    v, a = vectors(4, 9, dtype=torch.double); S = similarity_matrix(v, a)/.07; own = torch.arange(4)
    torch.testing.assert_close(diagonal_loss(v, a), (F.cross_entropy(S, own) + F.cross_entropy(S[:, :4].T, own))/2)
    assert diagonal_loss(v, a) > diagonal_loss(v, a[:4])
    with pytest.raises(InputError, match='as many audio as visual'): diagonal_loss(a, v)
    with pytest.raises(InputError, match='got 0 and 0'): diagonal_loss(v[:0], a[:0])
    with pytest.raises(InputError, match=r'expected visual \(N, D\)'): diagonal_loss(v, a[:, :3])


def test_ignored_pairs_are_not_there():
    v, a = vectors(5, dtype=torch.double); ignore = torch.zeros(5, 5, dtype=torch.bool); ignore[:4, 4] = ignore[4, :4] = True
    v.requires_grad_(); loss = diagonal_loss(v, a, ignore=ignore); loss.backward()
    torch.testing.assert_close(loss, diagonal_loss(v[:4], a[:4])*4/5)              # the last is alone with its partner, and costs 0
    assert torch.isfinite(v.grad).all() and v.grad[4].abs().max() < 1e-12


def test_diagonal_gradcheck():
    v, a = vectors(4, 7, dtype=torch.double); tau = torch.tensor(.2, dtype=torch.double); ignore = draw(4, 7) > .8; ignore[:, :4].fill_diagonal_(False)
    assert torch.autograd.gradcheck(lambda *x: diagonal_loss(*x, ignore), tuple(x.requires_grad_() for x in (v, a, tau)))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_diagonal_in_half_precision(dtype):
    "The matrix and its exponentials are float32, whatever comes in, inside of autocast too: at 0.01 half precision could not order near scores."
    v, a = (x.to(dtype) for x in vectors(6)); want = diagonal_loss(v.float(), a.float(), .01)
    with torch.autocast('cpu', torch.bfloat16): got = diagonal_loss(v, a, .01)
    assert got.dtype == torch.float32; torch.testing.assert_close(got, want)
    big = diagonal_loss(1e4*v.requires_grad_(), a); big.backward(); assert torch.isfinite(big) and torch.isfinite(v.grad).all()


# ---- which pairs are negatives

def test_near_pairs_brute_force():
    gen = np.random.default_rng(0); one, other = (torch.from_numpy(gen.integers(0, (3, 20), (n, 2))) for n in (12, 8))
    other[::4, 0] = NO_CLIP; audio = torch.cat([one, other])
    for least in (1, 5):
        found = near_pairs(one, audio, least)
        for i, (clip, frame) in enumerate(one.tolist()):
            for j, (c, f) in enumerate(audio.tolist()):
                assert found[i, j] == ((c == clip and abs(f - frame) < least and i != j) or c == NO_CLIP)


@pytest.mark.parametrize('frames', [1, 9, 14, 15, 40, 200])
@pytest.mark.parametrize('span', [1, 5])
def test_far_frames(frames, span):
    for start in range(0, max(1, frames - span + 1), 7):
        for count in (1, 4, 20):
            at = far_frames(frames, start, span, count); some = at[at >= 0]
            assert len(at) == count and at.dtype == np.int64 and len(set(some)) == len(some) and (np.sort(some) == some).all()
            assert all(p < frames and (p <= start - 5 or p >= start + span + 4) for p in some)
            allowed = sum(p <= start - 5 or p >= start + span + 4 for p in range(frames))
            assert len(some) == min(count, allowed) and (at[len(some):] == -1).all()


def test_further_sounds_are_those_of_the_clip():
    batch, clips = make_batch(3), store(3); batch.clip = torch.tensor([2, 0, 2])
    mels, where = further_sounds(clips, batch, 1, 4)
    assert mels.shape == (12, 80, 16) and where[:4, 0].tolist() == [2]*4
    for mel, (clip, frame) in zip(mels, where.tolist()): np.testing.assert_array_equal(mel, mel_window(clips[clip].mel, frame))
    mels, where = further_sounds(clips, batch, 5, 2, windows=frame_mels)
    for mel, (clip, frame) in zip(mels, where.tolist()): np.testing.assert_array_equal(mel, frame_mels(clips[clip].mel, [frame])[0])
    batch.start = torch.zeros(3, dtype=torch.int64)
    short, where = further_sounds([SimpleNamespace(mel=np.zeros((80, 20), np.float32))]*3, batch, 1, 2)       # too short for any
    assert (where[:, 0] == NO_CLIP).all() and torch.isfinite(short).all() and mel_frames(20) == 2


def test_moments():
    batch = make_batch()
    assert moments(batch, 2, 3).tolist() == [[0, 3], [0, 4], [0, 5], [1, 10], [1, 11], [1, 12]]
    unnamed = moments(SimpleNamespace(), 2, 2)
    assert unnamed[:, 0].tolist() == [-1, -1, -2, -2] and not near_pairs(unnamed, unnamed)[0, 2:].any() and near_pairs(unnamed, unnamed)[0, 1]


def test_who_speaks_is_not_enough():
    "Vectors that know the clip alone are good in a batch of clips, and at chance beside sounds of the same clip."
    who = torch.eye(6); where = torch.stack([torch.arange(6), torch.full((6,), 9)], 1)
    more, elsewhere = who.repeat_interleave(4, 0), torch.stack([torch.arange(6).repeat_interleave(4), torch.tensor([0, 20, 30, 40]*6)], 1)
    ignore = near_pairs(where, torch.cat([where, elsewhere]))
    assert diagonal_loss(who, who) < .01 and not ignore.any()
    assert diagonal_loss(who, torch.cat([who, more])).item() == pytest.approx(math.log(5)/2, abs=1e-3)


# ---- (6-10, 23): the term

def test_contrastive_parts_by_hand():
    toy, expert, batch = Toy(), frozen(SyncNet(.125)), make_batch()
    for p in expert.parameters(): p.data.mul_(1.5)
    toy(batch.target, batch); value = lambda **how: ContrastiveLoss(**how)(batch.target, batch).item()
    near = torch.block_diag(torch.ones(5, 5), torch.ones(5, 5)).bool() & ~torch.eye(10, dtype=torch.bool)   # frames of a window are near
    heads = diagonal_loss(toy.inner['visual'], toy.inner['audio'], ignore=near).item()
    seen = diagonal_loss(expert.embed_video(batch.target)[:, 0], expert.embed_audio(batch.mel_window)[:, 0]).item()
    assert value(generator=toy) == pytest.approx(heads, abs=1e-5) and value(expert=expert, heads=False) == pytest.approx(seen, abs=1e-5)
    assert value(generator=toy, expert=expert) == pytest.approx((heads + seen)/2, abs=1e-5)

    clips = store(); mels, _ = further_sounds(clips, batch, 1, 4)
    audio = torch.cat([expert.embed_audio(batch.mel_window), expert.embed_audio(mels)])[:, 0]
    hard = diagonal_loss(expert.embed_video(batch.target)[:, 0], audio).item()
    assert value(expert=expert, heads=False, clips=clips) == pytest.approx(hard, abs=1e-5) and hard > seen
    assert value(expert=expert, heads=False, clips=clips, negatives=0) == pytest.approx(seen, abs=1e-5)
    mels, _ = further_sounds(clips, batch, 5, 4, windows=frame_mels)
    audio = torch.cat([toy.inner['audio'], toy.embed_sounds(mels)]); ignore = torch.cat([near, torch.zeros(10, 8, dtype=torch.bool)], 1)
    assert value(generator=toy, clips=clips) == pytest.approx(diagonal_loss(toy.inner['visual'], audio, ignore=ignore).item(), abs=1e-5)


def test_windows_of_one_clip_that_overlap_are_not_negatives():
    batch, expert = make_batch(2), SyncNet(.125); term = ContrastiveLoss(expert=expert, heads=False)
    batch.clip = torch.zeros(2, dtype=torch.int64)
    for apart, alone in ((0, True), (4, True), (5, False)):
        batch.start = torch.tensor([10, 10 + apart]); loss = term(batch.target, batch).item()
        assert (loss == pytest.approx(0, abs=1e-6)) is alone


def test_longer_windows_have_a_row_for_every_five_frames():
    batch, expert = make_batch(2, frames=11), frozen(SyncNet(.125))
    v, a = expert.embed_video(batch.target), expert.embed_audio(batch.mel_window); assert v.shape[1] == 7
    where = moments(batch, 2, 7); want = diagonal_loss(v.flatten(0, 1), a.flatten(0, 1), ignore=near_pairs(where, where))
    torch.testing.assert_close(ContrastiveLoss(expert=expert, heads=False)(batch.target, batch), want, atol=1e-5, rtol=1e-5)


def test_pictures_that_follow_the_gradient_find_their_sound():
    "The diagonal of the expert's matrix rises, and the rest falls behind."
    torch.manual_seed(0); expert, batch = frozen(LightSyncNet(8, 16)), make_batch(4)
    for p in expert.parameters(): p.data.mul_(1.5)
    term = ContrastiveLoss(expert=expert, heads=False); picture = draw(4, 5, 3, 96, 96, seed=9)
    def lead(x):
        S = similarity_matrix(expert.embed_video(x)[:, 0], expert.embed_audio(batch.mel_window)[:, 0]).detach()
        return (S.diag().mean() - S[~torch.eye(4, dtype=torch.bool)].mean()).item()
    first, loss = lead(picture), term(picture, batch).item()
    for _ in range(15):
        picture.requires_grad_(); slope, = torch.autograd.grad(term(picture, batch), picture)
        picture = (picture - 4*slope/slope.norm()).detach().clamp(0, 1)
    assert lead(picture) > first + .02 and term(picture, batch) < loss


def test_temperature_learns_within_its_bounds_and_comes_back():
    warmth = Temperature(.07, (.01, .5), 2); assert warmth().tolist() == pytest.approx([.07, .07])
    warmth.log.data = torch.tensor([3., -9.]); assert warmth().tolist() == pytest.approx([.5, .01])
    (warmth()*torch.tensor([1., -1.])).sum().backward(); assert (warmth.log.grad != 0).all()          # no dead end at a bound
    torch.optim.SGD(warmth.parameters(), .1).step(); assert warmth()[0] < .5 and warmth()[1] > .01
    for start, bounds in ((.8, (.01, .5)), (.07, (0, .5)), (.07, (.5, .01))):
        with pytest.raises(ParamsError, match='temperature'): Temperature(start, bounds)


def test_the_temperatures_are_what_learns_of_the_term():
    toy, expert = Toy(), SyncNet(.125)
    counts = [len(ContrastiveLoss(**how).learnable.log) for how in (dict(generator=toy), dict(expert=expert, heads=False), dict(generator=toy, expert=expert))]
    assert counts == [1, 1, 2] and not any(p.requires_grad for p in expert.parameters()) and not expert.training
    term = ContrastiveLoss(toy, expert); assert sorted(term.modules) == ['expert', 'learnable']
    batch = make_batch(); toy(batch.target, batch); before = term(batch.target, batch)
    term.learnable.log.data.fill_(math.log(.5)); assert term(batch.target, batch) != before


@pytest.mark.parametrize('make, message', [
    (lambda: ContrastiveLoss(), 'pass generator='), (lambda: ContrastiveLoss(Toy(), heads=False), 'needs an expert'),
    (lambda: ContrastiveLoss(Toy(), negatives=-1), 'negatives'), (lambda: ContrastiveLoss(Toy(), min_offset=0), 'min_offset'),
    (lambda: ContrastiveLoss(Toy(), temperature=.9), 'temperature')])
def test_contrastive_refuses_settings(make, message):
    with pytest.raises(ParamsError, match=message): make()


def test_contrastive_refuses_batches():
    toy, expert, batch = Toy(), SyncNet(.125), make_batch(); sees = ContrastiveLoss(expert=expert, heads=False)
    with pytest.raises(InputError, match='hears mels'): ContrastiveLoss(expert=SyncNetV2(.0625), heads=False)
    with pytest.raises(InputError, match='contrastive reads visual, audio .* keeps nothing'): ContrastiveLoss(toy)(batch.target, batch)
    with pytest.raises(InputError, match='windows of 5 frames'): sees(batch.target[:, :4], batch)
    with pytest.raises(InputError, match='16 columns'): sees(draw(2, 7, 3, 96, 96), batch)
    with pytest.raises(InputError, match='without mel_window'): sees(batch.target, SimpleNamespace())
    named, nameless = ContrastiveLoss(expert=expert, clips=store(), heads=False), SimpleNamespace(mel_window=batch.mel_window)
    with pytest.raises(InputError, match='without clip, start'): named(batch.target, nameless)
    expert.train()
    with pytest.raises(InputError, match='evaluation mode'): sees(batch.target, batch)


def test_a_generator_without_embed_sounds_is_refused_further_sounds():
    toy = Toy(); kept = SimpleNamespace(inner=toy.inner)
    with pytest.raises(ParamsError, match='set negatives: 0'): ContrastiveLoss(kept, clips=store())
    assert ContrastiveLoss(kept, clips=store(), negatives=0)._clips is None


def test_partners_and_negatives_are_heard_in_one_call():
    "A batch norm in the encoder must not tell them apart."
    toy, batch, calls = Toy(), make_batch(), []; toy(batch.target, batch)
    toy.norm = nn.BatchNorm1d(8).train()
    def embed(mels): calls.append(len(mels)); return toy.norm(toy.heard(mels.flatten(1)))
    toy.embed_sounds = embed; ContrastiveLoss(toy, clips=store(), negatives=4)(batch.target, batch)
    assert calls == [2*5 + 2*4]


# ---- over processes

def test_gathered_alone_is_the_identity():
    x = draw(3, 2); assert gathered(x) is x


def half_of(batch, rank):
    return SimpleNamespace(**{k: v.chunk(2)[rank] for k, v in vars(batch).items()})


def contrastive_gradients(batch):
    "Loss, and gradients of the generator, the images and the temperatures."
    toy, expert = Toy(), LightSyncNet(8, 16)
    with torch.no_grad(): [p.copy_(torch.linspace(-1, 1, p.numel()).sin().view_as(p)*.3) for p in expert.parameters()]
    term = ContrastiveLoss(toy, expert, store(4)); output = batch.target.clone().requires_grad_()
    loss = term(toy(output, batch), batch); loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in toy.parameters() if p.grad is not None]), term.learnable.log.grad, output.grad


def test_two_processes_are_one(tmp_path):
    "Half of the windows in each of two processes: the loss is that of all, and averaged gradients are its gradient."
    script = tmp_path/'two.py'
    script.write_text(textwrap.dedent(f'''
        import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
        import torch, torch.distributed as dist, test_losses_g4g as t
        rank = int(sys.argv[1]); torch.set_num_threads(1)
        dist.init_process_group('gloo', init_method=f'file://{{sys.argv[2]}}', rank=rank, world_size=2)
        loss, weights, tau, images = t.contrastive_gradients(t.half_of(t.make_batch(4), rank))
        dist.all_reduce(weights); weights /= 2
        torch.save((loss, weights, tau, images/2), sys.argv[3] + str(rank))
        dist.destroy_process_group()
        '''))
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path), 'OMP_NUM_THREADS': '1'}
    runs = [subprocess.Popen([sys.executable, str(script), str(r), str(tmp_path/'group'), str(tmp_path/'found')], env=environment) for r in range(2)]
    want_loss, want_weights, want_tau, want_images = contrastive_gradients(make_batch(4))
    assert [r.wait(timeout=120) for r in runs] == [0, 0]
    found = [torch.load(f"{tmp_path/'found'}{r}") for r in range(2)]
    for loss, weights, tau, _ in found:
        torch.testing.assert_close(loss, want_loss); torch.testing.assert_close(tau, want_tau, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(weights, want_weights, rtol=1e-4, atol=1e-6)
    assert torch.equal(found[0][2], found[1][2])                                    # the temperatures do not drift apart
    torch.testing.assert_close(torch.cat([f[3] for f in found]), want_images, rtol=1e-4, atol=1e-7)
