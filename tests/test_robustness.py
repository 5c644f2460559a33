"""Perturbations move what they should and nothing else; every kind of expert is scored alike; intervals, figures and claims read rows."""
import numpy as np
import pandas as pd
import pytest
import torch

from talkingface.core import InputError, ParamsError, file_hash, typed
from talkingface.data.audio import save_audio
from talkingface.data.clips import ClipStore, prepare
from talkingface.data.corpora import Record, Selection, save_tracks
from talkingface.data.faces import MEAN_FACE
from talkingface.data.video import write_video
from talkingface.experiments import save_figure
from talkingface.experts.avhubert import TINY, AVHubertExpert
from talkingface.experts.avsyncnet import AVSyncNet
from talkingface.experts.base import embed_stored
from talkingface.experts.syncnet import LightSyncNet
from talkingface.robustness import (CLAIMS, CURVE_FIELDS, PERTURBATIONS, ROBUSTNESS_FIELDS, Claim, RobustnessParams, Source, claims_markdown,
                                    evaluate_robustness, ground_truth_curves, ground_truth_figure, ground_truth_stats, move_points, pair_metrics, pair_table,
                                    perturbed_clip, read_table, response_figure, response_table, robustness_claims, rotation, spoken_clips, summary_figure,
                                    summary_table, trainings, write_table)
from talkingface.weights import save_model

FEW = dict(shift_x=[-12, 12], shift_y=[], rotation=[20], scale=[], blur=[2], jpeg=[], h264=[40], brightness=[], noise=[0], offset=[-5, 5])


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A corpus of four people, one of them silent, textured faces with a flickering mouth; and its store."
    root, records, frames = tmp_path_factory.mktemp('corpus'), [], 40
    draw = np.random.default_rng(0)
    face = np.kron(draw.uniform(30, 150, (20, 20, 3)), np.ones((8, 8, 1)))
    points = np.tile(((MEAN_FACE - [128, 150])*.42 + [80, 84])[None].astype(np.float32), (frames, 1, 1)) + np.linspace(0, 3, frames)[:, None, None]
    left, top, right, bottom = *(points[0, 48:68].min(0)).astype(int), *(points[0, 48:68].max(0) + 4).astype(int)
    for i in range(4):
        loud = draw.choice(np.linspace(.1, 1, 8), frames)
        video = np.repeat(face[None], frames, 0); video[:, top:bottom, left:right] += 90*loud[:, None, None, None]
        stem = root/f'clip_{i}'
        write_video(stem.with_suffix('.mp4'), video.clip(0, 255).astype(np.uint8), crf=14)
        save_audio(stem.with_suffix('.flac'), ((i != 1)*np.repeat(10**(loud - 1.6), 640)*draw.normal(0, .3, frames*640)).astype(np.float32))
        save_tracks(stem.with_suffix('.npz'), dict(landmarks=points, valid=np.ones(frames, bool)))
        records.append(Record(stem.name, 'test', f'person_{i//2}', *(stem.with_suffix(s) for s in ('.mp4', '.flac', '.npz'))))
    corpus = Selection('toy', 'none', tuple(records)); prepare(corpus, root/'store', workers=1)
    return corpus, ClipStore(root/'store')


@pytest.fixture(scope='module')
def scored(made):
    "Rows and curves of one small expert."
    torch.manual_seed(0)
    expert, settings = LightSyncNet(8, 16).eval(), RobustnessParams(['test'], 3, 5, FEW)
    return evaluate_robustness(expert, 'syncnet', *made, settings, 'smoke'), ground_truth_curves(expert, 'syncnet', made[1], settings, 'smoke')


def toy_rows(expert, level, fall, seeds=1, clips=8, metric_noise=.01):
    "Rows of a made-up expert: cosine `level`, AUC .95 or a guess, both falling with the shift by the share `fall`."
    out, draw = [], np.random.default_rng(len(expert))
    for seed in range(seeds):
        for clip in range(clips):
            for name in ('shift_x', 'rotation'):
                for at in (-10, 0, 10):
                    keep = 1 - fall*(at != 0) + metric_noise*draw.normal()
                    lead = .45 if level > .1 else .001*draw.normal()
                    values = dict(cosine=level*keep, wrong=.05, auc=.5 + lead*keep, loss=-np.log(level*keep))
                    for how in ('kept', 'found'):
                        out += [('toy', expert, 'net', seed, 'test', f'c{clip}', name, at, how, m, v, 20) for m, v in values.items()]
    return pd.DataFrame(out, columns=list(ROBUSTNESS_FIELDS))


def toy_curves(expert, level, sd, wrong=.05, seeds=1, clips=12):
    draw, out = np.random.default_rng(7 + len(expert)), []
    for seed in range(seeds):
        for clip in range(clips):
            cosine = level + sd*draw.normal(size=30)
            out.append(pd.DataFrame(dict(profile='toy', expert=expert, network='net', seed=seed, set='test' if clip < 8 else 'hd', clip=f'c{clip}', position=range(30),
                                         seconds=np.arange(30)/25, speech=True, cosine=cosine, wrong=wrong + .01*draw.normal(size=30))))
    return pd.concat(out, ignore_index=True)[list(CURVE_FIELDS)]


@pytest.mark.parametrize('name, level', [('shift_x', 9), ('shift_y', -9), ('rotation', 25), ('scale', .8)])
def test_found_landmarks_follow_the_face_and_kept_ones_do_not(made, name, level):
    corpus, store = made; record, clip = list(corpus)[0], store[0]
    kept, found = (perturbed_clip(record, clip, name, level, how) for how in ('kept', 'found'))
    assert np.allclose(kept[1], clip.landmarks, atol=.02)
    if name != 'rotation': assert np.allclose(found[1], clip.landmarks, atol=.3)      # the box turns into another one only if the face turns
    differs = lambda faces: np.abs(faces[..., 12:84, 12:84].astype(float) - clip.faces[..., 12:84, 12:84]).mean()
    if name != 'rotation': assert differs(found[0]) < .7*differs(kept[0])
    eyes = lambda points: (points[0, 45] - points[0, 36]) @ [0, 1]
    if name == 'rotation': assert abs(eyes(kept[1])) < 1 < abs(eyes(found[1]))


@pytest.mark.parametrize('name', list(PERTURBATIONS))
def test_every_perturbation_changes_only_its_own(made, name):
    corpus, store = made; record, clip = list(corpus)[0], store[0]; how = PERTURBATIONS[name]
    faces, landmarks, wav = perturbed_clip(record, clip, name, how.levels[-1])
    assert faces.shape == clip.faces.shape and faces.dtype == np.uint8 and wav.dtype == np.float32 and wav.shape == clip.wav.shape
    assert np.array_equal(wav, clip.wav) == (how.changes != 'sound') and np.array_equal(faces, clip.faces) == (how.changes == 'sound')
    same = perturbed_clip(record, clip, name, how.neutral)
    assert all(np.array_equal(a, b) for a, b in zip(same, (clip.faces, clip.landmarks, clip.wav)))
    assert how.neutral in how.grid() and len(how.grid()) == len(how.levels) + 1


def test_noise_is_that_of_the_clip_and_the_level(made):
    corpus, store = made; one, two = list(corpus)[0], list(corpus)[2]
    noise = lambda record, i, level: perturbed_clip(record, store[i], 'noise', level)[2] - store[i].wav
    assert np.array_equal(noise(one, 0, 5), noise(one, 0, 5))
    assert abs(np.corrcoef(noise(one, 0, 5), noise(two, 2, 5))[0, 1]) < .05 > abs(np.corrcoef(noise(one, 0, 5), noise(one, 0, 10))[0, 1])


def test_a_rotation_back_is_the_identity():
    points = np.random.default_rng(0).uniform(0, 160, (68, 2))
    assert np.allclose(move_points(move_points(points, rotation(30, 160, 160)), rotation(-30, 160, 160)), points, atol=1e-3)


@pytest.mark.parametrize('expert', [LightSyncNet(8, 16), AVSyncNet(.125, dim=16), AVHubertExpert(TINY)], ids=lambda e: e.config['name'])
def test_all_kinds_of_experts_are_scored_alike(made, expert):
    "The neutral level of every perturbation is the stored clip, the rows are complete, and dense curves agree with the sweep."
    settings = RobustnessParams(['test'], 1, 10, dict(FEW, h264=[], rotation=[], blur=[]))
    rows = evaluate_robustness(expert.eval(), 'x', *made, settings, 'smoke')
    assert tuple(rows) == ROBUSTNESS_FIELDS and rows['value'].notna().all() and rows['network'].iloc[0].startswith(expert.config['name'])
    clip = spoken_clips(made[1], ['test'], 1)[0]; table = pair_table(expert, *embed_stored(expert, clip))
    assert table.shape == (clip.frames - 4, clip.frames - 4)
    dense = pair_metrics(table[::10, ::10], np.ones(len(table[::10]), bool), 10)
    still = rows[(rows['level'] == rows['perturbation'].map({n: p.neutral for n, p in PERTURBATIONS.items()})) & (rows['metric'] == 'cosine')]
    assert still['value'].std() == 0 and still['value'].iloc[0] == pytest.approx(dense['cosine'], abs=1e-3)


def test_silent_clips_are_left_out_and_people_come_first(made):
    names = [c.name for c in spoken_clips(made[1], ['test'], 3)]
    assert names == ['clip_0', 'clip_2', 'clip_3']                      # clip_1 is silent; the first of each person before a second one
    assert [c.name for c in spoken_clips(made[1], ['test'])] == ['clip_0', 'clip_2', 'clip_3']


def test_a_corpus_that_does_not_fit_is_refused(made, tmp_path):
    corpus, store = made; records = list(corpus)
    with pytest.raises(InputError, match='not in the corpus'):
        evaluate_robustness(LightSyncNet(8, 16).eval(), 'x', Selection('half', '', tuple(records[1:])), store, RobustnessParams(['test'], 1))
    short = write_video(tmp_path/'short.mp4', np.zeros((9, 160, 160, 3), np.uint8))
    with pytest.raises(InputError, match='9 frames'): Source(Record('clip_0', 'test', 'p', short), store[0])


@pytest.mark.parametrize('values, message', [(dict(levels={'blurr': [1]}), "did you mean 'blur'"), (dict(found=['blur']), 'robustness.found'),
                                             (dict(clips=0), 'at least 1'), (dict(clip=3), 'clips')])
def test_bad_parameters_are_refused(values, message):
    with pytest.raises((InputError, ParamsError), match=message): typed(RobustnessParams, values)


def test_tables_round_trip_and_profiles_do_not_mix(tmp_path, scored):
    rows, curves = scored
    paths = [write_table(tmp_path/f'{n}.csv', t) for n, t in (('rows', rows), ('curves', curves))]
    assert len(read_table(paths[0])) == len(rows) and np.isinf(read_table(paths[0])['level']).any()
    assert file_hash(write_table(tmp_path/'again.csv', read_table(paths[0]))) == file_hash(paths[0])
    other = write_table(tmp_path/'other.csv', rows.assign(profile='demo'))
    with pytest.raises(InputError, match='must not mix'): read_table(paths[0], other)
    with pytest.raises(InputError, match='expected the columns'): write_table(tmp_path/'bad.csv', rows.drop(columns='seed'))


def test_trainings_of_an_expert_are_averaged_per_clip(made, tmp_path):
    for n, folder in enumerate(('x', 'x/seed-1', 'x/seed-2')):
        torch.manual_seed(n); save_model(tmp_path/folder, LightSyncNet(8, 16), {})
    found = trainings(tmp_path/'x')
    assert list(found) == [0, 1, 2] and not next(found[1].parameters()).requires_grad
    rows = evaluate_robustness(found, 'syncnet', *made, RobustnessParams(['test'], 2, 10, dict(FEW, h264=[])), 'smoke')
    table = response_table(rows, 'cosine')
    assert (table['seeds'] == 3).all() and (table['n'] == 2).all()
    assert ((table['seed_low'] <= table['mean'] + 1e-9) & (table['mean'] <= table['seed_high'] + 1e-9)).all()


def test_statistics_are_those_of_all_positions_and_intervals_shrink():
    few, many = toy_curves('syncnet', .7, .1, clips=8), toy_curves('syncnet', .7, .1, clips=80)
    stats = ground_truth_stats(few).set_index('set').loc['all']
    assert stats['mean'] == pytest.approx(few['cosine'].mean()) and stats['sd'] == pytest.approx(few['cosine'].std(ddof=0))
    assert stats['below'] == pytest.approx((few['cosine'] < .5).mean()) and stats['positions'] == len(few)
    wide, narrow = (ground_truth_stats(c).set_index('set').loc['all'] for c in (few, many))
    assert narrow['sd_high'] - narrow['sd_low'] < wide['sd_high'] - wide['sd_low'] and narrow['sd_low'] < .1 < narrow['sd_high']


def test_silence_counts_for_nothing():
    curves = toy_curves('syncnet', .7, .1)
    quiet = curves.assign(cosine=-1., speech=False, position=curves['position'] + 30)
    assert ground_truth_stats(pd.concat([curves, quiet])).equals(ground_truth_stats(curves))


def test_claims_follow_the_rows():
    readers = ('avhubert', 'avhubert_contrast')
    rows = pd.concat([toy_rows('syncnet', .7, .5), toy_rows('avsyncnet', .7, .2), *(toy_rows(n, .8, .05) for n in readers)])
    curves = pd.concat([toy_curves('syncnet', .7, .15), toy_curves('avsyncnet', .7, .1), *(toy_curves(n, .7, .05) for n in readers)])
    claims = robustness_claims(rows, curves)
    assert set(claims.loc[claims['first'] == 'avhubert_contrast', 'paper']) == {'ours'}, 'what is not the paper\'s must say so'
    assert (claims[claims['main']]['verdict'] == 'reproduced').all() and len(claims[claims['main']]) == len(CLAIMS)
    assert ((claims['low'] <= claims['measured']) & (claims['measured'] <= claims['high'])).all()
    swapped = [Claim('turned round', 'A', c.second, c.first, c.measures, c.perturbation, c.landmarks) for c in CLAIMS]
    assert (robustness_claims(rows, curves, swapped)['verdict'] == 'not reproduced').all()
    assert claims_markdown(claims).count('| reproduced |') == len(claims)


def test_a_blind_expert_proves_nothing():
    "It is steady and bears every shift, because it tells no pair from another."
    rows = pd.concat([toy_rows('syncnet', .7, .5), toy_rows('avhubert', .05, 0.)])
    curves = pd.concat([toy_curves('syncnet', .7, .15), toy_curves('avhubert', .05, .03)])
    claims = robustness_claims(rows, curves); mine = claims[claims['main'] & (claims['second'] == 'syncnet') & (claims['first'] == 'avhubert')]
    assert len(mine) and mine['verdict'].isin(['undecided', 'mixed']).all() and mine['note'].str.contains('reproduced').all()


def test_equal_experts_are_undecided_and_absent_ones_not_measured():
    rows, curves = toy_rows('syncnet', .7, .3), toy_curves('syncnet', .7, .1)
    both = [pd.concat([t, t.assign(expert='avsyncnet')]) for t in (rows, curves)]
    claims = robustness_claims(*both)
    assert set(claims[claims['first'] == 'avsyncnet']['verdict']) == {'undecided'} and set(claims[claims['first'] == 'avhubert']['verdict']) == {'not measured'}
    with pytest.raises(InputError, match='different clips'):
        robustness_claims(both[0], pd.concat([curves, toy_curves('avsyncnet', .7, .1, clips=5)]))


def test_figures_are_small_complete_and_the_same_each_time(tmp_path):
    rows = pd.concat([toy_rows(n, .7, f, seeds=2) for n, f in (('syncnet', .5), ('avsyncnet', .3), ('avhubert', .1))])
    curves = pd.concat([toy_curves(n, .7, s, seeds=2) for n, s in (('syncnet', .15), ('avhubert', .05))])
    makers = dict(shift=lambda: response_figure(rows, [('shift_x', how, 'loss') for how in ('kept', 'found')]),
                  truth=lambda: ground_truth_figure(curves, [('syncnet', 'cosine'), ('avhubert', 'loss')], 2), summary=lambda: summary_figure(rows))
    for name, make in makers.items():
        one, two = ([file_hash(p) for p in save_figure(*(lambda f, d: (f, tmp_path/f'{name}{i}', d))(*make()), dpi=80)] for i in range(2))
        assert one == two
        assert all(p.stat().st_size < 150_000 for p in tmp_path.glob(f'{name}*'))
    drawn = pd.read_csv(tmp_path/'shift0.csv')
    assert set(drawn['expert']) == {'syncnet', 'avsyncnet', 'avhubert'} and set(drawn['landmarks']) == {'kept', 'found'}


def test_the_summary_ranks_and_checks_the_peak(scored):
    rows, _ = scored
    table = summary_table(rows).set_index(['perturbation', 'landmarks'])['value']
    assert ('none', 'kept') in table and ('shift_x', 'found') in table and ('offset', 'kept') in table
    steady, shaky = (summary_table(toy_rows('x', .7, f)).query("perturbation == 'shift_x' and landmarks == 'kept'")['value'].item() for f in (.1, .6))
    assert steady > shaky > .5
