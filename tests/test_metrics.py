"""Properties of the metrics: best at identity, symmetric where they must be, bounded, monotone, honest about gaps."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from talkingface.core import InputError
from talkingface.experts.base import SyncExpert
from talkingface.experts.features import FeatureNet
from talkingface.metrics.base import METRICS, ClipMean
from talkingface.metrics.image import PSNR, SSIM, SSIM_SETTINGS, psnr, psnr_frames, ssim, ssim_frames
from talkingface.metrics.lips import LipTracker, aperture_correlation, lmd
from talkingface.metrics.perceptual import CorpusLPIPS, FeatureScorer, lpips_frames
from talkingface.metrics.report import CLIP_SCORES, ROW_FIELDS, Case, Scorers, evaluate_method
from talkingface.metrics.sync import SyncScorer, check_independent, lse, lse_distances


@pytest.fixture(scope='module')
def clip():
    "Eight frames of smooth colour patterns."
    gen = torch.Generator().manual_seed(0)
    coarse = torch.rand(8, 3, 8, 8, generator=gen)
    return (torch.nn.functional.interpolate(coarse, 96, mode='bicubic').clamp(0, 1) * 255).to(torch.uint8)


def degraded(clip, sigma, seed=0):
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed)) * sigma
    return (clip.float() + noise).round().clamp(0, 255).to(torch.uint8)


def mouth(frames=40, seed=0):
    return np.random.default_rng(seed).uniform(30, 70, (frames, 20, 2))


@pytest.mark.parametrize('setting', SSIM_SETTINGS)
def test_ssim_identity_symmetry_bounds(clip, setting):
    other = degraded(clip, 25)
    assert ssim(clip, clip, setting) == 1.
    assert ssim(clip, other, setting) == pytest.approx(ssim(other, clip, setting), abs=1e-7)
    assert -1 <= ssim(255 - clip, clip, setting) < ssim(other, clip, setting) < 1


def test_psnr_identity_symmetry(clip):
    other = degraded(clip, 10)
    assert psnr(clip, clip) == float('inf')
    assert psnr(clip, other) == psnr(other, clip)
    assert torch.equal(psnr_frames(clip, other), psnr_frames(other, clip))


def test_psnr_does_not_wrap(clip):
    "1 against 255 differs by 254 levels; in uint8 arithmetic it would be 2."
    dark, light = torch.full((1, 3, 16, 16), 1, dtype=torch.uint8), torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    assert psnr(dark, light) == pytest.approx(20 * np.log10(255 / 254))


def test_identical_frames_are_left_out_of_a_clip(clip):
    other = degraded(clip, 10); other[0] = clip[0]
    assert psnr(other, clip) == pytest.approx(psnr(other[1:], clip[1:]))


@pytest.mark.parametrize('metric', [psnr, ssim])
def test_image_metrics_fall_with_noise(clip, metric):
    values = [metric(degraded(clip, s), clip) for s in (2, 5, 10, 20, 40)]
    assert values == sorted(values, reverse=True)


def test_batch_equals_loop_and_float32_equals_float64(clip):
    other = degraded(clip, 15)
    loop = torch.cat([ssim_frames(o[None], c[None]) for o, c in zip(other, clip)])
    assert torch.allclose(ssim_frames(other, clip), loop, atol=1e-7)
    assert torch.allclose(ssim_frames(other, clip), ssim_frames(other, clip, dtype=torch.float64), atol=1e-6)


def test_numpy_torch_and_float_agree(clip):
    other = degraded(clip, 15)
    assert psnr(other.numpy(), clip.numpy()) == psnr(other, clip)
    assert psnr(other / 255, clip / 255) == pytest.approx(psnr(other, clip), abs=1e-4)
    assert ssim(other / 255, clip / 255) == pytest.approx(ssim(other, clip), abs=1e-6)


def test_image_metrics_refuse_bad_frames(clip):
    broken = clip.float() / 255; broken[3] = float('nan')
    with pytest.raises(InputError, match='1 of 8 frames hold NaN'): ssim(broken, clip / 255)
    with pytest.raises(InputError, match='differ in shape'): psnr(clip[:4], clip)
    with pytest.raises(InputError, match='give both as uint8'): psnr(clip / 255, clip)
    with pytest.raises(InputError, match=r'lie in \[0,1\]'): psnr(clip.float(), clip.float())
    with pytest.raises(InputError, match='at least 11 pixels'): ssim(clip[..., :8, :8], clip[..., :8, :8])
    with pytest.raises(InputError, match='T >= 1'): psnr(clip[:0], clip[:0])


def test_lmd_properties():
    a, b = mouth(seed=1), mouth(seed=2)
    assert lmd(a, a) == 0
    assert lmd(a, b) == lmd(b, a)
    assert lmd(a + 7, b + 7) == pytest.approx(lmd(a, b))
    assert lmd(a + [0, 5], a) == pytest.approx(5) and lmd(a + [0, 5], a, aligned=True) == pytest.approx(0, abs=1e-9)
    assert lmd(a, b, aligned=True) < lmd(a, b) + 1e-9


def test_lmd_takes_68_points_and_skips_invalid_frames():
    face = np.random.default_rng(0).uniform(0, 96, (10, 68, 2)); moved = face + 2
    moved[3] = np.nan
    assert lmd(moved, face) == pytest.approx(np.sqrt(8))
    assert lmd(face[:, 48:], face) == 0
    moved[4] += 100
    assert lmd(moved, face, valid=np.arange(10) != 4) == pytest.approx(np.sqrt(8))
    assert np.isnan(lmd(np.full_like(face, np.nan), face))


def test_aperture_correlation_properties():
    a, b = mouth(seed=1), mouth(seed=2)
    still = np.repeat(a[:1], 40, 0)
    assert aperture_correlation(a, a) == pytest.approx(1)
    assert aperture_correlation(a, b) == pytest.approx(aperture_correlation(b, a))
    assert aperture_correlation(a * 1.7 + 4, b) == pytest.approx(aperture_correlation(a, b))
    assert -1 <= aperture_correlation(a, b) <= 1
    assert aperture_correlation(still, a) == 0 and np.isnan(aperture_correlation(a, still))


@pytest.mark.parametrize('shift', range(-15, 16, 3))
def test_lse_offset_finds_the_shift(shift):
    "Audio late by `shift` frames gives offset -shift."
    signal = torch.randn(90, 16, generator=torch.Generator().manual_seed(0))
    result = lse(lse_distances(signal[20:70], signal[20 - shift:70 - shift]))
    assert result.offset == -shift


def test_lse_properties():
    gen = torch.Generator().manual_seed(0)
    video, other = torch.randn(60, 16, generator=gen), torch.randn(60, 16, generator=gen)
    same, apart = lse(lse_distances(video, video)), lse(lse_distances(video, other))
    assert same.distance < apart.distance and same.confidence > apart.confidence >= 0
    assert same.distance == pytest.approx(4e-6, abs=1e-6)           # the published epsilon: 1e-6 sqrt(16)
    one_at_a_time = torch.cat([lse_distances(video, other)[i:i + 1] for i in range(60)])
    assert torch.equal(one_at_a_time, lse_distances(video, other))
    turn = torch.linalg.qr(torch.randn(16, 16, generator=gen)).Q    # a rotation of the space changes nothing
    assert lse(lse_distances(video @ turn, other @ turn)).distance == pytest.approx(apart.distance, abs=1e-4)


def test_lse_is_exact_in_pieces_of_long_clips():
    video = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(video, (0, 0, 15, 15))
    direct = torch.stack([torch.nn.functional.pairwise_distance(video, padded[j:j + 200]) for j in range(31)], 1)
    assert torch.allclose(lse_distances(video, video), direct, atol=1e-6)


def test_classes_equal_functions_and_sum_over_processes(clip):
    clips = [degraded(clip, s) for s in (5, 10, 20, 40)] + [clip]
    for cls, function in ((PSNR, psnr), (SSIM, ssim)):
        whole, parts = cls(), [cls(), cls()]
        for i, c in enumerate(clips): whole.update(c, clip); parts[i % 2].update(c, clip)
        finite = [v for v in (function(c, clip) for c in clips) if np.isfinite(v)]
        assert whole.compute().item() == pytest.approx(np.mean(finite), abs=1e-12)
        merged = sum(p.total for p in parts) / sum(p.used for p in parts)       # what the reduction over processes does
        assert merged.item() == pytest.approx(whole.compute().item(), abs=1e-12)


def test_every_metric_is_described():
    for name, info in METRICS.items():
        assert name == info.name and info.protocol and info.source and info.label
        assert info.higher_is_better in (True, False, None)
    todo = [ClipMean]
    while todo:
        cls = todo.pop(); todo += cls.__subclasses__()
        if cls.info is not None and cls.__module__.startswith('talkingface'): assert cls.info is METRICS[cls.info.name]


class Brightness(SyncExpert):
    "A stand-in for an expert: five frames of brightness against five of loudness."
    window = 5
    _unit = staticmethod(lambda x: torch.nn.functional.normalize(x.unfold(1, 5, 1) - .5, dim=-1))
    def embed_video(self, faces): return self._unit(faces.mean((2, 3, 4)))
    def audio_features(self, wav): return wav
    def embed_audio(self, features): return self._unit(features.view(len(features), -1, 640).abs().mean(-1))


class Corner(torch.nn.Module):
    "A stand-in for a landmarker: points that follow the brightness."
    def forward(self, faces): return faces.mean((1, 2, 3))[:, None, None] * torch.linspace(10, 90, 40).view(1, 20, 2)


def store_of(n=3, frames=40):
    "Clips whose brightness is their loudness."
    clips = []
    for i in range(n):
        level = np.random.default_rng(i).random(frames).astype(np.float32)
        faces = np.broadcast_to((level * 255).astype(np.uint8)[:, None, None, None], (frames, 3, 32, 32)).copy()
        clips.append(SimpleNamespace(name=f'clip{i}', split='test', faces=faces, landmarks=np.full((frames, 68, 2), np.nan, np.float32),
                                     valid=np.ones(frames, bool), wav=np.repeat(level, 640)))
        for array in (clips[-1].faces, clips[-1].wav): array.flags.writeable = False        # as in a clip store
    return clips


SCORERS = Scorers(syncs={'toy': SyncScorer(Brightness(), 'toy', 'ab' * 32)}, lips=LipTracker(Corner(), 'toy'))
BASIC = ['psnr', 'ssim', 'lmd', 'lmd_aligned', 'lmd_stored', 'aperture_correlation', 'aperture_correlation_stored', 'lse_d', 'lse_c', 'offset']


def by_metric(rows, clip='clip0'):
    return {r['metric']: r for r in rows if r['clip'] == clip}


@pytest.mark.filterwarnings('error')
def test_ground_truth_scores_best():
    rows = evaluate_method('ground_truth', lambda c: c.faces, store_of(), SCORERS, 'smoke', metrics=BASIC)
    assert all(tuple(r) == ROW_FIELDS for r in rows) and len(rows) == 3 * 10
    one = by_metric(rows)
    assert one['psnr']['value'] == float('inf') and one['psnr']['reason'] == 'identical to the ground truth'
    assert one['ssim']['value'] == 1 and one['lmd']['value'] == 0 and one['offset[toy]']['value'] == 0
    assert one['aperture_correlation']['value'] == pytest.approx(1)
    assert 'toy sha256:abababab' in one['lse_d[toy]']['protocol']


def test_gaps_are_rows_with_reasons():
    store = store_of(4)
    store[3].wav = np.zeros_like(store[3].wav); store[0].valid = np.zeros(40, bool)
    faces = {c.name: c.faces for c in store}
    faces['clip1'] = faces['clip1'][:-3]
    del faces['clip2']
    rows = evaluate_method('x', faces, store, SCORERS, 'smoke', metrics=BASIC)
    assert len(rows) == 4 * 10 and all((r['value'] is None) <= bool(r['reason']) for r in rows)
    assert by_metric(rows)['lmd_stored']['reason'] == 'no frame with landmarks' and by_metric(rows)['psnr']['reason'] == 'no frame shows a face'
    assert {r['reason'] for r in by_metric(rows, 'clip1').values()} == {'method gave (37, 3, 32, 32), clip has (40, 3, 32, 32)'}
    assert 'no frames' in by_metric(rows, 'clip2')['ssim']['reason']
    assert 'silent' in by_metric(rows, 'clip3')['lse_c[toy]']['reason'] and by_metric(rows, 'clip3')['ssim']['value'] == 1


def test_frames_without_a_face_are_not_scored():
    store = store_of(1); faces = np.array(store[0].faces); faces[:10] = 0; store[0].valid = np.arange(40) >= 10
    row = by_metric(evaluate_method('x', {'clip0': faces}, store, SCORERS, 'smoke'), 'clip0')['ssim']
    assert row['value'] == 1 and row['n_frames'] == 30


def test_other_speech_lists_what_needs_no_true_frames():
    store = store_of()
    shuffled = {c.name: store[(i + 1) % 3].wav for i, c in enumerate(store)}
    rows = evaluate_method('shuffled_audio', lambda c: c.faces, store, SCORERS, 'smoke', wavs=shuffled)
    truth = evaluate_method('ground_truth', lambda c: c.faces, store, SCORERS, 'smoke')
    assert {r['metric'] for r in rows} == {'lse_d[toy]', 'lse_c[toy]', 'offset[toy]', 'lse_c_variance[toy]', 'flicker'}
    assert by_metric(rows)['lse_d[toy]']['value'] > by_metric(truth)['lse_d[toy]']['value']
    with pytest.raises(InputError, match='cannot score psnr'):
        evaluate_method('x', {}, store, SCORERS, 'smoke', metrics=['psnr'], wavs=shuffled)


def test_the_teacher_may_not_judge():
    meta = {'losses': {'sync': {'weight': 2, 'expert_sha256': 'ab' * 32}}}
    with pytest.raises(InputError, match='trained this generator'): check_independent(SCORERS.syncs['toy'], meta)
    check_independent(SCORERS.syncs['toy'], {'losses': {'sync': {'expert_sha256': 'cd' * 32}}})
    with pytest.raises(InputError, match='no sha256'): check_independent(SyncScorer(Brightness(), 'toy'), meta)


def test_short_clip_of_29_frames_is_scored():
    rows = evaluate_method('x', lambda c: c.faces, store_of(1, 29), SCORERS, 'smoke')
    assert by_metric(rows)['lse_c[toy]']['value'] is not None
    rows = evaluate_method('x', lambda c: c.faces, store_of(1, 4), SCORERS, 'smoke')
    assert 'the expert needs 5' in by_metric(rows)['lse_c[toy]']['reason']


def test_lpips_of_the_corpus_leaves_the_feature_vectors_that_other_metrics_want():
    torch.manual_seed(0); net = FeatureNet(width=4).eval(); faces = torch.randint(0, 256, (21, 3, 96, 96), dtype=torch.uint8).numpy()
    clip = SimpleNamespace(faces=faces[::-1].copy(), valid=np.ones(21, bool), wav=np.zeros(1, np.float32), landmarks=np.zeros((21, 68, 2)))
    rows = FeatureScorer(net); scorers = Scorers(lpips={'corpus': CorpusLPIPS(net)}, features={'corpus': rows})
    case = Case(faces, clip, scorers); values = CLIP_SCORES['lpips_corpus'][0](case, 'corpus')
    np.testing.assert_allclose(values, lpips_frames(CorpusLPIPS(net), faces, clip.faces), rtol=1e-6)
    kept = [side.found[('rows', id(rows))] for side in (case.made, case.truth)]
    for found, side in zip(kept, (faces, clip.faces)): np.testing.assert_allclose(found, rows(side), atol=1e-5)
    assert not net.blocks[-1]._forward_hooks
