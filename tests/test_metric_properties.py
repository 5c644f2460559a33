"""What every metric promises, tried on each of them: best at the truth, worse with every degradation, the same in batches, in half the
precision, in several processes, and honest about clips that are identical."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_metrics import Brightness, Corner

from talkingface.core import InputError, ParamsError
from talkingface.experiments import metric_columns, metric_table, summarise, told_beside
from talkingface.experts.avhubert import TINY, AVHubertExpert
from talkingface.experts.checkpoints import build_expert
from talkingface.experts.features import FeatureNet
from talkingface.metrics.avs import AVSM, AVSU, AVSV, AVScorer
from talkingface.metrics.base import METRICS, ClipMean
from talkingface.metrics.image import MSE, PSNR, SSIM, PSNRWrapped, mse, psnr, psnr_uint8_wrap, ssim, ssim_frames
from talkingface.metrics.lips import LMD, ApertureCorrelation, ApertureCorrelationStored, LipTracker, LMDAligned, LMDStored, aperture_correlation, lmd, lmd_frames
from talkingface.metrics.perceptual import FID, LPIPS, CorpusLPIPS, FeatureScorer, Moments, frechet_distance, lpips
from talkingface.metrics.report import (CLIP_SCORES, CURVES, NETWORKS, SET_SCORES, Case, IdentityEncoder, Scorers, availability,
                                        available_metrics, evaluate_method, expand, finish_set, published_scorers, score_clip, set_interval,
                                        set_parts, split_name)
from talkingface.metrics.silence import LipFollow, LipLeak, SilentAperture, SilentExcess, SilentVariance
from talkingface.metrics.sync import LSEC, LSED, LSECVariance, SyncOffset, SyncScorer, lse, lse_distances, variance
from talkingface.metrics.temporal import CSIM, CSIMCorpus, FaceEncoder, Flicker, IFCDiff, IFCFeat, IFCFeatCorpus, csim, flicker, ifc_diff, ifc_feat

torch.manual_seed(0)
NET = FeatureNet(width=8).eval()
FEATURES = FeatureScorer(NET, 'corpus')
PERCEPTUAL = CorpusLPIPS(NET)


def smooth(frames=30, size=96, seed=0):
    "(T,3,H,W) uint8: a pattern that moves."
    gen = torch.Generator().manual_seed(seed)
    a, b = torch.nn.functional.interpolate(torch.rand(2, 3, 8, 8, generator=gen), size, mode='bicubic').clamp(0, 1)
    mix = (.5 + .5 * torch.sin(torch.arange(frames) / 3)).view(-1, 1, 1, 1)
    return ((a * mix + b * (1 - mix)) * 215 + 20).to(torch.uint8).numpy()


def noisy(frames, sigma, seed=0):
    "A stronger noise is the same one, louder: so that `monotone` means the metric and not the draw."
    noise = np.random.default_rng(seed).normal(0, 1, frames.shape)
    return np.clip(frames + sigma * noise, 0, 255).round().astype(np.uint8)


def blurred(frames, sigma):
    import cv2
    if not sigma: return frames
    return np.stack([cv2.GaussianBlur(f.transpose(1, 2, 0), (0, 0), sigma).transpose(2, 0, 1) for f in frames])


TRUTH = smooth()
IMAGE = {'psnr': psnr, 'ssim': ssim, 'mse': mse, 'lpips_corpus': lambda a, b: lpips(PERCEPTUAL, a, b), 'ifc_diff': ifc_diff,
         'ifc_feat_corpus': lambda a, b: ifc_feat(FEATURES, a, b), 'csim_corpus': lambda a, b: csim(IdentityEncoder(FEATURES), a, b)}
BEST = {'psnr': np.inf, 'ssim': 1, 'mse': 0, 'lpips_corpus': 0, 'ifc_diff': 0, 'ifc_feat_corpus': 0, 'csim_corpus': 1}


def mouth(seed=0, frames=60):
    return np.random.default_rng(seed).uniform(30, 70, (frames, 20, 2))


@pytest.mark.parametrize('name', IMAGE)
def test_identity_is_best(name):
    assert IMAGE[name](TRUTH, TRUTH) == pytest.approx(BEST[name], abs=1e-6)


@pytest.mark.parametrize('name', IMAGE)
def test_symmetry(name):
    other = noisy(TRUTH, 15)
    assert IMAGE[name](other, TRUTH) == pytest.approx(IMAGE[name](TRUTH, other), rel=1e-6)


@pytest.mark.parametrize('name', [n for n in IMAGE if n != 'ifc_feat_corpus'])       # that one with a network that means something: test_temporal
@pytest.mark.parametrize('degrade, levels', [(noisy, (2, 5, 10, 20, 40)), (blurred, (.7, 1.5, 3, 6))], ids=['noise', 'blur'])
def test_every_further_degradation_is_worse(name, degrade, levels):
    values = [IMAGE[name](degrade(TRUTH, level), TRUTH) for level in levels]
    assert values == sorted(values, reverse=METRICS[name].higher_is_better), values


def test_fid_properties():
    true, near, far = (FEATURES(x).numpy() for x in (TRUTH, noisy(TRUTH, 5), noisy(TRUTH, 40)))
    assert frechet_distance(true, true) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(near, true) == pytest.approx(frechet_distance(true, near), rel=1e-4)
    assert 0 < frechet_distance(near, true) < frechet_distance(far, true)


@pytest.mark.parametrize('name', [n for n in IMAGE if not n.startswith('ifc')])
def test_batch_equals_loop(name):
    other = noisy(TRUTH, 15)
    loop = np.mean([IMAGE[name](o[None], t[None]) for o, t in zip(other, TRUTH)])
    assert IMAGE[name](other, TRUTH) == pytest.approx(loop, rel=1e-5)


def test_long_clip_in_pieces_equals_one():
    "A clip repeated is scored as the clip, however the pieces fall."
    other = noisy(TRUTH, 15); long, other_long = (np.concatenate([x] * 9) for x in (TRUTH, other))
    for name in ('psnr', 'ssim', 'mse', 'lpips_corpus', 'csim_corpus'):
        assert IMAGE[name](other_long, long) == pytest.approx(IMAGE[name](other, TRUTH), rel=1e-5), name


@pytest.mark.parametrize('name', ['psnr', 'ssim', 'mse', 'ifc_diff'])
def test_float32_is_within_1e_4_of_float64(name):
    other = noisy(TRUTH, 15); exact = IMAGE[name](other / 255., TRUTH / 255.)
    assert IMAGE[name]((other / 255).astype(np.float32), (TRUTH / 255).astype(np.float32)) == pytest.approx(exact, rel=1e-4)
    assert IMAGE[name](other, TRUTH) == pytest.approx(exact, rel=1e-4)


def test_float32_networks_are_within_1e_4_of_float64():
    gen = torch.Generator().manual_seed(0); v, a = torch.randn(2, 80, 64, generator=gen, dtype=torch.float64)
    exact, single = lse(lse_distances(v, a)), lse(lse_distances(v.float(), a.float()))
    assert single[:2] == pytest.approx(exact[:2], rel=1e-4) and single.offset == exact.offset
    faces = torch.from_numpy(TRUTH[:8]); other = torch.from_numpy(noisy(TRUTH[:8], 15))
    deep = FeatureNet(width=8); deep.load_state_dict(NET.state_dict()); deep = CorpusLPIPS(deep.double()).eval()
    assert lpips(PERCEPTUAL, other, faces) == pytest.approx(lpips(deep, other, faces), rel=1e-4)
    assert ssim_frames(other, faces).numpy() == pytest.approx(ssim_frames(other, faces, dtype=torch.float64).numpy(), rel=1e-4)
    rows = FEATURES(TRUTH)
    assert frechet_distance(rows, rows[::2]) == pytest.approx(frechet_distance(rows.double(), rows[::2].double()), rel=1e-4)


# --- torchmetrics ---------------------------------------------------------------------------------------------------------------

WAV = np.concatenate([np.random.default_rng(0).normal(0, level, 640 * 20) for level in (.1, .0001, .1)]).astype(np.float32)
EMBED = lambda seed: torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(seed))
frames_of = lambda seed: (noisy(TRUTH, 3 + 4 * seed, seed), TRUTH)
CLASSES = {PSNR: frames_of, SSIM: frames_of, MSE: frames_of, PSNRWrapped: frames_of, IFCDiff: frames_of,
           Flicker: lambda seed: frames_of(seed)[:1], lambda: IFCFeat(FEATURES): frames_of, lambda: IFCFeatCorpus(FEATURES): frames_of,
           lambda: CSIM(FEATURES): frames_of, lambda: CSIMCorpus(FEATURES): frames_of, lambda: LPIPS(PERCEPTUAL): frames_of,
           lambda: FID(FEATURES): frames_of, LMD: lambda s: (mouth(s), mouth(9)), LMDAligned: lambda s: (mouth(s), mouth(9)),
           LMDStored: lambda s: (mouth(s), mouth(9)), ApertureCorrelation: lambda s: (mouth(s), mouth(9)),
           ApertureCorrelationStored: lambda s: (mouth(s), mouth(9)), LSED: EMBED, LSEC: EMBED, SyncOffset: EMBED, LSECVariance: EMBED,
           AVSU: EMBED, AVSM: EMBED, AVSV: EMBED, SilentAperture: lambda s: (mouth(s), mouth(9), WAV),
           SilentExcess: lambda s: (mouth(s), mouth(9), WAV), SilentVariance: lambda s: (mouth(s), mouth(9), WAV),
           LipLeak: lambda s: (mouth(s), mouth(s + 50), mouth(s + 90)), LipFollow: lambda s: (mouth(s), mouth(s + 50), mouth(s + 90))}
NAMES = [make().info.name for make in CLASSES]


def test_every_metric_has_a_class_with_its_facts():
    # `lpips` and `fid` are the classes of their corpus variants with published weights; tests/test_perceptual.py has them
    assert (CLIP_SCORES.keys() | SET_SCORES.keys()) - set(NAMES) <= {'lpips', 'fid', 'guide_mse'}
    for make in CLASSES:
        metric = make(); info = metric.info
        assert info is METRICS[info.name] and metric.higher_is_better == info.higher_is_better
        assert info.protocol and info.source and info.range[0] < info.range[1] and info.needs is not None


def merged(parts):
    "What torchmetrics does with the states of several processes: the reduction of each state."
    whole = parts[0].clone(); whole.reset()
    for name, reduce in whole._reductions.items():
        states = [getattr(p, name) for p in parts]
        if isinstance(states[0], list): setattr(whole, name, reduce([x for s in states for x in s]))
        else: setattr(whole, name, reduce(torch.stack(states)))
    whole._update_count = 1
    return whole


@pytest.mark.parametrize('make', CLASSES, ids=NAMES)
@pytest.mark.filterwarnings('ignore:.*biased')
def test_processes_do_not_change_a_value(make):
    clips, whole, parts = [CLASSES[make](s) for s in range(7)], make(), [make() for _ in range(3)]
    for i, clip in enumerate(clips):
        whole.update(*clip); parts[i % 3].update(*clip)
    want, got = whole.compute().item(), merged(parts).compute().item()
    assert got == pytest.approx(want, rel=1e-6, abs=1e-9)
    info = whole.info
    assert info.range[0] - 1e-9 <= want <= info.range[1] + 1e-9


def test_two_real_processes(tmp_path):
    "The same over a process group, as a trainer has it."
    script = tmp_path/'two.py'
    script.write_text('''
import sys, numpy as np, torch, torch.distributed as dist
from talkingface.metrics.image import PSNR, psnr
from talkingface.metrics.sync import LSECVariance
from talkingface.metrics.silence import LipLeak
rank = int(sys.argv[1])
dist.init_process_group('gloo', init_method=f'file://{sys.argv[2]}', rank=rank, world_size=2)
def clip(seed):
    gen = np.random.default_rng(seed); a = gen.integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    return gen.permutation(a), a
def points(seed): return np.random.default_rng(seed).uniform(30, 70, (30, 20, 2))
def embed(seed): return torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(seed))
work = {PSNR: clip, LSECVariance: embed, LipLeak: lambda s: (points(s), points(s + 50), points(s + 90))}
for cls, draw in work.items():
    shared, alone = cls(), cls(sync_on_compute=False)
    for s in range(5):
        if s % 2 == rank: shared.update(*draw(s))
        alone.update(*draw(s))
    assert abs(shared.compute().item() - alone.compute().item()) < 1e-9, cls
print('same')
''')
    import subprocess, sys
    runs = [subprocess.Popen([sys.executable, str(script), str(r), str(tmp_path/'group')], stdout=subprocess.PIPE, text=True) for r in range(2)]
    assert [r.communicate(timeout=120)[0].strip() for r in runs] == ['same', 'same']


# --- identical videos -----------------------------------------------------------------------------------------------------------

def test_identical_clips_are_counted_and_left_out():
    metric = PSNR()
    for clip in (noisy(TRUTH, 10), TRUTH, TRUTH): metric.update(clip, TRUTH)
    assert metric.compute().item() == pytest.approx(psnr(noisy(TRUTH, 10), TRUTH)) and metric.left_out.item() == 2
    half = noisy(TRUTH, 10); half[::2] = TRUTH[::2]
    assert psnr(half, TRUTH) == pytest.approx(psnr(half[1::2], TRUTH[1::2]))
    store = [clip_of(f'c{i}') for i in range(3)]
    rows = evaluate_method('x', lambda c: c.faces if c.name == 'c1' else noisy(c.faces, 9), store, Scorers(), 'smoke', metrics=['psnr'])
    assert [np.isinf(r['value']) for r in rows] == [False, True, False]
    line, = summarise(rows).itertuples()
    assert np.isfinite(line.mean) and (line.n, line.given) == (2, 3)


# --- the report core ------------------------------------------------------------------------------------------------------------

def clip_of(name='c0', frames=40, seed=0):
    gen = np.random.default_rng(seed); level = gen.random(frames).astype(np.float32)
    faces = np.broadcast_to((level * 255).astype(np.uint8)[:, None, None, None], (frames, 3, 96, 96)).copy()
    faces[:, :, 40:60, 40:60] //= 2
    return SimpleNamespace(name=name, split='test', faces=faces, landmarks=gen.uniform(20, 80, (frames, 68, 2)).astype(np.float32),
                           valid=np.ones(frames, bool), wav=np.repeat(level, 640))


@pytest.fixture(scope='module')
def scorers():
    torch.manual_seed(0)
    reader = AVScorer(AVHubertExpert(TINY | dict(layers=1), shrink=2), 'toy')
    return Scorers(syncs={'toy': SyncScorer(Brightness(), 'toy', 'ab' * 32), 'other': SyncScorer(Brightness(), 'other', max_offset=9)},
                   lips=LipTracker(Corner(), 'toy'), speech={'toy': reader}, lpips={'corpus': PERCEPTUAL}, fid={'corpus': FEATURES},
                   features={'corpus': FEATURES}, identity={'corpus': IdentityEncoder(FEATURES)},
                   missing={('syncs', 'syncnet_v2'): 'no file syncnet_v2.model', ('lpips', 'alex'): 'no file alexnet'})


def test_names_and_networks(scorers):
    assert set(NETWORKS) <= set(CLIP_SCORES) | set(SET_SCORES) and set(CURVES) <= set(CLIP_SCORES)
    assert set(CLIP_SCORES) | set(SET_SCORES) <= set(METRICS) and not set(CLIP_SCORES) & set(SET_SCORES)
    assert expand(['lse_c', 'psnr', 'lse_c[toy]', 'fid_corpus'], scorers) == ['lse_c[toy]', 'lse_c[other]', 'psnr', 'fid_corpus']
    assert expand(['lse_c[syncnet_v2]'], scorers) == ['lse_c[syncnet_v2]'] and expand(['lpips'], scorers) == ['lpips[alex]']
    assert expand(['fid'], scorers) == ['fid'] and expand(None, scorers) == available_metrics(scorers)
    with pytest.raises(ParamsError, match='did you mean lse_'): expand(['lse_e'], scorers)
    with pytest.raises(ParamsError, match='has no variants'): expand(['psnr[toy]'], scorers)


def test_availability_says_what_is_missing(scorers):
    told = availability(scorers)
    assert told['lse_c[toy]'] == '' and told['lse_c[syncnet_v2]'] == 'no file syncnet_v2.model' and told['lpips[alex]'] == 'no file alexnet'
    assert 'published weights' in told['fid'] and told['psnr'] == '' and {split_name(n)[0] for n in told} == set(CLIP_SCORES) | set(SET_SCORES)
    empty = availability(Scorers())
    assert 'sync expert' in empty['lse_c'] and 'AV-HuBERT' in empty['avs_u'] and 'feature network' in empty['fid_corpus'] and 'landmarker' in empty['lmd']
    assert 'true clip' in availability(scorers, own_audio=False)['psnr'] and 'showed' in availability(scorers, reference=False)['lip_leak']
    assert (Scorers(missing={('syncs', 'toy'): 'x'}) | scorers).missing == scorers.missing


def test_every_metric_scores_the_truth_best(scorers):
    clip = clip_of(); names = [n for n in available_metrics(scorers)]
    got = {r['metric']: r for r in score_clip(Case(clip.faces, clip, scorers), names)}
    bad = {r['metric']: r for r in score_clip(Case(noisy(clip.faces, 30), clip, scorers), names)}
    unscored = {'silent_aperture', 'silent_excess', 'silent_variance'}                     # nothing is silent here
    assert {n for n in got if got[n]['value'] is None} == unscored
    for name, row in got.items():
        up = METRICS[split_name(name)[0]].higher_is_better
        if row['value'] is None or up is None or 'stored' in name or name == 'flicker' or name.startswith(('lse', 'avs_u')): continue
        assert row['value'] >= bad[name]['value'] if up else row['value'] <= bad[name]['value'], name


def test_frames_without_a_face_are_left_out(scorers):
    clip = clip_of(); clip.valid = np.arange(40) >= 10
    faces = noisy(clip.faces, 10); faces[:10] = 0; kept = {}
    rows = {r['metric']: r for r in score_clip(Case(faces, clip, scorers), ['psnr', 'mse', 'ifc_diff', 'flicker', 'lpips_corpus', 'csim_corpus', 'avs_v[toy]'], kept)}
    assert rows['psnr']['n_frames'] == rows['lpips_corpus']['n_frames'] == rows['avs_v[toy]']['n_frames'] == 30
    assert rows['ifc_diff']['n_frames'] == 29 and rows['flicker']['n_frames'] == 28
    assert all(len(v) == 40 and np.isnan(v[:10]).all() for v in kept.values()) and rows['mse']['value'] == pytest.approx(mse(faces[10:], clip.faces[10:]))
    assert rows['ifc_diff']['value'] == pytest.approx(ifc_diff(faces[10:], clip.faces[10:])) and rows['flicker']['value'] == pytest.approx(flicker(faces[10:]))
    clip.valid = np.zeros(40, bool)
    assert {r['reason'] for r in score_clip(Case(faces, clip, scorers), ['psnr', 'flicker', 'csim_corpus'])} == {'no frame shows a face'}


def test_truth_is_measured_once_for_several_methods(scorers):
    clip, calls = clip_of(), []
    class Counted(LipTracker):
        def __call__(self, faces): calls.append(len(faces)); return super().__call__(faces)
    mine = Scorers(lips=Counted(Corner(), 'toy'))
    first = Case(noisy(clip.faces, 5), clip, mine); score_clip(first, ['lmd', 'lmd_aligned', 'aperture_correlation'])
    second = Case(noisy(clip.faces, 9), clip, mine, truth=first.truth); alone = Case(noisy(clip.faces, 9), clip, mine)
    assert score_clip(second, ['lmd']) == score_clip(alone, ['lmd']) and len(calls) == 2 + 1 + 2


def test_missing_weights_are_named(tmp_path, monkeypatch):
    "Without files nothing is random and nothing is silent: every metric says which file it wants."
    monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(tmp_path))
    told = availability(published_scorers())
    wanted = {'lse_c[syncnet_v2]': 'syncnet_v2.model', 'avs_u[avhubert]': 'base_vox_iter5.pt', 'lpips[alex]': 'alexnet-owt-7be5be79.pth',
              'lpips[vgg]': 'vgg16-397923af.pth', 'fid[inception]': 'pt_inception-2015-12-05-6726825d.pth',
              'ifc_feat[vgg19]': 'vgg19-dcbb9e9d.pth', 'csim[arcface]': 'arcface_r50.pth'}
    for name, file in wanted.items(): assert file in told[name] and str(tmp_path) in told[name], name


def test_an_aligned_face_encoder_sees_the_landmarks():
    clip = clip_of(); torch.manual_seed(0)
    mine = Scorers(identity={'arcface': FaceEncoder((1, 1, 1, 1), width=8, dim=16)})
    assert [n for n in available_metrics(mine) if 'csim' in n] == ['csim[arcface]']
    row, = score_clip(Case(noisy(clip.faces, 20), clip, mine), ['csim[arcface]'])
    assert row['value'] < 1 and 'aligned' in row['protocol']
    apart, = score_clip(Case(noisy(clip.faces, 20), SimpleNamespace(**{**vars(clip), 'landmarks': clip.landmarks + 9}), mine), ['csim[arcface]'])
    assert apart['value'] != row['value']


def test_curves_are_kept(scorers):
    clip, kept = clip_of(), {}
    rows = {r['metric']: r for r in score_clip(Case(noisy(clip.faces, 5), clip, scorers), ['ssim', 'lse_d[toy]', 'lse_c[toy]', 'offset[toy]', 'ifc_diff'], kept)}
    assert {k: len(v) for k, v in kept.items()} == {'ssim': 40, 'lse_d[toy]': 36, 'lse_c[toy]': 36, 'ifc_diff': 40}
    assert np.nanmean(kept['ssim']) == pytest.approx(rows['ssim']['value']) and kept['lse_d[toy]'].mean() == pytest.approx(rows['lse_d[toy]']['value'])


SETS = ['fid_corpus', 'lse_c_variance[toy]', 'lip_leak', 'lip_follow']


def test_metrics_of_a_set(scorers, tmp_path):
    store = [clip_of(f'c{i}', 40 + i, i) for i in range(4)]
    shown = lambda c: np.full(len(c.valid), 7)
    parts = {m: [] for m in SETS}
    for clip in store:
        case = Case(noisy(clip.faces, 20), clip, scorers, reference=shown(clip))
        for m, part in set_parts(case, SETS + ['psnr']).items(): parts[m].append(part)
    rows = {m: finish_set(m, parts[m], scorers) for m in SETS}
    assert all(r['value'] is not None for r in rows.values()), rows
    want = [lse(scorers.syncs['toy'].distances(noisy(c.faces, 20), c.wav)).confidence for c in store]
    assert rows['lse_c_variance[toy]']['value'] == pytest.approx(variance(want)) and rows['lse_c_variance[toy]']['n_frames'] == 40 + 41 + 42 + 43
    direct = frechet_distance(np.concatenate([FEATURES(noisy(c.faces, 20)) for c in store]), np.concatenate([FEATURES(c.faces) for c in store]))
    assert rows['fid_corpus']['value'] == pytest.approx(direct, rel=1e-4) and rows['fid_corpus']['n_frames'] == 166
    # parts survive a file, come in any order, and from a generator that is read once
    for m in SETS:
        files = []
        for i, part in enumerate(parts[m]): np.savez(tmp_path/f'{i}.npz', **part); files.append(dict(np.load(tmp_path/f'{i}.npz')))
        again = finish_set(m, (p for p in files[::-1]), scorers)
        assert again['value'] == pytest.approx(rows[m]['value'], rel=1e-6) and again | {'value': 0} == rows[m] | {'value': 0}
    low, high = set_interval('lip_leak', parts['lip_leak'], scorers)
    assert low < rows['lip_leak']['value'] < high
    assert all(np.isnan(set_interval('fid_corpus', parts['fid_corpus'], scorers)))


def test_long_clips_give_moments_instead_of_features(scorers):
    clip = clip_of(frames=90); case = Case(noisy(clip.faces, 20), clip, scorers)
    part = set_parts(case, ['fid_corpus'])['fid_corpus']
    assert 'generated_outer' in part and part['generated_outer'].shape == (64, 64) and part['truth_count'] == 90
    value = finish_set('fid_corpus', [part], scorers)['value']
    assert value == pytest.approx(frechet_distance(FEATURES(noisy(clip.faces, 20)).numpy(), FEATURES(clip.faces).numpy()), rel=1e-4)


def test_set_metrics_that_cannot_be_computed(scorers):
    clip = clip_of(); case = Case(clip.faces, clip, scorers)
    assert 'not known' in set_parts(case, ['lip_leak'])['lip_leak']['reason']
    row = finish_set('lip_leak', [dict(reason='x'), dict(reason='x')], scorers)
    assert row['value'] is None and row['reason'] == 'x (2 clips)'
    one = set_parts(case, ['lse_c_variance[toy]'])['lse_c_variance[toy]']
    assert 'two clips' in finish_set('lse_c_variance[toy]', [one], scorers)['reason']
    assert finish_set('fid_corpus', [], scorers)['reason'] == 'no clip was scored'
    with pytest.raises(InputError, match='cannot score lip_leak'): evaluate_method('x', lambda c: c.faces, [clip], scorers, 'smoke', metrics=['lip_leak'])


def test_rows_of_a_set_stand_beside_those_of_clips(scorers):
    store = [clip_of(f'c{i}', 40, i) for i in range(3)]
    rows = evaluate_method('x', lambda c: noisy(c.faces, 9), store, scorers, 'smoke', metrics=['ssim', 'fid_corpus', 'lse_c'])
    assert [r['clip'] for r in rows if r['metric'] == 'fid_corpus'] == ['all'] and len(rows) == 3 * 3 + 1
    summary = summarise(rows).set_index('metric')
    assert summary.loc['fid_corpus', 'n'] == 1 and np.isnan(summary.loc['fid_corpus', 'low'])
    table = metric_table(summarise(rows), metrics=['ssim', 'lse_c', 'fid_corpus'])
    assert metric_columns(table) == ['ssim', 'lse_c[toy]', 'lse_c[other]', 'fid_corpus']
    assert told_beside(metric_columns(table)) == {'ssim': 'ssim', 'lse_c[toy]': 'lse_c', 'fid_corpus': 'fid_corpus'}


# --- long clips -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('frames', [60, 61, 64, 65])
@pytest.mark.parametrize('net', ['light_syncnet', 'syncnet_v2'])
def test_sync_scores_in_pieces_are_those_of_the_whole_clip(frames, net):
    "Networks that hear mel or MFCC windows, whose columns meet frames at every fifth one or at every one."
    torch.manual_seed(0); net = build_expert(dict(light_syncnet=dict(name='light_syncnet', width=8, dim=16), syncnet_v2=dict(name='syncnet_v2', width=.0625, dim=16))[net])
    faces, wav = noisy(smooth(frames, 64), 20), np.random.default_rng(0).normal(0, .1, 640 * frames).astype(np.float32)
    whole, pieces = SyncScorer(net, 'x'), SyncScorer(net, 'x'); pieces.piece = 20
    for a, b in zip(whole.embed(faces, wav), pieces.embed(faces, wav)):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=2e-5)
    assert pieces(faces, wav)[:2] == pytest.approx(whole(faces, wav)[:2], rel=1e-4)


def test_memory_mapped_frames_are_not_read_at_once(scorers, tmp_path, monkeypatch):
    clip = clip_of(frames=200)
    np.save(tmp_path/'faces.npy', clip.faces); mapped = np.load(tmp_path/'faces.npy', mmap_mode='r')
    largest = [0]; real = np.ascontiguousarray
    def watched(x, *a, **k):
        if getattr(x, 'ndim', 0) == 4: largest[0] = max(largest[0], len(x))
        return real(x, *a, **k)
    monkeypatch.setattr(np, 'ascontiguousarray', watched)
    names = [n for n in available_metrics(scorers) if split_name(n)[0] in CLIP_SCORES and not n.startswith(('lse', 'offset', 'avs'))]
    want = {r['metric']: r['value'] for r in score_clip(Case(noisy(clip.faces, 5), clip, scorers), names)}
    np.save(tmp_path/'made.npy', noisy(clip.faces, 5)); clip.faces = mapped
    got = {r['metric']: r['value'] for r in score_clip(Case(np.load(tmp_path/'made.npy', mmap_mode='r'), clip, scorers), names)}
    assert got == want and 0 < largest[0] <= 130


@pytest.mark.parametrize('first', ['identical', 'different'])
def test_a_collection_keeps_metrics_apart(first):
    "torchmetrics merges metrics whose states agree after the first clip; ours have names of their own."
    from torchmetrics import MetricCollection
    draw = np.random.default_rng(0); clip = lambda: draw.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    make = lambda: {'mse': MSE(), 'ifc': IFCDiff(), 'gaussian': SSIM(setting='gaussian'), 'uniform': SSIM(setting='uniform')}
    true = [clip() for _ in range(3)]; made = [true[0] if first == 'identical' else clip(), clip(), clip()]
    both, alone = MetricCollection(make()), make()
    for g, t in zip(made, true):
        both.update(g, t)
        for metric in alone.values(): metric.update(g, t)
    found = both.compute()
    for name, metric in alone.items(): assert float(found[name]) == pytest.approx(float(metric.compute()), rel=1e-12), name
    assert len({round(float(v), 9) for v in found.values()}) == 4


def test_bad_frames_and_sound_are_refused_not_scored(scorers):
    clip = clip_of()
    with pytest.raises(InputError, match='expected uint8'): Case(np.asarray(clip.faces)/255, clip, scorers)
    broken = np.asarray(clip.faces, np.float32)/255; broken[1] = np.nan
    with pytest.raises(InputError, match='NaN'): scorers.lips(broken)
    whole, same = np.clip(np.asarray(clip.wav), -1, 1), scorers.syncs['toy']
    assert same(clip.faces, (whole*32767).astype(np.int16)).distance == pytest.approx(same(clip.faces, whole).distance, abs=1e-2)
    for bad in ((np.full(4, np.nan), np.eye(4)), (np.zeros(4), np.full((4, 4), np.inf)), (np.zeros(3), np.eye(3))):
        with pytest.raises(InputError): frechet_distance((np.zeros(4), np.eye(4)), bad)
        with pytest.raises(InputError): frechet_distance(bad, (np.zeros(4), np.eye(4)))
    with pytest.raises(InputError, match='NaN or infinite'): lse(lse_distances(np.full((40, 4), np.nan), np.zeros((40, 4))))
    clip.valid = np.zeros(len(clip.faces), bool)
    row, = score_clip(Case(clip.faces, clip, scorers), ['lse_d[toy]']); assert row['value'] is None and 'no frame shows a face' in row['reason']


def test_each_score_takes_its_own_measure(scorers):
    "Scores of one family differ, and each is what its function gives by hand."
    from talkingface.metrics.lips import aperture
    from talkingface.metrics.silence import leak_coefficients, leak_sums, silent_segments, silent_values
    clip = clip_of(frames=60); clip.wav = np.array(clip.wav); clip.wav[30*640:] = 0; clip.valid = np.arange(60) != 7
    made, shown = noisy(clip.faces, 40), np.arange(60)[::-1].copy()
    case = Case(made, clip, scorers, reference=shown); value = {r['metric']: r for r in score_clip(case, expand(None, scorers, reference=True))}
    lips, true = scorers.lips(made), scorers.lips(clip.faces)
    hand = silent_values(aperture(lips), aperture(true), silent_segments(clip.wav), clip.valid)
    assert {k: value[f'silent_{k}']['value'] for k in ('aperture', 'excess', 'variance')} == pytest.approx({k: hand[k] for k in ('aperture', 'excess', 'variance')})
    assert value['silent_aperture']['n_frames'] == hand['frames'] < 30 and value['aperture_correlation']['n_frames'] == 59
    size = np.asarray(clip.landmarks)*96/made.shape[-1]
    assert value['lmd_stored']['value'] == pytest.approx(np.nanmean(lmd_frames(lips, size, clip.valid)))
    net = scorers.speech['toy']; a, b = net(made, clip.wav, clip.landmarks), net(clip.faces, clip.wav, clip.landmarks)
    for name, stream in (('avs_m[toy]', 'joint'), ('avs_v[toy]', 'video')):
        assert value[name]['value'] == pytest.approx(float((a[stream]*b[stream]).sum(1)[clip.valid].mean()), abs=1e-5)
    sums = leak_sums(aperture(lips), aperture(true), aperture(true)[shown], clip.valid & clip.valid[shown])
    for name, want in zip(('lip_leak', 'lip_follow'), leak_coefficients(sums)):
        assert finish_set(name, [set_parts(case, [name])[name]], scorers)['value'] == pytest.approx(want)
    quiet = clip_of(); quiet.wav = np.zeros_like(quiet.wav)
    assert [r['value'] for r in score_clip(Case(quiet.faces, quiet, scorers), ['avs_u[toy]', 'lse_d[toy]'])] == [None, None]


def test_the_scorer_gives_the_published_arithmetic():
    "SyncScorer on pictures and sound equals distances of raw, not normalised, embeddings of syncnet_v2."
    torch.manual_seed(0); expert = build_expert({'name': 'syncnet_v2', 'width': .0625, 'dim': 16}).eval()
    draw = np.random.default_rng(0); faces = draw.integers(0, 256, (14, 3, 64, 64), dtype=np.uint8); sound = draw.normal(0, .1, 14*640 + 300).astype(np.float32)
    with torch.no_grad():
        v, a = (x[0] for x in (expert.raw_video(torch.from_numpy(faces)[None].float()/255), expert.raw_audio(expert.audio_features(torch.from_numpy(sound[:14*640])[None]))))
    count = 14 - 5                                           # as the published script counts: one window fewer than there are
    want = lse(lse_distances(v[:count], a[:count])); found = SyncScorer(expert, 'v2')(faces, sound)
    assert found.distance == pytest.approx(want.distance, rel=1e-4) and found.offset == want.offset and abs(float(v.norm(dim=1).mean()) - 1) > .01
