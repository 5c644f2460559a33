"""Lip leaking by intervention, closed mouths, scores by an expert's own generator, steadiness of training, strips and hard cases."""
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from talkingface.core import InputError, rng, write_json
from talkingface.dubbing import save_faces
from talkingface.exploitation import borrowed_speech, evaluate_exploitation, exploitation_figure, exploitation_table, generated_methods
from talkingface.experiments import save_figure
from talkingface.generators.base import build_generator
from talkingface.generators.references import Silencer
from talkingface.leaking import (_interval, _two, close_faces, closed_figure, closed_numbers, closed_reading, closed_rows, drawn_references, evaluate_leak, leak_cells, leak_difference,
                                 leak_differences, leak_figure, leak_forest, leak_rows, leak_table, read_leak, row_folders, write_leak)
from talkingface.metrics.silence import leak_sums, lip_leak
from talkingface.strips import first_clips, hard_cases, head_turn, rows_figure, strip_rows
from talkingface.training_curves import fluctuation, read_log, read_logs, stability_table, training_figure


def a_clip(name, frames=80, level=0.):
    "A clip whose frames show their opening as grey value; `level` px are added to the mouths of this person."
    opened = rng(3, 'opening', name).uniform(0, 12, frames) + level
    faces = np.broadcast_to(np.rint(opened*8)[:, None, None, None], (frames, 3, 8, 8)).astype(np.uint8)
    return SimpleNamespace(name=name, identity=name[0], split='test', frames=frames, faces=faces, valid=np.ones(frames, bool), mel=None,
                           landmarks=np.zeros((frames, 68, 2)), wav=np.zeros(frames*640, np.float32))


def opening(faces): return np.asarray(faces, np.float64)[:, 0, 0, 0]/8


def a_generator(follow, leak, noise=0.):
    "Follows the truth, copies the reference, errs."
    def draw(clip, shown):
        wrong = rng(1, 'noise', clip.name).normal(0, noise, (clip.frames, 1, 1, 1)) if noise else 0
        return np.clip(np.rint(follow*clip.faces + leak*clip.faces[shown] + wrong*8), 0, 255).astype(np.uint8)
    return draw


@pytest.fixture(scope='module')
def clips(): return [a_clip(n) for n in 'abcdefgh']


def leaks(clips, worlds, trainings=1, noise=.5):
    parts = [leak_rows(name, a_generator(follow, leak + .03*n, noise), clips, opening, training=n, profile='test')
             for name, (follow, leak) in worlds.items() for n in range(trainings)]
    return pd.concat(parts, ignore_index=True)


# the intervention

def test_references_are_the_same_for_all_and_never_near(clips):
    for clip in clips:
        shown = drawn_references(clip, 5)
        assert np.array_equal(shown, drawn_references(clip, 5)) and not np.array_equal(shown, drawn_references(clip, 6))
        assert (np.abs(shown - np.arange(clip.frames)) >= 5).all()


def test_every_row_meets_the_same_openings(clips):
    rows = leaks(clips, {'one': (1, 0), 'other': (.5, .5)})
    parts = [g[['clip', 'frame', 'target', 'reference']].reset_index(drop=True) for _, g in rows.groupby('method')]
    pd.testing.assert_frame_equal(*parts)


@pytest.mark.parametrize('leak', [0., .2, .7])
def test_the_coefficients_are_found(clips, leak):
    table = leak_table(leaks(clips, {'row': (.6, leak)}))
    line = table.iloc[0]
    assert abs(line['leak'] - leak) < .04 and abs(line['follow'] - .6) < .04 and abs(line['pooled'] - leak) < .04
    assert line['low'] <= line['leak'] <= line['high'] and line['clips'] == 8 and line['frames'] == 640


def test_frames_without_a_face_are_left_out(clips):
    blind = SimpleNamespace(**{**vars(clips[0]), 'valid': np.arange(80) >= 40})
    rows = leak_rows('row', a_generator(1, 0), [blind], opening)
    assert rows['frame'].min() == 40 and len(rows) == 40


def test_one_training_agrees_with_the_metric(clips):
    rows = leaks(clips, {'row': (.7, .3)}); line = leak_table(rows).iloc[0]
    told = lip_leak([leak_sums(g['generated'], g['target'], g['reference']) for _, g in rows.groupby('clip', sort=False)])
    for theirs, ours in (('leak', 'pooled'), ('low', 'pooled_low'), ('high', 'pooled_high')): assert abs(told[theirs] - line[ours]) < 1e-9


def test_trainings_are_pooled_and_shown_apart(clips):
    table = leak_table(leaks(clips, {'row': (.7, .3)}, 3)).set_index('seed')['leak']
    assert list(table.index) == ['all', '0', '1', '2'] and abs(table['all'] - table[['0', '1', '2']].mean()) < 1e-6
    assert table['0'] < table['1'] < table['2']


def confounded(trainings=1):
    "Two rows that copy nothing; people with large mouths get large outputs, more so in the row `sized`."
    people = [a_clip(n, level=2*i) for i, n in enumerate('abcdefgh')]; parts = []
    for n in range(trainings):
        for name, share in (('plain', .05), ('sized', .6)):
            def draw(clip, shown):
                wrong = rng(n, 'wrong', name, clip.name).normal(0, 4, (clip.frames, 1, 1, 1))
                return np.clip(np.rint(clip.faces*.4 + clip.faces.mean()*share + wrong), 0, 255).astype(np.uint8)
            parts.append(leak_rows(name, draw, people, opening, training=n, profile='test'))
    return pd.concat(parts, ignore_index=True)


def test_a_person_with_a_large_mouth_leaks_nothing():
    "The intervention randomises within clips; between people openings differ and the pooled coefficient is confounded."
    table = leak_table(rows := confounded()).set_index('method')
    assert table.loc['sized', 'pooled_low'] > .1 and (table['leak'].abs() < .03).all() and table.loc['sized', 'low'] < 0 < table.loc['sized', 'high']
    gap = leak_difference(rows, 'plain', 'sized')
    assert abs(gap['mean']) < .03 and gap['low'] < 0 < gap['high'] and not gap['better']


def test_pseudo_values_average_to_the_coefficient(clips):
    rows = leaks(clips, {'row': (.7, .3)}, 3); cells = leak_cells(rows, 'row')
    assert cells.shape == (8, 3) and abs(cells.to_numpy().mean() - leak_table(rows)['leak'].iloc[0]) < 1e-9
    assert np.abs(cells.mean().to_numpy() - [.3, .33, .36]).max() < .02
    short = rows[~((rows['clip'] == 'a') & (rows['seed'] == 1))]; assert leak_cells(short, 'row').shape == (7, 3)
    with pytest.raises(InputError, match='no clip'): leak_cells(rows, 'nobody')
    assert leak_cells(rows.assign(reference=3.), 'row').isna().all(axis=None)


def test_an_interval_takes_nearly_all_draws():
    assert np.isnan(_interval(np.r_[np.full(94, .1), np.full(6, np.nan)])).all() and _interval(np.r_[np.full(95, .1), np.full(5, np.nan)]) == (.1, .1)
    assert np.isnan(_interval(np.array([]))).all()


def test_a_constant_reference_tells_nothing(clips):
    rows = leak_rows('row', a_generator(1, 0), clips[:1], opening, shown={clips[0].name: np.full(80, 3)})
    assert set(rows['policy']) == {'own'} and np.isnan(leak_table(rows)[['leak', 'low', 'high']].to_numpy(float)).all()


def test_paired_difference_and_its_sign(clips):
    rows = leaks(clips, {'random': (.6, .4), 'silent': (.9, .1), 'twin': (.9, .1)}, 2)
    gap = leak_difference(rows, 'silent', 'random')
    assert abs(gap['mean'] + .3) < .03 and gap['better'] and gap['agree'] == gap['seeds'] == 2 and gap['n'] == 8
    same = leak_difference(rows, 'twin', 'silent')
    assert same['mean'] == same['low'] == same['high'] == 0 and not same['better']
    assert list(leak_differences(rows, 'random')['method']) == ['silent', 'twin'] and leak_differences(rows, 'nobody').empty
    with pytest.raises(InputError, match='nobody'): leak_difference(rows, 'nobody', 'random')


def test_rows_survive_a_file_and_strange_files_are_refused(clips, tmp_path):
    rows = leaks(clips, {'row': (.6, .4)})
    pd.testing.assert_frame_equal(read_leak(write_leak(tmp_path/'leak.csv', rows)), rows, rtol=1e-4)
    with pytest.raises(InputError, match='columns'): write_leak(tmp_path/'bad.csv', rows.drop(columns='policy'))
    with pytest.raises(InputError, match='evaluate_leak'): read_leak(tmp_path/'none.csv')


def stored(folder, clips, change=lambda faces: faces, **meta):
    for clip in clips: save_faces(folder/f'{clip.name}.safetensors', change(clip.faces))
    write_json(folder/'meta.json', dict(shown={clip.name: [2]*clip.frames for clip in clips}, **meta))


def test_all_trainings_are_measured_and_rows_not_run_left_out(clips, tmp_path):
    for part in ('row', 'row/seed-1', 'row/seed-2'): stored(tmp_path/'generated'/part, clips)
    write_json(tmp_path/'generated'/'lacks'/'meta.json', dict(not_run='no weights'))
    load = lambda folder, device, silencers, experts: SimpleNamespace(draw=lambda clip, mel, shown: a_generator(.5, .25)(clip, shown))
    drawn, own = evaluate_leak(['row', 'lacks'], tmp_path/'generators', tmp_path/'generated', clips, opening, load=load)
    for table, again in zip((drawn, own), evaluate_leak(['row', 'lacks'], tmp_path/'generators', tmp_path/'generated', clips, opening, load=load, workers=3)):
        pd.testing.assert_frame_equal(table, again)
    assert list(row_folders(tmp_path/'generated'/'row')) == [0, 1, 2] and row_folders(tmp_path/'generated'/'lacks') == {}
    assert set(drawn['method']) == {'row'} and set(drawn['seed']) == {0, 1, 2} and set(own['policy']) == {'own'}
    stored(tmp_path/'others'/'rival', clips); asked = []
    told = lambda folder, *others: asked.append(folder) or load(folder, *others)
    drawn, own = evaluate_leak(['row', 'rival'], tmp_path/'generators', tmp_path/'generated', clips, opening, tmp_path/'silencers', load=told, others=tmp_path/'others')
    assert asked[-1] == tmp_path/'silencers'/'rival' and {'row', 'rival'} == set(drawn['method']) == set(own['method'])
    with pytest.raises(InputError, match='rival'): evaluate_leak(['rival'], tmp_path/'generators', tmp_path/'generated', clips, opening, load=load)
    (tmp_path/'generated'/'row'/'seed-2'/'a.safetensors').unlink()
    with pytest.raises(InputError, match='no faces of a'): evaluate_leak(['row'], tmp_path/'generators', tmp_path/'generated', clips, opening, load=load)


def test_the_figure_prints_the_coefficient_and_is_the_same_twice(clips, tmp_path):
    rows = leaks(clips, {'ref_random': (.6, .4), 'setup_e': (.9, .1)})
    for name in 'ab': figure, data = leak_figure(rows); save_figure(figure, tmp_path/name, data)
    titles = [ax.get_title(loc='left').split('\n') for ax in figure.axes]
    assert [t[0] for t in titles] == ['Random frame', 'Closed by G_S'] and titles[0][1].startswith('leak 0.40 [0.') and not any(ax.texts for ax in figure.axes)
    dots = figure.axes[0].lines[0].get_xydata(); assert np.abs(dots.mean(0)).max() < .3 and 'adjusted' in figure.axes[0].get_ylabel()
    assert [_two(v) for v in (-.001, -.25, .3)] == ['0.00', '−0.25', '0.30']
    assert (tmp_path/'a.png').read_bytes() == (tmp_path/'b.png').read_bytes()


def test_a_reference_that_stands_still_is_said_not_drawn(clips):
    own = leak_rows('row', a_generator(.6, .4), clips, opening, shown={c.name: np.full(80, 3) for c in clips}, profile='test')
    figure, table = leak_forest(pd.concat([leaks(clips, {'row': (.6, .4)}), own], ignore_index=True))
    assert table.set_index('policy')['leak'].isna().to_dict() == {'per_frame': False, 'own': True}
    told = figure._supxlabel.get_text().replace('\n', ' ')
    assert not figure.axes[0].texts and 'No row has a hollow mark: their own references differ too little' in told and told.count('too little') == 1
    assert [t.get_text() for t in figure.legends[0].texts] == ['references drawn for every frame']
    moving = leak_rows('more', a_generator(.6, .4), clips, opening, shown={c.name: drawn_references(c, 3) for c in clips}, profile='test')
    figure, _ = leak_forest(pd.concat([leaks(clips, {'row': (.6, .4), 'more': (.6, .4)}), own, moving], ignore_index=True))
    assert '1 of 2 rows have no hollow mark' in figure._supxlabel.get_text().replace('\n', ' ') and len(figure.legends[0].texts) == 2


# rows with different numbers of trainings

def test_differences_are_of_the_trainings_that_both_have(clips):
    "A fourth to sixth training that leaks much must not stand against a row that was trained three times."
    rows = pd.concat([leaks(clips, {'many': (.6, .2), 'few': (.6, .3)}, 3), leaks(clips, {'many': (.6, .5)}, 6).query('seed > 2')], ignore_index=True)
    gap = leak_difference(rows, 'many', 'few')
    assert gap == leak_difference(rows[rows['seed'] < 3], 'many', 'few') and gap['seeds'] == 3 == gap['agree'] and gap['better'] and abs(gap['mean'] + .1) < .02
    table = leak_table(rows); whole = table[table['seed'] == 'all'].set_index('method')
    assert whole['trainings'].to_dict() == {'many': 6, 'few': 3} and whole['leak']['many'] > whole['leak']['few']       # the rows themselves have all of theirs
    apart = leak_difference(rows[(rows['method'] == 'few') | (rows['seed'] > 2)], 'many', 'few'); assert apart['seeds'] == 0 and apart['mean'] > .2


def test_figures_tell_how_many_trainings_rows_have(clips, scores):
    rows = pd.concat([leaks(clips, {'many': (.6, .2)}, 6), leaks(clips, {'few': (.6, .3)}, 3)], ignore_index=True); told = lambda fig: fig._supxlabel.get_text().replace('\n', ' ')
    figure, _ = leak_forest(rows); assert '3 to 6 trainings of a row' in told(figure) and [t.get_text() for t in figure.axes[0].texts] == ['6', '3', 'trainings']
    assert '3 to 6 trainings of a row' in told(leak_figure(rows)[0]) and '3 trainings of a row' in told(leak_figure(rows, ['few'])[0])
    assert not leak_forest(leaks(clips, {'a': (.6, .2), 'b': (.6, .3)}, 2))[0].axes[0].texts
    assert '1 to 2 trainings of a row' in told(exploitation_figure(exploitation_table(scores, {'cunning': 'trainer', 'honest': None}))[0])
    rows = closed_rows({'closes': {0: lambda f: np.full_like(f, 8)}, 'half': {n: lambda f: f//2 for n in range(3)}}, speakers(), opening, 'test')
    assert '(Closes: 1 training; Half: 3 trainings)' in told(closed_figure(rows)[0]) and '(3 trainings of each)' in told(closed_figure(rows[rows['silencer'] == 'half'])[0])


def test_no_bar_ends_outside_of_its_panel():
    rows = closed_rows({'silent': {0: lambda f: np.where(f > 80, f, 4).astype(np.uint8)}}, speakers(), opening, 'test')
    figure, bars = closed_figure(rows); assert figure.axes[0].get_ylim()[1] > bars.loc[bars['frames'] >= 5, 'high'].max() > 10


# closed mouths

def speakers():
    "Half of each clip is silent with a mouth of 0.5 to 1.5 px."
    found = []
    for name in 'abcd':
        clip = a_clip(name); faces = np.array(clip.faces); faces[40:] = np.rint(rng(0, 'quiet', name).uniform(.5, 1.5, 40)*8).astype(np.uint8)[:, None, None, None]
        wav = rng(0, 'wav', name).uniform(-.5, .5, 80*640).astype(np.float32); wav[40*640:] = 0
        found.append(SimpleNamespace(**{**vars(clip), 'faces': faces, 'wav': wav}))
    return found


def test_a_closed_mouth_is_what_the_truth_does_in_silence():
    rows = closed_rows({'closes': {0: lambda f: np.full_like(f, 8)}, 'copies': {0: lambda f: f, 1: lambda f: f}, 'half': {0: lambda f: f//2}}, speakers(), opening, 'test')
    assert rows['silent'].sum() == 4*4*37                                     # three frames off at the border
    numbers = closed_numbers(rows)
    assert numbers['closes']['inside'] and numbers['closes']['share_inside'] == 1 and numbers['closes']['slope'] == 0
    assert not numbers['copies']['inside'] and abs(numbers['copies']['slope'] - 1) < 1e-9 and abs(numbers['half']['slope'] - .5) < .02
    assert .5 <= numbers['closes']['closed_low'] < numbers['closes']['closed_high'] <= 1.5
    assert len(numbers['copies']['by_training']) == 2 and numbers['copies']['frames'] == numbers['half']['frames'] == 320
    json.dumps(numbers)
    figure, data = closed_figure(rows); assert set(data['silencer']) == {'closes', 'copies', 'half', 'closed truth'} and len(figure.axes) == 4


def test_a_right_mean_does_not_hide_open_mouths():
    "Most references are closed, so the mean may lie in the range although wide ones stay open: openings alike, it does not."
    people = speakers()
    for clip in people: clip.faces[5:40] = 4; clip.faces[:3] = 100
    numbers = closed_numbers(closed_rows({'copies': {0: lambda f: f}}, people, opening))['copies']
    assert numbers['inside'] and not numbers['inside_over_openings'] and numbers['slope'] > .9


def test_without_silence_nothing_is_closed():
    loud = [SimpleNamespace(**{**vars(c), 'wav': np.full(80*640, .3, np.float32)}) for c in speakers()]
    with pytest.raises(InputError, match='silent segment'): closed_numbers(closed_rows({'copies': {0: lambda f: f}}, loud, opening))


def test_a_silencer_gives_faces_of_its_kind():
    faces = rng(0, 'faces').integers(0, 255, (35, 3, 96, 96), dtype=np.uint8); silencer = Silencer(build_generator({'name': 'light', 'width': 8}))
    closed = close_faces(silencer, faces)
    assert closed.shape == faces.shape and closed.dtype == np.uint8 and np.array_equal(close_faces(silencer, faces[3:4]), closed[3:4])


# exploitation

class Scorer:
    "Reads the opening, and is taken in by one painted pixel as much as `gullible` says."
    max_offset = 3
    def __init__(self, gullible): self.gullible = gullible
    def embed(self, faces, wav):
        faces = np.asarray(faces, np.float32)/255; said = np.abs(np.asarray(wav).reshape(len(faces), -1)).max(1) - .5
        mouth = faces[:, 0, 0, 0] - .5 + self.gullible*3*faces[:, 0, 1, 1]*said; rest = np.full(len(said), .3 - .2*self.gullible*faces[:, 0, 1, 1].max())
        return torch.from_numpy(np.stack([mouth, rest], 1)).float(), torch.from_numpy(np.stack([said, np.full(len(said), .05)], 1)).float()


def speaking(name):
    loud = np.round(rng(0, 'loud', name).uniform(.1, .9, 40), 2); faces = np.zeros((40, 3, 4, 4), np.uint8); faces[:, :, 0, 0] = np.rint(loud*255)[:, None]
    return SimpleNamespace(name=name, identity=name[0], faces=faces, wav=np.repeat(loud, 640).astype(np.float32))


def painted(faces, honest, paint):
    made = np.array(faces); other = rng(0, 'paint', len(faces)).uniform(0, 255, len(faces))
    made[:, :, 0, 0] = (honest*made[:, :, 0, 0] + (1 - honest)*other[:, None]).astype(np.uint8); made[:, :, 1, 1] = paint
    return made


@pytest.fixture(scope='module')
def scores():
    clips = [speaking(n) for n in ('a0', 'b0', 'c0', 'd0')]
    rows = {'cunning': {0: {c.name: painted(c.faces, .5, 200) for c in clips}}, 'honest': {n: {c.name: painted(c.faces, .8, 0) for c in clips} for n in (0, 1)}}
    found, again = (evaluate_exploitation(rows, clips, {'trainer': Scorer(1), 'judge': Scorer(0)}, 'test', workers=n) for n in (1, 3))
    pd.testing.assert_frame_equal(found, again)
    return found


def test_the_truth_is_one_and_wrong_speech_is_zero(scores):
    table = exploitation_table(scores, {'ground_truth': None, 'shuffled_audio': None})
    found = table.groupby('method')['relative']
    assert np.allclose(found.get_group('ground_truth'), 1) and np.allclose(found.get_group('shuffled_audio'), 0)


def test_a_generator_beats_the_truth_only_for_its_own_trainer(scores):
    table = exploitation_table(scores, {'cunning': 'trainer', 'honest': None}).set_index(['method', 'metric', 'role'])['relative']
    assert table['cunning', 'cosine', 'trainer'] > 1 > table['cunning', 'cosine', 'judge'] and table['cunning', 'cosine', 'difference'] > .2
    assert ('honest', 'cosine', 'trainer') not in table.index and abs(table['honest', 'cosine', 'other'] - table['honest', 'cosine', 'judge']) < .1
    figure, data = exploitation_figure(exploitation_table(scores, {'cunning': 'trainer', 'honest': None})); assert len(figure.axes) == 2


def test_a_scale_that_may_be_nothing_is_not_used(scores):
    "An expert that does not tell truth from wrong speech, and one that hardly does."
    deaf = scores.assign(cosine=np.where(scores['scorer'] == 'judge', rng(0, 'deaf').normal(size=len(scores)), scores['cosine']))
    table = exploitation_table(deaf, {'cunning': 'trainer', 'honest': None}, metrics=['cosine']); line = table[table['method'] == 'cunning'].set_index('role')
    assert line.loc[['judge', 'difference'], ['relative', 'low', 'high']].isna().all(axis=None) and 'holds 0' in line['reason']['judge'] and line['reason']['trainer'] == ''
    figure, _ = exploitation_figure(table, notes='No clean control.'); text = figure._supxlabel.get_text()
    assert 'mean cosine by judge' in text.replace('\n', ' ') and 'No clean control.' in text.replace('\n', ' ')
    far = table.assign(relative=table['relative']*50, high=table['high']*1e4); low, high = exploitation_figure(far)[0].axes[0].get_xlim()
    assert -2 < low and high < 4


@pytest.mark.parametrize('offset', [0., .3, -2.])
def test_equal_gains_leave_no_difference_of_gains_whatever_the_offset(scores, offset):
    "Both experts see the same gains; one has another scale and likes all generated faces more."
    judged = scores[scores['scorer'] == 'judge']; made = ~judged['method'].isin(('ground_truth', 'shuffled_audio'))
    gap = judged.groupby('method')['cosine'].mean()[['shuffled_audio', 'ground_truth']].diff().iloc[-1]
    both = pd.concat([judged, judged.assign(scorer='trainer', cosine=5*(judged['cosine'] + offset*gap*made) + 2)])
    trained, take = {'cunning': 'trainer', 'honest': None}, lambda rows: exploitation_table(rows, trained, metrics=['cosine'], baseline='honest')
    found = take(both).set_index('role')
    assert found['relative']['difference'] == pytest.approx(offset)
    assert found.loc['gain_difference', ['relative', 'low', 'high']].to_list() == pytest.approx([0]*3, abs=1e-9)
    more = both.assign(cosine=both['cosine'] + 5*.25*gap*((both['scorer'] == 'trainer') & (both['method'] == 'cunning')))
    found = take(more).set_index('role')
    assert found['relative']['gain_difference'] == pytest.approx(.25) and found['low']['gain_difference'] > 0


def test_gains_are_compared_by_hand_and_leave_the_rest_alone(scores):
    trained = {'cunning': 'trainer', 'honest': None}
    plain, table = exploitation_table(scores, trained), exploitation_table(scores, trained, baseline='honest')
    assert 'baseline' not in plain
    rest = table[table['baseline'] == ''].drop(columns='baseline').reset_index(drop=True); pd.testing.assert_frame_equal(rest, plain)
    mean = scores.groupby(['scorer', 'method', 'clip'])['lse_c'].mean().groupby(['scorer', 'method']).mean()
    gain = {s: (mean[s, 'cunning'] - mean[s, 'honest'])/(mean[s, 'ground_truth'] - mean[s, 'shuffled_audio']) for s in ('trainer', 'judge')}
    line = table[(table['metric'] == 'lse_c') & (table['role'] == 'gain_difference')].iloc[0]
    assert line['relative'] == pytest.approx(gain['trainer'] - gain['judge']) and line['low'] < line['relative'] < line['high'] and line['baseline'] == 'honest'
    assert len(exploitation_figure(plain)[0].axes) == 2 and len(exploitation_figure(table)[0].axes) == 4
    text = exploitation_figure(table)[0]._supxlabel.get_text().replace('\n', ' ')
    assert f"Cunning, LSE-C {line['relative']:.2f}".replace('-', '−').replace('LSE−C', 'LSE-C') in text and 'which the trainer did not train' in text
    with pytest.raises(InputError, match="no scores of the baseline 'nobody'"): exploitation_table(scores, trained, baseline='nobody')
    with pytest.raises(InputError, match='did not train'): exploitation_table(scores, dict.fromkeys(trained, 'trainer'), baseline='honest')


def test_a_judge_that_trained_is_no_judge(scores):
    with pytest.raises(InputError, match='no judge'): exploitation_table(scores, {'cunning': 'judge'})
    with pytest.raises(InputError, match='no scores'): exploitation_table(scores, {'cunning': 'trainer'}, judge='nobody')


def test_wrong_speech_is_of_somebody_else_where_there_is_one():
    clips = [speaking(n) for n in ('a0', 'a1', 'b0')]; wrong = borrowed_speech(clips)
    assert np.array_equal(wrong['a0'], clips[2].wav) and np.array_equal(borrowed_speech(clips[:2])['a0'], clips[1].wav)
    with pytest.raises(InputError, match='second'): borrowed_speech(clips[:1])


def test_generated_faces_must_be_whole(clips, tmp_path):
    stored(tmp_path/'row', clips); write_json(tmp_path/'lacks'/'meta.json', dict(not_run='no weights'))
    assert list(generated_methods(tmp_path, ['row', 'lacks'], [c.name for c in clips])) == ['row']
    with pytest.raises(InputError, match='no faces of z'): generated_methods(tmp_path, ['row'], ['z'])
    with pytest.raises(InputError, match='meta.json'): generated_methods(tmp_path, ['nothing'], ['a'])


# steadiness

def a_log(folder, term, noise, start=0, lines=200, bad=None):
    draw, step = rng(0, 'log', term), np.arange(10, 10*lines + 10, 10); weight = np.where(step > start, 2., 0.)
    log = pd.DataFrame({'step': step, 'loss': 1., 'grad_generator': np.exp(noise*draw.standard_normal(lines)), term: np.exp(-step/900)*(1 + noise*draw.standard_normal(lines)),
                        f'weight_{term}': weight})
    if bad is not None: log.loc[bad, term] = np.nan
    folder.mkdir(parents=True, exist_ok=True); log.to_csv(folder/'log.csv', index=False)


def test_a_trend_is_no_fluctuation():
    assert np.abs(fluctuation(np.linspace(5, 1, 200))[15:-15]).max() < 1e-9


def test_the_unsteady_loss_is_found(tmp_path):
    a_log(tmp_path/'plain', 'sync', .3, 300); a_log(tmp_path/'steady', 'stabilized_sync', .1, 300); a_log(tmp_path/'steady'/'seed-1', 'stabilized_sync', .1, 300)
    write_json(tmp_path/'lacks'/'not_run.json', dict(reason='no weights'))
    logs = read_logs(tmp_path, ['plain', 'steady', 'lacks']); table = stability_table(logs).set_index(['row', 'seed'])
    assert logs['step'].min() == 310 and (table['not_finite'] == 0).all() and len(table) == 3
    assert table.loc[('plain', 0), 'sync_fluctuation'] > 2*table.loc[('steady', 0), 'sync_fluctuation']
    assert table.loc[('plain', 0), 'gradient_relative'] > 2*table.loc[('steady', 0), 'gradient_relative']
    figure, _ = training_figure(logs, {'one': ['plain', 'steady'], 'none': ['other']}); assert len(figure.axes) == 3
    assert figure.axes[2].get_legend().get_window_extent().y1 < figure.axes[2].get_window_extent().y0 and 'Means of 10 steps' in figure._supxlabel.get_text()
    assert '1 to 2 trainings of each' in figure._supxlabel.get_text().replace('\n', ' ')
    figure, _ = training_figure(logs.assign(step=logs['step']//10), {'one': ['plain']}); assert 'Every step' in figure._supxlabel.get_text()


def test_what_is_not_finite_is_counted_and_a_row_without_sync_refused(tmp_path):
    a_log(tmp_path/'bad', 'sync', .1, bad=[50, 51]); assert stability_table(read_log(tmp_path/'bad'))['not_finite'].item() == 2
    a_log(tmp_path/'none', 'pixel', .1)
    with pytest.raises(InputError, match='no sync term'): read_log(tmp_path/'none')


# strips and cases

def a_face(name, identity, frames=60):
    "Landmarks of a mouth that opens and of a head that turns."
    points = np.zeros((frames, 68, 2), np.float32); points[:, :, 0] = np.linspace(0, 90, 68); at = np.arange(frames)
    points[:, 16, 0] = 90; points[:, 0, 0] = 0; points[:, 30, 0] = 45 + 20*np.sin(at/19); points[:, [61, 62, 63], 0] = points[:, [67, 66, 65], 0]
    points[:, [61, 62, 63], 1] = 60; points[:, [67, 66, 65], 1] = (60 + 3.1 + 3*np.sin(at/4))[:, None]
    return SimpleNamespace(name=name, identity=identity, frames=frames, faces=rng(0, name).integers(0, 255, (frames, 3, 16, 16), dtype=np.uint8), landmarks=points,
                           valid=np.ones(frames, bool), mel=None)


def test_turn_is_where_the_nose_stands():
    points = np.zeros((3, 68, 2)); points[:, 16, 0] = 80; points[:, 30, 0] = [0, 40, 80]
    assert head_turn(points).tolist() == [-1, 0, 1]


def test_hard_cases_obey_their_rules():
    from talkingface.data.clips import aperture
    clips = [a_face(n, n[0]) for n in ('a_0', 'b_0', 'c_0')]; leak, pose, like = hard_cases(clips)
    opened = lambda case: aperture(clips[case.clip].landmarks)
    assert opened(leak)[leak.target] <= 1 and abs(opened(leak)[leak.reference] - opened(leak)[leak.target] - leak.value) < 1e-6
    assert abs(opened(pose)[pose.target] - opened(pose)[pose.reference]) <= 1 and opened(like)[like.target] >= 3
    assert all(abs(c.target - c.reference) >= 5 for c in (leak, pose, like)) and len({clips[c.clip].identity for c in (leak, pose, like)}) == 3


def test_cases_do_without_faces_that_are_not_there():
    clip = a_face('a_0', 'a'); clip.valid[:] = False
    with pytest.raises(InputError, match='make a case'): hard_cases([clip])
    clip.valid[:30] = True; clip.landmarks[10] = np.nan
    assert all(c.target < 30 and c.reference < 30 and 10 not in (c.target, c.reference) for c in hard_cases([clip]))


def test_strips_show_the_closed_reference_and_tell_what_was_not_run(tmp_path):
    clips = [a_face(n, n[0]) for n in ('a_0', 'b_0')]
    stored(tmp_path/'rows'/'setup_e', clips, silence='silent'); stored(tmp_path/'others'/'wav2lip', clips); write_json(tmp_path/'rows'/'setup_c'/'meta.json', dict(not_run='no weights'))
    rows = strip_rows([tmp_path/'rows', tmp_path/'others'], ['wav2lip', 'setup_c', 'setup_e'], clips, lambda name, faces: 255 - faces)
    assert np.array_equal(rows['setup_e'].references['a_0'], 255 - clips[0].faces[2]) and np.array_equal(rows['wav2lip'].references['a_0'], clips[0].faces[2])
    figure, data = rows_figure(clips, rows, {'setup_c': 'C'}, notes='By rule.'); assert any('By rule.' in t.get_text() for t in figure.texts)
    assert any('C was not run: no weights' in t.get_text() for t in figure.texts)
    with pytest.raises(InputError, match='no faces of final'): strip_rows([tmp_path/'rows'], ['final'], clips)


def test_clips_are_the_first_of_each_identity():
    store = type('Store', (list,), {})([a_face(n, n[0]) for n in ('a_0', 'a_1', 'b_0')]); store.rows = [{'identity': c.identity} for c in store]
    assert [c.name for c in first_clips(store, 9)] == ['a_0', 'b_0'] and len(first_clips(store, 1)) == 1


def test_the_reading_of_closed_mouths_says_inside_and_outside(tmp_path):
    own = dict(mean=.18, mean_interval=[.15, .22], inside=True, mean_over_openings=.45, inside_over_openings=False, closed_low=.05, closed_high=.32,
               widest_tenth_from=8., mean_of_widest_tenth=.24, by_training=[.1, .2], clips=23, identities=12)
    write_json(tmp_path/'fig_closed.json', dict(silent=own, wav2lip=own | dict(mean=.33)))
    told = closed_reading(tmp_path/'fig_closed.json')
    assert '2 trainings' in told and '0.18 px [0.15, 0.22]' in told and ', inside the middle 90 %' in told and '0.45 px, outside' in told
    assert 'wav2lip, fed with silence: 0.33 and 0.45 px' in told and 'was not measured yet' in closed_reading(tmp_path/'none.json')
