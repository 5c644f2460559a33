"""DINet's layout and its AdaAT against the published ones, and G4G: geometry, what it hides, what it keeps, its switches."""
import dataclasses
import math

import numpy as np
import pytest
import torch

from goldens import compare, det_array, det_state, load_golden, load_manifest
from test_checkpoints import NESTINGS, generated
from talkingface.core import CheckpointError, InputError, MissingWeights, ParamsError
from talkingface.experts.syncnet import SyncNet
from talkingface.generators.base import check_generator, random_batch
from talkingface.generators.dinet import (MODES, AdaAT, DINet, crop_shape, deform_exact, deform_published, load_dinet, resized,
                                          sampling_grid, visible_crop)


# ---- the adaptive affine transformation ---------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def golden(): return load_golden('dinet_adaat')


@pytest.fixture(scope='module')
def adaat(golden):
    layer = AdaAT(24, 16, 'published')
    layer.load_state_dict(det_state(golden), strict=True)
    return layer


def outputs(layer, golden) -> dict:
    features, code = (torch.from_numpy(golden.inputs[k]) for k in ('feature_map', 'para_code'))
    scale, angle, shift = layer.coefficients(code)
    same = torch.ones_like(scale), torch.zeros_like(angle), torch.zeros_like(shift)
    flat = sampling_grid(scale, angle, shift, *features.shape[-2:])
    channel = torch.linspace(-1, 1, 16)[None, :, None, None, None].expand(*flat.shape[:-1], 1)
    return dict(out=layer(features, code), out_align_corners_true=deform_published(features, scale, angle, shift, align_corners=True),
                scale=scale, angle=angle, translation=shift, grid=torch.cat([flat, channel], -1),
                identity=deform_published(features, *same),
                identity_align_corners_true=deform_published(features, *same, align_corners=True))


@torch.no_grad()
def test_published_adaat(golden, adaat):
    found = outputs(adaat, golden)
    scale = found['scale']
    if golden.outputs['scale'].ndim == 3: found['scale'], found['angle'] = scale[..., None], found['angle'][..., None]
    worst = compare(golden, found)
    print(worst)
    assert len(worst) == len(golden.outputs) == 8


@torch.no_grad()
@pytest.mark.parametrize('broken', ['exact', 'align corners', 'bound of pi', 'translation.0.bias', 'commn_linear.0.weight'])
def test_the_golden_of_adaat_notices(golden, broken):
    "A wrong convention, an angle bound of pi instead of 3.14159, or 5 % on one tensor, fails it."
    layer, state = AdaAT(24, 16, 'exact' if broken in ('exact', 'bound of pi') else 'published'), det_state(golden)
    if broken in state: state[broken] = state[broken]*1.05
    layer.load_state_dict(state)
    features, code = (torch.from_numpy(golden.inputs[k]) for k in ('feature_map', 'para_code'))
    params = layer.coefficients(code)
    got = {'align corners': lambda: deform_published(features, *params, align_corners=True),
           'bound of pi': lambda: deform_published(features, *params)}.get(broken, lambda: layer(features, code))()
    with pytest.raises(AssertionError, match='out differs'): compare(golden, dict(out=got), only=('out',))


@torch.no_grad()
def test_exact_is_published_where_channels_cannot_mix(golden, adaat):
    "With align_corners=True the third coordinate of each channel is its own number, and both samplings are one."
    features, code = (torch.from_numpy(golden.inputs[k]) for k in ('feature_map', 'para_code'))
    flat = deform_exact(features, *adaat.coefficients(code))
    compare(golden, dict(out_align_corners_true=flat), only=('out_align_corners_true',), atol=1e-4)


@pytest.mark.parametrize('height, width', [(26, 20), (52, 40), (104, 80), (9, 13), (64, 64)])
def test_identity_is_exact_bit_for_bit(height, width):
    features = torch.randn(2, 6, height, width)
    params = torch.ones(2, 6), torch.zeros(2, 6), torch.zeros(2, 6, 2)
    assert torch.equal(deform_exact(features, *params), features)
    assert not torch.allclose(deform_published(features, *params), features, atol=1e-2)
    layer = AdaAT(8, 6, 'exact')
    for p in layer.parameters(): torch.nn.init.zeros_(p)
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(layer(features, torch.randn(2, 8)), features)


def test_a_translation_by_whole_pixels_shifts_and_brings_in_zeros():
    features = torch.randn(1, 2, 11, 9)
    shift = torch.tensor([[[2/4, 0.], [0., -3/5]]])          # half a width is 4 px, half a height 5 px
    moved = deform_exact(features, torch.ones(1, 2), torch.zeros(1, 2), shift)
    expected = torch.zeros_like(features)
    expected[:, 0, :, :7], expected[:, 1, 3:] = features[:, 0, :, 2:], features[:, 1, :8]
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-5)


def test_a_half_turn_and_both_gradients():
    features = torch.randn(1, 3, 8, 6, dtype=torch.float64)
    turned = deform_exact(features, torch.ones(1, 3), torch.full((1, 3), math.pi), torch.zeros(1, 3, 2))
    torch.testing.assert_close(turned.double(), features.flip(-1, -2), atol=1e-5, rtol=1e-5)
    for mode in MODES:
        layer, maps = AdaAT(8, 3, mode), torch.randn(2, 3, 8, 6, requires_grad=True)
        layer(maps, torch.randn(2, 8)).square().sum().backward()
        assert all(p.grad.abs().max() > 0 for p in layer.parameters()) and maps.grad.abs().max() > 0


def test_channels_last_and_half_precision_change_nothing_but_rounding():
    features, params = torch.randn(2, 8, 26, 20), (torch.rand(2, 8) + .5, torch.randn(2, 8), .3*torch.randn(2, 8, 2))
    for deform in (deform_exact, deform_published):
        full = deform(features, *params)
        assert torch.equal(full, deform(features.contiguous(memory_format=torch.channels_last), *params))
        assert (deform(features.bfloat16(), *params) - full).abs().max() < .05 and full.dtype == torch.float32


# ---- DINet --------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def published(): return generated(load_manifest('dinet_generator'))


LOGITS = dict(audio_channels=29, audio_steps=5)


def test_names_and_shapes_of_dinet_are_the_published_ones():
    with torch.device('meta'): own = DINet(**LOGITS).state_dict()
    assert {k: tuple(v.shape) for k, v in own.items()} == load_manifest('dinet_generator')


def test_the_published_file_of_dinet_loads_strictly_from_the_weights_folder(tmp_path, monkeypatch, published):
    wrapped = {f'module.{k}': v for k, v in published.items()}
    torch.save({'epoch': 3, 'state_dict': {'net_g': wrapped, 'net_dI': {'module.x': torch.zeros(1)}}, 'optimizer': {'net_g': {}}},
               tmp_path/'clip_training_DINet_256mouth.pth')
    monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(tmp_path))
    generator = load_dinet(); own = generator.state_dict()
    assert own.keys() == published.keys() and all(torch.equal(own[k], published[k]) for k in own)
    assert not generator.training and generator.adaAT.mode == 'published' and generator.crop == (416, 320)
    assert generator.hears == 'speech' and generator.stills == 5 and 'reserved' in generator.meta['licence']


@pytest.mark.parametrize('change, message', [
    (lambda w: {k: v for k, v in w.items() if k != 'adaAT.rotation.0.bias'}, 'lacks 1 of .*adaAT.rotation'),
    (lambda w: {**w, 'extra.weight': torch.zeros(1)}, 'unexpected keys .*extra.weight'),
    (lambda w: {**w, 'out_conv.4.bias': torch.full((3,), torch.nan)}, 'NaN or infinity'),
    (lambda w: SyncNet(width=.125).state_dict(), 'is SyncNet of Wav2Lip, not the generator of DINet'),
    (lambda w: {'a': torch.zeros(1)}, 'no architecture that is known here')])
def test_another_file_is_refused_in_words(tmp_path, change, message):
    torch.save({'state_dict': {'net_g': change(DINet(width=.125, **LOGITS).state_dict())}}, tmp_path/'dinet.pth')
    with pytest.raises(CheckpointError, match=message): load_dinet(tmp_path/'dinet.pth')


def test_missing_weights_of_dinet_name_the_file_and_its_terms(tmp_path, monkeypatch):
    monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(tmp_path))
    with pytest.raises(MissingWeights, match=r'clip_training_DINet_256mouth\.pth in .*reserved') as error: load_dinet()
    assert str(tmp_path) in str(error.value)


@torch.no_grad()
def test_the_forward_pass_of_dinet(published):
    "Written out once more from the description, on plain tensors, at a quarter of the size."
    net = DINet(scale=.25, **LOGITS).eval(); net.load_state_dict(published)
    source, stills, sound = torch.rand(2, 3, 104, 80), torch.rand(2, 15, 104, 80), torch.randn(2, 29, 5)
    seen, shown = net.source_in_conv(source), net.ref_in_conv(stills)
    assert seen.shape == shown.shape == (2, 256, 26, 20)
    code = torch.cat([net.trans_conv(torch.cat([seen, shown], 1)).mean((2, 3)), net.audio_encoder(sound).mean(2)], 1)
    moved = net.appearance_conv_list[1](net.adaAT(net.appearance_conv_list[0](shown), code))
    torch.testing.assert_close(net.paint(source, stills, sound), net.out_conv(torch.cat([seen, moved], 1)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('options', [dict(), dict(adaat='exact'), LOGITS])
def test_the_contract_of_dinet(options): check_generator(DINet(width=.125, scale=.25, **options))


def test_dinet_sees_no_lower_half_and_all_stills():
    net, batch = DINet(width=.125, scale=.25).eval(), random_batch(96, 1, 2)
    drawn = net(batch)
    changed = dataclasses.replace(batch, masked=batch.masked + torch.cat([torch.zeros(48, 96), torch.rand(48, 96)]))
    assert torch.equal(net(changed), drawn)
    for i in range(5):
        other = batch.stills.clone(); other[:, i] = 1 - other[:, i]
        assert (net(dataclasses.replace(batch, stills=other)) - drawn).abs().max() > 1e-5


# ---- the crop -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('scale, message', [(.3, 'multiples of 8 px'), (0, 'multiples of 8'), (-.5, 'multiples of 8')])
def test_an_odd_crop_is_refused(scale, message):
    with pytest.raises(ParamsError, match=message): crop_shape(scale)


@pytest.mark.parametrize('scale', [1, .5, .25])
def test_nothing_of_the_hidden_half_reaches_the_crop(scale):
    faces = torch.rand(1, 3, 96, 96); faces[:, :, 48:] = torch.nan
    assert visible_crop(faces, *crop_shape(scale)).isfinite().all()


def test_resizing_to_the_same_size_changes_nothing():
    x = torch.rand(2, 3, 3, 24, 24)
    torch.testing.assert_close(resized(x, 24, 24), x); assert resized(x, 12, 20).shape == (2, 3, 3, 12, 20)
