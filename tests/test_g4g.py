"""DINet's layout and its AdaAT against the published ones, and G4G: geometry, what it hides, what it keeps, its switches."""
import dataclasses
import math
import os
import subprocess
import sys
import textwrap
from copy import deepcopy

import pytest
import torch

from goldens import compare, det_state, load_golden, load_manifest
from test_checkpoints import generated
from talkingface.core import CheckpointError, InputError, MissingWeights, ParamsError
from talkingface.experts.checkpoints import KNOWN_FILES, weights_table
from talkingface.experts.syncnet import SyncNet
from talkingface.generators.base import build_generator, check_generator, random_batch
from talkingface.generators.dinet import (DINET_FILE, MODES, AdaAT, DINet, crop_shape, deform_exact, deform_published, load_dinet, resized,
                                          sampling_grid, visible_crop)
from talkingface.generators.g4g import (G4G, AdaIN, BlendNet, _kept, _layout, bend, hidden_regions, landmark_sketch, smooth, softened)
from talkingface.layers import scaled
from talkingface.losses.g4g import ContrastiveLoss, AttributeLoss, MouthPixelLoss, mouth_masks


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


def test_the_file_of_dinet_is_among_the_known_ones(tmp_path, monkeypatch):
    "With its terms and origin; its size is that of the weights, and a file of that name is found and read."
    monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(tmp_path)); name = 'clip_training_DINet_256mouth.pth'
    with torch.device('meta'): whole = DINet(**LOGITS).state_dict()
    assert DINET_FILE in KNOWN_FILES and DINET_FILE.name == name and 'MRzzm/DINet' in DINET_FILE.source
    assert DINET_FILE.megabytes == round(sum(v.nbytes for v in whole.values())/1e6)
    net = DINet(width=.125, **LOGITS).eval(); torch.save({'state_dict': {'net_g': net.state_dict()}}, tmp_path/name)
    row = next(row for row in weights_table() if row['name'] == name); loaded = load_dinet(size=96, scale=.25)
    assert row['present'] and row['sha256'] == loaded.meta['sha256'] and row['licence'] == loaded.meta['licence']
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in loaded.state_dict().items())


@torch.no_grad()
def test_drawing_with_dinet_is_its_parts_in_order(published):
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


# ---- G4G: landmarks as a picture ----------------------------------------------------------------------------------------
def face(seed: int = 0) -> torch.Tensor: return 96*torch.rand(3, 68, 2, generator=torch.Generator().manual_seed(seed))


def test_the_ink_of_a_sketch_is_the_length_of_its_lines():
    "Far lines only: where two cross, a pixel cannot be more than full."
    points = torch.zeros(1, 68, 2); points[:, :17, 0], points[:, :17, 1] = torch.linspace(10, 80, 17), torch.linspace(20, 60, 17)
    points[:, 17:] = points[:, 16:17]
    length = (points[0, 16] - points[0, 0]).norm()
    assert abs(landmark_sketch(points, 96).sum() - length) < .01*length


def test_a_sketch_is_drawn_where_the_points_are_and_moves_with_them():
    sketch = landmark_sketch(face(), 96)
    assert sketch.shape == (3, 1, 96, 96) and sketch.min() >= 0 and sketch.max() <= 1
    small = 20 + .3*face()
    moved = landmark_sketch(small + torch.tensor([7., -4.]), 96)
    torch.testing.assert_close(moved[..., :90, 8:], landmark_sketch(small, 96).roll((-4, 7), (2, 3))[..., :90, 8:], atol=1e-3, rtol=0)
    with pytest.raises(InputError, match='68'): landmark_sketch(torch.zeros(1, 5, 2), 96)


@pytest.mark.parametrize('size', [(104, 80), (416, 320)])
def test_lines_have_no_gaps_at_any_size(size):
    "A jaw across the whole crop: every column between its ends holds ink."
    points = torch.zeros(1, 68, 2); points[:, :17, 0] = torch.linspace(2, size[1] - 3, 17); points[:, :17, 1] = size[0]/2 + 5*torch.sin(torch.arange(17.))
    points[:, 17:] = points[:, :1]
    ink = landmark_sketch(points, size)[0, 0].sum(0)[3:size[1] - 3]
    assert ink.min() > .9


def test_points_outside_the_crop_are_left_out():
    assert landmark_sketch(torch.full((1, 68, 2), -50.) + face()[:1]/10, 96).sum() == 0
    assert landmark_sketch(face()[:1]*4 - 100, 96).isfinite().all()


# ---- blocks -------------------------------------------------------------------------------------------------------------
def test_bend_is_a_relu_with_its_corner_at_minus_one():
    x = torch.linspace(-3, 3, 50)
    torch.testing.assert_close(bend(x), (x + 1).relu() - 1)


def test_adain_has_the_moments_that_the_landmarks_ask_for_and_forgets_those_of_the_map():
    layer, x, condition = AdaIN(4, 6), torch.randn(2, 6, 5, 7), torch.randn(2, 4)
    torch.nn.init.normal_(layer.to_style.weight)
    torch.testing.assert_close(layer(x, condition), layer(5*x + 3, condition), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(layer(x, condition), layer(x, condition.flip(0)))


@torch.no_grad()
def test_an_untrained_blend_net_gives_back_the_composite_and_paints_all_but_what_alternates():
    net, picture = BlendNet(16), torch.rand(2, 3, 24, 24)
    assert (net(picture, torch.ones(2, 1, 24, 24)) - picture).square().mean().sqrt() < .04
    for p in net.parameters(): p.zero_()
    left = net(picture, torch.ones(2, 1, 24, 24)) - .5                   # what of its input passes beside its weights
    torch.testing.assert_close(left, picture - smooth(picture)); assert smooth(left).abs().mean() < .3*picture.std()


@torch.no_grad()
def test_no_weights_make_a_pattern_that_alternates_from_pixel_to_pixel():
    net, flat = BlendNet(16), torch.full((1, 3, 24, 24), .5)
    net.outward.bias.copy_(torch.tensor([1., -1, -1, 1]).repeat(3))      # the order of pixel_shuffle: a checkerboard
    assert (net(flat, torch.ones(1, 1, 24, 24))[..., 2:-2, 2:-2].diff(dim=-1).abs() < .05).all()


# ---- what is hidden -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('height, width', [(104, 80), (208, 160), (96, 96), (416, 320)])
def test_hidden_regions_hold_the_lower_half_and_their_box(height, width):
    regions, boxes = hidden_regions(height, width), mouth_masks(height, width, 3, feather=0.)
    assert regions.shape == (3, 1, height, width) and (regions[:, :, height//2:] == 1).all()
    assert (regions >= boxes).all() and (regions[0] >= regions[1]).all() and (regions[0] > regions[1]).any()
    assert torch.equal(regions[1], regions[2])                          # the smaller boxes lie within the lower half
    masks = softened(regions, max(1, round(.03*height)))
    assert (masks[regions > 0] > 1 - 1e-5).all() and masks.max() <= 1 and masks[:, :, :height//3].max() == 0
    falling = masks[0, 0, :height//2, width//2].diff()
    assert falling.min() > -1e-6 and falling.max() < .35        # rises towards the mouth, in no step that would be seen as an edge


SMALL = dict(size=96, scale=.25, width=.125, blocks=1)


def known(groups: int, frames: int = 1) -> object:
    return dataclasses.replace(random_batch(96, groups, frames), clip=torch.arange(groups)*3, start=torch.arange(groups)*2)


def test_the_hidden_box_is_a_function_of_clip_and_start():
    net, batch = G4G(**SMALL).train(), known(60)
    boxes = net._box(batch)
    assert set(boxes.tolist()) == {0, 1, 2} and torch.equal(boxes, net._box(batch)) and torch.equal(boxes[20:30], net._box(batch[20:30]))
    assert not net._box(random_batch(96, 4, 1)).any() and not net.eval()._box(batch).any()
    assert not G4G(**SMALL, masks=1).train()._box(batch).any()


# ---- the generator ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('options', [dict(), dict(align=False), dict(masks=1), dict(blend=False), dict(adaat='published'),
                                     dict(align=False, masks=1, blend=False), dict(size=128), dict(width=.0625), dict(blocks=2),
                                     dict(audio={'name': 'wav2vec2'})])
def test_the_contract_of_g4g(options): check_generator(G4G(**{**SMALL, **options}))


def test_g4g_hears_the_frozen_tower_of_an_expert():
    expert = SyncNet(width=.125)
    net = G4G(**SMALL, audio=expert.config).load_audio(expert)
    check_generator(net)
    assert not any(p.requires_grad for p in net.audio_encoder.parameters())


@torch.no_grad()
def test_nothing_of_the_hidden_half_is_seen():
    net, batch = G4G(**SMALL).eval(), random_batch(96, 1, 2)
    drawn = net(batch)
    other = dataclasses.replace(batch, masked=batch.masked + torch.cat([torch.zeros(48, 96), torch.rand(48, 96)]))
    torch.testing.assert_close(net(other), drawn, atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_visible_half_is_kept_by_the_composite_bit_for_bit():
    net, batch = G4G(**SMALL, blend=False).eval(), random_batch(96, 2, 2)
    assert torch.equal(net(batch)[..., :36, :], batch.masked[..., :36, :])


@torch.no_grad()
def test_all_inputs_matter_and_target_landmarks_do_not():
    net = G4G(**SMALL); batch = random_batch(96, 1, 2)
    torch.nn.init.normal_(net.alignment.norm.to_style.weight, std=.3)
    for p in (net.adaat.scale[0].weight, net.adaat.translation[0].weight): p.mul_(30)
    net.eval(); drawn = net(batch)
    for field in ('masked', 'stills', 'still_landmarks', 'mel'):
        changed = dataclasses.replace(batch, **{field: getattr(batch, field)*.5})
        assert (net(changed) - drawn).abs().max() > 1e-4, field
    for field in ('landmarks', 'target', 'reference', 'raw_reference', 'mel_window'):
        assert torch.equal(net(dataclasses.replace(batch, **{field: getattr(batch, field)*.5})), drawn), field
    last = batch.still_landmarks.clone(); last[:, 1:] = 0        # only the first still's are drawn
    assert torch.equal(net(dataclasses.replace(batch, still_landmarks=last)), drawn)


@torch.no_grad()
def test_a_group_is_drawn_as_its_frames_are():
    net, batch = G4G(**SMALL).eval(), random_batch(96, 2, 3)
    frame = lambda i: dataclasses.replace(batch, **{k: getattr(batch, k)[:, i:i + 1] for k in batch.present()
                                                    if k not in ('stills', 'still_landmarks', 'mel_window', 'clip', 'start')})
    together = net(batch)
    for i in range(3): torch.testing.assert_close(net(frame(i)), together[:, i:i + 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('width', [1., .25, .1875, .125, .0625])
def test_an_untrained_network_shows_the_mean_of_the_stills(width):
    torch.manual_seed(0)
    blocks = torch.rand(1, 5, 3, 12, 12).repeat_interleave(8, -1).repeat_interleave(8, -2)
    net, batch = G4G(**{**SMALL, 'width': width}).eval(), dataclasses.replace(random_batch(96, 1, 1), stills=blocks)
    with torch.no_grad(): drawn = net(batch)
    stills = list(_kept(scaled(128, width), scaled(256, width))[0])
    mean = blocks[:, stills].mean(1)
    assert torch.corrcoef(torch.stack([net.inner['decoded'].flatten(), mean.flatten()]))[0, 1] > .75
    assert (drawn[0, ..., :36, :] - batch.masked[0, ..., :36, :]).square().mean().sqrt() < .05


def test_the_copies_fit_into_their_channels():
    for width in (1., .5, .375, .25, .1875, .125, .0625, .03):
        middle, wide = scaled(128, width), scaled(256, width); stills, luma, chroma = _kept(middle, wide)
        layout = _layout(luma, chroma)
        assert len(stills)*sum(len(to) for _, to in layout) <= wide and len(stills)*len(layout) <= middle
        assert sorted(c for _, to in layout for c in to) == list(range(luma**2 + 2*chroma**2))
    assert _kept(128, 256) == (tuple(range(5)), 4, 4)


@torch.no_grad()
def test_brightness_is_copied_at_full_size_where_colour_is_not():
    torch.manual_seed(0)
    grey, coloured = torch.rand(1, 1, 1, 104, 80).expand(1, 5, 3, 104, 80), torch.rand(1, 1, 3, 104, 80).expand(1, 5, 3, 104, 80)
    net = G4G(**{**SMALL, 'width': .25}).eval()
    for p in (net.still_encoder[0].conv, net.still_encoder[1].conv, net.decoder.join, net.decoder.up, net.decoder.paint):
        p.weight[p.weight.abs() < .03] = 0                                           # the small random weights beside the copies
    def shown(stills):
        source = torch.zeros(1, 64, 26, 20)
        return net.decoder(source, net.still_encoder(2*stills.flatten(1, 2) - 1)) - smooth(stills[:, 0])
    assert shown(grey).abs().mean() < .3*shown(coloured).abs().mean()


@pytest.mark.parametrize('options', [dict(), dict(masks=1), dict(blend=False)])
def test_what_losses_read(options):
    net, batch = G4G(**SMALL, **options), known(2, 2)
    drawn = net(batch)
    assert {k: v.shape[0] for k, v in net.inner.items()}.items() >= dict(fused=4, aligned=4, landmarks=4, visual=4, audio=4, decoded=4).items()
    for key in ('visual', 'audio'): torch.testing.assert_close(net.inner[key].norm(dim=1), torch.ones(4))
    loss = ContrastiveLoss(net)(drawn, batch) + AttributeLoss(net)(drawn, batch) + MouthPixelLoss(options.get('masks', 3))(drawn, batch)
    loss.backward()
    for part in (net.alignment.g_v, net.alignment.g_a, net.alignment.blocks, net.audio_encoder, net.landmark_encoder, net.source_deeper):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())
    assert net.alignment.g_a[0].weight.grad.abs().max() > 0


def test_the_attribute_loss_starts_calmly_and_looks_at_the_pictures():
    torch.manual_seed(0); net, batch = G4G(**SMALL), known(2, 2)
    AttributeLoss(net)(net(batch), batch).backward()
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    assert torch.stack([g.norm() for g in grads]).norm() < 10 and net.alignment.norm.to_style.weight.grad.norm() > 0
    with torch.no_grad():
        net(batch); before = net.inner['aligned']; net(dataclasses.replace(batch, stills=torch.rand_like(batch.stills)))
        assert (net.inner['aligned'] - before).norm() > .05*before.norm()


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_landmarks_that_are_not_known_are_named(bad):
    points = torch.rand(3, 68, 2)*90; points[1, 4] = bad
    with pytest.raises(InputError, match=r'landmarks \[1\] of 3 are not finite'): landmark_sketch(points, 96)


def test_without_alignment_the_losses_say_what_is_missing():
    net, batch = G4G(**SMALL, align=False), known(2)
    drawn = net(batch)
    with pytest.raises(InputError, match='alignment switched on'): ContrastiveLoss(net)(drawn, batch)
    with pytest.raises(InputError, match='align=True'): net.embed_sounds(batch.mel[0])


def test_sounds_of_the_store_have_the_vectors_of_the_frames():
    net, batch = G4G(**SMALL).eval(), random_batch(96, 2, 2)
    with torch.no_grad():
        net(batch)
        torch.testing.assert_close(net.embed_sounds(batch.mel.flatten(0, 1)), net.inner['audio'], atol=1e-5, rtol=1e-4)
    assert G4G(**SMALL, audio={'name': 'wav2vec2'}).embed_sounds is None


def test_autocast_changes_little_and_channels_last_nothing():
    net, batch = G4G(**SMALL).eval(), random_batch(96, 2, 2)
    with torch.no_grad():
        full = net(batch)
        assert (net.to(memory_format=torch.channels_last)(batch) - full).abs().max() < 1e-4
        with torch.autocast('cpu', torch.bfloat16): half = net(batch)
    assert half.dtype == torch.float32 and (half - full).abs().mean() < .01
    with torch.autocast('cpu', torch.bfloat16): (net.train()(batch) - batch.target).abs().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_copies_and_state_dicts_hold_weights_alone():
    net = G4G(**SMALL); net(random_batch(96, 1, 1))
    assert deepcopy(net).inner == {} and not {'hidden', 'mask'} & {k.split('.')[-1] for k in net.state_dict()}
    again = build_generator(net.config); again.load_state_dict(net.state_dict(), strict=True)


def test_wrong_arguments_are_named():
    with pytest.raises(ParamsError, match='expected 1 to 3'): G4G(**SMALL, masks=4)
    with pytest.raises(ParamsError, match='published'): G4G(**SMALL, adaat='fast')
    with pytest.raises(ParamsError, match='must be even'): G4G(**{**SMALL, 'size': 97})


def test_dinet_says_which_sounds_it_hears():
    net = DINet(width=.0625, size=48, scale=.25, audio_channels=29, audio_steps=5)
    with pytest.raises(InputError, match='5 steps by 29 channels a frame, got 10 by 768'): net.audio_encoder(torch.zeros(1, 768, 10))


@pytest.mark.parametrize('attribute', [True, False])
def test_two_processes_train_with_any_losses(tmp_path, attribute):
    "Under torchrun every part of the network needs a gradient, also one that no loss of the row looks at."
    script = tmp_path/'run.py'
    script.write_text(textwrap.dedent(f"""
        import torch, torch.distributed as dist
        from talkingface.generators.base import random_batch
        from talkingface.generators.g4g import G4G
        from talkingface.losses.g4g import AttributeLoss
        from torch.nn.parallel import DistributedDataParallel
        dist.init_process_group('gloo'); torch.set_num_threads(1); torch.manual_seed(0)
        net = G4G(**{SMALL!r}).train(); wrapped = DistributedDataParallel(net); batch = random_batch(96, 2, 5)
        for step in range(2):
            drawn = wrapped(batch); loss = (drawn - batch.target).abs().mean()
            if {attribute}: loss = loss + AttributeLoss(net, of='fused')(drawn, batch)
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        """))
    subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(script)],
                   check=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=120)
