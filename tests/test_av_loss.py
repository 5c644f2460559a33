"""AV-HuBERT as lip-sync loss: closed forms, gradients, the cached insertion against the plain way, padding, geometry, refusals."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from talkingface.core import InputError, ParamsError
from talkingface.data.clips import Clip
from talkingface.data.faces import crop_faces, face_box, mouth_crops, mouth_matrices, paste_faces, smooth_boxes, to_crop
from talkingface.experts.avhubert import BASE, TINY, AVHubertExpert, mouth_input, stored_mouths
from talkingface.experts.avsyncnet import AVSyncNet
from talkingface.losses.av_expert import (MODES, REACH, AVExpertLoss, AVMultimodalLoss, AVUnsupervisedLoss, AVVisualLoss, ClipContext,
                                          av_sync, clip_warp, crop_warp, encode_frames, generated_mouths, insertion_cost, plain_av_loss,
                                          step_memory, true_mouths)
from talkingface.losses.reconstruction import check_loss, total_loss

torch.set_num_threads(1)
SMALL = dict(dim=32, layers=2, heads=2, ffn=64, conv_pos=16, conv_pos_groups=4, front_width=.125, prelu=False, clusters=0)


def small(seed=0, **options):
    torch.manual_seed(seed); expert = AVHubertExpert(dict(SMALL, **options.pop('net', {})), shrink=options.pop('shrink', 4), **options)
    for module in expert.modules():                    # statistics as a trained network has them, not those of a fresh one
        if isinstance(module, torch.nn.BatchNorm2d): module.running_mean.normal_(0, .1); module.running_var.uniform_(.5, 1.5)
    return expert


def draw(*shape, seed=0, dtype=torch.float32): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def landmarks(frames=30, size=96., seed=0):
    "An upright face that drifts, turns and trembles a little."
    points = np.full((68, 2), .5); points[[36, 39, 42, 45, 33]] = [(.25, .33), (.4, .34), (.6, .34), (.75, .33), (.5, .56)]
    points[:17] = np.stack([np.linspace(.02, .98, 17), .35 + .6*np.sin(np.linspace(0, np.pi, 17))], 1)
    points[48:, 0] = .5 + .12*np.cos(np.linspace(0, 2*np.pi, 20)); points[48:, 1] = .76 + .05*np.sin(np.linspace(0, 2*np.pi, 20))
    rng, t = np.random.default_rng(seed), np.arange(frames)[:, None]
    turn = .08*np.sin(t/9 + seed)[..., None]*(points - .5)[None, :, ::-1]*[1, -1]
    return torch.from_numpy(((points + turn + .02*np.sin(t/7)[..., None] + .002*rng.normal(size=(frames, 1, 2)))*size).astype(np.float32))


def clip(frames=30, seed=0, **options):
    return ClipContext.of(draw(frames, 3, 96, 96, seed=seed), landmarks(frames, seed=seed), .2*draw(640*frames, seed=seed) - .1, **options)


def prepared(frames=24, seed=0, name=None):
    "A clip as it is prepared: crops and mouths cut out of smooth frames of 200 x 240 px."
    rng = np.random.default_rng(seed); frame = rng.uniform(0, 255, (frames, 3, 12, 15)).astype(np.float32)
    video = F.interpolate(torch.from_numpy(frame), (200, 240), mode='bicubic').clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    points = landmarks(frames, 120, seed).numpy() + np.float32([55, 45]); boxes = smooth_boxes(face_box(points))
    faces, wav = crop_faces(video, boxes).transpose(0, 3, 1, 2), (.1*rng.normal(size=640*frames)).astype(np.float32)
    made = Clip(name or f'clip {seed}', 'train', 'p', '', np.ascontiguousarray(faces), mouth_crops(video, points), to_crop(points, boxes),
                np.ones(frames, bool), boxes, np.zeros((80, 4*frames), np.float32), wav)
    return made, video, points


# the formula

def test_closed_form():
    x, axes = torch.randn(3, 5, 8), torch.eye(8)
    assert torch.allclose(av_sync(x, 7*x), torch.zeros(3), atol=1e-6)
    assert av_sync(axes[:1], axes[1:2]).item() == pytest.approx(-math.log(1e-4), rel=1e-5) == av_sync(axes[:1], -axes[:1]).item()
    assert av_sync(axes[:1], axes[1:2], floor=.01).item() == pytest.approx(-math.log(.01))
    assert av_sync(axes[:2], axes[[0, 2]]).item() == pytest.approx(math.log(2))         # the mean, then the logarithm
    assert av_sync(axes[:2], axes[[0, 2]], use=torch.tensor([True, False])).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(InputError, match='one shape'): av_sync(x, x[:, :4])
    with pytest.raises(InputError, match='at least 1'): av_sync(x[:, :0], x[:, :0])


def test_formula_gradient():
    a, b = torch.randn(2, 4, 3, dtype=torch.double), torch.randn(2, 4, 3, dtype=torch.double)
    a = (a + 2*b).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: av_sync(a, b), a)
    b.requires_grad_(); av_sync(a, b).sum().backward()
    assert a.grad.abs().sum() > 0 and b.grad is None


def test_formula_is_float32_in_half_precision():
    x = 300*torch.randn(2, 5, 64); y = x + 100*torch.randn(2, 5, 64)
    with torch.autocast('cpu', torch.bfloat16): assert av_sync(x, y).dtype == torch.float32 and torch.equal(av_sync(x, y), av_sync(x, y))
    for dtype in (torch.float16, torch.bfloat16): assert torch.allclose(av_sync(x.to(dtype), y.to(dtype)), av_sync(x, y), atol=2e-2)


# the insertion against the plain way

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('start', [0, 1, 3, 13, 24, 25])
def test_cached_is_plain(mode, start):
    expert, context, output = small(), clip(30, start=start), draw(1, 5, 3, 96, 96, seed=5).requires_grad_()
    ours, plain = AVExpertLoss(expert, mode)(output, context), plain_av_loss(expert, output, [context], mode)
    slopes = [torch.autograd.grad(v, output)[0] for v in (ours, plain)]
    assert abs(ours - plain).item() < 1e-5 and torch.allclose(*slopes, atol=1e-6) and slopes[0].abs().sum() > 0


@pytest.mark.parametrize('options', [dict(net=dict(norm_first=False)), dict(layer=1), dict(layer=2), dict(net=dict(fuse='add', prelu=True)),
                                     dict(shrink=1), dict(aspect=1.)], ids=str)
def test_cached_is_plain_for_every_kind_of_network(options):
    expert, output = small(**options), draw(2, 4, 3, 96, 96, seed=5); contexts = [clip(20, start=7), clip(20, seed=2, start=16)]
    for mode in MODES: assert abs(AVExpertLoss(expert, mode)(output, contexts) - plain_av_loss(expert, output, contexts, mode)).item() < 1e-5


def test_second_step_uses_what_is_kept_and_is_still_plain(monkeypatch):
    expert, context = small(), clip(30); loss = AVExpertLoss(expert, 'multimodal'); loss(draw(1, 5, 3, 96, 96), context.at(3))
    front, seen = expert.net.feature_extractor_video['resnet'], []
    inner = type(front)._frames
    def counted(self, video, *pad): seen.append(video.shape[2] + sum(pad) - 4); return inner(self, video, *pad)
    monkeypatch.setattr(type(front), '_frames', counted)
    output = draw(1, 5, 3, 96, 96, seed=9); ours = loss(output, context.at(20))
    assert seen == [5 + 2*REACH]                                       # of 30 frames
    assert abs(ours - plain_av_loss(expert, output, [context.at(20)], 'multimodal')).item() < 1e-5


def test_reach_is_that_of_the_front_end():
    front = small().net.feature_extractor_video['resnet'].eval(); mouths = torch.randn(1, 1, 15, 22, 22, requires_grad=True)
    slope, = torch.autograd.grad(front(mouths)[0, 7].sum(), mouths)
    assert slope.abs().sum((0, 1, 3, 4)).nonzero()[:, 0].tolist() == list(range(7 - REACH, 8 + REACH))


def test_whole_clip_may_be_generated():
    expert, context = small(), clip(12); output = draw(1, 12, 3, 96, 96, seed=3)
    assert abs(AVExpertLoss(expert)(output, context) - plain_av_loss(expert, output, [context])).item() < 1e-5


@pytest.mark.parametrize('mode', MODES)
def test_padding_changes_nothing(mode):
    "Clips of different length: each gives what it gives alone."
    loss, contexts = AVExpertLoss(small(), mode), [clip(30, start=24), clip(11, seed=1, start=6), clip(19, seed=2)]
    output = draw(3, 5, 3, 96, 96, seed=4); together = loss.cosines(output, contexts)
    alone = torch.cat([loss.cosines(output[i:i + 1], c) for i, c in enumerate(contexts)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert loss(output, contexts).item() == pytest.approx((-alone.mean(1).clamp_min(1e-4).log()).mean().item(), abs=1e-4)


def test_encode_frames_is_the_encoder_at_these_frames():
    x, padding = torch.randn(2, 14, 32), torch.arange(14) >= torch.tensor([[14], [9]])
    for first in (True, False):
        encoder = small(net=dict(norm_first=first, layers=3)).net.encoder.eval()
        for layer in (None, 1, 2, 3):
            for mask in (None, padding):
                ours = encode_frames(encoder, x, torch.tensor([10, 2]), 4, mask, layer); whole = encoder(x, mask, layer)
                assert torch.allclose(ours, torch.stack([whole[0, 10:14], whole[1, 2:6]]), atol=1e-5)


def test_three_times_as_fast_on_four_seconds():
    "The network of the demo; the count of operations cannot tremble, the clock may: the best of three runs counts."
    expert = AVHubertExpert(TINY, layer=1, shrink=2); runs = []
    for _ in range(3):
        runs.append(insertion_cost(expert, repeats=5)); print({k: round(v, 4) for k, v in runs[-1].items()})
        if runs[-1]['ratio'] >= 3: break
    cost = runs[-1]
    assert cost['difference'] < 1e-5 and cost['work_ratio'] > 6 and cost['ours_frames'] == 9 and cost['plain_frames'] == 100
    assert max(c['ratio'] for c in runs) >= 3 and cost['ours_bytes'] < cost['plain_bytes']/3


def test_published_size():
    "Equal, and a third of the operations, at the size of the published weights (12 layers, 768 wide, mouths of 88 px)."
    torch.manual_seed(0); expert, context, output = AVHubertExpert(BASE), clip(100, start=47), draw(1, 5, 3, 96, 96).requires_grad_()
    loss = AVExpertLoss(expert); loss(output.detach(), context); operations, values, slopes = [], [], []
    for way in (lambda: loss(output, context), lambda: plain_av_loss(expert, output, [context])):
        with FlopCounterMode(display=False) as counter: values.append(way()); slopes += torch.autograd.grad(values[-1], output)
        operations.append(counter.get_total_flops())
    assert abs(values[0] - values[1]).item() < 1e-5 and torch.allclose(*slopes, atol=1e-6)
    assert operations[1] > 3*operations[0]


# gradient

def test_gradient_against_finite_differences():
    "Tiny and in float64, along random directions: from pixels through insertion, front end and transformer."
    expert = small(net=dict(dim=16, heads=2, ffn=16, layers=1)).double(); context = clip(8, start=2); loss = AVExpertLoss(expert, 'visual')
    output = draw(1, 2, 3, 96, 96, seed=1, dtype=torch.double); ways = torch.randn(3, *output.shape, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda w: loss(output + torch.einsum('k,kbtchw->btchw', w, ways)*1e-2, context),
                                    torch.zeros(3, dtype=torch.double, requires_grad=True), eps=1e-5, atol=1e-6)


@pytest.mark.parametrize('mode', MODES)
def test_gradient_only_through_the_video(mode):
    expert = small(); context = clip(20, start=6); wav = context.wav.clone().requires_grad_(); context.wav = wav
    output = draw(1, 5, 3, 96, 96).requires_grad_(); AVExpertLoss(expert, mode)(output, context).backward()
    assert output.grad.abs().sum() > 0 and wav.grad is None
    assert all(p.grad is None and not p.requires_grad for p in expert.parameters()) and not expert.training


def test_gradient_stays_in_the_mouth():
    "Pixels that no mouth window shows have none."
    output = draw(1, 5, 3, 96, 96).requires_grad_(); context = clip(20, start=6); AVExpertLoss(small())(output, context).backward()
    seen = output.grad[0].abs().sum((0, 1)).nonzero()
    assert seen[:, 0].min() > 40 and (seen[:, 1].min() > 20 and seen[:, 1].max() < 76)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('mode', MODES)
def test_half_precision(mode, dtype):
    loss, context, output = AVExpertLoss(small(), mode), clip(20, start=6), draw(1, 5, 3, 96, 96)
    exact = loss(output, context)
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(loss(output, context), exact)
    half = output.to(dtype).requires_grad_(); value = loss(half, context); slope, = torch.autograd.grad(value, half)
    assert value.dtype == torch.float32 and abs(value - exact).item() < .05 and torch.isfinite(slope).all() and slope.abs().sum() > 0


def test_half_precision_network():
    expert = small().bfloat16(); output = draw(1, 5, 3, 96, 96).requires_grad_(); value = AVExpertLoss(expert)(output, clip(20, start=6))
    assert value.dtype == torch.float32 and torch.isfinite(torch.autograd.grad(value, output)[0]).all()


def test_seen_first_without_gradient_then_trained():
    "What was kept while validating in inference mode serves a training step."
    loss, context = AVExpertLoss(small()), clip(20)
    with torch.inference_mode(): loss(draw(1, 5, 3, 96, 96), context)
    output = draw(1, 5, 3, 96, 96).requires_grad_(); loss(output, context).backward(); assert output.grad.abs().sum() > 0


# geometry

def test_warp_of_prepared_clips_is_that_of_their_mouths():
    "Mouth pixel to frame pixel to crop pixel, from crops and boxes alone, is what the preparation used."
    made, video, points = prepared(); size = np.array([96, 96])
    frame = mouth_matrices(points); corner, step = made.boxes[:, :2], (made.boxes[:, 2:] - made.boxes[:, :2])/size
    expected = np.concatenate([frame[..., :2]/step[..., None], ((frame[..., 2] - corner)/step - .5)[..., None]], -1)
    ours = crop_warp(torch.from_numpy(made.landmarks), torch.from_numpy(made.boxes), (96, 96)).numpy()
    assert np.abs(ours - expected).max() < 2e-3


def test_insertion_is_paste_and_cut():
    "Generated crops pasted into whole frames and cut out again, with the functions that handle video, against the one map."
    made, video, points = prepared(); context = ClipContext.from_clips([made], [4])[0]
    smooth = F.interpolate(draw(5, 3, 10, 10, seed=3), (96, 96), mode='bicubic').clamp(0, 1)
    faces = (smooth*255).round().byte().permute(0, 2, 3, 1).numpy()
    pasted = video.copy(); pasted[4:9] = paste_faces(video[4:9], faces, made.boxes[4:9], feather=0)
    cut = stored_mouths(torch.from_numpy(mouth_crops(pasted, points))[None])[0, 0]
    warp = clip_warp(context, AVHubertExpert(TINY)); true = true_mouths(context, warp, 0, context.frames)
    ours = generated_mouths(smooth, true[0, 0, 4:9, None], warp[4:9], torch.from_numpy(made.valid[4:9]))[:, 0]
    assert (ours - cut[4:9]).abs().mean() < .02 and (ours - true[0, 0, 4:9]).abs().mean() > .3      # in standard deviations of grey
    assert torch.equal(true[0, 0, :4], cut[:4]) and torch.equal(true[0, 0, 9:], cut[9:])


def test_pixels_outside_the_crop_stay():
    "A crop that covers half of the mouth: the rest is the true mouth."
    context = clip(10); warp = clip_warp(context, AVHubertExpert(TINY)); warp[:, 0, 2] += 48      # px to the right
    true = torch.full((10, 1, 88, 88), 7.); drawn = generated_mouths(torch.zeros(10, 3, 96, 96), true, warp, context.valid)
    kept = (drawn == 7).float().mean((0, 1, 2)); assert kept[0] == 0 and kept[-1] == 1 and (kept.diff() >= 0).all()


def test_of_and_of_video_and_from_clips_agree():
    made, video, points = prepared(); expert, output = small(shrink=1), draw(1, 5, 3, 96, 96)
    frames = torch.from_numpy(video).permute(0, 3, 1, 2)
    stored, cut = (ClipContext.from_clips([made], [6], how)[0] for how in ('stored', 'expert'))
    whole = ClipContext.of_video(frames, points, made.boxes, made.wav, 6); crops = ClipContext.of(made.faces, made.landmarks, made.wav, 6)
    for mode in MODES:
        loss = AVExpertLoss(expert, mode); values = [loss(output, c).item() for c in (stored, whole, cut, crops)]
        assert values[0] == pytest.approx(values[1], abs=2e-2) and values[2] == pytest.approx(values[3], abs=1e-5)
    mouths = stored_mouths(whole.mouths[None]), stored_mouths(torch.from_numpy(made.mouths)[None])
    assert (mouths[0] - mouths[1]).abs().mean() < .02
    reference = mouth_input(torch.from_numpy(made.faces)[None], torch.from_numpy(made.landmarks)[None])
    assert torch.allclose(true_mouths(cut, clip_warp(cut, expert), 0, cut.frames), reference, atol=1e-5)


def test_true_frames_reach_zero():
    made, *_ = prepared(); context = ClipContext.from_clips([made], [6], 'expert'); truth = torch.from_numpy(made.faces[None, 6:11])/255
    for mode in ('visual', 'multimodal'): assert AVExpertLoss(small(), mode)(truth, context).item() == pytest.approx(0, abs=1e-5)


# what is kept

def test_memory_is_bounded_and_forgets_the_oldest():
    expert, contexts, output = small(), [clip(20, seed=i) for i in range(4)], draw(1, 5, 3, 96, 96)
    loss = AVExpertLoss(expert); loss(output, contexts[0]); each = loss._memory.bytes
    loss = AVExpertLoss(expert, limit=2*each); values = [loss(output, c).item() for c in contexts]
    assert len(loss._memory) == 2 and loss._memory.bytes == 2*each and contexts[0].key not in loss._memory._kept
    nothing = AVExpertLoss(expert, limit=0); assert [nothing(output, c).item() for c in contexts] == values and len(nothing._memory) == 0


def test_new_weights_are_noticed():
    expert, context, output = small(), clip(20, start=3), draw(1, 5, 3, 96, 96); loss = AVExpertLoss(expert, 'visual'); loss(output, context)
    expert.load_state_dict(small(seed=1).state_dict())
    assert loss(output, context).item() == pytest.approx(AVExpertLoss(small(seed=1), 'visual')(output, context).item(), abs=1e-6)


def test_clips_of_one_name_are_told_apart():
    one, other = (prepared(seed=s, name='same')[0] for s in (0, 1)); loss, output = AVExpertLoss(small()), draw(2, 5, 3, 96, 96)
    value = loss.cosines(output, ClipContext.from_clips([one, other], [0, 0]))
    assert len(loss._memory) == 2 and torch.allclose(value[1:], loss.cosines(output[1:], ClipContext.from_clips([other], [0])), atol=1e-5)


# as a term

@pytest.mark.parametrize('term,mode', [(AVUnsupervisedLoss, 'unsupervised'), (AVVisualLoss, 'visual'), (AVMultimodalLoss, 'multimodal')])
def test_term_contract(term, mode):
    store = [prepared(20)[0], prepared(26, seed=1)[0]]; loss = term(small(), clips=store)
    batch = SimpleNamespace(clip=torch.tensor([1, 0]), start=torch.tensor([20, 4]), target=draw(2, 5, 3, 96, 96))
    assert check_loss(loss, batch) > 0 and loss.name == term.name == f'av_{mode}' and f'mode={mode!r}' in repr(loss) and 'Clip' not in repr(loss)
    batch.contexts = ClipContext.from_clips([store[1], store[0]], [20, 4])
    total, logs = total_loss({loss.name: loss}, {loss.name: 2.}, batch.target, batch)
    assert total.item() == pytest.approx(2*loss(batch.target, batch.contexts).item()) and set(logs) == {loss.name, 'total'}
    assert loss.to('cpu').modules.keys() == {'expert'}


# guards

def test_chunk_must_lie_in_the_clip():
    loss, output = AVExpertLoss(small()), draw(1, 5, 3, 96, 96)
    with pytest.raises(InputError, match="clip 'a': its 4 frames are fewer than the 5"): loss(output, clip(4, name='a'))
    for start in (-1, 16):
        with pytest.raises(InputError, match=f'cannot start at frame {start} of 20; expected 0 to 15'): loss(output, clip(20, start=start))
    for start in (0, 15): assert torch.isfinite(loss(output, clip(20, start=start)))
    assert torch.isfinite(loss(output, clip(5)))


def test_frames_without_a_face():
    "They keep their place, hold the true mouth and do not count; NaN is filled in; a chunk without any face is refused."
    points = landmarks(20); points[[8, 9, 15]] = torch.nan; faces, wav = draw(20, 3, 96, 96), .1*draw(640*20)
    context = ClipContext.of(faces, points, wav, start=7); loss, output = AVExpertLoss(small()), draw(1, 5, 3, 96, 96).requires_grad_()
    cosines = loss.cosines(output, context); assert cosines.isnan().tolist() == [[False, True, True, False, False]]
    value = loss(output, context); assert value.item() == pytest.approx(-math.log(max(cosines.nanmean().item(), 1e-4)), abs=1e-5)
    value.backward() if cosines.nanmean() > 1e-4 else loss.cosines(output, context).nansum().backward()
    assert torch.isfinite(output.grad).all() and output.grad[0, 1:3].abs().sum() == 0 < output.grad[0, 0].abs().sum()
    assert abs(value - plain_av_loss(loss.expert, output, [context])).item() < 1e-5
    valid = torch.ones(20, dtype=torch.bool); valid[5:12] = False
    with pytest.raises(InputError, match='no face was found in frames 6 to 10'): loss(output, ClipContext.of(faces, landmarks(20), wav, 6, valid))
    with pytest.raises(InputError, match='no face in any of 20'): ClipContext.of(faces, torch.full((20, 68, 2), torch.nan), wav)
    bare = ClipContext(points, wav, valid, (96, 96), faces)
    with pytest.raises(InputError, match='hold NaN'): loss(output, bare)


def test_landmarks_in_one_point_are_named():
    context = ClipContext.of(draw(20, 3, 96, 96), torch.zeros(20, 68, 2), torch.zeros(640*20))
    with pytest.raises(InputError, match='lie in one point'): AVExpertLoss(small())(draw(1, 5, 3, 96, 96), context)


@pytest.mark.parametrize('mode', MODES)
def test_silence(mode):
    context = ClipContext.of(draw(20, 3, 96, 96), landmarks(20), torch.zeros(640*20), start=4)
    output = draw(1, 5, 3, 96, 96).requires_grad_(); value = AVExpertLoss(small(), mode)(output, context)
    assert torch.isfinite(value) and torch.isfinite(torch.autograd.grad(value, output)[0]).all()


def test_wrong_shapes():
    loss, output, context = AVExpertLoss(small()), draw(1, 5, 3, 96, 96), clip(20)
    for wrong, words in ((output[0], 'expected generated frames'), (output[:, :, :1], 'expected generated frames'),
                         (output[:, :0], 'expected generated'), ((output*255).byte(), 'as floats'), (output[..., :48, :48], 'crops of'),
                         (output.repeat(2, 1, 1, 1, 1), 'a context for each of 2')):
        with pytest.raises(InputError, match=words): loss(wrong, context)
    faces, points, wav, found = draw(20, 3, 96, 96), landmarks(20), torch.zeros(640*20), torch.ones(20, dtype=torch.bool)
    for make, words in ((lambda: ClipContext.of(faces[:-1], points, wav), r'faces: expected \(20, 3, H, W\)'),
                        (lambda: ClipContext.of(faces, points[:, :5], wav), r'landmarks: expected \(T, 68, 2\)'),
                        (lambda: ClipContext.of(faces, points, wav[:-1]), 'fit_length'),
                        (lambda: ClipContext.of(faces, points, wav.expand(2, -1)), 'one channel'),
                        (lambda: ClipContext.of(faces, points, wav/0), 'NaN or infinity'),
                        (lambda: ClipContext.of(faces, points, wav, valid=[True]), 'valid'),
                        (lambda: ClipContext.of_video(faces, points, torch.zeros(20, 4), wav), 'x0 < x1'),
                        (lambda: ClipContext.of_video(faces, points, torch.zeros(19, 4), wav), 'boxes'),
                        (lambda: ClipContext(points, wav, found, (96, 96)), 'expected face crops'),
                        (lambda: ClipContext(points, wav, found, (96, 96), faces[..., :64]), 'faces: expected')):
        with pytest.raises(InputError, match=words): make()


def test_wrong_arguments():
    with pytest.raises(ParamsError, match="did you mean 'visual'"): AVExpertLoss(small(), 'visua')
    with pytest.raises(ParamsError, match='mouths'): AVExpertLoss(small(), mouths='frame')
    with pytest.raises(ParamsError, match='floor'): AVExpertLoss(small(), floor=0)
    with pytest.raises(ParamsError, match='limit'): AVExpertLoss(small(), limit=-1)
    with pytest.raises(InputError, match='needs an AV-HuBERT'): AVExpertLoss(AVSyncNet(width=.0625, dim=16, size=32))
    expert = small(); loss, output = AVExpertLoss(expert), draw(1, 5, 3, 96, 96)
    with pytest.raises(InputError, match='clips='): loss(output, SimpleNamespace(clip=torch.tensor([0]), start=torch.tensor([0])))
    with pytest.raises(InputError, match='expected ClipContext'): loss(output, SimpleNamespace())
    expert.train()
    for way in (lambda: loss(output, clip(20)), lambda: plain_av_loss(expert, output, [clip(20)])):
        with pytest.raises(InputError, match='evaluation mode'): way()


def test_mouths_of_another_mean_face_are_refused():
    other = (np.array([(128., 150), (70, 99), (104, 99), (151, 99), (186, 99)])).tolist(); expert = small(reference=other); made, *_ = prepared()
    output = draw(1, 5, 3, 96, 96)
    with pytest.raises(InputError, match='another mean face'): AVExpertLoss(expert)(output, ClipContext.from_clips([made], [0]))
    assert torch.isfinite(AVExpertLoss(expert)(output, ClipContext.from_clips([made], [0], 'expert')))


# memory

def test_step_memory_counts_what_is_alive():
    a = torch.ones(1000)
    def work(): b = a*2; c = b + 1; del b; d = c.view(10, 100)*3; return d
    assert step_memory(work) == 8000 and step_memory(lambda: a.view(10, 100)) == 0
