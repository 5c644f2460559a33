"AV-HuBERT training: labels, masks and batches as functions of the step, resume bit for bit, agreement, errors."
import json
import os
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from talkingface.core import CheckpointError, InputError, ParamsError, rng, typed
from talkingface.data.clips import Clip
from talkingface.data.speech import ARTICULATION
from talkingface.experts.avhubert import AVHubertExpert
from talkingface.experts.checkpoints import load_expert
from talkingface.training.avhubert import (PHONES, VISEME, AVHubertParams, ClusterBatches, ClusterObjective, Finetune, Inputs,
                                           Iteration, SpeechObjective, alignment, cluster_labels, constant_error, contrast_loss,
                                           crossmodal_agreement, error_count, finetune_avhubert, kmeans, mfcc_rows,
                                           SpeechBatches, nearest, phone_frames, phoneme_error_rate, pretrain_avhubert,
                                           simple_phones, substitutes, viseme_confusion)

torch.set_num_threads(1)
NET = dict(dim=16, layers=2, heads=2, ffn=32, conv_pos=8, conv_pos_groups=4, front_width=.05, prelu=False, clusters=8,
           final_dim=8, dropout=.1)


class Clips(list):
    rows = property(lambda self: [dict(split=c.split, frames=c.frames) for c in self])
    def split(self, *names): return Clips(c for c in self if c.split in names)
    def first(self, n): return Clips(self[:n])


def toy_clip(i, frames=26, phones=('p', 'aɪ', 's')):
    draw = rng(i, 'clip'); points = np.full((frames, 68, 2), 48, np.float32); points[:, 48:] = [48, 72]
    points[:, [33, 36, 39, 42, 45]] = [[48, 55], [26, 33], [39, 33], [57, 33], [70, 33]]
    wav = draw.normal(0, .1, frames*640)*np.repeat(np.arange(frames) % 9 > 3, 640)
    times = .2 + .2*np.arange(len(phones))[:, None] + np.array([0, .2])
    return Clip(f'clip{i}', ('train', 'train', 'train', 'val', 'test')[i % 5], f'p{i}', '',
                draw.integers(0, 255, (frames, 3, 96, 96), np.uint8), draw.integers(0, 255, (frames, 96, 96), np.uint8), points,
                np.ones(frames, bool), np.zeros((frames, 4), np.float32), np.zeros((80, 90), np.float32), wav.astype(np.float32),
                tuple(phones), times.astype(np.float32))


@pytest.fixture(scope='module')
def toys(): return Clips(toy_clip(i, 26 + i % 3) for i in range(5))


def settings(**options):
    rounds = [dict(clusters=8, steps=4, contexts=[0, 3]), dict(source='features', clusters=6, steps=4, layers=[1, 2])]
    return AVHubertParams(**{**dict(net=NET, shrink=2, iterations=rounds, batch=2, frames=24, warmup=2, log_every=1,
                                    finetune=Finetune(steps=4, warmup=2, freeze=2, frame=.5, keep=.5)), **options})


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); yield


def interrupted(monkeypatch, owner, *at):
    "Make `owner.forward` die once at each of its calls in `at`."
    calls, left, call = [0], list(at), owner.forward
    def dying(self, *args):
        calls[0] += 1
        if left and calls[0] == left[0]: left.pop(0); raise KeyboardInterrupt
        return call(self, *args)
    monkeypatch.setattr(owner, 'forward', dying)
    return left


def run_to_end(train, deaths):
    while deaths:
        with pytest.raises(KeyboardInterrupt): train()
        np.random.seed(99); torch.manual_seed(99)
    return train()


def assert_same(a, b):
    for name in ('model.safetensors', 'log.csv'): assert (a/name).read_bytes() == (b/name).read_bytes(), name


def test_both_trainings_resume_bit_for_bit(tmp_path, toys, monkeypatch):
    "Broken in both iterations and in fine-tuning, before and behind a checkpoint."
    whole, broken = tmp_path/'whole', tmp_path/'broken'
    before = pretrain_avhubert(toys, settings(), whole/'a'); after = finetune_avhubert(toys, settings(), whole/'a', whole/'b')
    often = settings(checkpoint_every=2)
    with monkeypatch.context() as patch:
        deaths = interrupted(patch, ClusterObjective, 1, 4, 9)
        found = run_to_end(lambda: pretrain_avhubert(toys, often, broken/'a'), deaths)
    for m in (before, found): [r.pop('seconds') for r in m['iterations']]
    assert found == before; assert_same(whole/'a'/'iteration_2', broken/'a'/'iteration_2')
    with monkeypatch.context() as patch:
        deaths = interrupted(patch, SpeechObjective, 4)
        assert run_to_end(lambda: finetune_avhubert(toys, often, broken/'a', broken/'b'), deaths) == after
    assert_same(whole/'b', broken/'b')


def test_folders_are_experts_and_other_settings_are_refused(tmp_path, toys):
    pretrain_avhubert(toys, settings(), tmp_path/'a'); metrics = finetune_avhubert(toys, settings(), tmp_path/'a', tmp_path/'b')
    assert metrics['phoneme_error']['test'].keys() >= {'audio', 'video', 'joint', 'viseme_video', 'constant'}
    expert = load_expert('avhubert', tmp_path/'b')
    assert expert.phones == PHONES and expert.shrink == 2 and len(expert.net.label_embs_concat) == 12
    assert load_file(tmp_path/'a'/'iteration_1'/'labels.safetensors')['clip0'].shape == (26, 2)
    with pytest.raises(CheckpointError, match='lr: 0.0015 there'): pretrain_avhubert(toys, settings(lr=1e-3), tmp_path/'a')
    changed = replace(settings(), finetune=Finetune(steps=1))              # says nothing about pre-training
    assert pretrain_avhubert(toys, changed, tmp_path/'a')['iterations']


def test_frozen_steps_leave_the_front_end_alone(tmp_path, toys):
    pretrain_avhubert(toys, settings(), tmp_path/'a')
    finetune_avhubert(toys, settings(finetune=Finetune(steps=2, freeze=2)), tmp_path/'a', tmp_path/'b')
    old, new = (dict(load_expert('avhubert', tmp_path/n).net.named_parameters()) for n in 'ab')
    same = {k for k in old if torch.equal(old[k], new[k])}
    front = {k for k in old if k.startswith('feature_extractor_video.resnet')}
    assert front <= same and 'post_extract_proj.weight' not in same


@pytest.mark.parametrize('passes', ['all', 'drawn'])
def test_every_part_learns(toys, passes):
    params = settings(passes=passes, net={**NET, 'modality_dropout': .5}); expert = AVHubertExpert(NET, shrink=2)
    inputs = Inputs(toys, expert); labels = cluster_labels(inputs, expert, Iteration(clusters=8))
    batch = ClusterBatches(inputs, labels, params)[0]; batch['hidden_audio'][:, 3:6] = True
    ClusterObjective(expert, params)(batch, 0)['loss'].backward()
    assert not [n for n, p in expert.net.named_parameters() if p.grad is None]


def test_prediction_of_clusters_is_learned(toys):
    "On two clips by heart: far below the entropy of the labels."
    params = settings(passes='all', batch=2, frames=24, lr=3e-3, net={**NET, 'dropout': 0.}); torch.manual_seed(0)
    expert = AVHubertExpert(params.net, shrink=2); inputs = Inputs(toys.first(2), expert)
    model = ClusterObjective(expert, params); optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    batches = ClusterBatches(inputs, cluster_labels(inputs, expert, Iteration(clusters=8)), params); losses = []
    for k in range(60):
        loss = model(batches[k], k)['loss']; losses.append(loss.item())
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    assert np.mean(losses[-5:]) < .6*losses[0], losses[::10]


def test_padding_changes_nothing(toys):
    params = settings(frames=28); expert = AVHubertExpert(NET, shrink=2).eval(); inputs = Inputs(toys.first(1), expert)
    labels = [torch.zeros(26, 1, dtype=torch.long)]
    short, long = (ClusterBatches(inputs, labels, replace(params, frames=f, batch=1))[0] for f in (26, 40))
    torch.manual_seed(0); a = ClusterObjective(expert, params).eval().encoded(short, 0)
    b = ClusterObjective(expert, params).eval().encoded(long, 0)
    # the lip ResNet sees a frame of filling at the end, as it sees silence there
    assert (a - b[:, :, :26])[1].abs().max() < 1e-4 and (a - b[:, :, :26])[:, :, :16].abs().max() < .2


def test_batches_do_not_depend_on_what_was_asked_before(toys):
    params = settings(); expert = AVHubertExpert(NET, shrink=2)
    labels = [torch.zeros(c.frames, 1, dtype=torch.long) for c in toys]
    one, two = (ClusterBatches(Inputs(toys, expert), labels, params) for _ in range(2)); two[3]
    for key, value in one[7].items(): assert torch.equal(value, two[7][key])


def test_kmeans_finds_heaps_and_empty_clusters_do_no_harm():
    x = torch.tensor([[0.], [1.], [10.]]).repeat_interleave(20, 0)
    assert kmeans(x, 3).sort(0).values.flatten().tolist() == pytest.approx([0, 1, 10])
    assert torch.isfinite(kmeans(x, 10)).all() and torch.equal(kmeans(x, 10), kmeans(x, 10))
    assert torch.equal(nearest(x, torch.tensor([[9.], [0.]])), torch.tensor([1]*40 + [0]*20))


@pytest.mark.parametrize('seed', range(5))
def test_substitutes_stay_inside_and_change_only_what_is_hidden(seed):
    draw = rng(seed, 'mask'); hidden = draw.random(30) < .4; show = substitutes(hidden, draw)
    assert show.min() >= 0 and show.max() < 30 and (show[~hidden] == np.flatnonzero(~hidden)).all()
    assert substitutes(np.ones(7, bool), draw).tolist() == [*range(7)]


def test_mfcc_rows_follow_time_and_not_loudness():
    wav = rng(0, 'wav').normal(0, .1, 32000)
    a, b = mfcc_rows(wav, 50), mfcc_rows(wav[640:], 49)
    assert np.abs(a[5:-5] - b[4:-5]).mean() < .2*np.abs(a).mean()
    assert mfcc_rows(wav, 60).shape == (60, 156) and np.abs(mfcc_rows(wav/4, 50)[:, 4:52] - a[:, 4:52]).mean() < .1


def test_contrast_does_not_see_padding_or_neighbours():
    v, a = torch.randn(2, 1, 20, 8); there = torch.ones(1, 20, dtype=torch.bool); there[:, 15:] = False
    other = a.clone(); other[:, 15:] = 99.
    assert torch.allclose(contrast_loss(v, a, there), contrast_loss(v, other, there))
    assert torch.allclose(contrast_loss(v, a, there), contrast_loss(v[:, :15], a[:, :15], there[:, :15]))
    same = torch.ones(1, 7, 4)                                             # 7 frames, of which 3 are near enough to be left out
    assert contrast_loss(same, same, torch.ones(1, 7, dtype=torch.bool), near=7) == pytest.approx(0, abs=1e-6)


@pytest.mark.filterwarnings('ignore')
def test_two_processes(tmp_path):
    "With layers dropped, and with parts that fine-tuning does not use; the labels are computed once."
    script = tmp_path/'run.py'
    script.write_text(textwrap.dedent(f"""
        import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
        from pathlib import Path
        import test_avhubert_training as t
        from talkingface.training.loop import make_fabric
        fabric, out, net = make_fabric(threads=1), Path({str(tmp_path)!r}), {{**t.NET, 'layerdrop': .5}}
        clips = t.Clips(t.toy_clip(i, 26) for i in range(5))
        t.pretrain_avhubert(clips, t.settings(net=net, iterations=[dict(clusters=8, steps=4)]), out/'a', fabric)
        for name, how in dict(b=dict(ctc=1.), c=dict(keep=.5, frame=.5, masked=True)).items():
            t.finetune_avhubert(clips, t.settings(net=net, iterations=[{{}}], finetune=t.Finetune(steps=3, **how)),
                                out/'a', out/name, fabric)
        """))
    subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(script)],
                   check=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=120)
    for name in 'abc': assert json.loads((tmp_path/name/'meta.json').read_text())['processes'] == 2


# clips without phonemes

def speech_logs(clips, **how):
    params = settings(net={**NET, 'dropout': 0.}, batch=len(clips), finetune=Finetune(frame=.5, **how)); torch.manual_seed(0)
    expert = AVHubertExpert(params.net, phones=PHONES, shrink=2).eval(); model = SpeechObjective(expert, params).eval()
    return model(SpeechBatches(Inputs(clips, expert), params)[0], 0), model


def test_clips_without_phonemes_have_no_part_in_reading(monkeypatch):
    "The second clip has other pictures, and its loss would be another one; alone it gives zero and a gradient of zero."
    monkeypatch.setattr(SpeechObjective, 'encoded', lambda self, batch, key: self.expert.net.encode(   # no batch norm, no order
        self.expert.net.fuse(batch['audio'], None))[None].expand(3, -1, -1, -1))
    told, mute = toy_clip(0), toy_clip(1, phones=()); alone, both = (speech_logs(Clips(c))[0] for c in ([told], [told, mute]))
    for k in ('loss', 'ctc_video'): assert torch.allclose(alone[k], both[k], rtol=1e-4), k
    monkeypatch.setattr(SpeechBatches, '__getitem__', lambda self, k, make=SpeechBatches.__getitem__:
                        {k: v[-1:] if k != 'count' else v[-1:]*0 for k, v in make(self, k).items()})
    none, model = speech_logs(Clips([told, mute])); none['loss'].backward()
    assert none['loss'] == 0 and all(q.grad is None or torch.equal(q.grad, q.grad*0) for q in model.parameters())
    assert model.expert.head.weight.grad is not None


def test_too_many_phonemes_are_counted():
    fits, long = toy_clip(0), toy_clip(1, phones=('p', 'p')*9)             # 26 frames; 18 and 17 blanks
    logs, _ = speech_logs(Clips([fits, long])); assert logs['too_long'] == .5 and torch.isfinite(logs['loss'])


def test_splits_that_cannot_be_measured_are_none(tmp_path):
    clips = Clips([*(toy_clip(i) for i in range(3)), toy_clip(3, phones=()), toy_clip(4, frames=6)])
    with pytest.warns(UserWarning, match='split test: no clip is longer than 6'):
        found = pretrain_avhubert(clips, settings(), tmp_path/'a')
    assert found['test'] is None and found['val']['clips'] == 1
    with pytest.warns(UserWarning, match='split val: .*phone_times'):
        found = finetune_avhubert(clips, settings(), tmp_path/'a', tmp_path/'b')
    assert found['phoneme_error']['val'] is None and found['phoneme_error']['test']['clips'] == 1
    assert load_expert('avhubert', tmp_path/'b').phones == PHONES


# agreement

class Scripted(AVHubertExpert):
    "Embeddings that are written down: one-hot by the frame's number over `width`."
    def __init__(self, width): super().__init__(NET); self.width = width
    def _code(self, count):
        return torch.nn.functional.one_hot(torch.arange(count)//self.width % 64, 64).float()[None]
    def embed_video(self, faces, landmarks=None): return self._code(faces.shape[1])
    def embed_audio(self, features): return self._code(features.shape[1])


def test_agreement_counts_pairs_and_ties(toys):
    exact = crossmodal_agreement(Scripted(1), toys); clips = [c.frames for c in toys]
    assert exact['all'] == exact['speech'] == 1 and exact['pairs'] == sum(2*(n - 5) for n in clips) and exact['clips'] == 5
    assert exact['other_clip'] == 1                                        # it counts frames, and the control says so
    assert crossmodal_agreement(Scripted(1000), toys)['all'] == .5         # always the same: ties
    coarse = crossmodal_agreement(Scripted(10), toys)['all']; assert .5 < coarse < 1
    assert exact['speech'] is not None and exact['cosine'] == 1 and exact['cosine_apart'] == 0


def test_agreement_of_an_untrained_network_is_chance(toys):
    torch.manual_seed(0); found = crossmodal_agreement(AVHubertExpert(NET, shrink=2), toys, distance=3)
    assert abs(found['all'] - .5) < .2 and abs(found['all'] - found['other_clip']) < .2


# phonemes

def test_every_symbol_of_the_corpus_has_a_class():
    for symbol in ARTICULATION: assert simple_phones([symbol]), symbol
    assert set(VISEME) == set(PHONES) and len(PHONES) == len(set(PHONES))
    assert simple_phones(['oʊ', 'dʒ', 'əl', '?']) == ['o', 'ʊ', 'dʒ', 'ə', 'l']


def test_phone_frames_share_the_time_of_a_diphthong():
    names, now = ['-', *PHONES], phone_frames(toy_clip(0))                # 'p' from .2 s, 'aɪ' from .4 s, 's' from .6 s to .8 s
    assert [names[n] for n in now] == ['-']*5 + ['p']*5 + ['a']*3 + ['ɪ']*2 + ['s']*5 + ['-']*6
    assert len(phone_frames(toy_clip(0, phones=()))) == 26


def test_edit_distance():
    assert error_count('abc', 'abc') == 0 and error_count('abc', '') == 3 and error_count('abc', 'xbcd') == 2
    pairs = alignment(list('abcd'), list('acd')); assert [s for s, _ in pairs if s] == list('abcd') and ('b', None) in pairs


class Parrot(AVHubertExpert):
    "Says the same phrase whatever it is shown."
    def __init__(self, phrase): super().__init__(NET, phones=PHONES, shrink=2); self.phrase = phrase
    def phone_logits(self, audio=None, video=None, padding_mask=None):
        frames = audio.shape[1] if video is None else video.shape[2]; best = torch.zeros(frames, dtype=torch.long)
        for i, symbol in enumerate(self.phrase): best[2*i + 1] = PHONES.index(symbol) + 1
        return torch.nn.functional.one_hot(best, len(PHONES) + 1).float()[None]


def test_error_rates_of_known_answers(toys):
    right = phoneme_error_rate(Parrot(['p', 'a', 'ɪ', 's']), toys); assert right['audio'] == right['video'] == right['joint'] == 0
    near = phoneme_error_rate(Parrot(['b', 'a', 'ɪ', 's']), toys)          # p and b look alike
    assert near['video'] == .25 and near['viseme_video'] == 0 and near['phones'] == 20
    assert phoneme_error_rate(Parrot([]), toys)['joint'] == 1
    names, counts = viseme_confusion(Parrot(['b', 'a']), toys, 'test')
    assert counts[names.index('bilabial'), names.index('bilabial')] == 1 and counts[:, -1].sum() == 2 and counts.sum() == 4
    assert constant_error(toys.split('train'), toys.split('test')) == 0    # all toys say the same


# bad inputs

def test_bad_settings_are_refused():
    with pytest.raises(ParamsError, match='source: mfcc'): typed(AVHubertParams, dict(iterations=[dict(source='features')]))
    with pytest.raises(ParamsError, match='clusters'): typed(AVHubertParams, dict(iterations=[dict(cluster=3)]))
    with pytest.raises(ParamsError, match='three'): typed(AVHubertParams, dict(weights=[1., 1.]))
    with pytest.raises(ParamsError, match='passes: all'): typed(AVHubertParams, dict(passes='drawn', finetune=dict(contrast=1.)))
    with pytest.raises(ParamsError, match='shares'): typed(AVHubertParams, dict(masks=dict(audio=1.5)))
    with pytest.raises(ParamsError, match='not all 0'): typed(AVHubertParams, dict(weights=[0., 0., 0.]))
    with pytest.raises(ParamsError, match='batch'): typed(AVHubertParams, dict(batch=0))
    with pytest.raises(ParamsError, match='frames'): typed(AVHubertParams, dict(frames=0))
    with pytest.raises(ParamsError, match='contexts'): typed(AVHubertParams, dict(iterations=[dict(contexts=[])]))
    with pytest.raises(ParamsError, match=r'iterations\[1\].layers: expected 1 to 4'):
        typed(AVHubertParams, dict(iterations=[{}, dict(source='features', layers=[9])]))
    with pytest.raises(ParamsError, match='above 0'): typed(AVHubertParams, dict(finetune=dict(ctc=0.)))


def test_another_network_than_the_pre_trained_one_is_refused(tmp_path, toys):
    pretrain_avhubert(toys, settings(), tmp_path/'a')
    with pytest.raises(ParamsError, match='dim: 16 there, 32 now'):
        finetune_avhubert(toys, settings(net={**NET, 'dim': 32}), tmp_path/'a', tmp_path/'b')
    with pytest.raises(ParamsError, match='shrink: 2 there, 1 now'):
        finetune_avhubert(toys, settings(shrink=1), tmp_path/'a', tmp_path/'b')
    assert finetune_avhubert(toys, settings(net={**NET, 'dropout': .2}), tmp_path/'a', tmp_path/'b')


def test_a_shorter_restart_leaves_no_iteration_behind(tmp_path, toys):
    pretrain_avhubert(toys, settings(), tmp_path); kept = tmp_path/'iteration_10'; kept.mkdir(); (kept/'note.txt').touch()
    one = settings(iterations=[dict(clusters=8, steps=2)]); pretrain_avhubert(toys, one, tmp_path, on_change='restart')
    assert sorted(p.name for p in tmp_path.glob('iteration_*')) == ['iteration_1', 'iteration_10']   # not ours


def test_memory_of_inputs_is_bounded(toys):
    expert = AVHubertExpert(NET, shrink=2); free, tight = Inputs(toys, expert), Inputs(toys, expert, limit=1)
    for i in range(5): assert all(torch.equal(a, b) for a, b in zip(free[i], tight[i]))
    assert len(free._kept) == 5 and not tight._kept and tight._bytes == 0


def test_labels_do_not_depend_on_what_is_held(toys, monkeypatch):
    expert = AVHubertExpert(NET, shrink=2); inputs = Inputs(toys, expert); how = Iteration('features', clusters=5, layers=[1, 2])
    held = cluster_labels(inputs, expert, how); monkeypatch.setattr('talkingface.training.avhubert.KEPT_ROWS', 1)
    assert all(torch.equal(a, b) for a, b in zip(held, cluster_labels(inputs, expert, how)))


def test_clips_without_phonemes_pretrain_and_say_so_when_fine_tuned(tmp_path):
    mute = Clips(toy_clip(i, phones=()) for i in range(5)); pretrain_avhubert(mute, settings(), tmp_path/'a')
    with pytest.raises(InputError, match='phonemes'): finetune_avhubert(mute, settings(), tmp_path/'a', tmp_path/'b')
    with pytest.raises(InputError, match='phonemes'): phoneme_error_rate(Parrot([]), mute)
    inputs = Inputs(mute, AVHubertExpert(NET))
    with pytest.raises(InputError, match='as many rows'): cluster_labels(inputs, None, Iteration(clusters=9999))
    with pytest.raises(CheckpointError, match='run it first'): finetune_avhubert(mute, settings(), tmp_path/'x', tmp_path/'b')


def test_an_empty_store_and_short_clips_are_errors():
    with pytest.raises(InputError, match='empty'): Inputs(Clips(), AVHubertExpert(NET))
    with pytest.raises(InputError, match='longer than'): crossmodal_agreement(AVHubertExpert(NET), Clips([toy_clip(0, 5)]))
