"The feature network: shapes, batches as functions of the step, training that resumes bit for bit, labels, damage."
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from talkingface.core import CheckpointError, InputError, ParamsError, rng, typed
from talkingface.experts.features import FeatureNet, build_features, load_features
from talkingface.metrics.perceptual import load_feature_scorer, load_lpips_corpus, lpips
from talkingface.training.features import (UNKNOWN, VISEME_NAMES, FeatureBatches, FeatureParams, feature_accuracy, known_people,
                                           train_features, viseme_frames)


class Clips(list):
    "What training reads of a store."
    info = {'content': 'toys'}
    rows = property(lambda self: [dict(clip=c.name, split=c.split, identity=c.identity) for c in self])
    def split(self, name): return Clips(c for c in self if c.split == name)


def toy_clip(i, frames=50, split=None, phones=('p', 'aɪ', 's')):
    "A person is a tint."
    draw = rng(i, 'clip'); person = i % 3; times = .2 + .2*np.arange(len(phones))[:, None] + np.array([0, .2])
    faces = np.array([40 + 80*person, 120, 220 - 80*person])[:, None, None] + draw.normal(0, 6, (frames, 3, 96, 96))
    return SimpleNamespace(name=f'clip{i}', split=split or ('train', 'train', 'train', 'val', 'test', 'test')[i % 6],
                           identity=f'p{person}', frames=frames, faces=faces.clip(0, 255).astype(np.uint8), phones=phones,
                           phone_times=times, valid=np.arange(frames) % 7 != 6)


@pytest.fixture(scope='module')
def toys(): return Clips(toy_clip(i) for i in range(12))


def settings(**options): return FeatureParams(**{**dict(width=3, embedding=8, steps=6, batch=8, warmup=2, checkpoint_every=2), **options})


def test_visemes_of_frames():
    clip = toy_clip(0); names = [VISEME_NAMES[v] for v in viseme_frames(clip)]
    assert names[:5] == ['silence']*5 and names[5:10] == ['bilabial']*5 and names[15:20] == ['alveolar fricative']*5
    assert set(names[10:15]) == {'mid vowel', 'close vowel'} and set(names[20:]) == {'silence'} and len(names) == 50
    assert (viseme_frames(toy_clip(0, phones=())) == UNKNOWN).all() and len(VISEME_NAMES) == 13


def test_batches_are_functions_of_the_step(toys):
    train = toys.split('train'); batches = FeatureBatches(train, settings()); other = FeatureBatches(train, settings())
    other[0]
    for name, x in batches[5].items(): assert torch.equal(x, other[5][name])
    assert not torch.equal(batches[5]['faces'], batches[6]['faces'])
    assert not torch.equal(batches[5]['faces'], FeatureBatches(train, settings(seed=1))[5]['faces'])


def test_kept_back_frames_are_never_trained_on(toys):
    train = toys.split('train'); batches = FeatureBatches(train, settings(held_out=.3))
    for seen, kept, clip in zip(batches.seen, batches.kept_back, train):
        assert len(seen) and len(kept) and seen.max() + batches.gap < kept.min() and clip.valid[seen].all() and clip.valid[kept].all()


def test_labels_belong_to_the_pictures(toys):
    batches = FeatureBatches(toys.split('train'), settings(batch=64)); batch = batches[0]
    tint = batch['faces'].float().mean((2, 3))[:, 0]
    assert torch.equal(batch['identity'], ((tint - 40)/80).round().long()) and 0 <= batch['viseme'].min() <= batch['viseme'].max() < 13


@pytest.mark.parametrize('precision', ['32-true', 'bf16-mixed'])
def test_training_resumes_bit_for_bit(tmp_path, toys, monkeypatch, precision):
    whole = train_features(toys, settings(precision=precision), tmp_path/'whole')
    forward, calls = FeatureNet.forward, []
    def dying(self, faces):
        calls.append(1)
        if len(calls) == 5: raise KeyboardInterrupt
        return forward(self, faces)
    monkeypatch.setattr(FeatureNet, 'forward', dying)
    with pytest.raises(KeyboardInterrupt): train_features(toys, settings(precision=precision), tmp_path/'broken')
    torch.manual_seed(99); again = train_features(toys, settings(precision=precision), tmp_path/'broken')
    assert again == whole
    for name in ('model.safetensors', 'log.csv'): assert (tmp_path/'whole'/name).read_bytes() == (tmp_path/'broken'/name).read_bytes()


def test_what_a_training_leaves_behind(tmp_path, toys):
    found = train_features(toys, settings(), tmp_path)
    meta = json.loads((tmp_path/'meta.json').read_text())
    assert meta['metrics'] == found and set(found) == {'train', 'val', 'test'} and meta['data'] == 'toys'
    assert meta['config'] == dict(name='feature_net', identities=3, visemes=13, width=3, embedding=8)
    assert found['train']['identity_chance'] == 1/3 and 0 < found['val']['viseme_constant'] <= 1
    assert train_features(toys, settings(), tmp_path) == found
    with pytest.raises(CheckpointError, match='differs from this one'): train_features(toys, settings(steps=7), tmp_path)
    net = load_features(tmp_path)
    assert feature_accuracy(net, toys, 'val') == found['val'] and not any(p.requires_grad for p in net.parameters())
    faces = toys[0].faces
    assert load_feature_scorer(tmp_path)(faces[:4]).shape == (4, 24) and lpips(load_lpips_corpus(tmp_path), faces[:2], faces[:2]) == 0
    for what in (load_feature_scorer(tmp_path), load_lpips_corpus(tmp_path)): assert meta['weights_sha256'][:8] in what.protocol


def test_people_are_learned_without_phonemes(tmp_path):
    clips = Clips(toy_clip(i, phones=()) for i in range(12))
    found = train_features(clips, settings(steps=80, warmup=4, lr=1e-2), tmp_path)
    assert found['train']['identity'] > .9 and found['test']['identity_auc'] == 1
    assert found['val']['viseme'] is None and load_features(tmp_path).viseme is None


def test_some_clips_without_phonemes_teach_people(tmp_path):
    clips = Clips(toy_clip(i, phones=() if i % 2 else ('p',)) for i in range(12))
    found = train_features(clips, settings(batch=4), tmp_path)
    assert found['val']['viseme'] is None and load_features(tmp_path).config['visemes'] == 13       # val clips have odd numbers
    assert all(np.isfinite(float(v)) for line in (tmp_path/'log.csv').read_text().splitlines()[1:] for v in line.split(',') if v)


def test_stores_that_cannot_teach_are_refused(tmp_path, toys):
    one = Clips(c for c in toys if c.identity == 'p0' and c.split == 'train')
    with pytest.raises(InputError, match='two people or more'): train_features(one, settings(), tmp_path/'a')
    with pytest.raises(InputError, match="none of that split"): train_features(toys.split('val'), settings(), tmp_path/'b')
    blind = toy_clip(3, split='val'); blind.valid = np.zeros(50, bool)
    with pytest.raises(InputError, match='with none'): feature_accuracy(FeatureNet(3), Clips([blind]), 'val')


def test_parameters():
    assert typed(FeatureParams, {'steps': 5, 'augmentation': {'shift': 0}}).augmentation.shift == 0
    for bad, words in (({'held_out': 1.}, 'held_out'), ({'viseme': -1.}, 'viseme'), ({'augmentation': {'rotation': 3.}}, 'rotation'),
                       ({'widht': 3}, "did you mean 'width'")):
        with pytest.raises(ParamsError, match=words): typed(FeatureParams, bad)
    with pytest.raises(ParamsError, match='expected 1 or more identities'): FeatureNet(0)
    with pytest.raises(ParamsError, match="did you mean 'width'"): build_features({'name': 'feature_net', 'widht': 3})


def test_network_is_a_function_of_each_picture():
    "A batch is its pictures, float64 as float32, other sizes, gradients, brightness matters."
    torch.manual_seed(0); net = FeatureNet(3, 13, width=4).eval(); x = torch.rand(3, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(net.pool(x), torch.cat([net.pool(p[None]) for p in x]), rtol=1e-4, atol=1e-5)
        wide = FeatureNet(3, 13, width=4).eval().double(); wide.load_state_dict(net.state_dict())
        torch.testing.assert_close(wide.pool(x.double()).float(), net.pool(x), rtol=1e-4, atol=1e-5)
        assert net.pool(torch.rand(2, 3, 160, 120)).shape == (2, 32) and (net.pool(.5*x) - net.pool(x)).abs().max() > 1e-3
        torch.testing.assert_close(net.embed(x).norm(dim=1), torch.ones(3))
    x.requires_grad_(); slope, = torch.autograd.grad(net.embed(x)[:, 0].sum(), x); assert slope.abs().sum() > 0
    assert known_people(FeatureNet(3), SimpleNamespace(kept_back=[np.zeros(0, int)], people=['a', 'b']))['identity'] is None
