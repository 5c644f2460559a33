"""Loss terms: closed-form values, gradients against finite differences, signs, half precision, refusals."""
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from talkingface.core import CheckpointError, InputError, MissingWeights, ParamsError
from talkingface.experts.avsyncnet import AVSyncNet
from talkingface.experts.base import WindowExpert, frozen
from talkingface.experts.features import FeatureNet
from talkingface.experts.syncnet import LightSyncNet, SyncNet, SyncNetV2
from talkingface.layers import parameter_count
from talkingface.losses.adversarial import AdversarialLoss, QualityDiscriminator, held
from talkingface.losses.objective import LOSSES, build_loss
from talkingface.losses.perceptual import VGG19_FILE, PerceptualLoss, VGG19Features, features_name, load_vgg19_features
from talkingface.losses.reconstruction import LossTerm, PixelLoss, check_loss, mouth_box, total_loss
from talkingface.losses.sync import (GapSyncLoss, PenaltySyncLoss, StabilizedSyncLoss, SyncLoss, identity_reference, minus_log,
                                     stabilized_sync)
from talkingface.losses.triplet import AdaptiveTripletLoss, TripletLoss

torch.set_num_threads(1)
G4G = ('attribute', 'perceptual_scales', 'ls_adversarial', 'mouth_pixel', 'contrastive')
TERMS = [name for name in LOSSES if not name.startswith('av_') and name not in G4G]     # test_av_loss.py and test_losses_g4g.py hold the others


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_batch(clips=2, frames=5, dtype=torch.float32):
    columns = int(80*(frames - 5)/25) + 16
    shape = (clips, frames, 3, 96, 96)
    return SimpleNamespace(target=draw(*shape, dtype=dtype), reference=draw(*shape, seed=2, dtype=dtype)**2,
                           mel_window=8*draw(clips, 80, columns, seed=1, dtype=dtype) - 4)


def make_term(name, **options):
    torch.manual_seed(0)
    if name == 'pixel': return PixelLoss(mouth_weight=2., **options)
    if name == 'adversarial': return AdversarialLoss(.125, **options)
    return LOSSES[name](SyncNet(.125) if 'sync' in name else FeatureNet(5, width=4), **options)


def lively(term):
    "Undo the shrinking of the default initialisation, so that logits and cosines move without training."
    for module in term.modules.values():
        for p in module.parameters(): p.data.mul_(1.5)
    return term


# ---- every term

@pytest.mark.parametrize('name', TERMS)
def test_contract(name): check_loss(make_term(name), make_batch())


@pytest.mark.parametrize('name', TERMS)
def test_gradcheck(name):
    "Gradient against finite differences in float64, through a coarse picture of 2x2 values a frame."
    term, batch = lively(make_term(name)), make_batch(1, dtype=torch.double)
    for module in term.modules.values(): module.double()
    coarse = draw(1, 5, 1, 2, 2, seed=3, dtype=torch.double).requires_grad_()
    faces = lambda x: F.interpolate(x[0], (96, 96), mode='nearest').expand(-1, 3, -1, -1)[None]
    assert torch.autograd.gradcheck(lambda x: term(faces(x), batch), coarse, eps=1e-7, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize('name', TERMS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(name, dtype):
    term, batch = make_term(name), make_batch()
    output = draw(2, 5, 3, 96, 96, seed=5)
    want = term(output, batch).item()
    half = output.to(dtype).requires_grad_()
    value = term(half, batch)
    value.backward()
    assert value.dtype == torch.float32 and abs(value.item() - want) < .02*max(1, want)
    assert torch.isfinite(half.grad).all()


@pytest.mark.parametrize('name', TERMS)
def test_autocast_is_finite(name):
    term, batch = make_term(name), make_batch()
    output = draw(2, 5, 3, 96, 96, seed=5).requires_grad_()
    with torch.autocast('cpu', torch.bfloat16): value = term(output, batch)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(output.grad).all()


@pytest.mark.parametrize('name', TERMS)
def test_a_step_down_the_gradient_lowers_the_loss(name):
    term, batch = lively(make_term(name)), make_batch()
    output = draw(2, 5, 3, 96, 96, seed=5).requires_grad_()
    value = term(output, batch)
    slope, = torch.autograd.grad(value, output)
    assert term(output - 1e-2*slope/slope.norm(), batch) < value


@pytest.mark.parametrize('name', TERMS)
def test_repr_and_names(name):
    term = make_term(name)
    assert term.name == name == LOSSES[name].name and type(term).__name__ in repr(term)
    assert term.to('cpu') is term


# ---- pixel

def test_pixel_closed_form_and_zero_at_the_target():
    batch = make_batch()
    assert PixelLoss(3.)(batch.target, batch) == 0
    assert PixelLoss()(batch.target + .2, batch).item() == pytest.approx(.2, rel=1e-5)
    assert PixelLoss(3.)(batch.target - .2, batch).item() == pytest.approx(.8, rel=1e-5)


def test_mouth_weight_counts_the_box_only():
    batch = make_batch(1)
    output = batch.target.clone()
    output[..., :56, :] += .5                               # wrong above the mouth only
    assert PixelLoss(9.)(output, batch) == PixelLoss(0.)(output, batch)
    assert mouth_box(torch.zeros(96, 96)).numel() == 32*48
    assert mouth_box(torch.zeros(192, 192)).numel() == 4*32*48


def test_pixel_refuses_other_shapes_and_negative_weight():
    with pytest.raises(InputError, match='like the target'): PixelLoss()(torch.zeros(2, 5, 3, 64, 64), make_batch())
    with pytest.raises(ParamsError, match='at least 0'): PixelLoss(-1.)


# ---- adversarial

def test_adversarial_is_cross_entropy_of_the_probability():
    term, batch = make_term('adversarial'), make_batch()
    real, fake = batch.target, draw(2, 5, 3, 96, 96, seed=7)
    with torch.no_grad():
        p_real, p_fake = (torch.sigmoid(term.discriminator(x)) for x in (real, fake))
        assert term(fake, batch).item() == pytest.approx(F.binary_cross_entropy(p_fake, torch.ones_like(p_fake)).item(), rel=1e-5)
        want = F.binary_cross_entropy(p_real, torch.ones_like(p_real)) + F.binary_cross_entropy(p_fake, torch.zeros_like(p_fake))
        assert term.discriminator_loss(real, fake).item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize('logit', [-60., 0., 60.])
def test_adversarial_does_not_saturate(logit):
    "Also where a probability rounds to 0 or 1, value and slope are those of softplus."
    term = AdversarialLoss(.125)
    for p in term.discriminator.binary_pred.parameters(): torch.nn.init.zeros_(p)
    term.discriminator.binary_pred[0].bias.data.fill_(logit)
    faces = draw(1, 1, 3, 96, 96)
    assert term(faces, None).item() == pytest.approx(math.log1p(math.exp(-logit)) if logit > -50 else -logit, abs=1e-5)
    loss = term.discriminator_loss(faces, faces)
    assert loss.item() == pytest.approx(abs(logit) if logit else 2*math.log(2), abs=1e-4)


def test_each_side_moves_its_own_network_only():
    term, batch = make_term('adversarial'), make_batch(1)
    output = draw(1, 5, 3, 96, 96, seed=7).requires_grad_()
    term(output, batch).backward()
    assert output.grad.abs().sum() > 0 and all(p.grad is None for p in term.discriminator.parameters())
    output.grad = None
    term.discriminator_loss(batch.target, output).backward()
    assert output.grad is None and all(p.grad is not None for p in term.discriminator.parameters())


def test_held_restores_and_respects_frozen_parameters():
    net = torch.nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match='inside'):
        with held(net): raise RuntimeError('inside')
    assert net.weight.requires_grad and not net.bias.requires_grad


def test_discriminator_sees_each_frame_alone():
    net, faces = QualityDiscriminator(.125), draw(2, 3, 3, 96, 96)
    one = torch.stack([net(faces[:, i:i + 1])[:, 0] for i in range(3)], 1)
    torch.testing.assert_close(net(faces), one, atol=1e-5, rtol=1e-4)
    assert parameter_count(QualityDiscriminator()) == 14_113_793
    with pytest.raises(InputError, match=r'expected faces \(B, T'): net(faces[0])


# ---- sync

class Fixed(torch.nn.Module):
    "An expert whose cosine is the mean of the picture."
    def embed_video(self, faces): return faces.mean((2, 3, 4))[:, 4:, None]
    def embed_audio(self, features): return torch.ones(len(features), 1 + (features.shape[-1] - 16)//3, 1)
    def similarity(self, v, a): return (v*a).sum(-1)


@pytest.mark.parametrize('cosine, value', [(1., 0.), (.5, math.log(2)), (.1, math.log(10)),
                                           (0., -math.log(1e-4)), (-1., -math.log(1e-4))])
def test_sync_closed_form(cosine, value):
    batch = make_batch(1)
    assert SyncLoss(Fixed())(torch.full_like(batch.target, cosine), batch).item() == pytest.approx(value, abs=1e-5)
    want = -math.log(max((1 + cosine)/2, 1e-4))
    assert SyncLoss(Fixed(), rescale=True)(torch.full_like(batch.target, cosine), batch).item() == pytest.approx(want, abs=1e-5)


def test_sync_gradient_is_one_over_the_cosine_and_dies_below_the_floor():
    batch, slopes = make_batch(1), {}
    for cosine in (.8, .2, -.3):
        for rescale in (False, True):
            output = torch.full_like(batch.target, cosine).requires_grad_()
            SyncLoss(Fixed(), rescale=rescale)(output, batch).backward()
            slopes[cosine, rescale] = output.grad.sum().item()
    assert slopes[.8, False] == pytest.approx(-1/.8, rel=1e-4) and slopes[.2, False] == pytest.approx(-5., rel=1e-4)
    assert slopes[-.3, False] == 0 and slopes[-.3, True] == pytest.approx(-1/.7, rel=1e-4)


def test_sync_equals_the_experts_cosine_on_every_window():
    expert, batch = frozen(SyncNet(.125)), make_batch(2, frames=8)
    term = SyncLoss(expert)
    one = lambda i, start: expert(batch.target[:, i:i + 5], batch.mel_window[..., start:start + 16])
    cosine = torch.cat([expert.similarity(*one(i, int(3.2*i))) for i in range(4)], 1)
    torch.testing.assert_close(term.similarity(batch.target, batch), cosine, atol=1e-5, rtol=1e-4)
    assert term(batch.target, batch).item() == pytest.approx(-cosine.log().mean().item(), rel=1e-4)


def test_sync_gradient_goes_through_the_picture_only():
    term, batch = make_term('sync'), make_batch(1)
    batch.mel_window.requires_grad_()
    output = draw(1, 5, 3, 96, 96, seed=7).requires_grad_()
    term(output, batch).backward()
    assert output.grad[..., 48:, :].abs().sum() > 0 and batch.mel_window.grad is None
    assert all(p.grad is None for p in term.expert.parameters())


def test_sync_refuses_unequal_lengths_training_mode_and_bad_floor():
    term, batch = SyncLoss(LightSyncNet(8, 16)), make_batch(1)
    with pytest.raises(InputError, match='7 frames have 3 positions'): term(draw(1, 7, 3, 96, 96), batch)
    term.expert.train()
    with pytest.raises(InputError, match='evaluation mode'): term(batch.target, batch)
    with pytest.raises(ParamsError, match='between 0 and 1'): SyncLoss(LightSyncNet(8, 16), floor=0.)


def test_the_expert_hears_mels():
    for name in LOSSES:
        if 'sync' in name:
            with pytest.raises(InputError, match=f'{LOSSES[name].__name__} needs an expert that hears mels'): LOSSES[name](SyncNetV2(.0625))


@pytest.mark.parametrize('name', [n for n in LOSSES if 'sync' in n])
def test_sync_losses_compute_in_float32_inside_autocast(name):
    "A half-precision region around the term changes neither its value nor its gradient."
    term, batch, output = lively(make_term(name)), make_batch(), draw(2, 5, 3, 96, 96, seed=5).requires_grad_()
    def both():
        value = term(output, batch)
        return value.detach(), torch.autograd.grad(value, output)[0]
    exact = both()
    with torch.autocast('cpu', torch.bfloat16): inside = both()
    assert all(torch.equal(a, b) for a, b in zip(exact, inside)) and inside[0].dtype == torch.float32


# ---- the sync-loss family, of three similarities

def level(value, clips=1): return torch.full((clips, 5, 3, 96, 96), float(value))


def case(y, d, raw=None, clips=1):
    batch = SimpleNamespace(target=level(y, clips), reference=level(d, clips), mel_window=torch.zeros(clips, 80, 16))
    if raw is not None: batch.raw_reference = level(raw, clips)
    return batch


@pytest.mark.parametrize('x, y, d, value', [(.5, .9, .2, .452), (.5, .9, .8, 1.609), (.5, .9, .89, 3.714), (.9, .9, .2, 0.)])
def test_stabilized_closed_form(x, y, d, value):
    "Worked out by hand; the formula as the paper writes it; function and term agree."
    formula = -math.log(1 - (abs(x - y) + 1e-6)/(abs(x - y) + abs(y - d) + 1e-6))
    exact = stabilized_sync(*(torch.tensor(v, dtype=torch.double) for v in (x, y, d)), floor=0.).item()
    assert exact == pytest.approx(value, abs=5e-4) and exact == pytest.approx(formula, abs=1e-9)
    assert StabilizedSyncLoss(Fixed(), floor=1e-3)(level(x), case(y, d)).item() == pytest.approx(value, abs=1e-3)


def test_stabilized_is_zero_at_the_truth_and_symmetric_around_it():
    y, d = draw(50, seed=1), draw(50, seed=2)
    assert stabilized_sync(y, y, d).max() <= 1e-6/1e-2 + 1e-7                       # eps over the floor
    gap = .3*draw(50, seed=3)
    torch.testing.assert_close(stabilized_sync(y + gap, y, d), stabilized_sync(y - gap, y, d), rtol=1e-4, atol=1e-4)
    assert (stabilized_sync(y + gap, y, d) >= 0).all()


def test_stabilized_grows_as_the_reference_nears_the_truth():
    x, y, d = torch.tensor(.4), torch.tensor(.7), torch.linspace(-.3, .69, 60)
    below, above = stabilized_sync(x, y, d), stabilized_sync(x, y, 1.4 - d)
    assert (below.diff() > 0).all()
    torch.testing.assert_close(below, above, rtol=1e-4, atol=1e-4)                  # from either side
    assert stabilized_sync(x, y, y).item() == pytest.approx(math.log((.3 + .01 + 1e-6)/.01), rel=1e-5)   # and stops at the floor
    farther = stabilized_sync(torch.linspace(.7, 0, 30), y, torch.tensor(.2))
    assert (farther.diff() > 0).all()


def test_stabilized_gradient_has_the_sign_of_the_gap_and_the_size_of_the_notes():
    x, y, d = (draw(200, seed=k, dtype=torch.double) for k in (1, 2, 3))
    x.requires_grad_(); y.requires_grad_(); d.requires_grad_()
    stabilized_sync(x, y, d).sum().backward()
    assert torch.equal(x.grad.sign(), (x - y).sign()) and y.grad is None and d.grad is None
    want = (x - y).sign()/((x - y).abs() + (y - d).abs().clamp_min(1e-2) + 1e-6)
    torch.testing.assert_close(x.grad, want.detach(), rtol=1e-9, atol=1e-9)
    assert x.grad.abs().max() <= 100                                                # 1 / floor


def test_stabilized_gradcheck():
    x, y, d = (draw(40, seed=k, dtype=torch.double) for k in (1, 2, 3))
    assert torch.autograd.gradcheck(lambda v: stabilized_sync(v, y, d), x.requires_grad_(), eps=1e-8, atol=1e-6, rtol=1e-5)
    assert torch.autograd.gradcheck(lambda v: stabilized_sync(v, y, y), x, eps=1e-8, atol=1e-5, rtol=1e-4)   # at the floor


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_stabilized_is_finite_everywhere(dtype):
    "Also at y = d, at x = y, at the ends of the range and below 0, in every precision."
    values = torch.tensor([-1., -.5, 0., 1e-7, .3, .5, .5 + 1e-3, 1. - 1e-3, 1.], dtype=dtype)
    x, y, d = (v.flatten() for v in torch.meshgrid(values, values, values, indexing='ij'))
    x = x.clone().requires_grad_()
    loss = stabilized_sync(x, y, d); loss.sum().backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32) and x.grad.dtype == dtype
    assert torch.isfinite(loss).all() and torch.isfinite(x.grad).all() and loss.max() <= math.log(2.01/.01) + 1e-2
    exact = stabilized_sync(*(v.detach().double() for v in (x, y, d)))
    torch.testing.assert_close(loss.detach().double(), exact, rtol=1e-4, atol=1e-4)


def test_stabilized_takes_any_expert():
    class Linear(WindowExpert):
        def __init__(self):
            super().__init__(); self.config = dict(name='linear')
            self.lips, self.sound = torch.nn.Linear(15*48*96, 8), torch.nn.Linear(80*16, 8)
        def encode_faces(self, windows): return self.lips(windows.flatten(1))
        def encode_mel(self, mels): return self.sound(mels.flatten(1))
    torch.manual_seed(0)
    batch, output = make_batch(), draw(2, 5, 3, 96, 96, seed=5)
    for expert in (SyncNet(.125), LightSyncNet(8, 16), LightSyncNet(8, 16, relu=True), AVSyncNet(width=.0625, dim=16, size=32), Linear()):
        term = StabilizedSyncLoss(expert, rescale=not expert.positive)
        check_loss(term, batch)
        with torch.no_grad(): x, y, d = (expert.similarity(*expert(f, batch.mel_window)) for f in (output, batch.target, batch.reference))
        if not expert.positive: x, y, d = ((1 + c)/2 for c in (x, y, d))
        want = torch.log((x - y).abs() + (y - d).abs().clamp_min(.01) + 1e-6) - torch.log((y - d).abs().clamp_min(.01))
        assert term(output, batch).item() == pytest.approx(want.mean().item(), abs=1e-3)
        assert term(batch.target, batch).item() == pytest.approx(0., abs=2e-3)


def test_the_reference_of_d_is_a_switch():
    "raw: as drawn, if the batch has it; silent: what the generator sees. Penalty and triplet losses have the same."
    loss = lambda kind, batch: StabilizedSyncLoss(Fixed(), reference=kind)(level(.5), batch).item()
    assert loss('raw', case(.9, .2, raw=.8)) == pytest.approx(1.609, abs=1e-3)
    assert loss('silent', case(.9, .2, raw=.8)) == pytest.approx(.452, abs=1e-3)
    assert loss('raw', case(.9, .2)) == loss('silent', case(.9, .2))
    none = case(.9, .2); none.raw_reference = None
    assert identity_reference(none) is none.reference and loss('raw', none) == loss('silent', none)
    of = lambda kind: PenaltySyncLoss(Fixed(), reference=kind)(level(.5), case(.6, .2, raw=.9)).item()
    assert of('raw') == pytest.approx(1.3*math.log(2), rel=1e-4) and of('silent') == pytest.approx(math.log(2), rel=1e-4)
    for make in (lambda: StabilizedSyncLoss(Fixed(), reference='closed'), lambda: PenaltySyncLoss(Fixed(), reference='closed'),
                 lambda: TripletLoss(reference='closed')):
        with pytest.raises(ParamsError, match='Known: raw, silent'): make()


def test_family_in_closed_form():
    x, y, d = .5, .7, .8
    value = lambda make, **options: make(Fixed(), **options)(level(x), case(y, d)).item()
    assert value(GapSyncLoss) == pytest.approx(.2, abs=1e-5) and value(GapSyncLoss, rescale=True) == pytest.approx(.1, abs=1e-5)
    assert value(PenaltySyncLoss) == pytest.approx(1.1*math.log(2), rel=1e-4)
    assert value(PenaltySyncLoss, weight=10.) == pytest.approx(2*math.log(2), rel=1e-4)
    assert value(PenaltySyncLoss, weight=0.) == pytest.approx(value(SyncLoss), rel=1e-6)
    assert value(StabilizedSyncLoss) == pytest.approx(math.log(3), rel=1e-4)
    assert value(StabilizedSyncLoss, rescale=True) == pytest.approx(math.log(3), rel=1e-3)      # a ratio: only the floor feels it
    assert minus_log(torch.tensor([1., -1.])).tolist() == pytest.approx([0., -math.log(1e-4)])


def test_only_the_plain_losses_pull_past_the_truth():
    for make, pulls in ((SyncLoss, True), (PenaltySyncLoss, True), (GapSyncLoss, False), (StabilizedSyncLoss, False)):
        output = level(.9).requires_grad_()
        make(Fixed())(output, case(.7, .2)).backward()
        assert (output.grad.sum() < 0) == pulls, make


def test_target_and_references_get_no_gradient_and_are_seen_at_once():
    calls, expert = [], SyncNet(.125)
    batch = make_batch(); batch.raw_reference = draw(2, 5, 3, 96, 96, seed=9)
    for v in vars(batch).values(): v.requires_grad_()
    embed = expert.embed_video; expert.embed_video = lambda faces: calls.append((len(faces), torch.is_grad_enabled())) or embed(faces)
    output = draw(2, 5, 3, 96, 96, seed=5).requires_grad_()
    StabilizedSyncLoss(expert)(output, batch).backward()
    assert output.grad.abs().sum() > 0 and all(v.grad is None for v in vars(batch).values())
    assert sorted(calls) == [(2, True), (4, False)]


def test_stabilized_scores_every_window_and_refuses_other_shapes():
    term, batch = StabilizedSyncLoss(SyncNet(.125)), make_batch(2, frames=8)
    output = draw(2, 8, 3, 96, 96, seed=5)
    x, y, d = term.similarities(output, batch, batch.target, batch.reference)
    assert x.shape == y.shape == d.shape == (2, 4)
    torch.testing.assert_close(d, term.similarity(batch.reference, batch), rtol=1e-4, atol=1e-5)
    assert term(output, batch).item() == pytest.approx(stabilized_sync(x, y, d).mean().item(), rel=1e-5)
    batch.reference = batch.reference[:, :5]
    with pytest.raises(InputError, match='target and reference like the output'): term(output, batch)


@pytest.mark.parametrize('options, words', [
    (dict(floor=0.), 'floor must lie'), (dict(floor=1.), 'floor must lie'), (dict(eps=-1.), 'eps must be')])
def test_stabilized_refuses_bad_guards(options, words):
    with pytest.raises(ParamsError, match=words): StabilizedSyncLoss(Fixed(), **options)


# ---- perceptual

def test_vgg_is_that_of_torchvision(tmp_path, monkeypatch):
    "Five maps equal to torchvision's network; its whole file is taken, another one or none is refused."
    from torchvision.models.vgg import cfgs, make_layers
    torch.manual_seed(0); net = torch.nn.Module(); net.features = make_layers(cfgs['E'])
    monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(tmp_path))
    with pytest.raises(MissingWeights, match=VGG19_FILE): load_vgg19_features()
    torch.save(net.state_dict() | {'classifier.6.bias': torch.zeros(1000)}, tmp_path/VGG19_FILE)
    vgg, faces = load_vgg19_features(), draw(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([.485, .456, .406], [.229, .224, .225]))
    with torch.no_grad():
        for found, end in zip(vgg.stages(faces), (2, 7, 12, 21, 30)):               # after relu1_1, ... relu5_1
            torch.testing.assert_close(found, net.features[:end]((faces - mean)/std), rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in vgg.parameters()) and not vgg.training
    assert 'vgg19 relu1_1..relu5_1 sha256:' in PerceptualLoss(vgg).protocol
    torch.save({k: v for k, v in net.state_dict().items() if k != 'features.28.bias'}, tmp_path/VGG19_FILE)
    with pytest.raises(CheckpointError, match='is not vgg19'): load_vgg19_features()


def test_perceptual_closed_form():
    "Maps of known size: the mean over stages does not depend on their sizes."
    class Two(torch.nn.Module):
        def stages(self, faces): return [faces, 3*faces[:, :1, ::2, ::2]]
    batch = make_batch()
    assert PerceptualLoss(Two())(batch.target + .1, batch).item() == pytest.approx((.1 + .3)/2, rel=1e-4)
    assert PerceptualLoss(Two())(batch.target, batch) == 0 and PerceptualLoss(Two()).protocol == 'Two'


def test_perceptual_says_which_features():
    net = FeatureNet(3, width=4)
    assert features_name(net) == 'feature_net of the corpus'
    net.meta = {'weights_sha256': 'abcdef0123456789'}
    assert PerceptualLoss(net).protocol == 'feature_net of the corpus sha256:abcdef01' and 'abcdef01' in repr(PerceptualLoss(net))
    with pytest.raises(InputError, match='needs a network with stages'): PerceptualLoss(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match='like the target'): PerceptualLoss(net)(draw(2, 3, 3, 96, 96), make_batch())
    with pytest.raises(InputError, match='floats in'): VGG19Features(1).stages(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ParamsError, match='1 to 5'): VGG19Features(6)


@pytest.mark.parametrize('name', ['perceptual', 'triplet', 'adaptive_triplet'])
def test_feature_terms_leave_the_network_and_the_batch_alone(name):
    term, batch = make_term(name), make_batch()
    for v in vars(batch).values(): v.requires_grad_()
    before = {k: v.clone() for k, v in term.features.state_dict().items()}
    output = draw(2, 5, 3, 96, 96, seed=5).requires_grad_()
    term(output, batch).backward()
    assert output.grad.abs().sum() > 0 and all(v.grad is None for v in vars(batch).values())
    assert all(p.grad is None for p in term.features.parameters())
    assert all(torch.equal(v, before[k]) for k, v in term.features.state_dict().items())


# ---- triplet

torch.manual_seed(0)
FEATURES = (None, FeatureNet(5, width=4))


@pytest.mark.parametrize('features', FEATURES, ids=['pixels', 'features'])
def test_adaptive_triplet_is_zero_at_the_target_and_where_the_reference_is_the_target(features):
    term, batch, other = AdaptiveTripletLoss(features), make_batch(), draw(2, 5, 3, 96, 96, seed=5)
    assert term(batch.target, batch).item() == pytest.approx(0., abs=1e-6) and term(other, batch) > .01
    near = lambda share: term(other, SimpleNamespace(target=batch.target, reference=batch.target.lerp(batch.reference, share))).item()
    values = [near(s) for s in (1., .3, .1, .03, 0.)]
    assert values == sorted(values, reverse=True) and values[-1] == pytest.approx(0., abs=1e-6) and values[3] < .15*values[0]
    fixed = TripletLoss(features)(other, SimpleNamespace(target=batch.target, reference=batch.target)).item()
    assert fixed == pytest.approx(.2, rel=1e-4)


@pytest.mark.parametrize('features', FEATURES, ids=['pixels', 'features'])
def test_adaptive_triplet_gradient_pulls_to_the_target_and_from_the_reference(features):
    term, batch = AdaptiveTripletLoss(features), make_batch()
    output = draw(2, 5, 3, 96, 96, seed=5).requires_grad_()
    slope, = torch.autograd.grad(term(output, batch), output)
    stepped = (output - .3*slope/slope.norm()).detach()
    away = lambda x, y: term.distance(term.seen(x), term.seen(y)).mean().item()
    nearer = [away(x, batch.target) - away(x, batch.reference) for x in (output.detach(), stepped)]
    assert away(stepped, batch.target) < away(output.detach(), batch.target) and nearer[1] < nearer[0]


@pytest.mark.parametrize('features', FEATURES, ids=['pixels', 'features'])
def test_triplet_distance_is_a_metric_and_values_follow(features):
    term = TripletLoss(features, margin=.1)
    a, b, c = (draw(2, 5, 3, 96, 96, seed=k)**k for k in (1, 2, 3))
    D = lambda x, y: term.distance(term.seen(x), term.seen(y))
    assert D(a, a).max() < 1e-6 and torch.allclose(D(a, b), D(b, a)) and (D(a, b) + D(b, c) >= D(a, c) - 1e-6).all()
    assert D(a, b).shape == (2,) and (D(a, b) <= 2**.5).all()
    batch = SimpleNamespace(target=b, reference=c)
    want = lambda margin: (D(a, b) - D(a, c) + margin).clamp_min(0).mean().item()
    assert term(a, batch).item() == pytest.approx(want(.1), abs=1e-5)
    for strength in (0., .5, 1., 2.):
        assert AdaptiveTripletLoss(features, strength)(a, batch).item() == pytest.approx(want(strength*D(b, c)), abs=1e-5)
    term, silent = (TripletLoss(features, margin=1.5, reference=kind) for kind in ('raw', 'silent'))
    drawn = SimpleNamespace(**vars(batch), raw_reference=a)
    assert term(b, drawn) == term(b, SimpleNamespace(target=b, reference=a)) != term(b, batch) == silent(b, drawn)


def test_triplet_with_vgg_and_refusals():
    torch.manual_seed(0)
    batch = SimpleNamespace(**{k: v[:1, :2, :, :32, :32] for k, v in vars(make_batch()).items() if k != 'mel_window'})
    assert check_loss(AdaptiveTripletLoss(VGG19Features(4)), batch) > 0
    with pytest.raises(ParamsError, match='has 2 stages'): TripletLoss(VGG19Features(2))(batch.target, batch)
    for make in (lambda: TripletLoss(margin=-1.), lambda: AdaptiveTripletLoss(strength=-1.)):
        with pytest.raises(ParamsError, match='at least 0'): make()
    shorter = SimpleNamespace(target=batch.target, reference=batch.target[:, :1])
    with pytest.raises(InputError, match='like the reference'): TripletLoss()(batch.target, shorter)


# ---- objective

def test_total_is_the_weighted_sum_and_skips_zero_weights():
    class Costly(LossTerm):
        name = 'costly'
        def __call__(self, output, batch): raise AssertionError('computed at weight 0')
    batch = make_batch(1)
    terms = {'pixel': PixelLoss(), 'sync': make_term('sync'), 'costly': Costly()}
    output = draw(1, 5, 3, 96, 96, seed=7).requires_grad_()
    total, logs = total_loss(terms, {'pixel': 10, 'sync': .3, 'costly': 0.}, output, batch)
    assert set(logs) == {'pixel', 'sync', 'total'} and not any(v.requires_grad for v in logs.values())
    assert total.item() == pytest.approx(10*logs['pixel'].item() + .3*logs['sync'].item(), rel=1e-6)
    total.backward()
    assert output.grad.abs().sum() > 0


@pytest.mark.parametrize('weights, message', [
    ({'pixl': 1.}, "did you mean 'pixel'"), ({'pixel': 0.}, 'at least one weight'), ({}, 'at least one')])
def test_bad_objective(weights, message):
    batch = make_batch(1)
    with pytest.raises(ParamsError, match=message): total_loss({'pixel': PixelLoss()}, weights, batch.target, batch)


def test_build_loss():
    assert build_loss('pixel', mouth_weight=1.5).mouth_weight == 1.5
    with pytest.raises(ParamsError, match="did you mean 'adversarial'"): build_loss('adverserial')
    with pytest.raises(ParamsError, match="did you mean 'rescale'"): build_loss('sync', expert=Fixed(), rescaled=True)
    with pytest.raises(ParamsError, match='stabilized_sync: expected expert'): build_loss('stabilized_sync')
    with pytest.raises(ParamsError, match='perceptual: expected features'): build_loss('perceptual')
    assert build_loss('adaptive_triplet').protocol == 'pixels'


def test_objective_of_the_paper():
    weights = dict(adversarial=1, pixel=10, perceptual=1, stabilized_sync=2, adaptive_triplet=.5)
    terms, batch, output = {name: make_term(name) for name in weights}, make_batch(), draw(2, 5, 3, 96, 96, seed=5).requires_grad_()
    total, logs = total_loss(terms, weights, output, batch)
    assert set(LOSSES) == {*weights, 'sync', 'gap_sync', 'penalty_sync', 'triplet', 'av_unsupervised', 'av_visual', 'av_multimodal', *G4G}
    assert total.item() == pytest.approx(sum(w*logs[name].item() for name, w in weights.items()), rel=1e-5)
    total.backward(); assert torch.isfinite(output.grad).all()
