"""`evaluate`: what bad input does, that an interrupted run goes on, and that neither processes nor pieces change a number."""
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from test_metrics import Brightness, Corner

from talkingface.core import InputError, MissingWeights, ParamsError
from talkingface.data.audio import load_audio, save_audio
from talkingface.data.corpora import load_tracks, save_tracks
from talkingface.data.faces import FaceAlignmentTracker
from talkingface.data.video import read_frames, write_video
from talkingface.evaluation import (ON_DEMAND, choose_metrics, clip_order, differences_of, evaluate, part_path, read_part, usual_folders,
                                    usual_scorers, warnings_of, weights_of)
from talkingface.metrics.lips import LipTracker
from talkingface.metrics.report import ROW_FIELDS, Scorers
from talkingface.metrics.sync import SyncScorer
from talkingface.pairs import Framing, Pair, Side, find_pairs, read_manifest

NAMES = ('test_0000_0', 'test_0001_0', 'test_0002_0', 'test_0003_0')
FRAMES = 30
SCORERS = Scorers(syncs={'toy': SyncScorer(Brightness(), 'toy', 'ab' * 32)}, lips=LipTracker(Corner(), 'toy', 'cd' * 32))


def put(folder, name, frames, wav=None, landmarks=None, fps=25):
    folder.mkdir(parents=True, exist_ok=True)
    write_video(folder/f'{name}.mp4', frames, fps, wav=wav, crf=10, preset='ultrafast')
    if landmarks is not None: save_tracks(folder/f'{name}.npz', dict(landmarks=landmarks))


@pytest.fixture(scope='module')
def clips(root):
    "Name -> (frames, sound, landmarks) of some clips of the rendered corpus, thirty frames each."
    corpus = root/'data'/'corpus'/'test'
    if not corpus.is_dir(): pytest.skip('no data/corpus: dvc pull')
    return {n: (read_frames(corpus/f'{n}.mp4')[20:20 + FRAMES], load_audio(corpus/f'{n}.flac')[20*640:(20 + FRAMES)*640],
                load_tracks(corpus/f'{n}.npz')['landmarks'][20:20 + FRAMES]) for n in NAMES}


@pytest.fixture(scope='module')
def true(clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp('true')
    for name, (frames, wav, landmarks) in clips.items(): put(folder, name, frames, wav, landmarks)
    return folder


def noisy(frames, sigma=12, seed=0):
    return np.clip(frames + np.random.default_rng(seed).normal(0, sigma, frames.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope='module')
def made(clips, tmp_path_factory):
    "Generated videos: the references with noise, and with sound of their own."
    folder = tmp_path_factory.mktemp('made')
    for i, (name, (frames, wav, _)) in enumerate(clips.items()): put(folder, name, noisy(frames, 6 + 4*i, i), wav)
    return folder


@pytest.fixture
def copy(made, tmp_path):
    "The generated videos, to be spoilt."
    return shutil.copytree(made, tmp_path/'made')


def value(outcome, clip, metric, column='value', method=None):
    rows = outcome.rows; rows = rows[(rows['clip'] == clip) & (rows['metric'] == metric)]
    if method: rows = rows[rows['method'] == method]
    row, = rows.to_dict('records'); return row[column]


@pytest.fixture(scope='module')
def plain(true, made, tmp_path_factory):
    "An undisturbed run."
    return evaluate(find_pairs({'ours': made}, true), tmp_path_factory.mktemp('out'), SCORERS)


def test_all_files_are_written(plain, made):
    assert plain.status == 0 and plain.scored == plain.fresh == len(NAMES)
    assert {p.name for p in plain.out.iterdir()} == {'rows.csv', 'rows.parquet', 'summary.csv', 'clips.csv', 'protocol.json', 'report.html', 'parts'}
    rows, packed = pd.read_csv(plain.out/'rows.csv'), pd.read_parquet(plain.out/'rows.parquet')
    assert tuple(rows) == tuple(packed) == ROW_FIELDS and len(rows) == len(packed) == len(plain.rows)
    assert np.allclose(rows['value'], packed['value'], equal_nan=True) and {'psnr', 'ssim', 'lmd', 'lse_c[toy]', 'offset[toy]'} <= set(rows['metric'])
    summary = pd.read_csv(plain.out/'summary.csv').set_index('metric')
    assert {'mean', 'low', 'high', 'n', 'given', 'infinite'} <= set(summary) and (summary['given'] == len(NAMES)).all()
    assert summary.loc['psnr', 'low'] < summary.loc['psnr', 'mean'] < summary.loc['psnr', 'high']
    assert summary.loc['lse_c_variance[toy]', 'n'] == len(NAMES)                        # one value for the set
    assert value(plain, 'all', 'lse_c_variance[toy]') == pytest.approx(np.var([value(plain, n, 'lse_c[toy]') for n in NAMES]))


def test_the_protocol_says_everything(plain):
    protocol = json.loads((plain.out/'protocol.json').read_text())
    assert protocol['weights'] == {'syncs': {'toy': 'ab' * 32}, 'lips': {'toy': 'cd' * 32}} == weights_of(SCORERS)
    assert 'frame i is the picture on screen at i/25 s' in protocol['alignment'] and 'generated video if it has one' in protocol['sound']
    assert protocol['crop'].startswith('96x96') and protocol['versions']['torch'] and protocol['bootstrap']['seed'] == 0
    assert protocol['metrics']['psnr']['unit'] == 'dB' and protocol['metrics']['psnr']['higher_is_better'] is True
    assert 'weights' in protocol['unavailable']['lpips'] or 'alexnet' in str(protocol['unavailable'])
    assert value(plain, NAMES[0], 'lse_c[toy]', 'protocol').endswith('; sound: generated video')


def test_the_report_is_one_file(plain):
    page = (plain.out/'report.html').read_text()
    for part in ('PSNR ↑ (dB)', 'LMD ↓ (px)', 'Distributions', 'Worst clips', 'Best clips', 'Contact sheet', 'Skipped clips', 'data:image/jpeg;base64,', '<path'):
        assert part in page, part
    assert 'src="http' not in page and 'href="http' not in page and '<script' not in page and '@import' not in page
    assert all(n in page for n in NAMES)


def test_crops_are_those_of_prepare(plain, true, made, clips):
    "The same number as from arrays that are cut without any of this."
    from talkingface.data.faces import StoredTracks, crop_faces
    from talkingface.metrics.image import psnr
    name = NAMES[1]; boxes = StoredTracks().track(true/f'{name}.mp4').boxes
    a, b = (crop_faces(read_frames(f/f'{name}.mp4'), boxes).transpose(0, 3, 1, 2) for f in (made, true))
    assert value(plain, name, 'psnr') == pytest.approx(psnr(np.ascontiguousarray(a), np.ascontiguousarray(b)), abs=1e-9)


def test_processes_do_not_change_a_value(plain, true, made, tmp_path):
    many = evaluate(find_pairs({'ours': made}, true), tmp_path, SCORERS, workers=2)
    assert many.rows.to_csv() == plain.rows.to_csv() and many.summary.to_csv() == plain.summary.to_csv()
    assert not (tmp_path/'work').exists()


def test_an_interrupted_run_goes_on(plain, true, made, tmp_path, monkeypatch):
    "Two clips are finished, then the run is stopped; the next scores the other two, and the one after that none."
    from talkingface import evaluation
    real, calls = evaluation.score_case, []
    def stopped(*args):
        if len(calls) == 2: raise KeyboardInterrupt
        calls.append(1); return real(*args)
    monkeypatch.setattr(evaluation, 'score_case', stopped)
    with pytest.raises(KeyboardInterrupt): evaluate(find_pairs({'ours': made}, true), tmp_path, SCORERS)
    assert not (tmp_path/'work').exists() and not (tmp_path/'rows.csv').exists()
    monkeypatch.setattr(evaluation, 'score_case', real)
    first, second = (evaluate(find_pairs({'ours': made}, true), tmp_path, SCORERS) for _ in range(2))
    assert (first.fresh, second.fresh) == (2, 0)
    assert first.rows.to_csv() == second.rows.to_csv() == plain.rows.to_csv()


def test_what_was_kept_ends_with_files_settings_and_weights(true, copy, tmp_path):
    def run(scorers=SCORERS, **options): return evaluate(find_pairs({'ours': copy}, true), tmp_path/'out', scorers, ['psnr', 'lmd'], **options).fresh
    assert run() == 4 and run() == 0
    os.utime(copy/f'{NAMES[0]}.mp4'); assert run() == 0                                     # another time, the same bytes
    shutil.copy(copy/f'{NAMES[1]}.mp4', copy/f'{NAMES[0]}.mp4'); assert run() == 1          # another file
    assert run(framing=Framing(size=64)) == 4
    other = Scorers(lips=LipTracker(Corner(), 'toy', 'ef' * 32)); assert run(other, framing=Framing(size=64)) == 4 and run(other, framing=Framing(size=64)) == 0
    part_path(tmp_path/'out', 'ours', NAMES[2]).write_bytes(b'cut off by a full disk'); assert run(other, framing=Framing(size=64)) == 1


def test_unpaired_files_are_named(true, copy, tmp_path):
    (copy/f'{NAMES[0]}.mp4').rename(copy/'nobody.mp4')
    done = evaluate(find_pairs({'ours': copy}, true), tmp_path/'out', SCORERS, ['psnr'])
    assert done.status == 1 and done.scored == 3
    why = {s['clip']: s['reason'] for s in done.skipped}
    assert set(why) == {NAMES[0], 'nobody'} and 'no generated video' in why[NAMES[0]] and 'no reference' in why['nobody']
    page = (tmp_path/'out'/'report.html').read_text(); assert 'nobody' in page and 'no generated video of this name' in page
    assert done.summary.iloc[0]['n'] == 3 and done.summary.iloc[0]['given'] == 5


def test_a_generated_video_that_is_shorter(clips, true, copy, tmp_path):
    name, (frames, wav, _) = NAMES[0], clips[NAMES[0]]
    put(copy, name, noisy(frames[:21]), wav[:21*640])
    done = evaluate(find_pairs({'ours': copy}, true), tmp_path/'out', SCORERS, ['psnr', 'lse_c'])
    assert done.status == 0 and value(done, name, 'psnr', 'n_frames') == 21
    note = pd.read_csv(tmp_path/'out'/'clips.csv').set_index('clip').loc[name, 'note']
    assert 'reference is 9 frames (0.36 s) longer than generated; the first 21 frames are compared' in note and note in (tmp_path/'out'/'report.html').read_text()


def test_another_size_and_rate_are_aligned(clips, true, tmp_path):
    "Twice the size and thirty frames per second: the same faces at the same times."
    import cv2
    name, (frames, wav, _) = NAMES[0], clips[NAMES[0]]
    fast = frames[np.minimum(np.arange(36)*25//30, FRAMES - 1)]
    put(tmp_path/'made', name, np.stack([cv2.resize(f, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR) for f in fast]), wav, fps=30)
    pair, = [p for p in find_pairs({'ours': tmp_path/'made'}, true) if not p.reason]
    done = evaluate([pair], tmp_path/'out', SCORERS, ['psnr'])
    facts = pd.read_csv(tmp_path/'out'/'clips.csv').iloc[0]
    assert facts['generated_size'] == '320x320' and facts['generated_fps'] == 30 and facts['frames'] == FRAMES and '30 frames/s' in facts['note']
    assert value(done, name, 'psnr') > 30


def test_a_clip_without_face(true, made, tmp_path):
    folder = shutil.copytree(true, tmp_path/'true')
    save_tracks(folder/f'{NAMES[0]}.npz', dict(landmarks=np.full((FRAMES, 68, 2), np.nan, np.float32)))
    done = evaluate(find_pairs({'ours': made}, folder), tmp_path/'out', SCORERS, ['psnr'])
    assert done.status == 1 and 'no face in any of 30 frames' in done.skipped[0]['reason'] and value(done, NAMES[0], 'psnr', 'reason') == done.skipped[0]['reason']


def test_frames_without_landmarks_are_left_out(clips, made, tmp_path):
    "NaN in the tracks: those frames are not scored, the others are."
    name, (frames, wav, landmarks) = NAMES[0], clips[NAMES[0]]
    broken = landmarks.copy(); broken[5:12] = np.nan
    put(tmp_path/'true', name, frames, wav, broken)
    done = evaluate([p for p in find_pairs({'ours': made}, tmp_path/'true') if not p.reason], tmp_path/'out', SCORERS, ['psnr', 'lmd'])
    assert value(done, name, 'psnr', 'n_frames') == value(done, name, 'lmd', 'n_frames') == FRAMES - 7 and np.isfinite(value(done, name, 'lmd'))
    assert '7 of 30 frames show no face' in pd.read_csv(tmp_path/'out'/'clips.csv').iloc[0]['note']


def test_a_clip_without_sound(clips, tmp_path):
    name, (frames, _, landmarks) = NAMES[0], clips[NAMES[0]]
    put(tmp_path/'true', name, frames, None, landmarks); put(tmp_path/'made', name, noisy(frames))
    done = evaluate(find_pairs({'ours': tmp_path/'made'}, tmp_path/'true'), tmp_path/'out', SCORERS)
    assert done.status == 0 and np.isfinite(value(done, name, 'psnr'))
    assert value(done, name, 'lse_c[toy]', 'reason') == value(done, 'all', 'lse_c_variance[toy]', 'reason').removesuffix(' (1 clips)') \
        == 'neither the generated nor the reference video has sound'
    assert any('no value of' in w and 'sound' in w for w in warnings_of(done))


def test_silent_sound(clips, tmp_path):
    name, (frames, wav, landmarks) = NAMES[0], clips[NAMES[0]]
    put(tmp_path/'true', name, frames, np.zeros_like(wav), landmarks); put(tmp_path/'made', name, noisy(frames), np.zeros_like(wav))
    done = evaluate(find_pairs({'ours': tmp_path/'made'}, tmp_path/'true'), tmp_path/'out', SCORERS)
    assert done.status == 0 and 'silent' in value(done, name, 'lse_c[toy]', 'reason') and np.isfinite(value(done, name, 'psnr'))


def test_whose_sound_is_scored(clips, tmp_path):
    "The generated video's own, or a file beside it, or that of the reference; the protocol says which."
    name, (frames, wav, landmarks) = NAMES[0], clips[NAMES[0]]
    put(tmp_path/'true', name, frames, wav, landmarks); put(tmp_path/'made', name, frames)
    def sound(prefer='generated'):
        done = evaluate(find_pairs({'ours': tmp_path/'made'}, tmp_path/'true'), tmp_path/'out', SCORERS, ['lse_d'], Framing(audio=prefer))
        return value(done, name, 'lse_d[toy]', 'protocol').split('; sound: ')[1]
    assert sound() == 'reference video'
    save_audio(tmp_path/'made'/f'{name}.wav', wav); assert sound() == 'file beside the generated video'
    put(tmp_path/'made', name, frames, wav); assert sound() == 'generated video' and sound('reference') == 'reference video'


def test_a_single_frame(clips, tmp_path):
    name, (frames, wav, landmarks) = NAMES[0], clips[NAMES[0]]
    put(tmp_path/'true', name, frames[:1], wav[:640], landmarks[:1]); put(tmp_path/'made', name, noisy(frames[:1]), wav[:640])
    done = evaluate(find_pairs({'ours': tmp_path/'made'}, tmp_path/'true'), tmp_path/'out', SCORERS)
    assert done.status == 0 and np.isfinite(value(done, name, 'psnr')) and 'the expert needs 5' in value(done, name, 'lse_c[toy]', 'reason')
    assert value(done, name, 'ifc_diff', 'reason') and (tmp_path/'out'/'report.html').is_file()


def test_few_frames_for_fid_are_warned_of(true, made, tmp_path):
    class Features:
        name, sha256, dim, protocol = 'toy', '12' * 32, 96, 'toy features'
        def __call__(self, faces): return torch.tensor(np.asarray(faces), dtype=torch.float32).flatten(1)[:, ::280][:, :96]/255
    scorers = Scorers(fid={'toy': Features()})
    pairs = [Pair(p.method, p.clip, p.generated, p.reference) for p in find_pairs({'ours': made}, true)][:2]
    done = evaluate(pairs, tmp_path/'out', scorers, ['fid'])
    row, = done.rows.to_dict('records')
    assert row['clip'] == 'all' and row['value'] >= 0 and row['n_frames'] == 2*FRAMES and 'bias' in row['reason']
    assert any('bias' in w for w in warnings_of(done)) and 'bias' in (tmp_path/'out'/'report.html').read_text()


def test_identical_videos_are_infinite_and_counted(true, copy, tmp_path):
    for name in NAMES[:2]: shutil.copy(true/f'{name}.mp4', copy/f'{name}.mp4')
    done = evaluate(find_pairs({'ours': copy}, true), tmp_path/'out', SCORERS, ['psnr', 'ssim'])
    line = done.summary.set_index('metric').loc['psnr']
    assert line[['n', 'given', 'infinite']].tolist() == [2, 4, 2] and np.isfinite(line['mean'])
    assert value(done, NAMES[0], 'psnr') == np.inf and done.status == 0 and '2 infinite' in (tmp_path/'out'/'report.html').read_text()
    done = evaluate([p for p in find_pairs({'ours': true}, true)], tmp_path/'same', SCORERS, ['psnr'])
    assert done.summary.iloc[0]['mean'] == np.inf and done.summary.iloc[0]['infinite'] == 4


@pytest.mark.parametrize('workers', [1, 2])
def test_a_corrupt_file_in_the_middle_of_a_run(true, copy, tmp_path, workers):
    data = (copy/f'{NAMES[1]}.mp4').read_bytes(); (copy/f'{NAMES[1]}.mp4').write_bytes(data[:len(data)//2]); (copy/f'{NAMES[2]}.mp4').write_text('not a video')
    done = evaluate(find_pairs({'ours': copy}, true), tmp_path/'out', SCORERS, ['psnr'], workers=workers)
    assert done.status == 1 and done.scored == 2 and {s['clip'] for s in done.skipped} == set(NAMES[1:3])
    assert all(s['reason'].startswith('generated: ') and str(copy) not in s['reason'] for s in done.skipped)
    (copy/f'{NAMES[1]}.mp4').write_bytes(data)                                               # mended: scored in the next run, and nothing else
    assert evaluate(find_pairs({'ours': copy}, true), tmp_path/'out', SCORERS, ['psnr']).fresh == 1


def test_nothing_scored_has_status_2(true, tmp_path):
    (tmp_path/'made').mkdir(); (tmp_path/'made'/f'{NAMES[0]}.mp4').write_bytes(b'')
    done = evaluate(find_pairs({'ours': tmp_path/'made'}, true), tmp_path/'out', SCORERS, ['psnr'])
    assert done.status == 2 and done.scored == 0 and (tmp_path/'out'/'report.html').is_file()


def test_unknown_metrics_and_missing_networks():
    with pytest.raises(ParamsError, match='did you mean lse_c'): choose_metrics(SCORERS, ['lse_cc'])
    with pytest.raises(InputError, match=r'cannot score lse_c\[other\].*lse_c\[toy\]'): choose_metrics(SCORERS, ['lse_c[other]'])
    with pytest.raises(InputError, match='AV-HuBERT'): choose_metrics(SCORERS, ['avs_u'])
    assert choose_metrics(SCORERS, ['lse_c', 'psnr']) == ['lse_c[toy]', 'psnr']
    assert not set(ON_DEMAND) & set(choose_metrics(SCORERS)) and choose_metrics(SCORERS, ON_DEMAND) == list(ON_DEMAND)


def test_missing_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(tmp_path))
    with pytest.raises(InputError, match='alexnet-owt-7be5be79.pth'): choose_metrics(usual_scorers(dict.fromkeys(usual_folders(tmp_path))), ['lpips'])
    with pytest.raises(InputError, match='pt_inception-2015-12-05-6726825d.pth'): choose_metrics(usual_scorers(dict.fromkeys(usual_folders(tmp_path))), ['fid'])


@pytest.mark.parametrize('place', ['file', 'file/inside'])
def test_a_folder_that_cannot_be_written(true, made, tmp_path, place, monkeypatch):
    "Said before any work."
    (tmp_path/'file').write_text(''); monkeypatch.setattr('talkingface.evaluation._score_all', lambda *a: pytest.fail('work was done'))
    with pytest.raises(InputError, match='cannot write to .*--out'): evaluate(find_pairs({'ours': made}, true), tmp_path/place, SCORERS)


def test_methods_are_compared(clips, true, made, tmp_path):
    "Less noise is better, with a p-value over the pairs; the reference is read once for both."
    for i, (name, (frames, wav, _)) in enumerate(clips.items()): put(tmp_path/'better', name, noisy(frames, 3, i), wav)
    done = evaluate(find_pairs({'ours': made, 'better': tmp_path/'better'}, true), tmp_path/'out', SCORERS, ['psnr', 'ssim', 'offset'])
    table = pd.read_csv(tmp_path/'out'/'differences.csv').set_index('metric')
    assert set(table['method']) == {'better'} and set(table['other']) == {'ours'} and (table['n'] == 4).all()
    assert table.loc['psnr', 'low'] > 0 and table['p'].isna().all()                       # four clips are too few for a p-value
    page = (tmp_path/'out'/'report.html').read_text(); assert 'better − ours' in page and '4 clips only' in page
    assert set(done.summary['method']) == {'ours', 'better'}


def test_p_values_of_many_clips():
    draw = np.random.default_rng(1)
    rows = pd.DataFrame([dict(method=m, set='s', clip=str(i), metric=k, value=draw.normal(shift*(m == 'b'), 1)) for i in range(60) for m in 'ab'
                         for k, shift in (('psnr', 2.), ('ssim', 0.), ('lmd', 2.))])
    table = differences_of(rows, 'a').set_index('metric')
    assert table.loc['psnr', 'better'] == 'b' and table.loc['lmd', 'better'] == 'a' and table.loc['ssim', 'better'] == ''
    assert table.loc['psnr', 'p'] < .001 < .05 < table.loc['ssim', 'p'] and (table['p_holm'] >= table['p']).all()


def test_worst_and_best_clips():
    rows = pd.DataFrame([dict(method='a', clip=c, metric=m, value=v) for c, *values in (('x', 30., .9, 1., 3), ('y', 35., .95, .5, -4), ('z', 32., .8, 2., 0))
                         for m, v in zip(('psnr', 'ssim', 'lmd', 'offset'), values)])
    assert [c for c, _ in clip_order(rows)] == ['z', 'x', 'y']


def test_a_manifest(true, made, tmp_path):
    lines = ['generated,reference,clip,method,set,shown'] + [f'{made/n}.mp4,{true/n}.mp4,,{m},{s},{k}' for n, m, s, k in
             ((NAMES[0], 'a', 'easy', 0), (NAMES[1], 'a', 'hard', 5), (NAMES[2], 'a', 'hard', 20), (NAMES[0], 'b', 'easy', ''))]
    (tmp_path/'list.csv').write_text('\n'.join(lines))
    done = evaluate(read_manifest(tmp_path/'list.csv'), tmp_path/'out', SCORERS, ['psnr', 'lip_leak'])
    assert done.status == 0 and set(zip(done.summary['method'], done.summary['set'])) == {('a', 'easy'), ('a', 'hard'), ('b', 'easy')}
    page = (tmp_path/'out'/'report.html').read_text(); assert 'Summary: easy' in page and 'Summary: hard' in page
    for text, message in (('generated,refrence\na,b', "did you mean 'reference'"), ('generated\na', 'reference is missing'), ('generated,reference\n', 'no lines'),
                          ('generated,reference,shown\na,b,first', 'number of a frame'), ('generated,reference\na.mp4,b.mp4\na.mp4,b.mp4', 'more than once')):
        (tmp_path/'bad.csv').write_text(text)
        with pytest.raises(InputError if 'mean' not in message else ParamsError, match=message): read_manifest(tmp_path/'bad.csv')


def test_tracks_of_each_video(clips, true, tmp_path):
    "A generated face that is moved by ten pixels: with its own tracks the crops agree, with those of the reference they do not."
    name, (frames, wav, landmarks) = NAMES[0], clips[NAMES[0]]
    put(tmp_path/'made', name, np.roll(frames, 10, 2), wav, landmarks + np.float32([10, 0]))
    pairs = [p for p in find_pairs({'ours': tmp_path/'made'}, true) if not p.reason]
    ours, theirs = (value(evaluate(pairs, tmp_path/t, SCORERS, ['psnr'], Framing(tracks=t)), name, 'psnr') for t in ('own', 'reference'))
    assert ours > theirs + 8


def test_landmarks_from_a_tracker_are_kept_by_content(clips, true, made, tmp_path, monkeypatch):
    "Videos without stored landmarks: each is looked at once, whatever it is called."
    folder, looked = tmp_path/'true', []
    for name in NAMES[:2]: put(folder, name, clips[name][0])
    def find(tracker, video, boxes=None): looked.append(video.name); return clips[video.stem][2]
    monkeypatch.setattr('talkingface.data.faces._detect', lambda tracker, video: None); monkeypatch.setattr('talkingface.data.faces._find_landmarks', find)
    monkeypatch.setattr(FaceAlignmentTracker, 'check', lambda self: None)
    pairs = [p for p in find_pairs({'ours': made}, folder) if not p.reason]
    for out in ('a', 'b'): assert evaluate(pairs, tmp_path/out, SCORERS, ['psnr'], tracker=FaceAlignmentTracker(cache=tmp_path/'cache')).status == 0
    assert sorted(looked) == [f'{n}.mp4' for n in NAMES[:2]] and len(list((tmp_path/'cache').iterdir())) == 2
    done = evaluate(pairs, tmp_path/'c', SCORERS, ['psnr'])
    assert done.status == 2 and 'store them (T,68,2)' in done.skipped[0]['reason']


def test_wrong_tracks_are_refused(clips, made, tmp_path):
    name, (frames, wav, landmarks) = NAMES[0], clips[NAMES[0]]
    for count, words in ((FRAMES - 4, 'the video has more'), (FRAMES + 4, 'the video has 30')):
        put(tmp_path/'true', name, frames, wav, np.resize(landmarks, (count, 68, 2)))
        done = evaluate([p for p in find_pairs({'ours': made}, tmp_path/'true') if not p.reason], tmp_path/'out', SCORERS, ['psnr'])
        assert done.status == 2 and words in done.skipped[0]['reason'] and 'make them again' in done.skipped[0]['reason']


def test_names_are_matched_with_and_without_folders(tmp_path):
    for name in ('true/a/1.mp4', 'true/b/1.mp4', 'true/b/2.mp4', 'true/c.mov', 'made/b/1.mp4', 'made/2.mp4', 'made/c.mp4', 'made/1.mp4'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True); (tmp_path/name).touch()
    found = {p.clip: p for p in find_pairs({'m': tmp_path/'made'}, tmp_path/'true')}
    assert found['b__1'].generated.video.parent.name == 'b' and not found['b__2'].reason and not found['c'].reason
    assert not found['a__1'].reason and found['a__1'].generated.video == (tmp_path/'made'/'1.mp4').resolve()     # the one that is left
    inside = {p.clip for p in find_pairs({'m': tmp_path/'true'/'b'}, tmp_path/'true')}
    assert 'a__1' in inside                                                                # results within the folder of references
    with pytest.raises(InputError, match='no such folder'): find_pairs({'m': tmp_path/'none'}, tmp_path/'true')


def test_long_videos_need_no_more_memory(clips, tmp_path):
    "Crops of a clip four times as long take no more of Python's memory."
    import tracemalloc
    from talkingface.pairs import Job, prepare_job
    name, (frames, wav, landmarks) = NAMES[0], clips[NAMES[0]]; peaks = []
    for times in (8, 32):
        folder = tmp_path/str(times); put(folder, name, np.tile(frames, (times, 1, 1, 1)), None, np.tile(landmarks, (times, 1, 1)))
        side = Side(folder/f'{name}.mp4', None, folder/f'{name}.npz'); tracemalloc.start()
        result, = prepare_job(Job(name, side, (('same', side),)), folder/'work'); peaks.append(tracemalloc.get_traced_memory()[1]); tracemalloc.stop()
        assert result.facts['frames'] == FRAMES*times
    assert peaks[1] < peaks[0] + 4e6, peaks


def test_parts_are_small(plain):
    part = read_part(part_path(plain.out, 'ours', NAMES[0]))
    assert set(part.strips) == {'reference', 'generated'} and len(part.curves['psnr']) == FRAMES and os.path.getsize(part_path(plain.out, 'ours', NAMES[0])) < 1e5


def test_pairs_are_checked_before_any_work(true, made, tmp_path):
    pairs = find_pairs({'ours': made}, true)
    for wrong, message in (([], 'at least one pair'), (pairs + pairs[:1], 'more than once'), ([Pair('ours', 'all', pairs[0].generated, pairs[0].reference)], "called 'all'")):
        with pytest.raises(InputError, match=message): evaluate(wrong, tmp_path, SCORERS)


def test_weights_are_known_through_wrappers():
    "A scorer that uses another's network has that network's hash."
    from types import SimpleNamespace as Has
    net = Has(meta={'weights_sha256': '34' * 32}); scorer = Has(net=net)
    assert weights_of(Scorers(fid={'corpus': scorer}, identity={'corpus': Has(features=scorer)})) == {'fid': {'corpus': '34' * 32}, 'identity': {'corpus': '34' * 32}}


def test_another_shown_frame_or_reach_of_offsets_is_scored_again(true, made, tmp_path):
    def run(shown, reach=15):
        lines = ['generated,reference,shown'] + [f'{made/n}.mp4,{true/n}.mp4,{shown}' for n in NAMES]
        (tmp_path/'m.csv').write_text('\ufeff' + '\n'.join(lines))                             # as a spreadsheet writes it
        scorers = Scorers(syncs={'toy': SyncScorer(Brightness(), 'toy', 'ab' * 32, max_offset=reach)}, lips=SCORERS.lips)
        return evaluate(read_manifest(tmp_path/'m.csv'), tmp_path/'out', scorers, ['lip_leak', 'lse_d'])
    assert [run(0).fresh, run(0).fresh, run(20).fresh, run(20, reach=3).fresh] == [4, 0, 4, 4]
    row = run(9999).rows.query("metric == 'lip_leak'").iloc[0]
    assert np.isnan(row['value']) and 'shown: frame 9999, but only 30 frames are compared' in row['reason']


def test_names_of_any_length_have_files_of_their_own(tmp_path):
    paths = {part_path(tmp_path, m, c) for m in ('..', '.', 'a/b', 'ours') for c in ('字'*60, '字'*59, 'x', '..')}
    assert len(paths) == 16 and all(len(part) < 255 for p in paths for part in p.parts)
    assert all((tmp_path/'parts').resolve() in p.resolve().parents for p in paths)


def test_companions_of_the_reference_are_not_the_generated_videos_own(clips, tmp_path):
    "Results in a folder beside `clips` and `landmarks`: the landmarks belong to the clips."
    name, (frames, wav, landmarks) = NAMES[0], clips[NAMES[0]]
    put(tmp_path/'clips', name, frames, wav); put(tmp_path/'gen', name, noisy(frames), wav)
    (tmp_path/'landmarks').mkdir(); save_tracks(tmp_path/'landmarks'/f'{name}.npz', dict(landmarks=landmarks))
    pair, = find_pairs({'gen': tmp_path/'gen'}, tmp_path/'clips')
    assert pair.reference.tracks is not None and pair.generated.tracks is None


def test_strange_landmarks_skip_one_clip(true, copy, tmp_path):
    reference = tmp_path/'true'; shutil.copytree(true, reference)
    np.savez(reference/f'{NAMES[0]}.npz', landmarks=np.full((FRAMES, 68, 2), 'x'))
    done = evaluate(find_pairs({'ours': copy}, reference), tmp_path/'out', SCORERS, ['psnr'])
    assert done.status == 1 and done.scored == 3 and [s['clip'] for s in done.skipped] == [NAMES[0]]
