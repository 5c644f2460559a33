"LPIPS and FID: goldens, published layouts, the package lpips, and what must hold of any such measure."
import copy
import os
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from goldens import compare, det_array, det_state, load_golden, load_manifest

from talkingface.core import CheckpointError, InputError, MissingExtra, MissingWeights, ParamsError
from talkingface.experts.features import FeatureNet
from talkingface.metrics import perceptual
from talkingface.metrics.base import METRICS
from talkingface.metrics.perceptual import (FID, LPIPS, CorpusLPIPS, FeatureScorer, InceptionFID, LPIPSNet, Moments, fid,
                                            frechet_distance, layer_distances, load_inception, load_lpips, lpips, lpips_frames,
                                            reference_moments)
from talkingface.weights import load_published, load_weights

CASES = ('full', 'shifted', 'identical', 'lowrank', 'degenerate', 'big')


def det_weights(manifest: str, **rule) -> dict[str, torch.Tensor]:
    "Weights in the layout of a published file, by rule det-v1."
    return {k: torch.from_numpy(det_array(k, shape, **rule)) for k, shape in load_manifest(manifest).items()}


def trunk_file(path, kind: str):
    "A file in the layout of torchvision, with a classifier behind the features."
    features = {k.split('.', 2)[2]: v for k, v in det_weights(f'lpips_{kind}', salt=f'{kind}:').items() if k.startswith('net.')}
    torch.save({**{f'features.{k}': v for k, v in features.items()}, 'classifier.1.bias': torch.zeros(8)}, path)
    return path


def picture(frames=4, size=96, seed=0):
    coarse = torch.rand(frames, 3, 10, 10, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size, mode='bicubic').clamp(0, 1)


def blurred(x, factor): return F.interpolate(F.avg_pool2d(x, factor), x.shape[-2:], mode='bilinear')


def noised(x, sigma): return (x + sigma*torch.randn(x.shape, generator=torch.Generator().manual_seed(5))).clamp(0, 1)


@pytest.fixture(scope='module')
def alex(tmp_path_factory):
    return load_lpips('alex', file=trunk_file(tmp_path_factory.mktemp('alex')/'alexnet-owt-7be5be79.pth', 'alex'))


@pytest.fixture(scope='module')
def corpus():
    torch.manual_seed(0)
    return FeatureNet(width=8).eval().requires_grad_(False)


@pytest.fixture(scope='module')
def inception_file(tmp_path_factory):
    "A file as the published one is laid out; counters of batch norm are missing, as in old files."
    path = tmp_path_factory.mktemp('inception')/InceptionFID.file
    torch.save({k: v for k, v in det_weights('fid_inception_v3').items() if not k.endswith('num_batches_tracked')}, path)
    return path


@pytest.fixture(scope='module')
def inception(inception_file): return load_inception(file=inception_file)


@pytest.mark.parametrize('case', CASES)
def test_frechet_distance_meets_the_golden(case):
    golden = load_golden('pytorch_fid_frechet')
    a, b = golden.inputs[f'{case}_a'], golden.inputs[f'{case}_b']
    compare(golden, {case: np.float64(frechet_distance(a, b))}, only=[case])
    compare(golden, {case: np.float64(frechet_distance(b, a))}, only=[case])
    streamed = [Moments.of(x[i:i + 7] for i in range(0, len(x), 7)) for x in (a, b)]
    compare(golden, {case: np.float64(frechet_distance(*streamed))}, only=[case])


def test_golden_names_every_case():
    assert set(load_golden('pytorch_fid_frechet').outputs) == set(CASES)


def test_lpips_meets_the_golden():
    golden = load_golden('lpips_alex'); net = LPIPSNet('alex')
    linear = load_published(perceptual._linear_weights('alex')); state = {**net.state_dict(), **det_state(golden), **linear}
    load_weights(net, state | {f'lins.{k[3:]}': v for k, v in linear.items()})
    a, b = (torch.from_numpy(golden.inputs[k]) for k in 'ab')
    with torch.no_grad():
        terms, maps = net.layers(a, b), net.maps(a)
        compare(golden, {'dist': net(a, b), 'dist_norm01': lpips_frames(net, (a + 1)/2, (b + 1)/2).float(),
                         **{f'layer{i}': terms[:, i] for i in range(5)},
                         **{f'feat{i}_mean': m.mean((2, 3)) for i, m in enumerate(maps)}})


@pytest.mark.parametrize('kind', ['alex', 'vgg'])
def test_lpips_has_the_published_layout(kind):
    assert {k: tuple(v.shape) for k, v in LPIPSNet(kind).state_dict().items()} == load_manifest(f'lpips_{kind}')


@pytest.mark.parametrize('kind', ['alex', 'vgg'])
def test_lpips_equals_the_package(tmp_path, kind):
    package = pytest.importorskip('lpips')
    ours = load_lpips(kind, file=trunk_file(tmp_path/'trunk.pth', kind))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); theirs = package.LPIPS(net=kind, pnet_rand=True, verbose=False)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    a, b = 2*picture(2, 64) - 1, 2*picture(2, 64, seed=1) - 1
    with torch.no_grad():
        value, terms = theirs(a, b, retPerLayer=True)
        torch.testing.assert_close(ours(a, b), value.view(-1), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(ours.layers(a, b), torch.cat(terms, 1)[..., 0, 0], rtol=1e-5, atol=1e-8)


def test_inception_has_the_published_layout():
    with torch.device('meta'): net = InceptionFID()
    manifest = load_manifest('fid_inception_v3')
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == manifest
    load_weights(net, {k: torch.empty(shape, device='meta') for k, shape in manifest.items()})


def test_inception_is_wired_as_torchvision_but_for_its_poolings(inception, monkeypatch):
    "Average poolings do not count padding, and the last mixed block takes the maximum."
    models = pytest.importorskip('torchvision.models.inception')
    theirs = models.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    theirs.load_state_dict(inception.state_dict(), strict=True); theirs.eval(); theirs.fc = torch.nn.Identity()
    average = F.avg_pool2d
    class Pools:                              # stands for torch.nn.functional there; only the last block pools 2048 channels
        def __getattr__(self, name): return getattr(F, name)
        def avg_pool2d(self, x, **how):
            return F.max_pool2d(x, **how) if x.shape[1] == 2048 else average(x, **how, count_include_pad=False)
    monkeypatch.setattr(models, 'F', Pools())
    x = picture(1, 96)
    with torch.no_grad():
        expected = theirs(2*F.interpolate(x, (299, 299), mode='bilinear') - 1)
        torch.testing.assert_close(inception(x), expected, rtol=1e-4, atol=1e-5)
        assert (inception(x) - inception.stages(x)[-1].mean((2, 3))).abs().max() == 0 and inception(x).std() > 1e-3


def test_inception_refuses_other_files(tmp_path):
    path = tmp_path/'other.pth'; torch.save({'conv1.weight': torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match='another architecture than InceptionFID'): load_inception(file=path)
    with pytest.raises(CheckpointError, match='another architecture than LPIPSNet'): load_lpips('alex', file=path)


@pytest.mark.parametrize('kind', ['alex', 'vgg'])
def test_a_trunk_of_the_other_kind_is_refused(tmp_path, kind):
    path = trunk_file(tmp_path/'trunk.pth', 'vgg' if kind == 'alex' else 'alex')
    with pytest.raises(CheckpointError, match='another architecture than LPIPSNet'): load_lpips(kind, file=path)


def test_missing_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(tmp_path))
    with pytest.raises(MissingWeights, match='alexnet-owt-7be5be79.pth'): load_lpips('alex')
    with pytest.raises(MissingWeights, match='vgg16-397923af.pth'): load_lpips('vgg')
    with pytest.raises(MissingWeights, match='pt_inception-2015-12-05-6726825d.pth'): load_inception()
    with pytest.raises(ParamsError, match="did you mean 'vgg'"): load_lpips('vgg16')
    trunk_file(tmp_path/'alexnet-owt-7be5be79.pth', 'alex'); assert load_lpips('alex').meta['file'] == 'alexnet-owt-7be5be79.pth'
    monkeypatch.setattr(perceptual.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(MissingExtra, match=r'talkingface\[perceptual\]'): load_lpips('alex')


def test_a_trunk_that_wants_to_run_code_is_refused(tmp_path):
    class Command:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/ran',)
    torch.save({'features.0.weight': Command()}, tmp_path/'trunk.pth')
    with pytest.raises(CheckpointError, match='refused'): load_lpips('alex', file=tmp_path/'trunk.pth')
    assert not (tmp_path/'ran').exists()


@pytest.mark.parametrize('which', ['alex', 'corpus'])
def test_perceptual_distances(alex, corpus, which):
    "0 for equal clips, symmetric, at least 0, a batch is its frames, uint8 as floats, float32 as float64, read-only memory."
    net = alex if which == 'alex' else CorpusLPIPS(corpus); clip = (255*picture(5)).byte(); other = (255*noised(picture(5), .1)).byte()
    values = lpips_frames(net, other, clip)
    assert values.shape == (5,) and values.dtype == torch.float64 and (values > 0).all()
    assert lpips_frames(net, clip, clip).eq(0).all()
    torch.testing.assert_close(lpips_frames(net, clip, other), values, rtol=1e-6, atol=0)
    torch.testing.assert_close(lpips_frames(net, other, clip, batch=2), values, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(lpips_frames(net, other.float()/255, clip.float()/255), values, rtol=1e-4, atol=1e-8)
    frozen = clip.numpy(); frozen.setflags(write=False)
    torch.testing.assert_close(lpips_frames(net, other.numpy(), frozen), values)
    torch.testing.assert_close(lpips_frames(copy.deepcopy(net).double(), other, clip), values, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize('which', ['alex', 'corpus'])
@pytest.mark.parametrize('damage', [lambda x, s: blurred(x, 2**s), lambda x, s: noised(x, .03*s)], ids=['blur', 'noise'])
def test_distances_grow_with_the_damage(alex, corpus, which, damage):
    net, x = (alex if which == 'alex' else CorpusLPIPS(corpus)), picture(6)
    values = [lpips(net, damage(x, s), x) for s in range(5)]
    assert values[0] == 0 and values == sorted(values) and len(set(values)) == 5


@pytest.mark.parametrize('damage', [lambda x, s: blurred(x, 2**s), lambda x, s: noised(x, .03*s)], ids=['blur', 'noise'])
def test_fid_grows_with_the_damage(corpus, damage):
    scorer, x = FeatureScorer(corpus), picture(100); truth = Moments.of(scorer(x))
    values = [fid(Moments.of(scorer(damage(x, s))), truth).value for s in range(5)]
    assert values[0] < 1e-6 and values == sorted(values) and len(set(values)) == 5


def test_fid_in_float32_is_that_of_float64(corpus):
    wide, x, y = copy.deepcopy(corpus).double(), picture(200), noised(picture(200), .1)
    exact = frechet_distance(*(wide.pool(v.double()) for v in (y, x))); scorer = FeatureScorer(corpus)
    assert frechet_distance(scorer(y), scorer(x)) == pytest.approx(exact, rel=1e-4)


def test_bad_clips_are_refused(alex):
    clip = picture(3)
    with pytest.raises(InputError, match='generated has 2 frames, truth has 3'): lpips_frames(alex, clip[:2], clip)
    with pytest.raises(InputError, match='differ in shape'): lpips_frames(alex, picture(3, 64), clip)
    with pytest.raises(InputError, match='T >= 1'): lpips_frames(alex, clip[:0], clip[:0])
    with pytest.raises(InputError, match='at least 32 pixels'): lpips_frames(alex, picture(3, 16), picture(3, 16))
    broken = clip.clone(); broken[1, 0, 0, 0] = float('nan')
    with pytest.raises(InputError, match='1 of 3 frames hold NaN'): lpips_frames(alex, broken, clip)
    with pytest.raises(InputError, match='1 of 3 frames hold NaN'): FeatureScorer(FeatureNet(width=2))(broken)
    with pytest.raises(InputError, match='T >= 1'): FeatureScorer(FeatureNet(width=2))(clip[:0])


def test_layers_without_features_are_no_distance():
    zero = [torch.zeros(1, 3, 2, 2)]
    assert layer_distances(zero, zero, [lambda d: d.sum(1, keepdim=True)]).item() == 0


def test_gradients_reach_the_pictures(alex):
    x = picture(1).requires_grad_()
    slope, = torch.autograd.grad(alex(2*x - 1, 2*blurred(picture(1), 4) - 1).sum(), x)
    assert torch.isfinite(slope).all() and slope.abs().sum() > 0


def test_moments_of_a_stream_are_those_of_the_whole():
    x = np.random.default_rng(0).normal(40, 2, (1000, 24))
    parts = Moments.of(x[i:i + 33] for i in range(0, 1000, 33)); half = Moments.of(x[:400]) + Moments.of(x[400:])
    for moments in (parts, half, Moments.of(x)):
        assert moments.count == 1000
        np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.cov, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)
    single = frechet_distance(Moments.of(x[:500].astype(np.float32)), Moments.of(x[500:].astype(np.float32)))
    assert single == pytest.approx(frechet_distance(x[:500], x[500:]), rel=1e-4)


def test_moments_refuse_what_is_no_feature():
    with pytest.raises(InputError, match=r'expected features \(n,4\)'): Moments(4).add(torch.zeros(3, 5))
    with pytest.raises(InputError, match='NaN or infinite'): Moments(4).add(torch.full((3, 4), float('inf')))
    with pytest.raises(InputError, match='at least two frames'): frechet_distance(torch.zeros(1, 4), torch.zeros(5, 4))
    with pytest.raises(InputError, match='use one network'): frechet_distance(torch.randn(9, 4), torch.randn(9, 5))
    with pytest.raises(InputError, match='got none'): Moments.of([])


@pytest.mark.parametrize('frames', [300, 20])
def test_frechet_distance_is_symmetric_and_zero_at_identity(frames):
    draw = np.random.default_rng(3); a, b = draw.normal(0, 1, (frames, 48)), draw.normal(.1, 2, (frames, 48))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-5)
    assert frechet_distance(a, a) < 1e-5 < frechet_distance(a, b)
    assert frechet_distance(np.zeros((5, 3)), np.zeros((5, 3))) == 0
    assert frechet_distance(np.zeros((5, 3)), np.ones((5, 3))) == pytest.approx(3)


def test_few_frames_are_named():
    x = torch.randn(40, 16)
    assert fid(Moments.of(x), Moments.of(x)).reason == ''
    few = fid(Moments.of(x[:10]), Moments.of(x[:10]))
    assert 'biased upwards' in few.reason and '10 frames are fewer than the 16 dimensions' in few.reason and np.isfinite(few.value)
    assert '40 generated and 30 true' in fid(Moments.of(x), Moments.of(x[:30])).reason
    metric = FID(dim=16); metric.update(x[:10], x[:10])
    with pytest.warns(UserWarning, match='biased upwards'): metric.compute()
    empty = FID(dim=16); empty.update(x[:1], x[:1]); assert torch.isnan(empty.compute())


def test_fid_of_frames_and_of_a_reference(corpus):
    scorer, a, b = FeatureScorer(corpus, batch=7), picture(80), noised(picture(80), .05)
    whole = FID(scorer); whole.update(b, a)
    pieces = FID(scorer); pieces.set_reference(Moments.of(scorer(a)))
    for i in range(0, 80, 11): pieces.update(generated=b[i:i + 11])
    assert whole.compute().item() == pytest.approx(pieces.compute().item(), rel=1e-6)
    assert whole.compute().item() == pytest.approx(frechet_distance(scorer(b), scorer(a)), rel=1e-9)
    assert whole.info.name == 'fid_corpus' and FID(dim=4).info.name == 'fid' and whole.higher_is_better is False
    whole.reset(); assert whole.generated_count == 0 and whole.generated_outer.abs().sum() == 0
    with pytest.raises(InputError, match='expected moments of 64'): whole.set_reference(Moments(5))


def test_two_processes_give_the_value_of_one(tmp_path):
    "Half of the features in each of two processes."
    script = tmp_path/'two.py'
    script.write_text(textwrap.dedent('''
        import sys, numpy as np, torch, torch.distributed as dist
        from talkingface.metrics.perceptual import FID
        dist.init_process_group('gloo'); torch.set_num_threads(1)
        a, b = (torch.from_numpy(np.random.default_rng(s).normal(s, 1, (101, 6))) for s in (1, 2))
        metric = FID(dim=6); metric.update(a[dist.get_rank()::2], b[dist.get_rank()::2])
        value = metric.compute().item()
        if dist.get_rank() == 0: open(sys.argv[1], 'w').write(repr(value))
        dist.destroy_process_group()
    '''))
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path), 'OMP_NUM_THREADS': '1'}
    subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(script),
                    str(tmp_path/'value')], check=True, env=environment, timeout=120, capture_output=True)
    a, b = (np.random.default_rng(s).normal(s, 1, (101, 6)) for s in (1, 2))
    assert float((tmp_path/'value').read_text()) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_lpips_class_is_the_mean_over_clips(alex, corpus):
    x, y, z = picture(3), noised(picture(3), .1), blurred(picture(3), 4)
    metric = LPIPS(alex); metric.update(y, x); metric.update(z, x)
    assert metric.compute().item() == pytest.approx((lpips(alex, y, x) + lpips(alex, z, x))/2)
    assert metric.info is METRICS['lpips'] and LPIPS(CorpusLPIPS(corpus)).info is METRICS['lpips_corpus']


def test_reference_moments_are_kept_and_mended(tmp_path):
    calls = []
    def make(): calls.append(1); return Moments.of(torch.arange(24.).view(6, 4))
    first = reference_moments('a', make, tmp_path); again = reference_moments('a', make, tmp_path)
    assert len(calls) == 1 and again.count == 6 and torch.equal(first.outer, again.outer) and torch.equal(first.total, again.total)
    reference_moments('b', make, tmp_path); assert len(calls) == 2
    reference_moments('a', make); assert len(calls) == 3                                           # no folder: not kept
    for file in tmp_path.glob('*.safetensors'): file.write_bytes(b'broken')
    with pytest.warns(UserWarning, match='damaged'): mended = reference_moments('a', make, tmp_path)
    assert len(calls) == 4 and torch.equal(mended.cov, first.cov)
    reference_moments('a', make, tmp_path); assert len(calls) == 4


def test_inception_features_of_a_clip(inception):
    "uint8 and floats alike, a batch is its frames, nothing moves by calling train()."
    scorer, clip = FeatureScorer(inception, batch=2), (255*picture(3, 48)).byte()
    values = scorer(clip)
    assert values.shape == (3, 2048) and 'inception' in scorer.protocol and 'sha256:' in scorer.protocol
    inception.train()
    torch.testing.assert_close(scorer(clip[2:])[0], values[2], rtol=1e-4, atol=1e-5)


def test_every_entry_says_what_it_needs():
    for name, need in (('lpips', 'weights'), ('fid', 'weights'), ('lpips_corpus', 'features'), ('fid_corpus', 'features')):
        info = METRICS[name]
        assert need in info.needs and info.higher_is_better is False and info.range[0] == 0 and len(info.protocol) > 80


def test_importing_does_not_import_the_package_lpips():
    code = "import sys, talkingface.metrics.perceptual; sys.exit('lpips' in sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True, timeout=120)
