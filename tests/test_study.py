"""The user study: orders are balanced, the page is blind and works by keyboard in a browser, and every file of a rater is accounted for."""
import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from talkingface import study
from talkingface.cli import main
from talkingface.core import InputError, ParamsError
from talkingface.data.audio import load_audio
from talkingface.data.clips import ClipStore, prepare
from talkingface.data.corpora import FolderCorpus
from talkingface.data.faces import MEAN_FACE
from talkingface.data.video import probe, read_frames, write_video
from talkingface.dubbing import save_faces
from talkingface.study import (balanced_square, browser_problem, build_study, collect_study, copy_clip, crossed_interval, find_clips,
                               find_scales, krippendorff_alpha, method_folders, rater_order, read_key, read_ratings, read_study,
                               row_videos, study_of, study_table)

METHODS, CLIPS = ('zebrafish', 'wallaby', 'ground_truth'), ('holiday', 'harbour')


def picture(seed=0, frames=10, size=64):
    "Frames that differ, so that a shift would be seen."
    noise = np.random.default_rng(seed).integers(0, 255, (frames, size//8, size//8, 3), dtype=np.uint8)
    return noise.repeat(8, 1).repeat(8, 2)


def sound(frames=10):
    return np.sin(np.arange(frames*640)*.15).astype(np.float32)*.2


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp('videos')
    for m, method in enumerate(METHODS):
        for c, clip in enumerate(CLIPS): write_video(root/method/f'{clip}.mp4', picture(10*m + c), wav=sound())
    return {m: root/m for m in METHODS}


@pytest.fixture(scope='module')
def built(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp('built')/'study'
    build_study(videos, out, seed=1, raters=6)
    return out


# ---- who sees what

@pytest.mark.parametrize('methods', [2, 3, 4, 5])
@pytest.mark.parametrize('clips', [1, 2, 5])
def test_orders_are_balanced_over_raters(methods, clips):
    raters = len(balanced_square(methods)); orders = np.stack([rater_order(methods, clips, r, seed=4) for r in range(raters)])
    for order in orders:
        assert sorted(map(tuple, order)) == [(c, m) for c in range(clips) for m in range(methods)], 'everything, once'
        for block in order.reshape(clips, methods, 2):
            assert sorted(block[:, 1]) == list(range(methods)), 'a block holds every method once'
            if clips >= methods: assert len(set(block[:, 0])) == methods, 'each with another clip'
    for position in orders[:, :, 1].T: assert (np.bincount(position, minlength=methods) == raters//methods).all()
    assert len({orders[r, :, 1].tobytes() for r in range(raters)}) == raters


def test_orders_depend_on_the_seed_and_the_rater_only():
    assert (rater_order(3, 5, 2, seed=1) == rater_order(3, 5, 2, seed=1)).all()
    assert (rater_order(3, 5, 2, seed=1) != rater_order(3, 5, 2, seed=2)).any()


def test_a_clip_is_seldom_followed_by_itself():
    orders = [rater_order(4, 6, r) for r in range(8)]
    assert sum((o[1:, 0] == o[:-1, 0]).sum() for o in orders) == 0


# ---- building

def test_the_page_does_not_name_methods_or_clips(built, videos):
    key = read_key(built); page = (built/'page'/'index.html').read_text()
    assert not [w for w in (*METHODS, *CLIPS, 'http:', 'https:', '//cdn', str(videos[METHODS[0]])) if w in page]
    media = sorted(p.name for p in (built/'page'/'media').iterdir())
    assert media == sorted(f'{name}.mp4' for name in key['items']) and len(media) == len(METHODS)*len(CLIPS)
    assert {p.stat().st_mtime for p in (built/'page'/'media').iterdir()} == {0.}, 'dates tell methods apart'
    assert {p.name for p in built.iterdir()} == {'key.json', 'page'} and {p.name for p in (built/'page').iterdir()} == {'index.html', 'media'}
    for name, item in key['items'].items():
        source = videos[item['method']]/f"{item['clip']}.mp4"
        assert (read_frames(built/'page'/'media'/f'{name}.mp4') == read_frames(source)).all()


def test_metadata_is_left_behind(tmp_path):
    import av
    plain = write_video(tmp_path/'plain.mp4', picture(), wav=sound())
    with av.open(str(plain)) as source, av.open(str(tmp_path/'told.mp4'), 'w') as out:
        out.metadata.update(title='made by zebrafish', comment='zebrafish', artist='zebrafish')
        goes = {s.index: out.add_stream_from_template(s) for s in source.streams}
        for stream in goes.values(): stream.metadata['handler_name'] = 'zebrafish'
        for packet in source.demux():
            if packet.dts is not None: packet.stream = goes[packet.stream_index]; out.mux(packet)
    assert b'zebrafish' in (tmp_path/'told.mp4').read_bytes()
    copy = copy_clip(tmp_path/'told.mp4', tmp_path/'copy.mp4')
    assert b'zebrafish' not in copy.read_bytes() and (read_frames(copy) == picture_of(plain)).all()
    assert np.array_equal(load_audio(copy), load_audio(plain))


def picture_of(path):
    return read_frames(path)


def test_the_same_input_gives_the_same_bytes(videos, built, tmp_path):
    build_study(videos, tmp_path/'again', seed=1, raters=6)
    files = lambda root: {p.relative_to(root): p.read_bytes() for p in root.rglob('*') if p.is_file()}
    assert files(tmp_path/'again') == files(built)
    build_study(videos, tmp_path/'other', seed=2, raters=6)
    assert read_key(tmp_path/'other')['study'] != read_key(built)['study']


def test_one_file_that_browsers_do_not_play_encodes_all(videos, tmp_path):
    import cv2
    other = tmp_path/'mpeg4'; other.mkdir()
    for i, clip in enumerate(CLIPS):
        out = cv2.VideoWriter(str(other/f'{clip}.mp4'), cv2.VideoWriter_fourcc(*'mp4v'), 25, (64, 64))
        for frame in picture(i): out.write(frame)
        out.release()
    assert 'mpeg4' in browser_problem(other/f'{CLIPS[0]}.mp4')
    with pytest.raises(InputError, match='no sound, and scale sync needs it'):
        build_study({'a': other, 'b': videos['wallaby']}, tmp_path/'out')
    key = build_study({'a': other, 'b': videos['wallaby']}, tmp_path/'out', scales=['visual'])
    assert key['encoded'] and any('encoded anew' in note for note in key['notes'])
    for path in (tmp_path/'out'/'page'/'media').iterdir(): assert browser_problem(path) == '' and probe(path).frames == 10


def test_what_gives_methods_away_is_noted(tmp_path):
    write_video(tmp_path/'a'/'x.mp4', picture(), wav=sound()); write_video(tmp_path/'b'/'x.mp4', picture(frames=20, size=32), wav=sound(20))
    notes = ' '.join(build_study({m: tmp_path/m for m in 'ab'}, tmp_path/'out', raters=3)['notes'])
    assert 'lengths differ' in notes and 'picture sizes differ' in notes and '3 is none' in notes


def test_bad_input_is_refused_by_name(videos, tmp_path):
    with pytest.raises(InputError, match='--method a is given twice'): method_folders(['a=x', 'a=y'])
    with pytest.raises(InputError, match='folder of another method'): method_folders(['a=x', 'b=./x'])
    with pytest.raises(InputError, match='expected NAME=DIR'): method_folders(['x'])
    with pytest.raises(InputError, match='at least two methods'): build_study({'a': videos['wallaby']}, tmp_path/'out')
    with pytest.raises(InputError, match='no such folder'): find_clips({'a': tmp_path/'gone', 'b': tmp_path})
    with pytest.raises(ParamsError, match="did you mean 'sync'"): find_scales(['synk'])
    with pytest.raises(ParamsError, match='given twice'): find_scales(['sync', 'sync'])
    less = tmp_path/'less'; less.mkdir(); shutil.copy(videos['wallaby']/'holiday.mp4', less)
    with pytest.raises(InputError, match='less lacks harbour'): build_study({'less': less, 'b': videos['wallaby']}, tmp_path/'out')
    with pytest.raises(InputError, match='expected 1 to 2'): build_study(videos, tmp_path/'out', clips=3)
    (less/'harbour.mp4').write_bytes((less/'holiday.mp4').read_bytes()[:2000])
    with pytest.raises(InputError, match='harbour.mp4'): build_study({'less': less, 'b': videos['wallaby']}, tmp_path/'out')
    (less/'harbour.mp4').write_bytes(b'')
    with pytest.raises(InputError, match='is empty'): build_study({'less': less, 'b': videos['wallaby']}, tmp_path/'out')
    assert not (tmp_path/'out').exists(), 'nothing is left of a build that failed'
    (tmp_path/'full').mkdir(); (tmp_path/'full'/'x').write_text('x')
    with pytest.raises(InputError, match='not empty'): build_study(videos, tmp_path/'full')


# ---- rows of the pipeline

@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    "A clip store of two sets, and the faces of two rows; the second has one set only."
    root = tmp_path_factory.mktemp('rows')
    for i, name in enumerate(('test/one', 'test/two', 'val/three')):
        video = write_video(root/'corpus'/f'{name}.mp4', picture(i), wav=sound()*(i + 1)/3)
        np.savez(video.with_suffix('.npz'), landmarks=np.repeat(MEAN_FACE[None]*.2 + 5, 10, 0).astype(np.float32))
    prepare(FolderCorpus(root/'corpus'), root/'store', workers=1); store = ClipStore(root/'store')
    for clip in store:
        save_faces(root/'plain'/f'{clip.name}.safetensors', np.array(clip.faces))
        if clip.split == 'test': save_faces(root/'dark'/f'{clip.name}.safetensors', clip.faces//3)
    return root


def test_a_row_becomes_videos_with_the_sound_of_its_clips(rows, tmp_path):
    store = ClipStore(rows/'store'); made = row_videos(rows/'dark', store, store.split('test').names, tmp_path/'out')
    assert list(made) == store.split('test').names and {p.name for p in (tmp_path/'out').iterdir()} == {f'{n}.mp4' for n in made}
    for name, path in made.items():
        clip, info = store.by_name(name), probe(path)
        assert (info.width, info.height, info.frames, info.fps) == (3*96, 3*96, 10, 25) and browser_problem(path) == ''
        assert np.abs(read_frames(path)[:, 1::3, 1::3].astype(int) - clip.faces.transpose(0, 2, 3, 1)//3).mean() < 6
        heard = load_audio(path)[:clip.wav.size]
        assert np.corrcoef(heard, clip.wav)[0, 1] > .95 and heard.std() == pytest.approx(clip.wav.std(), rel=.1), 'its own sound, as loud'


def test_a_study_of_rows_and_the_truth(rows, tmp_path):
    methods = {'truth': rows/'store', 'plain': rows/'plain', 'dark': rows/'dark'}
    key = build_study(methods, tmp_path/'out', raters=6, store=rows/'store', sets=['test'])
    assert key['clips'] == ClipStore(rows/'store').split('test').names and not key['encoded'] and not key['notes']
    media = {(i['method'], i['clip']): (tmp_path/'out'/'page'/'media'/f'{n}.mp4').read_bytes() for n, i in key['items'].items()}
    for clip in key['clips']: assert media['truth', clip] == media['plain', clip] != media['dark', clip], 'the same faces, the same bytes'
    key = build_study({m: methods[m] for m in ('plain', 'truth')}, tmp_path/'all', raters=2, store=ClipStore(rows/'store'))
    assert len(key['clips']) == 3, 'the truth has what the rows have'
    assert [n for n, _ in find_clips({m: methods[m] for m in ('truth', 'dark')}, store=ClipStore(rows/'store'))[1]].count('truth') == 2


def test_rows_that_do_not_fit_are_refused_by_name(rows, tmp_path):
    store = ClipStore(rows/'store'); plain, dark = rows/'plain', rows/'dark'
    with pytest.raises(InputError, match='holds face crops without sound.*--store DIR'): find_clips({'a': plain, 'b': dark})
    with pytest.raises(InputError, match='is a clip store.*--store DIR'): find_clips({'a': rows/'store', 'b': dark})
    with pytest.raises(InputError, match='dark lacks .*three.*--sets A,B'): find_clips({'plain': plain, 'dark': dark}, store=store)
    with pytest.raises(InputError, match='add --store DIR'): find_clips({'a': rows/'corpus'/'test', 'b': rows/'corpus'/'val'}, sets=['test'])
    with pytest.raises(InputError, match="split 'hd' has no clips"): find_clips({'plain': plain, 'dark': dark}, store=store, sets=['hd'])
    with pytest.raises(InputError, match='no clips to compare in val'): find_clips({'truth': rows/'store', 'dark': dark}, store=store, sets=['val'])
    shutil.copytree(rows/'store', tmp_path/'other')
    with pytest.raises(InputError, match='is another clip store'): find_clips({'a': tmp_path/'other', 'b': dark}, store=store)
    strange = tmp_path/'strange'; save_faces(strange/'gone.safetensors', np.zeros((10, 3, 96, 96), np.uint8))
    with pytest.raises(InputError, match='gone of .* is no clip of'): find_clips({'a': strange, 'b': dark}, store=store)
    left = tmp_path/'left'; left.mkdir(); (left/'meta.json').write_text(json.dumps({'not_run': 'no weights'}))
    with pytest.raises(InputError, match='was not run .no weights.'): find_clips({'a': left, 'b': dark}, store=store)
    name = store.split('val').names[0]; save_faces(tmp_path/'short'/f'{name}.safetensors', np.zeros((4, 3, 96, 96), np.uint8))
    with pytest.raises(InputError, match='4 faces of .*has 10'):
        build_study({'a': tmp_path/'short', 'b': plain}, tmp_path/'out', raters=2, store=store, sets=['val'])
    assert not (tmp_path/'out').exists(), 'nothing is left of a build that failed'


def test_faces_beside_whole_videos_are_noted(rows, tmp_path):
    methods = {'row': rows/'plain', 'video': tmp_path/'videos'}
    for i, name in enumerate(ClipStore(rows/'store').names): write_video(tmp_path/'videos'/f'{name}.mp4', picture(i), wav=sound())
    notes = ' '.join(build_study(methods, tmp_path/'out', raters=2, store=rows/'store')['notes'])
    assert 'row show the face alone, video what their videos show' in notes and 'picture sizes differ' in notes


def test_rows_at_the_command_line(rows, tmp_path, capsys):
    given = ['study', 'build', '--method', f"truth={rows/'store'}", '--method', f"dark={rows/'dark'}", '--scales', 'visual', '--raters', '2']
    assert main([*given, '--out', str(tmp_path/'none')]) == 1
    assert '--store DIR' in capsys.readouterr().err and not (tmp_path/'none').exists()
    assert main([*given, '--out', str(tmp_path/'out'), '--store', str(rows/'store'), '--sets', 'test', '--clips', '1']) == 0
    assert '2 videos: 1 clips by 2 methods' in capsys.readouterr().out
    assert read_key(tmp_path/'out')['methods'] == ['truth', 'dark']


# ---- agreement and intervals

def test_alpha_of_the_published_example():
    "Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section E: four observers, twelve units."
    _ = np.nan
    example = [[1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
               [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _], [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _]]
    for level, value in (('nominal', .743), ('ordinal', .815), ('interval', .849)):
        assert krippendorff_alpha(example, level) == pytest.approx(value, abs=5e-4)


def test_alpha_of_two_observers_and_binary_data():
    "The same paper, section A: two observers, ten units, 0 and 1: 0.095."
    example = [[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]]
    assert krippendorff_alpha(example, 'nominal') == pytest.approx(.095, abs=5e-4)


def test_alpha_by_pairs_counted_one_by_one():
    random = np.random.default_rng(3); x = random.integers(1, 6, (5, 9)).astype(float); x[random.random(x.shape) < .3] = np.nan
    units = [u[np.isfinite(u)] for u in x.T]; units = [u for u in units if len(u) > 1]; every = np.concatenate(units); n = len(every)
    observed = sum(((u[:, None] - u)**2).sum()/(len(u) - 1) for u in units)/n
    expected = ((every[:, None] - every)**2).sum()/(n*(n - 1))
    assert krippendorff_alpha(x, 'interval') == pytest.approx(1 - observed/expected, abs=1e-12)
    assert krippendorff_alpha(2*x + 7, 'interval') == pytest.approx(krippendorff_alpha(x, 'interval'), abs=1e-12)
    assert krippendorff_alpha(np.exp(x), 'ordinal') == pytest.approx(krippendorff_alpha(x, 'ordinal'), abs=1e-12)
    with pytest.raises(ParamsError, match='level'): krippendorff_alpha(x, 'ratio')


def test_intervals_cover_the_truth():
    "Raters and clips drawn anew: about 95 of 100 intervals hold the mean, or more, since this bootstrap is wide."
    held = 0
    for i in range(100):
        random = np.random.default_rng(i)
        x = 3 + random.normal(0, .5, (14, 1)) + random.normal(0, .5, (1, 10)) + random.normal(0, .7, (14, 10))
        x[random.random(x.shape) < .1] = np.nan
        low, high = crossed_interval(x, seed=i, draws=400); held += low < 3 < high
    assert held >= 89
    assert np.isnan(crossed_interval(np.ones((1, 5)))).all() and np.isnan(crossed_interval(np.ones((5, 1)))).all()
    assert crossed_interval(np.full((3, 3), 4.)) == (4., 4.)


# ---- collecting

def rating_file(path, key, rater, scores=lambda item, scale: 3, items=None, drop=(), **changes):
    "A file as the page saves it."
    order = key['orders'][rater - 1][:items]
    entry = lambda n, i: dict(item=n, position=i, shown='2024-05-01T10:00:00.000Z', rated='2024-05-01T10:00:09.500Z', plays=1, failed=False,
                              scores={s['name']: scores(key['items'][n], s['name']) for s in key['scales']})
    data = dict(format=study.RATINGS_FORMAT, study=key['study'], checksum=key['checksum'], rater=rater, started=f'2024-05-{rater:02d}T10:00:00.000Z',
                finished=None, saved=f'2024-05-{rater:02d}T11:00:00.000Z', complete=items is None, ratings=[entry(n, i) for i, n in enumerate(order)])
    path.write_text(json.dumps(data | changes)); return path


def test_files_become_scores_with_methods_named(built, tmp_path):
    key = read_key(built); value = dict(zip(METHODS, (2, 3, 5)))
    files = [rating_file(tmp_path/f'{r}.json', key, r, lambda item, scale: value[item['method']] - (scale == 'sync')) for r in (1, 2, 3)]
    done = collect_study(built, files, tmp_path/'out', reported=None)
    cells = done['scores'].set_index(['method', 'metric'])
    assert cells.loc[('wallaby', 'mos_visual'), 'mean'] == 3 and cells.loc[('ground_truth', 'mos_sync'), 'mean'] == 4
    assert tuple(cells.loc[('zebrafish', 'mos_real'), ['low', 'high', 'n', 'given', 'raters', 'clips']]) == (2, 2, 6, 2, 3, 2)
    assert (done['agreement'][['ordinal', 'interval']] == 1).all(axis=None)
    gaps = done['differences'].set_index(['method', 'scale'])
    assert gaps.loc[('ground_truth', 'visual'), 'mean'] == 3 and gaps['better'].all()
    assert (done['files_used'], done['files_given'], done['ratings_used'], done['ratings_given']) == (3, 3, 54, 54)
    assert set(done['ratings']['seconds']) == {9.5} and not done['ratings']['reason'].any()
    wanted = {f'{n}.csv' for n in ('ratings', 'files', 'scores', 'differences', 'agreement')} | {'study.json'} | {f'table.{s}' for s in
              ('csv', 'md', 'tex', 'pdf', 'png')}
    assert {p.name for p in (tmp_path/'out').iterdir()} == wanted
    text = (tmp_path/'out'/'table.md').read_text()
    assert '3 raters on 2 clips, 54 of 54 ratings, 3 of 3 files' in text and '| *Ground truth* |' in text
    with pytest.raises(InputError, match='not empty'): collect_study(built, files, tmp_path/'out')
    assert read_study(tmp_path/'out')['scores']['mean'].tolist() == pytest.approx(done['scores']['mean'].tolist())


def test_every_file_is_accounted_for(built, tmp_path):
    key = read_key(built); whole = len(key['items'])*3
    def broken(name, rater, change):
        path = rating_file(tmp_path/name, key, rater); data = json.loads(path.read_text()); change(data); path.write_text(json.dumps(data)); return path
    first = lambda data: data['ratings'][0]
    (tmp_path/'text.json').write_text('rated!'); (tmp_path/'list.json').write_text('[1]')
    cases = {rating_file(tmp_path/'good.json', key, 1): '', rating_file(tmp_path/'part.json', key, 2, items=2): f'6 of {whole} ratings',
             rating_file(tmp_path/'same.json', key, 1, saved='2024-05-01T10:59:00.000Z'): 'good.json is a later or equal one of the same session',
             rating_file(tmp_path/'twice.json', key, 1, started='2024-06-01T10:00:00.000Z'): 'good.json has more ratings, or was begun first',
             rating_file(tmp_path/'begun.json', key, 1, items=1, started='2024-04-01T10:00:00.000Z'): 'good.json has more ratings',
             rating_file(tmp_path/'empty.json', key, 3, items=0): f'0 of {whole} ratings, none',
             tmp_path/'text.json': 'no JSON', tmp_path/'list.json': 'no file of ratings',
             rating_file(tmp_path/'other.json', key, 4, study='0'*10): 'of another study', rating_file(tmp_path/'sum.json', key, 4, checksum='x'): 'checksum',
             rating_file(tmp_path/'nine.json', key, 4, lambda *_: 9): 'is 9, expected 1 to 5',
             rating_file(tmp_path/'true.json', key, 4, lambda *_: True): 'is True, expected 1 to 5',
             broken('many.json', 1, lambda d: d.update(rater=99)): 'rater 99, expected 1 to 6',
             broken('item.json', 4, lambda d: first(d).update(item='c99')): "unknown clip 'c99'",
             broken('scale.json', 4, lambda d: first(d)['scores'].update(taste=3)): "unknown scale 'taste'",
             broken('double.json', 4, lambda d: d['ratings'].append(first(d))): 'is rated twice'}
    ratings, told = read_ratings(built, cases)
    for (path, reason), line in zip(cases.items(), told.itertuples()):
        assert line.file == path.name and (reason in line.reason if reason else line.reason == ''), (line, reason)
    assert list(told['file'][told['used'] == 'yes']) == ['good.json', 'part.json']
    lacking = ratings[ratings['rater'] == 2]
    assert len(lacking) == whole and lacking['value'].notna().sum() == 6 and set(lacking['reason']) == {'', 'not rated'}


def test_clips_that_did_not_play_or_were_not_seen_have_a_reason(built, tmp_path):
    key = read_key(built); path = rating_file(tmp_path/'a.json', key, 1); data = json.loads(path.read_text())
    data['ratings'][0].update(failed=True, scores={}); data['ratings'][1].update(plays=0); path.write_text(json.dumps(data))
    ratings, told = read_ratings(built, [path])
    assert list(ratings.groupby('position')['reason'].first()[:3]) == ['clip could not be played', 'clip was not seen to its end', '']
    assert told['ratings'][0] == 12 and ratings['value'].isna().sum() == 6


def test_without_a_usable_file_there_is_no_score(built, tmp_path):
    (tmp_path/'text.json').write_text('rated!')
    done = collect_study(built, [tmp_path/'text.json'], tmp_path/'out')
    assert done['files_used'] == 0 and {p.name for p in (tmp_path/'out').iterdir()} == {'files.csv', 'ratings.csv', 'study.json'}
    with pytest.raises(InputError, match='at least one file'): collect_study(built, [], tmp_path/'none')


def test_a_changed_key_is_refused(built, tmp_path):
    key = json.loads((built/'key.json').read_text()); key['orders'][0].reverse(); (tmp_path/'key.json').write_text(json.dumps(key))
    with pytest.raises(InputError, match='was changed'): read_key(tmp_path)
    with pytest.raises(InputError, match='no such file'): read_key(tmp_path/'gone')


def test_the_table_without_ratings_says_that_ours_is_open(root):
    from talkingface.experiments import published, table_markdown
    told = published(root/'nbs'/'papers'/'published.csv', paper='av_expert', table='table_03')
    table = study_table(None, told); text = table_markdown(table, 'User study', study.study_caption(None))
    assert table['mos_sync'].isna().all() and list(table['mos_sync_reported']) == [2.91, 3.92]
    assert 'open' in text and '2.91†' in text and '3.92†' in text and '±' not in text


def test_reported_scores_stand_beside_measured_ones(built, tmp_path, root):
    from talkingface.experiments import published
    key = read_key(built); told = published(root/'nbs'/'papers'/'published.csv', paper='av_expert', table='table_03')
    done = collect_study(built, [rating_file(tmp_path/'1.json', key, 1), rating_file(tmp_path/'2.json', key, 2)], tmp_path/'out')
    table = study_table(done, told, {'ours': 'wallaby'}).set_index('method')
    assert table.loc['wallaby', 'mos_sync'] == 3 and table.loc['wallaby', 'mos_sync_reported'] == 3.92
    assert np.isnan(table.loc['wav2lip', 'mos_sync']) and table.loc['wav2lip', 'mos_sync_reported'] == 2.91
    mixed = pd.concat([told, told.assign(set='LRS2')])
    with pytest.raises(InputError, match='several sets'): study_table(done, mixed)


def test_a_study_counts_for_the_profile_whose_clips_were_rated(built, tmp_path):
    key = read_key(built); files = [rating_file(tmp_path/f'{r}.json', key, r) for r in (1, 2, 3)]; collect_study(built, files, tmp_path/'out')
    block = dict(collected=str(tmp_path/'out'), profile='demo', methods={})
    assert study_of(block, 'demo')['raters'] == 3 and study_of(block, 'medium') is None
    assert study_of({}, 'demo') is None and study_of(block | dict(collected=''), 'demo') is None
    (tmp_path/'text.json').write_text('rated!'); collect_study(built, [tmp_path/'text.json'], tmp_path/'none')
    assert study_of(block | dict(collected=str(tmp_path/'none')), 'demo') is None           # no rating can be used
    with pytest.raises(InputError, match='no study.json'): study_of(block | dict(collected=str(tmp_path/'gone')), 'demo')


def test_the_table_of_a_paper_takes_ratings(built, tmp_path, root):
    "The notebook of table 3, as its stage runs it, with and without ratings."
    import papermill
    key = read_key(built); collect_study(built, [rating_file(tmp_path/f'{r}.json', key, r) for r in (1, 2, 3)], tmp_path/'collected')
    for name, block in dict(rated=dict(collected=str(tmp_path/'collected'), profile='demo', methods={'ours': 'wallaby'}), open={}).items():
        papermill.execute_notebook(root/'nbs'/'papers'/'g4g'/'table_study.ipynb', tmp_path/f'{name}.ipynb', cwd=root, progress_bar=False,
                                   parameters=dict(profile='demo', ratings=block, out=str(tmp_path/name)))
    rated, open_ = (pd.read_csv(tmp_path/f'{name}.csv').set_index('method') for name in ('rated', 'open'))
    assert rated.loc['wallaby', 'mos_sync'] == 3 and rated.loc['wallaby', 'mos_sync_reported'] == 4.26 and '| G4G |' in (tmp_path/'rated.md').read_text()
    assert open_.loc['ours', 'mos_sync_reported'] == 4.26 and open_['mos_sync'].isna().all() and 'open' in (tmp_path/'open.md').read_text()


# ---- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'))), None)
FLAGS = ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', '--mute-audio', '--remote-debugging-pipe')
KEYS = {' ': ('Space', 32), 'Enter': ('Enter', 13), 'ArrowUp': ('ArrowUp', 38), 'ArrowDown': ('ArrowDown', 40), 'ArrowLeft': ('ArrowLeft', 37),
        'ArrowRight': ('ArrowRight', 39), 'Tab': ('Tab', 9)}


class Page:
    "A page of headless Chromium, driven through its debugging pipe: no port, no package."
    def __init__(self, profile: Path, downloads: Path):
        (self.out, answers), (orders, self.into) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (orders, answers)]      # out of the way of 3 and 4
        self.process = subprocess.Popen([CHROMIUM, *FLAGS, f'--user-data-dir={profile}', 'about:blank'], close_fds=False,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                        preexec_fn=lambda: [os.dup2(fd, n) for fd, n in zip(high, (3, 4))])
        for fd in (orders, answers, *high): os.close(fd)
        self.left, self.number, self.events, self.session = b'', count(1), [], None
        target = self.ask('Target.createTarget', url='about:blank')['targetId']
        self.session = self.ask('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Network'): self.ask(f'{domain}.enable')
        self.ask('Browser.setDownloadBehavior', behavior='allow', downloadPath=str(downloads))

    def ask(self, method, **params):
        n = next(self.number); at = {'sessionId': self.session} if self.session and not method.startswith(('Target', 'Browser')) else {}
        os.write(self.into, json.dumps({'id': n, 'method': method, 'params': params} | at).encode() + b'\0')
        end = time.time() + 30
        while time.time() < end:
            message = self._message(end)
            if message.get('id') == n:
                assert 'error' not in message, f'{method}: {message}'
                return message['result']
            self.events.append(message)
        raise TimeoutError(f'{method}: the browser does not answer')

    def _message(self, end):
        while b'\0' not in self.left:
            assert select.select([self.out], [], [], max(0, end - time.time()))[0], 'the browser does not answer'
            self.left += (part := os.read(self.out, 65536)); assert part, 'the browser has ended'
        line, self.left = self.left.split(b'\0', 1)
        return json.loads(line)

    def run(self, script):
        told = self.ask('Runtime.evaluate', expression=script, returnByValue=True, userGesture=False)
        assert 'exceptionDetails' not in told, told
        return told['result'].get('value')

    def until(self, script, seconds=20):
        end = time.time() + seconds
        while not (value := self.run(script)):
            assert time.time() < end, f'{script} does not come true: {self.run("document.body.innerText")}'
            time.sleep(.03)
        return value

    def open(self, url):
        self.ask('Page.navigate', url=url); self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def press(self, *keys):
        for key in keys:
            code, number = KEYS.get(key, (f'Digit{key}', ord(key[0])))
            text = {'text': {'Enter': '\r'}.get(key, key)} if len(key) == 1 or key == 'Enter' else {}
            for kind in ('keyDown', 'keyUp'):
                self.ask('Input.dispatchKeyEvent', type=kind, key=key, code=code, windowsVirtualKeyCode=number, **(text if kind == 'keyDown' else {}))

    def size(self, width, height):
        self.ask('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def picture(self, path):
        Path(path).write_bytes(base64.b64decode(self.ask('Page.captureScreenshot', format='png')['data']))

    def close(self):
        try: self.ask('Browser.close')
        except (AssertionError, OSError, TimeoutError): pass
        finally:
            try: self.process.wait(10)
            except subprocess.TimeoutExpired: self.process.kill(); self.process.wait()
            os.close(self.out); os.close(self.into)


@contextmanager
def browser(profile, downloads):
    page = Page(profile, downloads)
    try: yield page
    finally: page.close()


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason='no Chromium; install chromium (Debian: apt install chromium) or Google Chrome')
seen = "document.getElementById('state').textContent.startsWith('Seen')"
shown = lambda name: f"!document.getElementById('{name}').hidden"
heading = "document.getElementById('count').textContent"


def rate_clip(page, position, total, digits='345'):
    "One clip by keyboard: watched, rated, on to the next."
    page.until(f"{heading} === 'Clip {position} of {total}'"); page.until(seen); page.press(*digits); page.press('Enter')


def saved_file(downloads, number=1):
    end = time.time() + 10
    while len(files := sorted(downloads.glob('*.json'))) < number or list(downloads.glob('*.crdownload')):
        assert time.time() < end, 'no file came'
        time.sleep(.05)
    return files


@needs_browser
def test_two_raters_go_through_the_page_by_keyboard(built, tmp_path):
    key = read_key(built); total = len(key['items']); url = (built/'page'/'index.html').as_uri()
    downloads = tmp_path/'downloads'; downloads.mkdir()
    with browser(tmp_path/'one', downloads) as page:                      # the first rates all in one go
        page.open(url); page.until(shown('start')); page.run("document.getElementById('rater').focus()")
        page.press('Enter'); assert 'from 1 to 6' in page.run("document.getElementById('refused').textContent")
        page.press('9', 'Enter'); page.until("document.getElementById('refused').textContent !== ''")
        page.run("document.getElementById('rater').value = ''"); page.press('1', 'Enter')
        for i in range(total): rate_clip(page, i + 1, total, '512' if i % 2 else '345')
        page.until(shown('end')); page.press('Enter')                     # the button has the focus
        saved_file(downloads)
    with browser(tmp_path/'two', downloads) as page:                      # the second closes the browser after two clips
        page.open(url + '?rater=2'); page.until(shown('start')); page.run("document.getElementById('go').focus()"); page.press('Enter')
        for i in range(2): rate_clip(page, i + 1, total)
        page.until(f"{heading} === 'Clip 3 of {total}'"); page.until(seen); page.press('1', '2')
    with browser(tmp_path/'two', downloads) as page:
        page.open(url); page.until(shown('start'))
        assert page.run("document.getElementById('rater').value") == '2' and page.run("document.getElementById('go').textContent") == 'Go on'
        assert f'2 of {total} clips are rated' in page.run("document.getElementById('rater-help').textContent")
        page.run("document.getElementById('go').focus()"); page.press('Enter')
        page.until(f"{heading} === 'Clip 3 of {total}'"); page.press('4', 'Enter')          # 1 and 2 are still there
        for i in range(3, total): rate_clip(page, i + 1, total)
        page.until(shown('end')); page.press('Enter'); files = saved_file(downloads, 2)
        network = [e['params']['request']['url'] for e in page.events if e.get('method') == 'Network.requestWillBeSent']
        assert network and not [u for u in network if not u.startswith(('file:', 'blob:', 'data:'))]
        assert not [e for e in page.events if e.get('method') == 'Runtime.exceptionThrown']
    assert [f.name for f in files] == [f"ratings-{key['study']}-rater-{r:02d}.json" for r in (1, 2)]
    done = collect_study(built, files, tmp_path/'collected')
    assert (done['files_used'], done['ratings_used'], done['ratings_given']) == (2, 6*total, 6*total)
    second = done['ratings'][done['ratings']['rater'] == 2]
    assert second[second['position'] == 3].set_index('scale')['value'].to_dict() == dict(visual=1, sync=2, realness=4)
    first = done['ratings'][done['ratings']['rater'] == 1].pivot(index='position', columns='scale', values='value')
    assert first.loc[2].to_dict() == dict(visual=5, sync=1, realness=2) and first.loc[1].to_dict() == dict(visual=3, sync=4, realness=5)
    assert (done['ratings']['plays'] >= 1).all() and f'{6*total} of {6*total} ratings' in (tmp_path/'collected'/'table.md').read_text()


@needs_browser
def test_keys_focus_and_labels(built, tmp_path):
    url = (built/'page'/'index.html').as_uri(); downloads = tmp_path/'downloads'; downloads.mkdir()
    at = "document.activeElement.closest('fieldset')?.dataset.scale"
    with browser(tmp_path/'profile', downloads) as page:
        page.open(url + '?rater=3'); page.until(shown('start')); page.run("document.getElementById('go').focus()"); page.press('Enter')
        page.until(shown('clip')); assert page.run(at) == 'visual'
        page.press('ArrowDown'); assert page.run(at) == 'sync'
        page.press('ArrowUp'); assert page.run(at) == 'visual'
        page.press('2'); assert page.run(at) == 'sync' and page.run("document.querySelector('input[name=visual]:checked').value") == '2'
        assert page.run("getComputedStyle(document.activeElement.nextElementSibling).outlineStyle") == 'solid', 'focus is visible'
        page.ask('Input.dispatchKeyEvent', type='keyDown', key='5', code='Digit5', text='5', autoRepeat=True)
        assert page.run(at) == 'sync' and not page.run("document.querySelector('input[name=sync]:checked')"), 'a key held down rates once'
        page.press('ArrowUp', '4'); assert page.run("document.querySelector('input[name=visual]:checked').value") == '4', 'mended'
        page.press('Enter'); assert page.run(heading).startswith('Clip 1 ') and 'Still to do' in page.run("document.getElementById('lacking').textContent")
        page.until(seen); page.press(' '); page.until("document.getElementById('play').textContent === 'Pause'")
        page.press(' '); page.until("document.getElementById('video').paused")
        page.press('3', '3', 'ArrowRight'); page.until(f"{heading}.startsWith('Clip 2 ')")
        page.press('ArrowLeft'); page.until(f"{heading}.startsWith('Clip 1 ')")
        assert page.run("[...document.querySelectorAll('input:checked')].map(r => r.value).join()") == '4,3,3'
        page.run("document.getElementById('part').click()"); path, = saved_file(downloads)
        told = json.loads(path.read_text()); assert not told['complete'] and len(told['ratings']) == 2
        ratings, files = read_ratings(built, [path])
        assert files['reason'][0] == '3 of 18 ratings' and ratings['value'].notna().sum() == 3
        names = {n['name']['value']: n['role']['value'] for n in page.ask('Accessibility.getFullAXTree')['nodes'] if n.get('name', {}).get('value')}
        for name, role in (('1 Bad', 'radio'), ('Clips rated', 'progressbar'), ('Clip 1', 'Video'), ('Your ratings', 'form')): assert names.get(name) == role, names
        assert any(n.startswith('Lip synchronisation') and r == 'group' for n, r in names.items()), names


@needs_browser
@pytest.mark.parametrize('width, height', [(1280, 800), (1024, 700), (390, 844), (320, 640)])
def test_the_page_fits(built, tmp_path, width, height):
    "Nothing is wider than the window, and on a desktop a clip and its questions need no scrolling."
    with browser(tmp_path/'profile', tmp_path) as page:
        page.size(width, height); page.open((built/'page'/'index.html').as_uri() + '?rater=4'); page.until(shown('start'))
        wide = 'document.documentElement.scrollWidth <= innerWidth'; assert page.run(wide)
        page.run("document.getElementById('go').focus()"); page.press('Enter'); page.until(shown('clip')); page.until(seen)
        assert page.run(wide)
        if width > 1000: assert page.run("document.getElementById('next').getBoundingClientRect().bottom <= innerHeight")
        sizes = page.run("[...document.querySelectorAll('.answers label, button:not(.plain)')].filter(e => e.offsetWidth).map(e => [e.offsetWidth, e.offsetHeight])")
        assert min(h for _, h in sizes) >= 44 and min(w for w, _ in sizes) >= 44, 'large enough for a finger'


@needs_browser
def test_a_clip_that_does_not_play_can_be_marked(built, tmp_path):
    copy = tmp_path/'study'; shutil.copytree(built, copy); key = read_key(copy); name = key['orders'][0][0]
    (copy/'page'/'media'/f'{name}.mp4').write_bytes(b'nothing'); downloads = tmp_path/'downloads'; downloads.mkdir()
    with browser(tmp_path/'profile', downloads) as page:
        page.open((copy/'page'/'index.html').as_uri() + '?rater=1'); page.until(shown('start')); page.run("document.getElementById('go').click()")
        page.until(shown('broken')); page.run("document.getElementById('skip').click()"); page.until(f"{heading}.startsWith('Clip 2 ')")
        page.run("document.getElementById('part').click()"); path, = saved_file(downloads)
    ratings, _ = read_ratings(copy, [path])
    assert set(ratings[ratings['item'] == name]['reason']) == {'clip could not be played'}


@needs_browser
def test_a_browser_that_keeps_nothing_says_so(built, tmp_path):
    downloads = tmp_path/'downloads'; downloads.mkdir()
    with browser(tmp_path/'profile', downloads) as page:
        page.open((built/'page'/'index.html').as_uri() + '?rater=1'); page.until(shown('start'))
        page.run("Storage.prototype.setItem = () => { throw new Error('full') }"); page.run("document.getElementById('go').click()")
        page.until(shown('clip')); assert 'do not close' in page.run("document.getElementById('alarm').textContent")
        page.run("document.getElementById('part').click()"); assert saved_file(downloads); page.run('window.onbeforeunload = null')
