"""Loss terms: closed-form values, gradients against finite differences, signs, half precision, refusals."""
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from talkingface.core import InputError, ParamsError
from talkingface.experts.base import frozen
from talkingface.experts.syncnet import LightSyncNet, SyncNet
from talkingface.layers import parameter_count
from talkingface.losses.adversarial import AdversarialLoss, QualityDiscriminator, held
from talkingface.losses.reconstruction import LossTerm, PixelLoss, check_loss, mouth_box, total_loss
from talkingface.losses.sync import LOSSES, SyncLoss, build_loss

torch.set_num_threads(1)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_batch(clips=2, frames=5, dtype=torch.float32):
    columns = int(80*(frames - 5)/25) + 16
    return SimpleNamespace(target=draw(clips, frames, 3, 96, 96, dtype=dtype),
                           mel_window=8*draw(clips, 80, columns, seed=1, dtype=dtype) - 4)


def make_term(name, **options):
    torch.manual_seed(0)
    return {'pixel': lambda: PixelLoss(mouth_weight=2., **options), 'adversarial': lambda: AdversarialLoss(.125, **options),
            'sync': lambda: SyncLoss(SyncNet(.125), **options)}[name]()


def lively(term):
    "Undo the shrinking of the default initialisation, so that logits and cosines move without training."
    for module in term.modules.values():
        for p in module.parameters(): p.data.mul_(1.5)
    return term


# ---- every term

@pytest.mark.parametrize('name', LOSSES)
def test_contract(name): check_loss(make_term(name), make_batch())


@pytest.mark.parametrize('name', LOSSES)
def test_gradcheck(name):
    "Gradient against finite differences in float64, through a coarse picture of 4x3 values a frame."
    term, batch = lively(make_term(name)), make_batch(1, dtype=torch.double)
    for module in term.modules.values(): module.double()
    coarse = draw(1, 5, 1, 4, 3, seed=3, dtype=torch.double).requires_grad_()
    faces = lambda x: F.interpolate(x[0], (96, 96), mode='nearest').expand(-1, 3, -1, -1)[None]
    assert torch.autograd.gradcheck(lambda x: term(faces(x), batch), coarse, eps=1e-7, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize('name', LOSSES)
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


@pytest.mark.parametrize('name', LOSSES)
def test_autocast_is_finite(name):
    term, batch = make_term(name), make_batch()
    output = draw(2, 5, 3, 96, 96, seed=5).requires_grad_()
    with torch.autocast('cpu', torch.bfloat16): value = term(output, batch)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(output.grad).all()


@pytest.mark.parametrize('name', LOSSES)
def test_a_step_down_the_gradient_lowers_the_loss(name):
    term, batch = lively(make_term(name)), make_batch()
    output = draw(2, 5, 3, 96, 96, seed=5).requires_grad_()
    value = term(output, batch)
    slope, = torch.autograd.grad(value, output)
    assert term(output - 1e-2*slope/slope.norm(), batch) < value


@pytest.mark.parametrize('name', LOSSES)
def test_repr_and_names(name):
    term = make_term(name)
    assert term.name == name and LOSSES[name].name == name and type(term).__name__ in repr(term)
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
